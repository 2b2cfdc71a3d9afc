"""Every default of the project, in frozen dataclasses without torch. A Config builds nothing and holds nothing live.

run_config.py has the section `run`. config_fields.py says what a field's declaration means; config_checks.py holds a
Config to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llama_fn.config_fields import number, opt
from llama_fn.run_config import RunConfig

__all__ = ["Config", "DataConfig", "MeshConfig", "ModelConfig", "OptimConfig", "RunConfig"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of a LLaMA. Letters: D embed, N heads, K kv_heads, F mlp, V vocab, L layers."""

    preset: str = opt("llama_tiny", "model preset; the other --model flags change single values of it")
    num_layers: int = number(4, "L", 1, 1000)
    embed_dim: int = number(256, "D", 1)
    num_heads: int = number(4, "N, query heads", 1)
    num_kv_heads: int = number(4, "K, key and value heads; N / K query heads share one (GQA)", 1)
    head_size: int = number(0, "H, numbers of a head; 0: D / N", 0)
    mlp_dim: int = number(688, "F", 1)
    vocab_size: int = number(4096, "V, rows of the embedding, padding included", 1)
    norm_eps: float = number(1e-6, "epsilon of RMSNorm", 0.0, 1.0)
    rope_theta: float = number(10000.0, "base of the rotary frequencies", 0.0, open=True)
    rope_factor: float = number(1.0, "Llama 3.1's scaling of slow rotary frequencies: divided by this; 1: none", 1.0)
    rope_low_freq: float = number(1.0, "of Llama 3.1's scaling: fewer turns than this in rope_length are slow", 0.0)
    rope_high_freq: float = number(4.0, "of Llama 3.1's scaling: more turns than this in rope_length stay", 0.0)
    rope_length: int = number(8192, "of Llama 3.1's scaling: sequence that the model was trained on before", 1)
    qkv_bias: bool = opt(False, "add biases to queries, keys and values, as Qwen 2 does")
    qk_norm: bool = opt(False, "RMSNorm on the queries and keys of each head, as Qwen 3 does")
    tie_embeddings: bool = opt(False, "use the embedding table as the output head")
    init_std: float = number(0.02, "standard deviation of the initial matrices", 0.0)
    init_scaled: bool = opt(True, "divide the std of wo and w_down by sqrt(2 L)")
    compute_dtype: Literal["fp32", "bf16", "fp16", "fp64"] = opt(
        "fp32", "dtype of forward and backward; masters are fp32, or fp64 to check against"
    )
    fused_head: bool = opt(
        False,
        "compute head and loss in small blocks of tokens: least memory; with a sharded vocabulary or in a pipeline, "
        "one more head product",
    )

    @property
    def head_dim(self) -> int:
        """H."""
        return self.head_size or self.embed_dim // self.num_heads

    @property
    def rope_scaling(self) -> tuple[float, ...]:
        """What rope_table takes of Llama 3.1's scaling; nothing without."""
        scaled = (self.rope_factor, self.rope_low_freq, self.rope_high_freq, float(self.rope_length))
        return scaled if self.rope_factor != 1.0 else ()


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with global-norm clipping and a schedule. The schedule counts updates: iterations that were not skipped."""

    lr: float = number(3e-4, "peak learning rate", 0.0)
    min_lr: float = number(3e-5, "learning rate at the end of the decay", 0.0)
    schedule: Literal["cosine", "linear", "constant"] = opt("cosine", "decay after the warmup")
    warmup_steps: int = number(
        0, "updates of linear warmup; update i uses lr * i / warmup. Skipped iterations do not count", 0
    )
    decay_steps: int = number(0, "updates until min_lr, warmup included; 0 means run.steps", 0)
    b1: float = number(0.9, "decay of the first moment", 0.0, 0.999999999)
    b2: float = number(0.95, "decay of the second moment", 0.0, 0.999999999)
    eps: float = number(1e-8, "AdamW epsilon", 0.0, open=True)
    weight_decay: float = number(0.1, "decoupled weight decay, on matrices only", 0.0)
    clip: float = number(1.0, "largest global gradient norm; 0 means no clipping", 0.0)
    initial_loss_scale: float = number(65536.0, "fp16 only: first loss scale", 1.0)
    loss_scale_window: int = number(1000, "fp16 only: updates in a row before the loss scale doubles", 1)
    reduce_dtype: Literal["fp32", "compute"] = opt("fp32", "dtype in which gradients are summed over devices")
    reduce_per_microbatch: bool = opt(
        False, "gather weights and reduce gradients for every microbatch instead of once a step: less memory"
    )


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and how they are batched."""

    path: str = opt(
        "",
        "text or .jsonl file, folder of text, PREFIX of PREFIX.bin/.idx, or a mixture (docs/data.md): a .yaml file, or "
        "WEIGHT PREFIX WEIGHT PREFIX ...; empty: Python's library",
        path=True,
    )
    tokenizer: str = opt(
        "", "tokenizer.model or tokenizer.json; empty: train one of model.vocab_size on the corpus", path=True
    )
    jsonl_key: str = opt("text", "field of a .jsonl line that holds the text")
    split: str = opt("949,50,1", "weights of train, validation and test parts of the documents")
    verify: bool = opt(
        True, "read all data once, when it is first used: every checksum there is, and every token id", False
    )
    cache: str = opt(
        "",
        "folder for long orders of samples, shared by the processes of a machine; empty: in run.workdir",
        False,
        path=True,
    )
    segments: bool = opt(False, "documents of a row do not see one another: attention and positions begin anew at each")
    mask_ends: bool = opt(False, "the first token of a document is no target of the one before it in its row")
    skip: str = opt(
        "", "FROM:TO,... of consumed samples to pass over, as train.log counts them; no batch has any of them"
    )
    rampup: str = opt(
        "", "START,STEP,SAMPLES: batches of START samples that grow by STEP until SAMPLES are consumed; as Megatron's"
    )
    seq_len: int = number(256, "T, tokens per sample", 1)
    global_batch_size: int = number(8, "samples per iteration over all devices", 1)
    microbatches: int = number(1, "parts that the global batch is computed in, gradients summed", 1)


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged."""

    axes: str = opt(
        "", "mesh as NAME:SIZE,... of node, pipe, data, context and model, outermost first; empty is one device", False
    )
    without: str = opt(
        "",
        "lowering passes to leave out, comma-separated, of bucket, overlap, schedule, sink_casts; the numbers stay",
        False,
    )
    fuse: bool = opt(
        False, "join collectives and matrix products into one op where Ascend has one; last digits may change"
    )
    remat: Literal["none", "full", "dots", "names", "budget"] = opt(
        "none",
        "what layers keep for the backward instead of computing it again: none recomputes nothing, full keeps nothing, "
        "dots keeps results of matrix products, names what mesh.remat_names lists, budget what saves most time within "
        "mesh.remat_gb (docs/remat.md)",
        False,
    )
    remat_names: str = opt("context,out_proj,gate,up", "names kept by remat=names, comma-separated", False)
    remat_gb: float = number(
        0.0, "remat=budget: GB per device that layers may keep for the backward of a microbatch", 0.0, numbers=False
    )
    regather: bool = opt(
        False,
        "sharded weights: gather them again for the backward instead of keeping them whole from the forward",
        False,
    )
    replicated: str = opt(
        "",
        "mesh axes whose devices are copies of one another on purpose, comma-separated; all others must shard",
        False,
    )
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb_h1"] = opt(
        "1f1b", "the order in which the stages of a pipeline work, on a mesh with pipe (docs/pipeline.md)", False
    )
    chunks: int = number(
        1, "schedule=interleaved: into how many parts the layers of each stage are cut", 1, numbers=False
    )
    stage_layers: str = opt(
        "", "how many layers each stage of a pipeline holds, comma-separated; empty: as many on each", False
    )
    rules: str = opt(
        "fsdp_tp", "sharding rules: dp, zero1, fsdp, tp_sp, fsdp_tp or fsdp_tp_ulysses (docs/sharding.md)", False
    )


@dataclass(frozen=True)
class Config:
    """All settings of a run; every field is a flag: --model.num_layers."""

    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig()
