"""What a traced function is, stage by stage: the global graph, the graph of a device, the executable (stages.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from llama_fn import compat, tree
from llama_fn.compiler import backends, calls, cost, ir, liveness, overview, passes
from llama_fn.compiler.arguments import spoil
from llama_fn.compiler.garbage import uncollected
from llama_fn.compiler.graph import Graph
from llama_fn.compiler.lowering import lowered_graphs
from llama_fn.compiler.passes.fuse import report as fusion_report
from llama_fn.compiler.passes.partition import rules_named
from llama_fn.compiler.passes.remat_regions import Remat
from llama_fn.compiler.resize import resized, without_extent
from llama_fn.compiler.signature import Signature, is_within
from llama_fn.config import MeshConfig
from llama_fn.errors import UserError, nearest
from llama_fn.model.arrays import abstract, describe
from llama_fn.tree import Tree
from sharding import P, collectives_table
from sharding.mesh import Mesh
from sharding.rules import Rules
from sharding.stages import Pipeline, stage_of


@dataclass(frozen=True, repr=False)
class Traced(Graph):
    """The global graph of a function: no mesh, no device, our op set and plain pointwise aten."""

    name: str
    graph_module: torch.fx.GraphModule
    signature: Signature
    seconds: float

    @property
    def title(self) -> str:
        """The name of the function and of the stage."""
        return f"{self.name} traced"

    @property
    def aliases(self) -> Sequence[tuple[int, int]]:
        """(input, result) of every donated input: the result takes its buffer."""
        return self.signature.aliases

    def flat(self) -> torch.fx.GraphModule:
        """The graph with every call written out."""
        return passes.written_out(self.graph_module)

    @uncollected()
    def resized(self, *args: Tree) -> Traced:
        """The trace for another batch size, for a tenth of the time that tracing takes.

        ValueError where more than the extent of `batch` axes differs from what was traced, or where an op does not take
        it.
        """
        start = time.perf_counter()
        leaves, spec = tree.flatten(tuple(args))
        infos = tuple(abstract(x) for x in leaves)
        if spec != self.signature.in_spec:
            raise ValueError(f"{self.name} was traced for arguments of another structure")
        for path, was, info in zip(self.signature.in_paths, self.signature.in_infos, infos, strict=True):
            if without_extent(was, "batch") != without_extent(info, "batch"):
                raise ValueError(
                    f"{path} differs in more than the batch size: {self.name} was traced for {describe(was)}, given is "
                    f"{describe(info)}. Trace for it instead"
                )
        signature = replace(self.signature, in_infos=infos)
        gm = resized(self.graph_module, infos)
        signature.check_donation(ir.results(gm.graph))
        return Traced(self.name, gm, signature, time.perf_counter() - start)

    @uncollected()
    def lower(
        self, mesh: Mesh | None = None, rules: str | Rules = MeshConfig.rules, without: Collection[str] = (),
        fuse: bool = False, remat: str | Remat = "none", observe: passes.Observer = passes.unobserved,
        first: Collection[passes.Pass] = (), pipeline: Pipeline | None = None,
    ) -> Lowered:  # fmt: skip
        """The graph of one device of `mesh` (default: a single device), sharded by `rules` or a preset's name,
        by default that of the flags. On a mesh with an axis `pipe` there is one for each stage, and `pipeline` says how
        the model is cut and in which order the stages work.

        `without` names passes of passes.OPTIONAL to leave out; `fuse` asks for passes/fuse.py; `remat` is what layers
        compute again in the backward, or the policy alone; `observe` sees the graph after partitioning and each pass;
        `first` are passes of your own, run on the graph of one device before ours (docs/extending.md).
        UserError where a dimension is not divisible, or an annotation is missing or wrong.
        """
        for name in without:
            if name not in passes.OPTIONAL:
                raise UserError(f"pass {name!r} cannot be left out. {nearest(name, passes.OPTIONAL)}")
        mesh, rules = mesh or Mesh(), rules_named(rules)
        start, signature = time.perf_counter(), self.signature
        left_out = {*without, *([] if fuse else ["fuse"])}
        chosen = [*first, *(each for each in passes.LOWERING if each.__name__ not in left_out)]
        remat = Remat(remat) if isinstance(remat, str) else remat
        graphs, parts, rules = lowered_graphs(
            self.graph_module, signature, mesh, rules, chosen, remat, observe, pipeline or Pipeline()
        )
        taken = {o for _, o in signature.aliases}
        outputs = tuple(layout for o, layout in enumerate(parts.outputs) if o not in taken)
        return Lowered(self, graphs, mesh, rules, parts.inputs, outputs, time.perf_counter() - start)


@dataclass(frozen=True, repr=False)
class Lowered(Graph):
    """The graph that one device runs; donated inputs are overwritten at its end.

    Of a pipeline there is a graph for each stage: `graphs` has them all, and what a Lowered answers is of `stage`.
    `inputs` and `outputs` are the shardings of its arguments and of the results that take no donated buffer.
    """

    traced: Traced
    graphs: tuple[torch.fx.GraphModule, ...]
    mesh: Mesh
    rules: Rules
    inputs: tuple[P, ...]
    outputs: tuple[P, ...]
    seconds: float
    stage: int = 0

    @property
    def graph_module(self) -> torch.fx.GraphModule:  # type: ignore[override]
        """The graph of its stage."""
        return self.graphs[self.stage]

    @property
    def by_stage(self) -> tuple[Lowered, ...]:
        """The same of every stage, the first first; of no pipeline itself alone."""
        return tuple(replace(self, stage=stage) for stage in range(len(self.graphs)))

    def of_rank(self, rank: int) -> Lowered:
        """The same of a device's stage."""
        return replace(self, stage=stage_of(self.mesh, rank))

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.traced.name

    @property
    def signature(self) -> Signature:
        """Paths, shapes and dtypes of arguments and results, all global."""
        return self.traced.signature

    @property
    def title(self) -> str:
        """The name of the function and of the stage."""
        of = f", stage {self.stage}" if len(self.graphs) > 1 else ""
        return f"{self.name} lowered for {self.mesh}, rules {self.rules.name}{of}"

    def _output_shapes(self) -> tuple[tuple[int, ...], ...]:
        taken = {o for _, o in self.signature.aliases}
        results = ir.results(self.traced.graph_module.graph)
        return tuple(tuple(compat.node_value(r).shape) for o, r in enumerate(results) if o not in taken)

    def collectives(self) -> list[collectives_table.Collective]:
        """What goes over the mesh in one step, and which annotation asked for it."""
        return collectives_table.collectives(calls.counted(self.graph_module))

    def as_text(self, scope: str = "") -> str:
        """The graph of one device, the table of its collectives, and what fused or did not; with `scope`, the ops of
        that alone."""
        if scope:
            return super().as_text(scope)
        rows, notes = self.collectives(), fusion_report(calls.counted(self.graph_module))
        table = collectives_table.as_text(rows) if rows else ""
        return "\n\n".join(filter(None, (super().as_text(), table, "\n".join(notes))))

    def layouts_of(self, argument: str) -> list[P]:
        """The shardings of the leaves of one argument, by its name: "batch"."""
        paths = self.signature.in_paths
        return [layout for path, layout in zip(paths, self.inputs, strict=True) if is_within(path, argument)]

    @cached_property
    def local_signature(self) -> Signature:
        """The signature in one device's shapes."""
        shapes = [tuple(compat.node_value(node).shape) for node in ir.placeholders(self.graph_module.graph)]
        infos = (replace(i, shape=s) for i, s in zip(self.signature.in_infos, shapes, strict=True))
        return replace(self.signature, in_infos=tuple(infos))

    @property
    def argument_bytes(self) -> int:
        """What its arguments take of one device."""
        return sum(info.bytes for info in self.local_signature.in_infos)

    def compile(self, backend: str | Callable[..., backends.Executable] = "inductor", **options: Any) -> Compiled:
        """An executable; `options` are the backend's keyword arguments (see compiler/backends/). A backend is a name or
        a function of the same signature as theirs."""
        start = time.perf_counter()
        infos = enumerate(self.signature.in_infos)
        weights = tuple(i for i, x in infos if x.stays or (x.axes and "batch" not in x.axes))
        shapes = self._output_shapes()
        program = backends.Program(self.graphs, self.mesh, self.inputs, self.outputs, shapes, weights)
        make = backends.get(backend) if isinstance(backend, str) else backend
        executable = make(program, **options)
        name = backend if isinstance(backend, str) else backend.__name__
        return Compiled(self, name, executable, time.perf_counter() - start)


