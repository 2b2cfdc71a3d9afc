"""The environment variables of a run on NPUs: set where unset, checked where set."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_fn import compat
from llama_fn.config import RunConfig
from llama_fn.errors import UserError, nearest
from llama_fn.launch import launched


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
    Variable("HCCL_EXEC_TIMEOUT", "570", range(0, 2**31), "seconds a collective may take before HCCL gives up; 30 "
             "below --run.timeout_s, so that HCCL reports first"),
    Variable("TORCH_HCCL_ASYNC_ERROR_HANDLING", "1", ("0", "1"), "end the process when a collective fails in the "
             "background"),
    Variable("HCCL_DETERMINISTIC", "false", ("false", "true", "strict"), "sums over ranks in a fixed order; true under "
             "--run.deterministic"),
    Variable("HCCL_OP_EXPANSION_MODE", None, ("AI_CPU", "AIV", "HOST", "HOST_TS"), "where collectives become tasks; "
             "HCCL's own choice on a 910B is HOST. AIV makes 3 tasks of each, for one group of ranks inside of one "
             "machine, without sums in a fixed order; CANN offers it for inference"),
    Variable("HCCL_BUFFSIZE", None, range(1, 2**31), "MB of either buffer of a communicator; HCCL's own 200 is what a "
             "plan keeps for each"),
    Variable("MAX_COMPILE_CORE_NUMBER", "1", range(1, 1025), "threads with which GE compiles a graph; the physical "
             "cores of the machine shared by its processes, where GE's own choice is 1"),
    Variable("ASCEND_CACHE_PATH", None, None, "folder in which the processes of a machine share compiled operators; "
             "$HOME/atc_data unless set. Its file system must have locks: NFSv4 has, NFSv3 has not"),
    Variable("TASK_QUEUE_ENABLE", "1", ("0", "1", "2"), "launch operators outside of the graph from a second thread"),
    Variable("COMBINED_ENABLE", None, ("0", "1"), "join operators on non-contiguous tensors; the graph has none"),
    Variable("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", None, "torch_npu's allocator"),
    Variable("CPU_AFFINITY_CONF", "1", None, "bind each process to the cores near its NPU"),
    Variable("NPU_ASD_ENABLE", None, ("0", "1", "2", "3"), "torch_npu's search for silent data corruption; our step "
             "refuses non-finite gradients itself"),
    Variable("ASCEND_HOME_PATH", None, None, "where CANN is installed; set by CANN's set_env.sh"),
)  # fmt: skip


AIV_LONGEST_S = 1091  # HCCL takes no longer timeout in mode AIV (CANN's page of HCCL_EXEC_TIMEOUT)


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
    aiv = environ.get("HCCL_OP_EXPANSION_MODE") == "AIV"
    seconds = max(1, run.timeout_s - 30)
    cores = max(1, compat.physical_cores() // launched().local_world)
    from_flags = {
        "HCCL_EXEC_TIMEOUT": str(min(seconds, AIV_LONGEST_S) if aiv else seconds),
        "MAX_COMPILE_CORE_NUMBER": str(cores),
    }
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
    if aiv:
        _check_aiv(environ)
    if dump_to is not None:
        folder = dump_to.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        environ.setdefault("DUMP_GE_GRAPH", "2")  # graphs without weights
        environ["DUMP_GRAPH_PATH"] = str(folder)
        lines += [f"DUMP_GE_GRAPH={environ['DUMP_GE_GRAPH']}", f"DUMP_GRAPH_PATH={folder}"]
    return lines


def _check_aiv(environ: Mapping[str, str]) -> None:
    """UserError for what HCCL does not do where collectives are expanded on vector cores, and says nothing of."""
    if environ.get("HCCL_DETERMINISTIC", "false") != "false":
        raise UserError(
            "environment variable HCCL_OP_EXPANSION_MODE=AIV: HCCL then sums in no fixed order, and "
            f"HCCL_DETERMINISTIC={environ['HCCL_DETERMINISTIC']} asks for one. Unset one of them, or leave out "
            "--run.deterministic"
        )
    if int(environ["HCCL_EXEC_TIMEOUT"]) > AIV_LONGEST_S:
        raise UserError(
            f"environment variable HCCL_EXEC_TIMEOUT={environ['HCCL_EXEC_TIMEOUT']}: with HCCL_OP_EXPANSION_MODE=AIV "
            f"HCCL waits {AIV_LONGEST_S} seconds at most"
        )


def check_groups(mesh: str, groups: Mapping[str, Sequence[int]], environ: Mapping[str, str] = os.environ) -> None:
    """UserError where HCCL cannot expand the collectives of these groups of ranks, by their axes, as it was told to."""
    if environ.get("HCCL_OP_EXPANSION_MODE") != "AIV" or not groups:
        return
    across = [axes for axes, ranks in groups.items() if len({rank // launched().local_world for rank in ranks}) > 1]
    if len(groups) > 1 or across:
        several = f"this step has {len(groups)}: {', '.join(groups)}"
        why = f"{' and '.join(across)} joins machines" if across else several
        raise UserError(
            "environment variable HCCL_OP_EXPANSION_MODE=AIV: of a GE graph it takes one group of ranks, inside of one "
            f"machine, and on mesh {mesh} {why}. Unset it"
        )
