"""Tracing to FX graphs with fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx

from kernels.repeat import called_by
from llama_fn.compat.repeat import Repeats
from llama_fn.compat.repeat_body import with_bodies
from llama_fn.compat.sources import sourced

TORCH = "2.13.0"
INVOKE_SUBGRAPH = invoke_subgraph
DATA_DEPENDENT = (
    DataDependentOutputException,
    DynamicOutputShapeException,
)  # a value, or a size that depends on values


def graph_module(root: torch.nn.Module, graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """`graph` with what it names of `root`. Python code is written for it when it is first called or compiled, and not,
    as torch.fx.GraphModule does, for every graph that a pass makes."""
    return _LazyGraphModule(root, graph)


def check_torch_version() -> None:
    """RuntimeError unless torch is the release whose private parts this file knows."""
    if torch.__version__.split("+")[0] != TORCH:
        raise RuntimeError(f"llama_fn needs torch {TORCH}, found {torch.__version__}: pip install torch=={TORCH}")


class FakeTensors:
    """A world of tensors with shape, dtype and device but no storage."""

    def __init__(self) -> None:
        # Captured real tensors become graph constants, which tracing.py then refuses by name.
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def make(self, shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
        """A tensor of this world."""
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

    def trace(
        self, fn: Callable[..., Any], inputs: Sequence[torch.Tensor], decompositions: Mapping[Any, Any] | None = None
    ) -> torch.fx.GraphModule:
        """The FX graph of `fn(*inputs) -> list of tensors`, with node.meta["val"] and annotations in meta["custom"].
        Repeated functions are bodies, each a submodule that nodes call.

        Runs autograd in the calling thread, so that scopes opened in a backward are seen whatever the device.
        """
        with (
            self.mode,
            torch.autograd.set_multithreading_enabled(False),
            fx_traceback.preserve_node_meta(),
            _use_lazy_graph_module(True),
            called_by(Repeats()),
        ):
            return with_bodies(make_fx(sourced(fn), decompositions, tracing_mode="real")(*inputs))

    def run(self, fn: Callable[..., Any], *args: Any) -> Any:
        """fn(*args) on tensors of this world."""
        with self.mode:
            return fn(*args)


def labels(node: torch.fx.Node) -> dict[str, Any]:
    """scope, phase, source, region, name and note of a node, as far as it has them (kernels/scope.py)."""
    return node.meta.get("custom", {})


def node_value(node: torch.fx.Node) -> Any:
    """The fake result of a node: a tensor or a tuple of them."""
    return node.meta["val"]
