"""Inductor's generated code says which part of the program each kernel is, for profiles.

Before every kernel call inductor writes a comment with the kernel's origin if told to track provenance. Here the
comment becomes a call of llama_fn.compiler.ranges, so the ranges are part of the code, of what is kept on disk too.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch

from llama_fn.compat.tracing import INVOKE_SUBGRAPH

Title = Callable[[Iterable[torch.fx.Node]], str]


@contextlib.contextmanager
def ranges_in_code(title: Title, title_of_call: Callable[[torch.fx.Node], str], text: str) -> Iterator[None]:
    """While open, inductor writes `title(nodes)` as a range around each kernel, and `title_of_call(node)` around each
    call of a subgraph. `text`, the graph with its scopes, goes into the key of what is kept on disk, and so does the
    form of titles: two graphs that differ only in scopes have different code."""
    from torch._inductor import config, debug
    from torch._inductor.codegen import cpp, triton
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen as Wrapper

    header, subgraph, returns = Wrapper.write_header, Wrapper.codegen_invoke_subgraph, Wrapper.generate_return

    def name(schedule: Any, kernel_name: str, is_extern: bool = False) -> str:
        return title(_origins(schedule))

    def write_header(self: Any) -> None:
        header(self)
        self.imports.splice("from llama_fn.compiler.ranges import RANGES as _ranges\n")

    def codegen_invoke_subgraph(self: Any, call: Any) -> None:
        self.writeline(f"_ranges.enter({title_of_call(_called(call))!r})")
        subgraph(self, call)
        self.writeline("_ranges.leave()")

    def generate_return(self: Any, results: list[str]) -> None:
        # Not after the call: torch's own range of it would then end before ours inside it, which Perfetto drops.
        self.wrapper_call.writeline("_ranges.to('')")
        returns(self, results)

    named: list[tuple[Any, str, Any]] = [
        (debug, "set_kernel_post_grad_provenance_tracing", name),
        (cpp, "set_kernel_post_grad_provenance_tracing", name),
        (triton, "set_kernel_post_grad_provenance_tracing", name),
        (Wrapper, "write_provenance_debug_handle", lambda self, _, name: self.writeline(f"_ranges.to({name!r})")),
        (Wrapper, "write_header", write_header),
        (Wrapper, "codegen_invoke_subgraph", codegen_invoke_subgraph),
        (Wrapper, "generate_return", generate_return),
    ]
    key = hashlib.sha256(text.encode()).hexdigest()
    with contextlib.ExitStack() as stack:
        stack.enter_context(config.patch({"aot_inductor.metadata": {"llama_fn_ranges": key}}))
        for where, attribute, meanwhile in named:
            stack.enter_context(mock.patch.object(where, attribute, meanwhile))
        yield


def _origins(schedule: Any) -> list[torch.fx.Node]:
    """The traced nodes that an extern kernel, or a list of fused scheduler nodes, computes."""
    if isinstance(schedule, (list, tuple)):  # markers of loops stand among the nodes
        irs = [each.node for each in schedule if getattr(each, "node", None) is not None]
        return _of_this_graph(origin for node in irs for origin in node.origins)
    if schedule.origin_node is not None:
        return _of_this_graph([schedule.origin_node])
    # Of an op with several results, what made its operands counts as an origin, too.
    origins = _of_this_graph(schedule.origins)
    return [node for node in origins if node.target is getattr(schedule, "op_overload", None)] or origins


def _called(call: Any) -> torch.fx.Node:
    """The traced node of a subgraph's call. Those whose results it takes count as its origins, too."""
    calls = {node for node in _of_this_graph(call.origins) if node.target is INVOKE_SUBGRAPH}
    return [node for node in next(iter(calls)).graph.nodes if node in calls][-1]


def _of_this_graph(origins: Iterable[torch.fx.Node]) -> list[torch.fx.Node]:
    """In a subgraph, what made its arguments and its call count as origins, too."""
    from torch._inductor.virtualized import V

    return [node for node in dict.fromkeys(origins) if node.graph is V.graph.module.graph]
