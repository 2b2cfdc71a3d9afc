"""Runs the programs of all stages of a pipeline in one process: each in turn, until it waits for another.

A program is a generator. It yields what it waits for, a message or that all stages meet in one collective, and is sent
what came of it. So programs run in any order in which no one waits for ever, as on devices of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

PerDevice = list[torch.Tensor]  # of the devices of a stage
Key = tuple[int, int, int]  # of a message: the stage that sends, the one that receives, the tag


@dataclass(frozen=True)
class Message:
    """Waits for the message of this key."""

    key: Key


@dataclass(frozen=True)
class Meeting:
    """Waits for all stages to come to the collective `name` with like arguments; `given`: values of this stage's
    devices, by argument."""

    name: str
    given: tuple[PerDevice, ...]
    rest: tuple[Any, ...]


Wait = Message | Meeting
Program = Generator[Wait, Any, Any]


@dataclass
class Mailbox:
    """Messages that are sent and not yet received."""

    held: dict[Key, PerDevice] = field(default_factory=dict)

    def put(self, key: Key, values: PerDevice) -> None:
        """Send; RuntimeError for a message whose key another under way has."""
        if key in self.held:
            raise RuntimeError(f"stage {key[0]} sends a second message {key[2]} to stage {key[1]}")
        self.held[key] = values


def together(programs: Sequence[Program], mailbox: Mailbox, meet: Callable[[list[Meeting]], list[Any]]) -> list[Any]:
    """What each program returns. `meet` gives each stage's result of a collective of all. RuntimeError where programs
    wait for ever, or a message is left over."""
    results: list[Any] = [None] * len(programs)
    waiting: dict[int, Wait] = {}

    def resume(stage: int, value: Any) -> None:
        try:
            waiting[stage] = programs[stage].send(value)
        except StopIteration as end:
            waiting.pop(stage, None)
            results[stage] = end.value

    for stage in range(len(programs)):
        resume(stage, None)
    while waiting:
        ready = [stage for stage, wait in waiting.items() if isinstance(wait, Message) and wait.key in mailbox.held]
        meetings = [wait for _, wait in sorted(waiting.items()) if isinstance(wait, Meeting)]
        for stage in ready:
            resume(stage, mailbox.held.pop(waiting[stage].key))  # type: ignore[union-attr]
        if len(meetings) == len(programs):
            for stage, value in enumerate(meet(meetings)):
                resume(stage, value)
        elif not ready:
            raise RuntimeError(f"stages wait for ever: {waiting}")
    if mailbox.held:
        raise RuntimeError(f"messages that no stage received: {sorted(mailbox.held)}")
    return results
