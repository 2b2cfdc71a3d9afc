"""What looks like a mistake in a lowered step, though it runs: found in its graph alone, without a good one beside it.

Each lint names the scope and the line of the model, and what to do. That a collective was asked for by nobody is none
of them: partition.py puts in what an annotation or a parameter's declaration asks for, and refuses the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.registry import of_node
from kernels.scope_names import without_numbers
from llama_fn import compat
from llama_fn.compiler import calls, cost, ir
from llama_fn.compiler.passes.remat import RECOMPUTED
from llama_fn.compiler.signature import is_within
from llama_fn.compiler.stages import Lowered

SHOWN = 3  # places of one kind


@dataclass(frozen=True)
class Lint:
    """`kind` is a word to search for; `note`: worth knowing, and often meant."""

    kind: str
    text: str
    note: bool = False

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def lints(lowered: Lowered, remat: str = "none") -> list[Lint]:
    """Of one device's graph, the worst first. `remat`: the policy that was asked for."""
    counted = [(node, times) for node, times in calls.counted(lowered.graph_module) if ir.operands(node)]
    return [
        *_donation(lowered),
        *_dtypes(counted),
        *_remat(counted, remat),
        *_scopes(lowered, counted),
        *_scales(counted),
    ]


_Counted = list[tuple[torch.fx.Node, int]]


def _donation(lowered: Lowered) -> Iterator[Lint]:
    """The first result has the leaves of an argument, and takes none of its buffers."""
    signature, traced = lowered.signature, lowered.traced
    results = [compat.node_value(node) for node in ir.results(traced.graph_module.graph)]
    for position, name in enumerate(signature.argument_names):
        own = [i for i, path in enumerate(signature.in_paths) if is_within(path, name)]
        if position in signature.donated or len(own) < 2 or len(own) > len(results):
            continue
        alike = all(
            tuple(signature.in_infos[i].shape) == tuple(value.shape) and signature.in_infos[i].dtype == value.dtype
            for i, value in zip(own, results, strict=False)
        )
        if alike:
            size = sum(signature.in_infos[i].bytes for i in own)
            yield Lint(
                "donation", f"{name} comes back as the first result, and is not donated: {size / 1e6:.1f} MB live "
                f"twice. Write jit(..., donate={position})"
            )  # fmt: skip


def _dtypes(counted: _Counted) -> Iterator[Lint]:
    """Products in float32 among products in 16 bits."""
    flops: dict[bool, int] = {True: 0, False: 0}
    wide: _Counted = []
    for node, times in counted:
        if not cost.flops_of(node):
            continue
        # The largest, as sums over rows, which attention keeps, and cotangents of losses are in float32 on purpose.
        largest = max(map(compat.node_value, ir.operands(node)), key=lambda x: x.numel())
        narrow = largest.dtype not in (torch.float32, torch.float64)
        flops[narrow] += times * cost.flops_of(node)
        if not narrow:
            wide.append((node, times))
    if wide and flops[True] > flops[False]:
        share = flops[False] / sum(flops.values())
        text = f"a step in 16 bits has products in float32, {share:.1%} of its FLOPs: {_places(wide)}"
        yield Lint("dtype", f"{text}. Cast what goes into them to the dtype of the weights")


def _remat(counted: _Counted, policy: str) -> Iterator[Lint]:
    if policy in ("none", "") or any(compat.labels(node).get("note") == RECOMPUTED for node, _ in counted):
        return
    yield Lint("remat", f"policy {policy} was asked for, and nothing is computed again: mark the function whose values "
               "are not to be kept with transforms.remat, as llama.hidden does with each layer")  # fmt: skip


def _scopes(lowered: Lowered, counted: _Counted) -> Iterator[Lint]:
    """Products of the backward in no scope but the step's own, where those of the forward are in scopes of theirs."""
    root = ("", lowered.traced.name)
    products = [(node, times) for node, times in counted if cost.flops_of(node)]
    lost = [each for each in products if ir.phase_of(each[0]) == "backward" and ir.scope_of(each[0]) in root]
    if lost and any(ir.phase_of(node) == "forward" and ir.scope_of(node) not in root for node, _ in products):
        yield Lint(
            "scope", f"products of the backward have lost the scope of their forward, so profiles cannot say whose "
            f"they are: {_places(lost)}. A backward of your own has to open it again, with kernels.scope.named_scope"
        )  # fmt: skip


def _scales(counted: _Counted) -> Iterator[Lint]:
    odd = []
    for node, times in counted:
        kernel = of_node(node.target)
        if kernel is None or kernel.name != "attention":
            continue
        head_dim, scale = compat.node_value(ir.operands(node)[0]).shape[-1], node.args[3]
        if isinstance(scale, float) and abs(scale * head_dim**0.5 - 1) > 1e-6:
            odd.append((node, times, scale, head_dim))
    if odd:
        _, _, scale, head_dim = odd[0]
        yield Lint("attention scale", f"{scale:.6g}, and head_dim^-0.5 is {head_dim**-0.5:.6g}: "
                   f"{_places([(node, times) for node, times, *_ in odd])}", note=True)  # fmt: skip


def _places(counted: _Counted) -> str:
    """Scopes and lines, each once; layers and microbatches are taken together."""
    places: dict[str, int] = {}
    for node, times in counted:
        place = f"{without_numbers(ir.scope_of(node)) or 'no scope'} ({compat.labels(node).get('source', '?')})"
        places[place] = places.get(place, 0) + times
    said = [f"{place}, {count} times" if count > 1 else place for place, count in places.items()]
    more = f" and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    return "; ".join(said[:SHOWN]) + more
