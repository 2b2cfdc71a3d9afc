"""Whole compiled steps on disk. A start that asks for one under the same key runs it without tracing, lowering or
importing what compiles.

The key is the caller's: it must name everything that the step depends on. Beside the compiled code an entry holds what
a caller sees of a step: trees, shapes and shardings. The graphs are made again only where somebody looks at them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llama_fn import compat, tree
from llama_fn.compiler import backends
from llama_fn.compiler.arguments import Leaves
from llama_fn.compiler.backends import code_cache
from llama_fn.compiler.backends.in_turn import Order, follow
from llama_fn.compiler.signature import Signature
from llama_fn.compiler.traced import Compiled, Lowered, Traced
from llama_fn.distributed import Processes
from llama_fn.files import atomic
from llama_fn.tree import Tree
from sharding import P
from sharding.mesh import Mesh
from sharding.rules import Rules

log = logging.getLogger("llama_fn.kept")
FOLDER = "steps"
LEAF = "leaf"
Said = Sequence[tuple[str, int, str]]  # what was said on the way: logger, level, text


class KeptLowered(Lowered):
    """A lowered step that is known by its arguments and results; its graphs are made by `again` when they are asked
    for."""

    def __init__(
        self, name: str, signature: Signature, local: Signature, mesh: Mesh, rules: Rules, inputs: tuple[P, ...],
        outputs: tuple[P, ...], again: Callable[[], Lowered],
    ) -> None:  # fmt: skip
        known = {"mesh": mesh, "rules": rules, "inputs": inputs, "outputs": outputs, "seconds": 0.0, "stage": 0}
        own = {"_name": name, "_signature": signature, "local_signature": local, "_make": again}
        self.__dict__.update(known | own)  # it is frozen

    @property
    def name(self) -> str:
        """The name of the function."""
        return str(self.__dict__["_name"])

    @property
    def signature(self) -> Signature:
        """Paths, shapes and dtypes of arguments and results, all global."""
        signature: Signature = self.__dict__["_signature"]
        return signature

    @property
    def by_stage(self) -> tuple[Lowered, ...]:
        """Itself: steps of pipelines are not kept."""
        return (self,)

    def of_rank(self, rank: int) -> Lowered:
        """Itself, of every device."""
        return self

    @cached_property
    def _again(self) -> Lowered:
        lowered: Lowered = self.__dict__["_make"]()
        return lowered

    @cached_property
    def traced(self) -> Traced:
        """Traced again."""
        return self._again.traced

    @cached_property
    def graphs(self) -> tuple[torch.fx.GraphModule, ...]:
        """Lowered again."""
        return self._again.graphs


@dataclass(frozen=True)
class Asked:
    """What is asked for: the key, the arguments, where the step is to run, and how its graphs are made."""

    key: str
    args: Sequence[Tree]
    mesh: Mesh
    rules: Rules
    processes: Processes | None
    device: str
    again: Callable[[], Lowered]


def keep(cache: Path, key: str, compiled: Compiled, said: Said) -> bool:
    """Write an entry, if all of the step can be written; whether it was. A disk that does not take it is said."""
    plain, lowered = compiled.executable.plain, compiled.lowered
    signature, folder = lowered.signature, cache.absolute()
    result = _result(signature)
    if plain is None or result is None:
        return False
    kernels = [file for code in plain.codes for file, _ in code.kernels.values()]
    files = [*kernels, *(o.file for o in compiled.executable.origins if o.file)]
    if not all(file.is_relative_to(folder) for file in files):  # loaded before by this process, from elsewhere
        return False
    entry = {
        "name": lowered.name,
        "arguments": signature.argument_names,
        "donated": signature.donated,
        "result": result,
        "paths": signature.out_paths,
        "local": [info.shape for info in lowered.local_signature.in_infos],
        "inputs": [_layout(p) for p in lowered.inputs],
        "outputs": [_layout(p) for p in lowered.outputs],
        "order": [plain.order.inputs, plain.order.steps, plain.order.results],
        "groups": {text: [group.name, group.index] for text, group in plain.groups.items()},
        "codes": [
            [code.source, {name: [str(file.relative_to(folder)), f] for name, (file, f) in code.kernels.items()}]
            for code in plain.codes
        ],
        "origins": [[o.key, str(o.file.relative_to(folder))] for o in compiled.executable.origins if o.file],
        "text": compiled.executable.text,
        "said": said,
    }
    try:
        with code_cache.opened(folder):
            (folder / FOLDER).mkdir(exist_ok=True)
            with atomic(_entry(folder, key)) as f:
                json.dump(entry, f)
    except OSError as error:
        log.warning("the compiled %s is not kept whole, and a later start traces it again: %s", lowered.name, error)
        return False
    return True


def is_there(cache: Path, key: str) -> bool:
    """Whether there is an entry; damage shows when it is loaded."""
    return _entry(cache.absolute(), key).exists()


def _entry(folder: Path, key: str) -> Path:
    return folder / FOLDER / f"{key}.json"


def load(cache: Path, asked: Asked) -> tuple[Compiled, Said] | None:
    """The step under this key and what was said when it was compiled, or None where it, or code that it needs, is not
    there."""
    start, folder = time.perf_counter(), cache.absolute()
    file = _entry(folder, asked.key)
    if not file.exists():
        return None
    with code_cache.opened(folder):
        try:
            entry = json.loads(file.read_bytes())
        except FileNotFoundError:  # it was damaged, and removed
            return None
        if not _groups_are(entry["groups"], asked.processes):
            return None
        codes = [compat.PlainCode(s, {n: (folder / at, f) for n, (at, f) in k.items()}) for s, k in entry["codes"]]
        files = [file for code in codes for file, _ in code.kernels.values()]
        origins = tuple(backends.CodeOrigin(key, folder / at, True) for key, at in entry["origins"])
        if not all(each.exists() for each in [*files, *(o.file for o in origins if o.file)]):
            return None
        runs = [compat.loaded_plain(code) for code in codes]
    run_all = follow(Order(*entry["order"]), runs)

    @torch.no_grad()
    def run(flat: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return run_all(list(flat))

    executable = backends.Executable(
        run, entry["text"], origins, local=asked.processes is not None, device=asked.device,
        code="\n".join(code.source for code in codes),
    )  # fmt: skip
    return Compiled(_lowered(entry, asked), "inductor", executable, time.perf_counter() - start), entry["said"]


def _lowered(entry: Mapping[str, Any], asked: Asked) -> Lowered:
    leaves = Leaves.of(entry["arguments"], asked.args)
    result = tree.flatten(_result_of(entry["result"], asked.args))[1]
    signature = Signature(
        leaves.spec, tuple(leaves.paths), tuple(leaves.given), result, tuple(entry["paths"]),
        tuple(entry["donated"]), tuple(entry["arguments"]),
    )  # fmt: skip
    shapes = zip(signature.in_infos, entry["local"], strict=True)
    local = replace(signature, in_infos=tuple(replace(info, shape=tuple(shape)) for info, shape in shapes))
    inputs, outputs = (tuple(P.of(*each) for each in entry[name]) for name in ("inputs", "outputs"))
    return KeptLowered(entry["name"], signature, local, asked.mesh, asked.rules, inputs, outputs, asked.again)


def _groups_are(known: Mapping[str, Sequence[Any]], processes: Processes | None) -> bool:
    """Whether this process's groups have the names that the code calls them by, and it the same places in them."""
    if processes is None:
        return not known
    groups = processes.groups(known)
    return all([groups[text].name, groups[text].index] == list(group) for text, group in known.items())


def _layout(p: P) -> tuple[Any, ...]:
    return p.by_dim, sorted(p.unreduced)


def _result(signature: Signature) -> Any:
    """The tree of the results as JSON holds it: donated arguments by their number, else tuples and dicts of leaves.
    None where it is more than that."""
    whole = tree.unflatten(signature.out_spec, [LEAF] * len(signature.out_paths))
    parts = list(whole) if isinstance(whole, tuple) else [whole]
    parts[: len(signature.donated)] = [{"argument": number} for number in signature.donated]
    return {"parts": parts, "alone": not isinstance(whole, tuple)} if all(map(_is_plain, parts)) else None


def _is_plain(part: Any) -> bool:
    return part == LEAF or (isinstance(part, dict) and all(isinstance(x, int) or _is_plain(x) for x in part.values()))


def _result_of(kept: Mapping[str, Any], args: Sequence[Tree]) -> Tree:
    parts = [
        args[part["argument"]] if isinstance(part, dict) and "argument" in part else part for part in kept["parts"]
    ]
    return parts[0] if kept["alone"] else tuple(parts)
