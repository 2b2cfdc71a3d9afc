"""Where in the program an op was asked for: scope path, phase and source line, written on traced nodes.

The three are carried by `torch.fx.traceback.annotate`, which graph tracing copies onto every node made inside;
outside a trace they cost a dictionary update. Backward ops run long after the scope has closed, so each
differentiable op remembers its location and reopens it (:func:`backward_of`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

import torch.fx.traceback as fx_traceback


@dataclass(frozen=True)
class Location:
    """Scope path such as "layers/3/attention", phase, "file.py:line" of the call, and the remat region it is in."""

    path: str = ""
    phase: str = "forward"
    source: str = ""
    region: str = ""


_TOP = Location()
_LOCATION: ContextVar[Location] = ContextVar("llama_fn_location", default=_TOP)
_ROOT = Path(__file__).parent.parent
_OURS = (str(_ROOT / "kernels"), str(_ROOT / "sharding"), str(_ROOT / "llama_fn" / "compat"))
_LIBRARIES = ("/torch", "/contextlib", "/functools")


def current() -> Location:
    """Where ops that are called now stand."""
    return _LOCATION.get()


@contextmanager
def at(location: Location) -> Iterator[None]:
    """Put the ops inside at `location`, wherever this is called."""
    token = _LOCATION.set(location)
    try:
        where = {"scope": location.path, "phase": location.phase, "source": location.source, "region": location.region}
        with fx_traceback.annotate(where):
            yield
    finally:
        _LOCATION.reset(token)


@contextmanager
def named_scope(name: str) -> Iterator[None]:
    """Open the scope `name` under the current one; ops traced inside carry the joined path."""
    here = current()
    with at(replace(here, path=f"{here.path}/{name}" if here.path else name)):
        yield


@contextmanager
def remat_region() -> Iterator[None]:
    """Values computed inside may be computed again in the backward instead of being kept: what a remat policy chooses
    among. The region is named by the scope it is opened in."""
    here = current()
    with at(replace(here, region=here.path)):
        yield


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark everything inside as one phase of the step: forward, backward or optimizer."""
    with at(replace(current(), phase=name)):
        yield


@contextmanager
def backward_of(location: Location) -> Iterator[None]:
    """Reopen the scope of a forward op for the ops of its backward."""
    with at(replace(location, phase="backward")):
        yield


@contextmanager
def source_line(line: str = "") -> Iterator[None]:
    """Record `line` as the source of the ops inside, or the innermost caller outside kernels/, sharding/ and torch.

    A line that is recorded already stays: inside a kernel that of the kernel's caller, inside a backward the forward's.
    """
    here = current()
    if here.source and not line:
        yield
        return
    with at(replace(here, source=line or caller())):
        yield


def caller() -> str:
    """ "file.py:line" of the innermost caller outside kernels/, sharding/, llama_fn/compat/ and torch."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(_OURS) and not any(part in filename for part in _LIBRARIES):
            return f"{file_name(filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def file_name(path: str) -> str:
    """The name of a source file, without its folders; of a cell of a notebook, whose file says nothing, In[3]."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    cell = shell.compile.format_code_name(path) if shell is not None else None
    return cell[1] if cell else Path(path).name
