"""One process per device of the mesh: groups along its axes, and global arrays taken apart and put together.

Started by torchrun, which says rank and world size in the environment; one process alone has none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llama_fn import compat, tree
from llama_fn.distributed.watchdog import Watchdog
from llama_fn.errors import SaidElsewhere, UserError
from llama_fn.launch import launched
from llama_fn.model import arrays
from sharding import Mesh, P
from sharding.collectives import axes_of
from sharding.parts import Part, part_of
from sharding.simulate import join, part


@dataclass(frozen=True)
class Processes:
    """This process's rank among those of the mesh. `backend` carries the collectives of the graph: the device's own,
    where the world of all processes also has gloo for what lies in CPU memory."""

    mesh: Mesh
    rank: int
    watchdog: Watchdog
    backend: str
    _groups: dict[str, compat.Group] = field(default_factory=dict, repr=False)

    @property
    def chief(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    def groups(self, axes: Iterable[str]) -> dict[str, compat.Group]:
        """This process's group along each of `axes` ("data", "data+model"); every process must ask for the same."""
        for text in sorted(set(axes) - set(self._groups)):
            for ranks in self.mesh.groups(axes_of(text)):
                # One backend alone: of a group with several, torchair takes the CPU's, and HCCL does not know its name.
                group = dist.new_group(ranks, backend=self.backend)
                if self.rank in ranks:
                    self._groups[text] = compat.Group(compat.group_name(group), ranks.index(self.rank))
        return self._groups

    def part(self, x: torch.Tensor, layout: P) -> torch.Tensor:
        """What this process holds of a global tensor."""
        return part(x, layout, self.mesh, self.rank)

    def whole(self, mine: torch.Tensor, layout: P, shape: Sequence[int]) -> torch.Tensor | None:
        """The global tensor, on rank 0 only, in CPU memory."""
        mine = mine.detach().cpu().contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.mesh.size)] if self.chief else None
        dist.gather(mine, parts)
        return join(parts, layout, self.mesh, shape) if parts is not None else None

    def parts(self, infos: Any, layouts: Sequence[P]) -> list[Part]:
        """This process's part of every leaf."""
        leaves = tree.leaves(infos)
        return [part_of(x.shape, layout, self.mesh, self.rank) for x, layout in zip(leaves, layouts, strict=True)]

    def local(self, values: Any, layouts: Sequence[P]) -> Any:
        """This process's part of a tree of global tensors."""
        leaves, spec = tree.flatten(values)
        return tree.unflatten(spec, [self.part(x, layout) for x, layout in zip(leaves, layouts, strict=True)])

    def gathered(self, mine: Any, infos: Any, layouts: Sequence[P]) -> Any:
        """The tree of global tensors on rank 0, None elsewhere; leaf by leaf."""
        leaves, spec = tree.flatten(mine)
        zipped = zip(leaves, layouts, tree.leaves(infos), strict=True)
        whole = [self.whole(x, layout, info.shape) for x, layout, info in zipped]
        return tree.unflatten(spec, whole) if self.chief else None

    def scatter_state(self, whole: Any, infos: Any, layouts: Sequence[P], device: str) -> Any:
        """Every process's part of rank 0's tree of global tensors; one leaf at a time is whole elsewhere."""
        given = iter(tree.leaves(whole) if self.chief else ())

        def one(info: arrays.ArrayInfo, layout: P) -> torch.Tensor:
            x = next(given).cpu() if self.chief else torch.empty(info.shape, dtype=info.dtype)
            dist.broadcast(x, 0)
            return self.part(x, layout).to(device)

        leaves, spec = tree.flatten(infos)
        return tree.unflatten(spec, [one(i, layout) for i, layout in zip(leaves, layouts, strict=True)])

    def in_turn(self, fn: Callable[[], Any]) -> Any:
        """`fn()` by the first process of every machine, then by the others, who find what it left on disk.

        A UserError of one ends all. They wait at a store, not in a collective, whose time limit tokenizing a large
        corpus would pass; the watchdog still sees who dies.
        """
        first, value, error = launched().local_rank == 0, None, None
        if first:
            try:
                value = fn()
            except UserError as wrong:
                error = wrong
        self.watchdog.report("in_turn", "failed" if error else "done")
        failed = "failed" in self.watchdog.wait_for_all("in_turn")
        if error is not None:
            raise error
        if failed:
            raise SaidElsewhere("the first process of a machine could not prepare the data")
        return value if first else fn()

    def all_reached(self, what: str) -> None:
        """Wait until every process has come to `what`, once for each; for what may take minutes longer on one than on
        another, which a collective's time limit would count."""
        self.watchdog.report(what, "done")
        self.watchdog.wait_for_all(what)

    def barrier(self) -> None:
        """Wait for all processes."""
        dist.barrier()

    def any(self, flag: int) -> int:
        """The largest flag of any process: all see the same."""
        value = torch.tensor(flag)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def by_chief(self, fn: Callable[[], Any]) -> Any:
        """What `fn()` gives on rank 0, on every process; a UserError there ends all."""
        value, error = None, None
        if self.chief:
            try:
                value = fn()
            except UserError as wrong:
                error = wrong
        held = [(value, str(error) if error else "")]
        dist.broadcast_object_list(held)
        if error is not None:
            raise error
        if held[0][1]:
            raise SaidElsewhere(held[0][1])
        return held[0][0]

    def close(self) -> None:
        """Leave together: nobody is missed by those who are still saving."""
        self.watchdog.close()
        dist.destroy_process_group()


def by_chief(processes: Processes | None, fn: Callable[[], Any]) -> Any:
    """`fn()`; of several processes the first alone calls it, and all have what it gives."""
    return fn() if processes is None else processes.by_chief(fn)


def start(mesh: Mesh, device: str, timeout_s: int) -> Processes | None:
    """Join the other processes that torchrun started, or None where there is one process only.

    UserError where their number is not the mesh's.
    """
    world, rank = launched().world, launched().rank
    if world == 1:
        return None
    if world != mesh.size:
        raise UserError(
            f"torchrun started {world} processes, but --mesh.axes={mesh} has {mesh.size} devices: use "
            f"--nproc_per_node (times --nnodes) = {mesh.size}, or another mesh"
        )
    kind = torch.device(device).type
    backend = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}[kind]
    whole = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{backend}"
    dist.init_process_group(whole, timeout=timedelta(seconds=timeout_s))
    if backend == "gloo":
        compat.register_gloo_collectives()
    return Processes(mesh, rank, Watchdog(rank, world, timeout_s).start(), backend)
