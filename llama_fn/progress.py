"""How far long work is: told by whoever does it, shown by whoever asked for it (run/display.py), neither knowing the
other.

    with shown_by(bar):                          # bar(0.35, "tokenizing")
        with span(0.3, 1.0, "tokenizing"):       # seven tenths of the whole
            for document in tracked(documents):  # say(i / len(documents))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Show = Callable[[float, str], None]  # of 1, and what is being done
_SHOW: ContextVar[Show | None] = ContextVar("llama_fn_progress", default=None)


@contextmanager
def shown_by(show: Show) -> Iterator[None]:
    """What is said inside, in this thread, comes to `show`."""
    token = _SHOW.set(show)
    try:
        yield
    finally:
        _SHOW.reset(token)


def say(done: float, what: str = "") -> None:
    """So much of 1 of the span is done; `what` is next."""
    if (show := _SHOW.get()) is not None:
        show(min(done, 1.0), what)


@contextmanager
def span(start: float, stop: float, what: str = "") -> Iterator[None]:
    """What is said inside is said of this part of the whole."""
    outer = _SHOW.get()
    if outer is None:
        yield
        return
    with shown_by(lambda done, inner: outer(start + done * (stop - start), ", ".join(filter(None, (what, inner))))):
        say(0.0)
        yield


def tracked(items: Sequence[T], what: Callable[[T], str] = lambda _: "") -> Iterator[T]:
    """`items`, each said before it is given."""
    for i, item in enumerate(items):
        say(i / len(items), what(item))
        yield item
