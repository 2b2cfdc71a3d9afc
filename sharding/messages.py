"""Messages between neighbouring stages of a pipeline, as ops of the per-device graph of a stage.

    %p = receive([4, 128], float32, "pipe", 4, -1, 6)    asks for what the stage before will send under tag 6
    ...                                                  other work, while it is under way
    %x = received(%p, "pipe", 4, -1, 6)                  waits for it
    %s = send(%y, "pipe", 4, 1, 6)                       begins to send to the stage behind, and waits for nothing

`step` says to which stage, counted from this one along the axis of n stages and round its ends. A tag stands for one
value of one microbatch on its way to one part of the model, so it says which send and receive belong together.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.registry import tensor_bytes
from sharding.collectives import axes_of, collective
from sharding.stages import PIPE

send = collective("send", "(Tensor x, str axes, int n, int step, int tag) -> Tensor", lambda x, *_: x.new_empty(1))
receive = collective(
    "receive", "(int[] shape, ScalarType dtype, str axes, int n, int step, int tag, *, Device device) -> Tensor",
    lambda shape, dtype, *_, device: torch.empty(shape, dtype=dtype, device=device),
)  # fmt: skip
received = collective(
    "received", "(Tensor(a) pending, str axes, int n, int step, int tag) -> Tensor(a)",
    lambda pending, *_: torch.empty_like(pending),
)  # fmt: skip
MESSAGES = (send.op, receive.op, received.op)


def is_message(node: torch.fx.Node) -> bool:
    """Whether a node sends, receives, or waits for what it asked for."""
    return node.op == "call_function" and node.target in MESSAGES


def over_stages(node: torch.fx.Node) -> bool:
    """Whether a node is a collective that all stages take part in."""
    named = (a for a in node.args if isinstance(a, str))
    return node.op == "call_function" and not is_message(node) and any(PIPE in axes_of(text) for text in named)


def sends_bytes(node: torch.fx.Node) -> int:
    """Bytes of the message that a node sends; 0 for any other."""
    sent: Any = node.args[0] if node.target is send.op else None
    return 0 if sent is None else tensor_bytes(sent.meta["val"])


def stream_of(node: torch.fx.Node) -> str:
    """The stream of a device on which a message stands: its side and direction, such as send_next."""
    _, step, _ = way(node)
    return f"{'send' if node.target is send.op else 'receive'}_{'next' if step > 0 else 'previous'}"


def way(node: torch.fx.Node) -> tuple[int, int, int]:
    """Of a message: how many stages there are, the step to the other one, and the tag."""
    n, step, tag = node.args[-3:]
    return int(n), int(step), int(tag)  # type: ignore[arg-type]
