"""The op set of a LLaMA training step: one record per op, importable without anything else of the project."""

__version__ = "0.1.0"

from kernels.attention import attention
from kernels.barrier import barrier
from kernels.bias import bias
from kernels.checkpoint_name import checkpoint_name
from kernels.cross_entropy import cross_entropy
from kernels.decoding import cached, cached_attention
from kernels.einsum import einsum
from kernels.embedding import embedding
from kernels.head_cross_entropy import head_cross_entropy
from kernels.layers import stack, unbind
from kernels.rms_norm import rms_norm
from kernels.rope import rope, rope_table
from kernels.rows import join_rows, split_rows
from kernels.swiglu import swiglu
from kernels.vocab_parallel import SHARDED_VOCABULARY
from kernels.weighted_sum import weighted_sum

__all__ = [
    "SHARDED_VOCABULARY",
    "attention",
    "barrier",
    "bias",
    "cached",
    "cached_attention",
    "checkpoint_name",
    "cross_entropy",
    "einsum",
    "embedding",
    "head_cross_entropy",
    "join_rows",
    "rms_norm",
    "rope",
    "rope_table",
    "split_rows",
    "stack",
    "swiglu",
    "unbind",
    "weighted_sum",
]
