"""Errors of a traced function that end where the user's code does: frames of torch and of ours are folded away.

`llama_fn.errors.full_traceback()` shows the last one whole.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType

import torch

from kernels.scope import file_name
from llama_fn import compat, errors

_PACKAGE = Path(__file__).resolve().parents[1]
_OURS = [_PACKAGE, *(_PACKAGE.parent / name for name in ("kernels", "sharding"))]
_TORCH = Path(str(torch.__file__)).resolve().parent
_FOLDED = [
    *map(str, [_TORCH, _TORCH.with_name("optree"), *_OURS]),
    str(contextlib.__file__),
    "<eval_with_key>",
    "<string>",
]
_MODEL = str(_PACKAGE / "model")  # a model of ours is what the user looks at


def folded(error: Exception, name: str) -> Exception:
    """The error to raise instead, with the frames of the traced function alone: the same, or one that says what a
    traced function cannot do. Its whole traceback is kept as text."""
    whole = errors.keep_traceback(error)
    frames = _users(error.__traceback__)
    last = frames[-1] if frames else None
    place = f"{file_name(last.tb_frame.f_code.co_filename)}:{last.tb_lineno}" if last else "an unknown line"
    if isinstance(error, compat.DATA_DEPENDENT):
        error = ValueError(
            f"{name} asks for the value of a tensor ({place}), and while it is traced tensors have none: `if`, "
            "`while`, .item() and the like would decide once for all calls. Choose between values with torch.where, or "
            "pass what is known before as a plain argument of the function that makes the step"
        )
    chain: TracebackType | None = None
    for frame in reversed(frames):
        chain = TracebackType(chain, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    error.__dict__[errors.WHOLE] = whole
    return error.with_traceback(chain)


def _users(traceback: TracebackType | None) -> list[TracebackType]:
    """From the first frame that is the traced function's."""
    kept: list[TracebackType] = []
    inside = False
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        ours = any(file.startswith(folder) for folder in _FOLDED) and not file.startswith(_MODEL)
        inside |= ours  # what stands before is the caller, whose frames Python adds again
        if inside and not ours:
            kept.append(traceback)
        traceback = traceback.tb_next
    return kept
