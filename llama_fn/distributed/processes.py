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
from sharding import Mesh, P
from sharding.collectives import axes_of
from sharding.parts import Part, part_of
from sharding.simulate import part


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
                    named(group, self.backend, f"llama_fn_{text.replace('+', '_')}")
                    self._groups[text] = compat.Group(compat.group_name(group), ranks.index(self.rank))
        return self._groups

    def part(self, x: torch.Tensor, layout: P) -> torch.Tensor:
        """What this process holds of a global tensor."""
        return part(x, layout, self.mesh, self.rank)

    def parts(self, infos: Any, layouts: Sequence[P]) -> list[Part]:
        """This process's part of every leaf."""
        leaves = tree.leaves(infos)
        return [part_of(x.shape, layout, self.mesh, self.rank) for x, layout in zip(leaves, layouts, strict=True)]

    def local(self, values: Any, layouts: Sequence[P]) -> Any:
        """This process's part of a tree of global tensors."""
        leaves, spec = tree.flatten(values)
        return tree.unflatten(spec, [self.part(x, layout) for x, layout in zip(leaves, layouts, strict=True)])

    def in_turn(self, fn: Callable[[], Any]) -> Any:
        """`fn()` by the first process of every machine, then by the others, who find what it left on disk.

        A UserError of one ends all. They wait at a store, not in a collective, whose time limit tokenizing a large
        corpus would pass; the watchdog still sees who dies.
        """
        about = self.watchdog.turn("in_turn")
        first, value, error = launched().local_rank == 0, None, None
        if first:
            try:
                value = fn()
            except UserError as wrong:
                error = wrong
        self.watchdog.report(about, "failed" if error else "done")
        failed = "failed" in self.watchdog.wait_for_all(about)
        if error is not None:
            raise error
        if failed:
            raise SaidElsewhere("the first process of a machine could not prepare the data")
        return value if first else fn()

    def all_reached(self, what: str) -> None:
        """Wait until every process has come to `what`; for what may take minutes longer on one than on another, which a
        collective's time limit would count."""
        about = self.watchdog.turn(what)
        self.watchdog.report(about, "done")
        self.watchdog.wait_for_all(about)

    def words(self, about: str, word: str) -> list[str]:
        """What every process says about a matter, by rank; each matter has a name of its own. Not a collective: it may
        take as long as it takes, and be called in a thread."""
        self.watchdog.report(about, word)
        return self.watchdog.wait_for_all(about)

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


def named(group: Any, backend: str, name: str) -> None:
    """Give this process's group a name that is the same at every start and on every rank, where it is part of compiled
    graphs: with HCCL."""
    if backend == "hccl":
        compat.name_group(group, name)


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
