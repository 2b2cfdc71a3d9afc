"""Messages between the processes of neighbouring stages (sharding/messages.py), over torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from llama_fn import compat
from llama_fn.distributed.processes import Processes, named
from sharding.messages import receive, received, send
from sharding.stages import PIPE


class Messages:
    """This process's side of every message. Each device of a stage has its like on the stages before and behind."""

    def __init__(self, processes: Processes, device: str) -> None:
        self.device = torch.device(device)
        self.line = processes.mesh.group_of(processes.rank, (PIPE,))
        self.index = self.line.index(processes.rank)
        self.groups = self._groups(processes)
        self.sending: list[tuple[Any, torch.Tensor]] = []  # a tensor has to live until it has been sent
        self.asked: dict[int, Any] = {}

    @staticmethod
    def _groups(processes: Processes) -> dict[tuple[int, int, int], Any]:
        """A group for each pair of neighbours and direction, so that on a device the two directions do not wait for
        one another. gloo tells messages apart by their tags, and needs none."""
        if processes.backend == "gloo":
            return {}
        groups = {}
        for line in processes.mesh.groups((PIPE,)):
            for i, source in enumerate(line):
                for step in (1, -1):
                    target = line[(i + step) % len(line)]
                    group = dist.new_group([source, target], backend=processes.backend)
                    if processes.rank in (source, target):
                        way = f"{i}_to_{(i + step) % len(line)}"  # of two stages, twice
                        named(group, processes.backend, f"llama_fn_{way}_{'on' if step > 0 else 'back'}")
                    groups[source, target, step] = group
        return groups

    def named(self, step: int, sends: bool) -> tuple[str, int]:
        """The name of the group of the messages that this process sends, or receives, along `step`, and the number of
        the other process in it."""
        mine, other = self.line[self.index], self.line[(self.index + step) % len(self.line)]
        group = self._group(mine, other, step) if sends else self._group(other, mine, -step)
        return compat.group_name(group), sorted((mine, other)).index(other)

    def _group(self, source: int, target: int, step: int) -> Any:
        return self.groups.get((source, target, step))

    def send(self, x: torch.Tensor, axes: str, n: int, step: int, tag: int) -> torch.Tensor:
        """Begin to send."""
        target = self.line[(self.index + step) % n]
        self.sending = [(work, held) for work, held in self.sending if not work.is_completed()]
        x = x.contiguous()
        group = self._group(self.line[self.index], target, step)
        self.sending.append((dist.isend(x, target, group=group, tag=tag), x))
        return x.new_zeros(1)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, axes: str, n: int, step: int, tag: int) -> torch.Tensor:
        """Begin to receive; what is returned has the values once :meth:`received` has waited for them."""
        source = self.line[(self.index + step) % n]
        pending = torch.empty(list(shape), dtype=dtype, device=self.device)
        group = self._group(source, self.line[self.index], -step)
        self.asked[tag] = dist.irecv(pending, source, group=group, tag=tag)
        return pending

    def received(self, pending: torch.Tensor, axes: str, n: int, step: int, tag: int) -> torch.Tensor:
        """`pending`, once it is there."""
        self.asked.pop(tag).wait()
        return pending

    @property
    def forms(self) -> Mapping[Any, Callable[..., torch.Tensor]]:
        """By op, what this process does."""
        return {send.op: self.send, receive.op: self.receive, received.op: self.received}