@dataclass(frozen=True, repr=False)
class Compiled:
    """Callable with the trees that were traced. `from_cache`: nothing was compiled, earlier code was loaded."""

    lowered: Lowered
    backend: str
    executable: backends.Executable
    seconds: float

    @property
    def from_cache(self) -> bool:
        """Whether nothing was compiled and earlier code was loaded."""
        return bool(self.executable.origins) and all(origin.from_cache for origin in self.executable.origins)

    def __call__(self, *args: Tree, **kwargs: Tree) -> Tree:
        """The function's results. Donated arguments are overwritten; where the call is interrupted, by an error or by
        Ctrl-C, they are refused from then on, as some may hold new values and others old ones."""
        signature = self.lowered.local_signature if self.executable.local else self.lowered.signature
        leaves = signature.inputs(args, kwargs, f"compiled {self.lowered.name}", self.executable.device)
        try:
            flat = list(self.executable.run(leaves))
        except BaseException:
            spoil(leaves[i] for i in signature.overwritten)
            raise
        for i, o in signature.aliases:
            flat.insert(o, leaves[i])
        return tree.unflatten(signature.out_spec, flat)

    def as_text(self, scope: str = "") -> str:
        """The graph that the backend runs; with `scope`, such as layers/0/mlp, those ops of the lowered graph that it
        was made of."""
        return self.lowered.as_text(scope) if scope else self.executable.text

    def __str__(self) -> str:
        return self.as_text()

    def __repr__(self) -> str:
        return overview.text(self.lowered, self._facts())

    def _repr_html_(self) -> str:
        return overview.page(self.lowered, self._facts())

    def _facts(self) -> list[str]:
        how = "loaded from the cache" if self.from_cache else "compiled"
        return [f"{how} with {self.backend} in {self.seconds:.1f} s", *map(str, self.executable.origins[:1])]

    def cost_analysis(self) -> cost.Cost:
        """Of the lowered graph: what the backend makes of it is not counted."""
        return self.lowered.cost_analysis()

    def memory_analysis(self) -> liveness.Memory | None:
        """What the backend measured of its last call, or None where it measures nothing."""
        return self.executable.measured(self.lowered.stage)
