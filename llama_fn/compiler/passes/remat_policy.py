"""Which values of a region stay from the forward to the backward. See remat.py for what the policies mean."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from kernels.registry import of_node, tensor_bytes
from llama_fn import compat
from llama_fn.compiler import cost, ir
from llama_fn.compiler.passes.remat_regions import Remat, RematRegion
from llama_fn.errors import UserError, nearest
from llama_fn.hardware import FLOPS_PER_HBM_BYTE, FLOPS_PER_LINK_BYTE
from sharding.collectives import communicates, sent_bytes


def kept_values(regions: Sequence[RematRegion], wanted: Remat) -> set[torch.fx.Node]:
    """The values of all regions that stay, besides what the regions read."""
    if wanted.policy == "budget":
        return _within(wanted.budget_bytes, regions)
    kept: set[torch.fx.Node] = set()
    for region in regions:
        if wanted.policy == "dots":
            kept |= {_sum_of(node) for node in region.forward if _is_product(node)}
        elif wanted.policy == "names":
            _check_names(region, wanted.names)
            kept |= {node for node in region.forward if _name(node) in wanted.names}
    return kept


def _name(node: torch.fx.Node) -> str:
    return str(compat.labels(node).get("name", ""))


def _check_names(region: RematRegion, names: Sequence[str]) -> None:
    known = {name for node in region.forward if (name := _name(node))}
    for name in names:
        if name not in known:
            raise UserError(f"remat: no value is named {name!r} by checkpoint_name. {nearest(name, sorted(known))}")


def _is_product(node: torch.fx.Node) -> bool:
    source: Any = node.args[0] if node.target is operator.getitem else node
    return cost.flops_of(source) > 0 and not isinstance(compat.node_value(node), (tuple, list))


def _sum_of(product: torch.fx.Node) -> torch.fx.Node:
    """What a partial sum becomes, where the product is one: smaller, and no collective to run again."""
    for user in product.users:
        if communicates(of_node(user.target)) and ir.phase_of(user) == "forward":
            return user
    return product


def _price(node: torch.fx.Node) -> float:
    """What running an op once more costs, in FLOP."""
    if cost.is_view(node):
        return 0.0
    kernel = of_node(node.target)
    name = communicates(kernel)
    if name:
        x, _, n, *_ = node.args
        return float(FLOPS_PER_LINK_BYTE * sent_bytes(name, compat.node_value(x), n))  # type: ignore[arg-type]
    return max(float(cost.flops_of(node)), float(FLOPS_PER_HBM_BYTE * cost.moved(node)))


def _within(budget: int, regions: Sequence[RematRegion]) -> set[torch.fx.Node]:
    """Value after value, in the order of what they save per byte, in all regions of a forward pass while bytes last; of
    the first that is too much for all, in as many of the last regions as there is room for."""
    forward_passes: dict[tuple[int, str], list[RematRegion]] = defaultdict(list)
    for region in regions:
        forward_passes[region.forward_pass, " ".join(str(node.target) for node in region.forward)].append(region)
    left = dict.fromkeys((forward_pass for forward_pass, _ in forward_passes), budget)
    kept: set[torch.fx.Node] = set()
    for (forward_pass, _), alike in forward_passes.items():
        members = [list(region.forward) for region in alike]
        for position in _ranked(alike[0]):
            size = tensor_bytes(compat.node_value(members[0][position]))
            room = min(len(alike), left[forward_pass] // size)
            kept |= {each[position] for each in members[len(alike) - room :]}
            left[forward_pass] -= room * size
            if room < len(alike):
                break
    return kept


def _ranked(region: RematRegion) -> list[int]:
    """Positions of the values worth keeping, the one that saves most per byte first, given those before it."""
    nodes = list(region.forward)
    candidates = {
        i
        for i, node in enumerate(nodes)
        if isinstance(compat.node_value(node), torch.Tensor)
        if node.target is operator.getitem or not cost.is_view(node)
    }
    chosen: list[int] = []
    held: set[torch.fx.Node] = set()
    price = {node: _price(node) for node in nodes}

    def bill(kept: set[torch.fx.Node]) -> float:
        return sum(price[node] for node in region.needed(kept))

    now = bill(held)
    while candidates and now > 0:
        gains = {i: (now - bill(held | {nodes[i]})) / tensor_bytes(compat.node_value(nodes[i])) for i in candidates}
        best = max(gains, key=gains.__getitem__)
        if gains[best] <= 0:
            break
        chosen.append(best)
        held.add(nodes[best])
        candidates.remove(best)
        now = bill(held)
    return chosen
