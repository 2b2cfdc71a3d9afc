"""torchair, the graph engine of torch_npu 2.13: FX graphs become Ascend GE graphs. Everything here needs torch_npu."""

from __future__ import annotations

import ast
import copy
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llama_fn.compat import ge_streams

TORCH_NPU = "2.13.0"
# Our ops that ge_converters.py converts as they are
CONVERTED = ("matmul", "barrier", "send", "receive", "received")
CONVERTED_IN_GROUP = ("all_gather_matmul", "matmul_reduce_scatter")  # the same, with the group's name for the axes


def load_torchair() -> Any:
    """torchair with our converters registered."""
    import torch_npu  # noqa: F401
    import torchair

    from llama_fn.compat import ge_converters  # noqa: F401

    return torchair


def _config(torchair: Any) -> Any:
    config = torchair.CompilerConfig()
    config.experimental_config.enable_ref_data = True  # donated inputs are updated in place
    config.experimental_config.topology_sorting_strategy = "StableRDFS"  # our order, which overlaps collectives
    # The graph is as our passes left it: nothing is removed or fused that the dump does not show.
    config.experimental_config.remove_noop_ops = False
    config.experimental_config.pattern_fusion_pass = False
    config.export.experimental.enable_record_nn_module_stack = True  # carries our scopes to the GE ops
    return config


def cann_version() -> str:
    """Of CANN, as torch_npu finds it."""
    import torch_npu

    return str(torch_npu.npu.utils.get_cann_version())


def names_groups() -> bool:
    """Whether CANN's HCCL lets a process group have a name of ours."""
    import torch_npu

    return bool(torch_npu.distributed._is_support_hccl_comm_name())


def name_group(group: Any, name: str) -> None:
    """Have HCCL call this process's group `name`, as at every start and on every rank, where it can. By itself it
    counts groups, or takes address and time."""
    if names_groups():
        group._get_backend(torch.device("npu"))._set_hccl_comm_name(name)


def without_converter(targets: Sequence[Any]) -> list[Any]:
    """The operators among `targets` that torchair has no converter for; most of its converters only raise."""
    from torchair._ge_concrete_graph.fx2ge_converter import _get_converter

    return [t for t in targets if (converter := _get_converter(t)) is None or _only_raises(inspect.unwrap(converter))]


def _only_raises(fn: Callable[..., Any]) -> bool:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(fn))).body
    assert isinstance(definition, ast.FunctionDef)
    body = [s for s in definition.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return len(body) == 1 and isinstance(body[0], ast.Raise)


@dataclass(frozen=True)
class GeGraph:
    """A converted graph. `run(inputs)` compiles it on the NPU at its first call; donated inputs are overwritten."""

    graph: Any  # torchair's GeConcreteGraph
    run: Callable[..., Sequence[torch.Tensor]]
    shapes: Mapping[str, list[int]]  # of "node.result"; torchair's own notes are overwritten by later views

    @cached_property
    def proto(self) -> Any:
        """The GraphDef as GE gets it: donated inputs are RefData, which torchair makes of them at the first call."""
        proto = copy.deepcopy(self.graph.graph._proto)
        written = set(self.written().values())
        for op in proto.op:
            if op.type == "Data" and op.attr["index"].i in written:
                op.type = "RefData"
        return proto

    def pbtxt(self) -> str:
        """The GraphDef as protobuf text, which netron opens."""
        from google.protobuf import text_format

        return str(text_format.MessageToString(self.proto))

    def air(self) -> bytes:
        """The same as a model file of GE (.air), as torchair's export writes it and CANN's `atc` reads it: a ModelDef.
        ValueError for more than the 2 GB that such a file may have."""
        model = copy.deepcopy(self.graph.graph._model)
        model.graph[0].CopyFrom(self.proto)
        return bytes(model.SerializeToString())

    def used(self) -> list[int]:
        """Our input of every GE input; an input that nothing reads is not passed on."""
        return [info.func.fx_input_idx for info in self.graph._input_info_list]

    def written(self) -> Mapping[int, int]:
        """Which GE input's buffer takes which GE result."""
        return dict(self.graph._graph_output_ref_input)

    def keep_in(self, cache: Path) -> str:
        """Have GE keep the compiled graph in a folder of `cache`, and load it from there where it is; returns the key,
        the name of the folder: a hash of the graph, torchair's options, and the versions of what compiles it."""
        import torch_npu

        local, glob = self.graph._normalize_ge_option()
        versions = [torch_npu.__version__, cann_version(), torch.npu.get_device_name()]  # type: ignore[attr-defined]
        hashed = hashlib.sha256(self.proto.SerializeToString(deterministic=True))
        hashed.update(json.dumps([local, glob, versions], sort_keys=True, default=str).encode())
        key = hashed.hexdigest()
        given = {"ge.graph_compiler_cache_dir": str(cache / key), "ge.graph_key": key}
        self.graph._normalize_ge_option = lambda: ({**local, **given}, glob)
        return key

    def options(self, kept: Mapping[int, int], positions: Mapping[str, int]) -> str:
        """JSON: what torchair passes to GE; the ranks of each group; which of our inputs the GE inputs are, which of
        them each GE result overwrites, and which GE results, views of inputs or, as `kept` says, inputs are ours; the
        positions, by mesh axes, that the graph takes behind our inputs."""
        local, glob = self.graph._normalize_ge_option()
        results = [self._result(i) for i in range(len(self.graph._fx_outputs))]
        for number, i in sorted(kept.items()):
            results.insert(number, {"input": i})
        groups = {name: list(ranks) for name, (ranks, _) in self.graph.graph.used_process_group.items()}
        options = {
            "global": glob, "graph": local, "groups": groups, "inputs": self.used(), "written_inputs": self.written(),
            "results": results, "positions": dict(positions),
        }  # fmt: skip
        return json.dumps(options, indent=1, default=str)

    def _result(self, i: int) -> int | dict[str, Any]:
        """Which GE result our i-th is. A view of an input is none: torchair takes it when the graph has run."""
        if i in self.graph._fx_outputs_mapping:
            return int(self.graph._fx_outputs_mapping[i])
        view = self.graph._fx_outputs[i]
        return {
            "view_of": view._fx_input_index, "shape": view._ori_meta_shape, "stride": view._ori_meta_stride,
            "offset": view._ori_meta_offset,
        }  # fmt: skip


def ge_convert(
    gm: torch.fx.GraphModule, inputs: Sequence[torch.Tensor], scopes: Mapping[str, str], streams: Mapping[str, str]
) -> GeGraph:
    """`gm`, whose inputs are like the fake `inputs`, as one GE graph; `scopes` by node name are written on its ops,
    `streams` by group on its collectives (ge_streams.py)."""
    torchair = load_torchair()
    compiler = torchair.get_compiler(_config(torchair))
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            node.target = node.name  # by which torchair names the input
        if node.name in scopes:
            node.meta["nn_module_stack"] = scopes[node.name]
    gm.recompile()
    with inputs[0].fake_mode:  # type: ignore[attr-defined]
        run = compiler(gm, list(inputs))
    ge_streams.arrange(run.runner.graph, streams)
    return GeGraph(run.runner, run, _shapes(gm))


def _shapes(gm: torch.fx.GraphModule) -> dict[str, list[int]]:
    shapes = {}
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        for i, one in enumerate(value if isinstance(value, (tuple, list)) else [value]):
            if isinstance(one, torch.Tensor):
                shapes[f"{node.name}.{i}"] = list(one.shape)
    return shapes
