"""Seven small corpora of real text from what this machine has, as stand-ins for the sources of LLaMA's mixture.

    python -m llama_fn.tools.corpus --out=work/corpus
    python train.py --flagfile=configs/tiny_cpu.flags --data.path=configs/mixture_llama.yaml --run.workdir=work/mixture

    ccnet          docstrings of Python's library and of installed packages
    c4             the system's documentation (/usr/share/doc)
    github         source files of Python's library
    wikipedia      the topics of Python's help
    books          licences
    arxiv          what installed packages say of themselves
    stackexchange  manual pages; where there are none, Python's tests

Each becomes NAME.jsonl with a text in each line, of at most --mb. Where the system has nothing for a source, docstrings
that no other source has take its place. Nothing comes from a network.

Exit status 0, or 2 for wrong input.
"""

from __future__ import annotations

import ast
import gzip
import json
import os
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import chain
from pathlib import Path

from absl import app, flags

from llama_fn.errors import UserError
from llama_fn.files import atomic
from llama_fn.tools import command

FLAGS = flags.FLAGS
LIBRARY = Path(sysconfig.get_path("stdlib"))
PACKAGES = Path(sysconfig.get_path("purelib"))
FEWEST = 20  # documents, below which docstrings are added
STAND_INS = 8  # parts of the docstrings: ccnet has the first two, each other source has one to fall back to


def _read(path: Path) -> str:
    """A text file, packed or not; "" where it is none."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return ""


def _files(folder: Path, *patterns: str) -> Iterator[Path]:
    yield from sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def docstrings(parts: range) -> Iterator[str]:
    """Those of a module together, of the modules whose names fall into `parts`."""
    for path in chain(_files(LIBRARY, "*.py", "*/*.py"), _files(PACKAGES, "*/*.py", "*/*/*.py")):
        if zlib.crc32(path.name.encode()) % STAND_INS not in parts or "test" in path.parts:
            continue
        try:
            tree = ast.parse(_read(path))
        except (SyntaxError, ValueError, RecursionError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        if len(text := "\n\n".join(filter(None, texts))) > 400:
            yield text


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (text for _, text in sorted(topics.items()))


def _descriptions() -> Iterator[str]:
    found = {dist.metadata["Name"]: dist for dist in metadata.distributions()}
    for _, dist in sorted(found.items(), key=lambda item: str(item[0])):
        payload = dist.metadata.get_payload()  # type: ignore[attr-defined]
        if isinstance(payload, str):
            yield payload


def _manual() -> Iterator[str]:
    """Pages without the lines that only say how they are set."""
    for path in _files(Path("/usr/share/man"), "man[1-8]/*"):
        lines = [line for line in _read(path).splitlines() if not line.startswith((".", "'"))]
        yield "\n".join(lines).replace("\\-", "-").replace("\\fB", "").replace("\\fR", "").replace("\\fI", "")


def _licences() -> Iterator[str]:
    seen = set()
    named = ("*.dist-info/**/LICEN*", "*.dist-info/**/COPYING*", "*.dist-info/**/NOTICE*")
    for path in chain(_files(Path("/usr/share/common-licenses"), "*"), _files(PACKAGES, *named)):
        if (text := _read(path)) not in seen:
            seen.add(text)
            yield text


SOURCES: dict[str, Callable[[], Iterator[str]]] = {
    "ccnet": lambda: docstrings(range(2)),
    "c4": lambda: map(_read, _files(Path("/usr/share/doc"), "*/*")),
    "github": lambda: map(_read, _files(LIBRARY, "*.py", "*/*.py")),
    "wikipedia": _topics,
    "books": _licences,
    "arxiv": _descriptions,
    "stackexchange": lambda: chain(_manual(), map(_read, _files(LIBRARY / "test", "*.py"))),
}  # fmt: skip


def documents(number: int, name: str, limit: int) -> Iterator[str]:
    """Those of a source, up to `limit` characters."""
    count = 0
    texts = (text for text in SOURCES[name]() if len(text.strip()) > 200)
    for text in texts:
        yield text[:limit]
        count, limit = count + 1, limit - len(text)
        if limit <= 0:
            return
    if count < FEWEST:
        for text in docstrings(range(number + 1, number + 2)):
            yield text[:limit]
            if (limit := limit - len(text)) <= 0:
                return


def corpus() -> int:
    """Write all of them."""
    if not FLAGS.out:
        raise UserError("give --out, a folder for the seven files")
    out = Path(os.path.expanduser(FLAGS.out))
    for number, name in enumerate(SOURCES):
        count = size = 0
        with atomic(out / f"{name}.jsonl") as f:
            for text in documents(number, name, int(FLAGS.mb * 1e6)):
                f.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                count, size = count + 1, size + len(text)
        print(f"{name:14} {count:6d} documents {size / 1e6:8.2f} million characters", flush=True)
    print(f"train on all: --data.path=configs/mixture_llama.yaml, whose paths say {out}" if out == Path("work/corpus")
          else f"train on all: a mixture file like configs/mixture_llama.yaml, with paths in {out}")  # fmt: skip
    return 0


def main(argv: list[str]) -> None:
    """The command: exit status 0 or 2."""
    sys.exit(command.status_of(corpus))


if __name__ == "__main__":
    flags.DEFINE_string("out", "", "folder for the files")
    flags.DEFINE_float("mb", 4.0, "million characters of each source at most", 0.001)
    app.run(main, flags_parser=command.parse)
