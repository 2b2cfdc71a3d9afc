"""The environment variables of a run on NPUs: set where unset, checked where set."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from llama_fn.config import RunConfig
from llama_fn.errors import UserError, nearest


@dataclass(frozen=True)
class Variable:
    """An environment variable: what it is set to where unset (None: left alone), what is allowed, what it does."""

    name: str
    default: str | None
    allowed: range | tuple[str, ...] | None
    meaning: str

    def refused(self, value: str) -> str:
        """What is wrong with a value, "" if nothing is."""
        if isinstance(self.allowed, range):
            good = value.isascii() and value.isdigit() and int(value) in self.allowed
            return "" if good else f"an integer of {self.allowed.start}..{self.allowed.stop - 1}"
        return "" if self.allowed is None or value in self.allowed else " or ".join(self.allowed)


# The one table; docs/ascend.md is checked against it.
VARIABLES = (
    Variable("HCCL_CONNECT_TIMEOUT", "1200", range(120, 7201), "seconds in which all ranks must reach their first "
             "collective; HCCL's own 120 are too short where one rank compiles longer than the others"),
    Variable("HCCL_EXEC_TIMEOUT", "544", range(0, 17341), "seconds a collective may take before HCCL gives up; the "
             "largest multiple of 68 that lies 30 below --run.timeout_s, so that HCCL reports first"),
    Variable("TORCH_HCCL_ASYNC_ERROR_HANDLING", "1", ("0", "1"), "end the process when a collective fails in the "
             "background"),
    Variable("HCCL_DETERMINISTIC", "false", ("false", "true", "strict"), "sums over ranks in a fixed order; true under "
             "--run.deterministic"),
    Variable("TASK_QUEUE_ENABLE", "1", ("0", "1", "2"), "launch operators outside of the graph from a second thread"),
    Variable("COMBINED_ENABLE", None, ("0", "1"), "join operators on non-contiguous tensors; the graph has none"),
    Variable("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", None, "torch_npu's allocator"),
    Variable("CPU_AFFINITY_CONF", "1", None, "bind each process to the cores near its NPU"),
    Variable("NPU_ASD_ENABLE", None, ("0", "1", "2", "3"), "torch_npu's search for silent data corruption; our step "
             "refuses non-finite gradients itself"),
    Variable("ASCEND_HOME_PATH", None, None, "where CANN is installed; set by CANN's set_env.sh"),
)  # fmt: skip


def set_environment(run: RunConfig, dump_to: Path | None, environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """Default what is unset, check what is set; a line per variable that has a value. `dump_to`: folder that gets what
    CANN dumps of its graphs.

    UserError for a value that is not allowed, and for a name that is nearly one of ours: HEEL_CONNECT_TIMEOUT does
    nothing.
    """
    for name in environ:
        if name.startswith(("HEEL_", "HCLL_", "HCL_")):
            raise UserError(f"environment variable {name} does nothing. {nearest(name, [v.name for v in VARIABLES])}")
    lines = []
    from_flags = {"HCCL_EXEC_TIMEOUT": str(max(1, (run.timeout_s - 30) // 68) * 68)}
    if run.deterministic:
        from_flags["HCCL_DETERMINISTIC"] = "true"
    for variable in VARIABLES:
        default = from_flags.get(variable.name, variable.default)
        given = environ.get(variable.name)
        if given is None and default is not None:
            environ[variable.name] = default
        value = environ.get(variable.name)
        if value is not None and (wanted := variable.refused(value)):
            raise UserError(f"environment variable {variable.name}={value}: expected {wanted} ({variable.meaning})")
        if value is not None:
            lines.append(f"{variable.name}={value}{' (default of llama_fn)' if given is None else ''}")
    if dump_to is not None:
        folder = dump_to.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        environ.setdefault("DUMP_GE_GRAPH", "2")  # graphs without weights
        environ["DUMP_GRAPH_PATH"] = str(folder)
        lines += [f"DUMP_GE_GRAPH={environ['DUMP_GE_GRAPH']}", f"DUMP_GRAPH_PATH={folder}"]
    return lines
