"""Every private torch symbol that the project touches, pinned to torch 2.13. When torch moves, this folder moves.

Functions here say what is wanted in terms of public ideas (a traced graph, a compiled graph) and hide how torch spells
it this year.
"""

from llama_fn.compat.distributed import Group, collective_forms, collectives_entered, group_name, is_collective
from llama_fn.compat.gloo import register_gloo_collectives
from llama_fn.compat.inductor import (
    CompiledGraph,
    GraphSource,
    inductor_compile,
    inductor_decompositions,
    keep_compiled_code,
    missing_tool,
)
from llama_fn.compat.inductor_ranges import ranges_in_code
from llama_fn.compat.native import (
    cpu_model,
    flash_attention,
    flash_attention_backward,
    keep_memory,
    physical_cores,
    slow_products,
)
from llama_fn.compat.npu import (
    CONVERTED,
    CONVERTED_IN_GROUP,
    TORCH_NPU,
    GeGraph,
    cann_version,
    ge_convert,
    load_torchair,
    name_group,
    names_groups,
    without_converter,
)
from llama_fn.compat.npu_schemas import define_npu_ops
from llama_fn.compat.plain_code import PlainCode
from llama_fn.compat.plain_code import loaded as loaded_plain
from llama_fn.compat.repeat_body import add_body, is_inlined
from llama_fn.compat.tracing import (
    DATA_DEPENDENT,
    INVOKE_SUBGRAPH,
    FakeTensors,
    check_torch_version,
    graph_module,
    labels,
    node_value,
)

__all__ = [
    "CONVERTED",
    "CONVERTED_IN_GROUP",
    "DATA_DEPENDENT",
    "INVOKE_SUBGRAPH",
    "TORCH_NPU",
    "CompiledGraph",
    "FakeTensors",
    "GeGraph",
    "GraphSource",
    "Group",
    "PlainCode",
    "add_body",
    "cann_version",
    "check_torch_version",
    "collective_forms",
    "collectives_entered",
    "cpu_model",
    "define_npu_ops",
    "flash_attention",
    "flash_attention_backward",
    "ge_convert",
    "graph_module",
    "group_name",
    "inductor_compile",
    "inductor_decompositions",
    "is_collective",
    "is_inlined",
    "keep_compiled_code",
    "keep_memory",
    "labels",
    "load_torchair",
    "loaded_plain",
    "missing_tool",
    "name_group",
    "names_groups",
    "node_value",
    "physical_cores",
    "ranges_in_code",
    "register_gloo_collectives",
    "slow_products",
    "without_converter",
]
