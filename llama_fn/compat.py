"""Every private torch symbol that the project touches, pinned to torch 2.13. When torch moves, this file moves.

Functions here say what is wanted in terms of public ideas (a traced graph, a compiled artifact) and hide how torch
spells it this year.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

TORCH = "2.13.0"
INVOKE_SUBGRAPH = invoke_subgraph


def check_torch_version() -> None:
    """RuntimeError unless torch is the release whose private parts this file knows."""
    if torch.__version__.split("+")[0] != TORCH:
        raise RuntimeError(f"llama_fn needs torch {TORCH}, found {torch.__version__}: pip install torch=={TORCH}")


class FakeTensors:
    """A world of tensors with shape, dtype and device but no storage."""

    def __init__(self) -> None:
        # Captured real tensors become graph constants, which the ladder then refuses by name.
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def make(self, shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
        with self.mode:
            return torch.empty(tuple(shape), dtype=dtype, device=device)

    def like(self, x: torch.Tensor, device: str) -> torch.Tensor:
        """x's shape, strides and dtype on `device`."""
        with self.mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    @classmethod
    def of(cls, x: torch.Tensor) -> FakeTensors:
        """The world that a fake tensor came from."""
        assert isinstance(x, FakeTensor)
        world = cls.__new__(cls)
        world.mode = x.fake_mode
        return world

    def trace(self, fn: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
        """The FX graph of `fn(*inputs) -> list of tensors`, with node.meta["val"] and annotations in meta["custom"].

        Runs autograd in the calling thread, so that scopes opened in a backward are seen whatever the device.
        """
        with self.mode, torch.autograd.set_multithreading_enabled(False), fx_traceback.preserve_node_meta():
            return make_fx(fn, tracing_mode="real")(*inputs)

    def run(self, fn: Callable[..., Any], *args: Any) -> Any:
        with self.mode:
            return fn(*args)


def labels(node: torch.fx.Node) -> dict[str, Any]:
    return node.meta.get("custom", {})


def node_value(node: torch.fx.Node) -> Any:
    """The fake result of a node: a tensor or a tuple of them."""
    return node.meta["val"]


def set_node_value(node: torch.fx.Node, value: Any) -> None:
    node.meta["val"] = value


def inductor_compile(gm: torch.fx.GraphModule, inputs: Sequence[torch.Tensor], options: dict[str, Any]) -> Any:
    """A callable artifact of `gm` for static shapes; see :func:`save_artifact`."""
    import torch._inductor

    with torch.no_grad():
        return torch._inductor.standalone_compile(
            gm, list(inputs), dynamic_shapes="from_graph", options=options, donate_graph_module=True
        )


def trust_cpu_flags() -> None:
    """Let inductor take the vector instructions that the CPU lists as given.

    It would else compile and run a probe for each set of them, ten seconds in all. A compiler too old for them fails
    with its own message instead.
    """
    import torch._inductor.config

    torch._inductor.config.cpp.vec_isa_ok = True


def save_artifact(artifact: Any, path: Path) -> None:
    artifact.save(path=str(path), format="binary")


def load_artifact(path: Path) -> Any:
    """Load what save_artifact wrote. This runs native code and unpickles: only from the user's own cache."""
    from torch._inductor.standalone_compile import CompiledArtifact

    return CompiledArtifact.load(path=str(path), format="binary")


def keep_compiled_code(folder: Path) -> None:
    """Keep the native code of artifacts in `folder`; loading one finds it there by its source's hash."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def flash_attention(q, k, v, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention on [B, N, T, H]: o and log-sum-exp [B, N, T]."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)[:2]


def flash_attention_backward(do, q, k, v, o, lse, scale: float) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv of :func:`flash_attention`."""
    if q.device.type == "cpu":
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return op(do, q, k, v, o, lse, 0.0, True, scale=scale)
    t = q.shape[2]
    seed = torch.zeros((2,), dtype=torch.uint64, device=q.device)
    op = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return op(do, q, k, v, o, lse, None, None, t, t, 0.0, True, seed, seed[0], scale=scale)


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available()


_FORMS = torch.library.Library("llama_fn_forms", "FRAGMENT")
_FORMS.define("onednn_product(Tensor a, Tensor b) -> Tensor")
_FORMS.impl("onednn_product", lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], ""), "CPU")
torch.library.register_fake(
    "llama_fn_forms::onednn_product", lambda a, b: a.new_empty((a.shape[0], b.shape[1])), lib=_FORMS
)


def onednn_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [M, K] times b [K, N]; either may be a transposed view. An op of its own, which inductor leaves alone."""
    return torch.ops.llama_fn_forms.onednn_product(a, b)


def cpu_model() -> str:
    """Everything about this CPU that compiled code depends on: it is built for exactly this one (-march=native)."""
    facts = {torch.backends.cpu.get_cpu_capability()}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith(("model name", "flags", "Features", "CPU part")):
            facts.add(line)
    return "\n".join(sorted(facts))


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_memory() -> bool:
    """Tell glibc's malloc to keep freed memory, so that large tensors are not mapped and zeroed again every step.

    Returns False where there is no glibc; then nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    limit = 2**31 - 1
    return bool(mallopt(M_MMAP_THRESHOLD, limit) and mallopt(M_TRIM_THRESHOLD, limit))


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text() if path.exists() else str(cpu))
    return max(1, len(siblings))
