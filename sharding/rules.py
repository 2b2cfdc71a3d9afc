"""Rules: which mesh axes each logical axis is laid over, one table for each kind of tensor.

    params     parameters between steps
    moments    optimizer state between steps, and gradients once they are reduced
    compute    weights, activations and batches while the step runs

A logical axis that a table does not name is replicated; a mesh axis that the mesh does not have is passed over. So one
preset serves every mesh, and data parallelism over nodes and devices is `("node", "data")`.

At rest, layers lie over the stages of a pipeline, and so do the rows of the embedding and of the head, which the whole
pipeline gathers once a step. Every preset says so: all compose with `pipe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sharding.mesh import Mesh
from sharding.spec import P
from sharding.stages import PIPE

Table = Mapping[str, tuple[str, ...]]
TABLES = ("params", "moments", "compute")


@dataclass(frozen=True)
class Rules:
    """Three tables from logical axis to mesh axes, outermost first. `replicated`: mesh axes whose devices are meant to
    be copies of one another. `blocks`: of how many layers each is that the stages of a pipeline take in turn."""

    name: str
    params: Table
    moments: Table
    compute: Table
    replicated: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()

    def layout(self, axes: tuple[str | None, ...], table: str, mesh: Mesh) -> P:
        """The sharding over `mesh` of a tensor with these logical axes; ValueError if a mesh axis is used twice."""
        rules: Table = getattr(self, table)
        sizes = dict(mesh.axes)
        dims = [tuple(m for m in rules.get(axis, ()) if sizes.get(m, 1) > 1) if axis else () for axis in axes]
        stacked = axes[:1] == ("layers",) and dims[0] == (PIPE,)
        try:
            return P.of(dims, blocks=self.blocks if stacked else ())
        except ValueError as error:
            raise ValueError(f"rules {self.name}, table {table}, logical axes {axes}: {error}") from None


DATA = ("node", "data")
_HEADS = {"heads": ("model",), "kv_heads": ("model",), "mlp": ("model",), "vocab": ("model",)}
_WHOLE: Table = {"attn_seq": (), "head_dim": (), "layers": ()}  # named so that annotations may say it: whole
_DP_COMPUTE = {"batch": DATA, **_WHOLE}
_TP_COMPUTE = {
    **_DP_COMPUTE, **_HEADS, "seq": ("model",), "attn_heads": ("model",), "attn_kv_heads": ("model",),
}  # fmt: skip
_ULYSSES_COMPUTE = {
    **_TP_COMPUTE, "seq": ("context", "model"), "full_seq": ("context",),
    "attn_heads": ("model", "context"), "attn_kv_heads": ("model", "context"),
}  # fmt: skip
_STAGED: Table = {"layers": (PIPE,), "vocab": (PIPE,)}
_FSDP = {"embed": DATA, **_STAGED}
_TP = {**_HEADS, "layers": (PIPE,), "vocab": ("model", PIPE)}
_FSDP_TP = {**_TP, "embed": DATA}
_FSDP_ULYSSES = {**_TP, "embed": (*DATA, "context")}

# A token of each row at a time: heads, mlp and vocabulary are shared out, and there is no sequence to share.
_DECODING: Table = {**_HEADS, **_WHOLE, "attn_heads": ("model",), "attn_kv_heads": ("model",)}


def decoding(mesh: Mesh) -> Rules:
    """For generation: over `model`; devices along other axes are copies of one another."""
    copies = tuple(name for name, size in mesh.axes if name != "model")
    return Rules("decoding", _HEADS, _HEADS, _DECODING, copies)


PRESETS = {
    rules.name: rules
    for rules in (
        Rules("dp", _STAGED, _STAGED, _DP_COMPUTE),
        Rules("zero1", _STAGED, _FSDP, _DP_COMPUTE),
        Rules("fsdp", _FSDP, _FSDP, _DP_COMPUTE),
        Rules("tp_sp", _TP, _TP, _TP_COMPUTE),
        Rules("fsdp_tp", _FSDP_TP, _FSDP_TP, _TP_COMPUTE),
        Rules("fsdp_tp_ulysses", _FSDP_ULYSSES, _FSDP_ULYSSES, _ULYSSES_COMPUTE),
    )
}
