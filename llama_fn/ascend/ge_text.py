"""The readable text of an Ascend GE graph: a line per op with shapes, inputs by name, attributes, phase and scope."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

STREAM = "_user_stream_label"
SCOPE = "nn_module_stack"  # the attribute that carries "phase scope"
_TRACED = "_fx_tensor_name"  # "node-target.OUTPUT.result" of the traced node that an op's result is


def ge_text(proto: Any, shapes: Mapping[str, list[int]]) -> str:
    """A line per op of a GraphDef, in its order; `shapes` by traced node and result, which ops are marked with."""
    return "\n".join([f"ge graph {proto.name} {{", *(f"  {_line(op, shapes)}" for op in proto.op), "}"]) + "\n"


def ge_scopes(proto: Any) -> dict[str, str]:
    """ "phase scope" of each op by its name, which is how profilers of the device call it."""
    return {op.name: op.attr[SCOPE].s.decode() for op in proto.op if SCOPE in op.attr}


def _line(op: Any, shapes: Mapping[str, list[int]]) -> str:
    results = ", ".join(_described(desc, shapes) for desc in op.output_desc)
    operands = ", ".join(_operands(op))
    named = sorted((k, v) for k, v in op.attr.items() if not k.startswith("_") and k != SCOPE)
    attributes = "".join(f" {k}={_value(v)}" for k, v in named)
    edges = [given.removesuffix(":-1") for given in op.input if given.endswith(":-1")]
    after = f" after {', '.join(f'%{name}' for name in edges)}" if edges else ""
    stream = f" stream={op.attr[STREAM].s.decode()}" if STREAM in op.attr else ""
    scope = f"  # {op.attr[SCOPE].s.decode()}" if SCOPE in op.attr else ""
    return f"%{op.name}: {results} = {op.type}({operands}){attributes}{stream}{after}{scope}"


def _operands(op: Any) -> Iterator[str]:
    names = [desc.name for desc in op.input_desc]
    for i, given in enumerate(given for given in op.input if not given.endswith(":-1")):  # control edges apart
        if given:  # an optional one may not be
            producer, _, index = given.rpartition(":")
            yield f"{names[i] if i < len(names) else i}=%{producer}{'' if index == '0' else '#' + index}"


def _described(desc: Any, shapes: Mapping[str, list[int]]) -> str:
    """dtype and shape; the shape of what a converter made on the way is GE's to infer."""
    dtype = desc.DESCRIPTOR.fields_by_name["dtype"].enum_type.values_by_number[desc.dtype].name.removeprefix("DT_")
    node, _, index = (desc.attr[_TRACED].s.decode() if _TRACED in desc.attr else "").partition("-")
    shape = shapes.get(f"{node}.{index.rpartition('.')[2]}")
    if shape is None and "_meta" in desc.attr:
        known = re.search(r"torch\.Size\((\[.*?\])\)", desc.attr["_meta"].s.decode())
        return f"{dtype}{known[1]}" if known else f"{dtype}[?]"
    return f"{dtype}{shape if shape is not None else list(desc.shape.dim) or '[?]'}"


def _value(attr: Any) -> str:
    kind = attr.WhichOneof("value")
    if kind == "s":
        return str(attr.s.decode(errors="replace"))
    if kind == "list":
        held = next((list(getattr(attr.list, f)) for f in ("i", "f", "b", "s") if getattr(attr.list, f)), [])
        return str(held)
    if kind == "t":
        return f"<{list(attr.t.desc.shape.dim)} {len(attr.t.data)} bytes>"
    return str(getattr(attr, kind)) if kind else ""
