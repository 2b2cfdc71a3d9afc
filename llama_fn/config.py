"""Every default of the project, in frozen dataclasses without torch. A Config builds nothing and holds nothing live.

config_fields.py says what a field's declaration means; config_checks.py holds a Config to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llama_fn.config_fields import number, opt


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
class RunConfig:
    """The run around the step."""

    workdir: str = opt(
        "work/run", "folder for checkpoints, logs and the tokenized corpus; resumes what it holds", False, path=True
    )
    steps: int = number(300, "iterations to train in all", 1)
    seed: int = number(1234, "seed of the initial parameters and of the sample order", 0, 2**32 - 1)
    backend: Literal["inductor", "interpret", "eager", "npu"] = opt("inductor", "how the step graph is executed")
    device: str = opt(
        "auto", "cpu, cuda or npu; auto: npu for backend npu, else cpu. Of several, each process takes its own", False
    )
    deterministic: bool = opt(False, "sums in a fixed order on CUDA and NPU, slower; CPU runs are always repeatable")
    compile_only: bool = opt(
        False, "stop before the first weight: lower, say what a step takes and needs, dump if asked, and compile", False
    )
    dump_dir: str = opt(
        "", "folder for the graph after every stage, a summary and pages (docs/debugging.md)", False, path=True
    )
    dump_ranks: str = opt("0", "ranks that write to dump_dir, comma-separated, or all", False)
    profile_steps: str = opt(
        "", "FIRST:LAST iterations to profile by scope into workdir/profile (docs/debugging.md)", False
    )
    strict: bool = opt(False, "what looks like a mistake in the lowered step is an error (docs/debugging.md)", False)
    check_finite: bool = opt(
        False,
        "look at every op's result and stop with status 4 at the first that is not finite, naming op, scope and line; "
        "backends interpret and eager, slow; overflows of fp16's loss scale count",
        False,
    )
    attention: Literal["auto", "reference", "blocked", "flash"] = opt(
        "auto", "form of the attention kernel in compiled code; auto: flash on cuda in bf16 and fp16, else blocked"
    )
    npu_form: Literal["auto", "whole", "calls"] = opt(
        "auto",
        "backend npu: whole makes one GE graph of the step, calls one of the microbatch that is run again and again, "
        "auto takes calls where one graph might not load, or would take GE over half an hour (docs/ascend.md)",
    )
    npu_streams: Literal["by_axis", "one"] = opt(
        "by_axis",
        "backend npu: by_axis gives the collectives of each mesh axis, and the messages of each direction, a stream of "
        "their own; one leaves all on one stream, where each waits for the one before",
        False,
    )
    npu_cache: bool = opt(
        False,
        "backend npu, experimental: GE keeps compiled graphs in --run.compile_cache, and a second start loads them; "
        "Huawei's documents say that its cache does not know graphs with updated inputs yet, which ours are",
        False,
    )
    log_every: int = number(1, "iterations between log lines", 1, numbers=False)
    norms_every: int = number(
        0, "iterations between records of the norms of each layer's parameters, gradients and updates, in norms.jsonl "
        "and TensorBoard; the step computes them always (docs/metrics.md); 0: none", 0, numbers=False,
    )  # fmt: skip
    checkpoint_every: int = number(100, "iterations between checkpoints", 1, numbers=False)
    keep_latest: int = number(2, "how many of the newest checkpoints to keep", 1, numbers=False)
    keep_every: int = number(
        0, "also keep each checkpoint whose iteration is a multiple of this; 0: none", 0, numbers=False
    )
    local_every: int = number(
        0,
        "iterations between emergency copies in --run.local_dir (docs/checkpoints.md); 0: none",
        0,
        numbers=False,
    )
    local_dir: str = opt(
        "",
        "where emergency copies lie: a folder of each machine's own, on its disk or, such as /dev/shm, in its memory",
        False,
        path=True,
    )
    stop_after_skipped: int = number(
        100, "stop after so many skipped iterations in a row, with status 4; 0: never", 0, numbers=False
    )
    eval_every: int = number(100, "iterations between validations; 0: never", 0, numbers=False)
    eval_batches: int = number(4, "global batches in one validation", 1, numbers=False)
    sample_every: int = number(
        0, "iterations between texts that the model writes into the logs; 0: none", 0, numbers=False
    )
    sample_prompts: str = opt("|def |The ", "what these texts begin with, separated by |", False)
    stop_signals: str = opt(
        "SIGTERM,SIGUSR1,SIGUSR2", "signals beside Ctrl-C that mean: finish the step, save, and stop", False
    )
    grace_s: int = number(
        0, "seconds from such a signal until the run is killed; 0: as torchrun says, else not known", 0, numbers=False
    )
    timeout_s: int = number(
        600, "several processes: seconds without a sign of life after which the others give up", 1, numbers=False
    )
    step_limit_s: int = number(
        3600,
        "seconds after which one iteration, the first of a start apart, counts as stuck: stacks of all threads go to "
        "workdir/stuck, and the process ends with status 8; 0: never", 0, numbers=False,
    )  # fmt: skip
    compile_cache: str = opt("", "folder of compiled code; empty: ~/.cache/llama_fn", False, path=True)
    threads: int = number(0, "CPU threads; 0: one per physical core. Sums depend on it in their last digits", 0, 4096)
    init_from: str = opt(
        "",
        "begin with the weights of this work folder, checkpoint or converted model, not random ones",
        path=True,
    )
    stop_at: int = number(
        0, "end behind this iteration and save nothing, to look at it once more (tools/replay.py); 0: never", 0,
        numbers=False,
    )  # fmt: skip
    accept_changes: bool = opt(
        False, "this once, resume although flags or data that change the numbers differ", False, saved=False
    )
    wandb: str = opt("", "Weights & Biases project to log to (extra wandb); empty: none, no network", False)
    mlflow: str = opt(
        "",
        "MLflow experiment to log to (extra mlflow): of the server in MLFLOW_TRACKING_URI, else in workdir/mlflow.db",
        False,
    )
    prometheus: str = opt(
        "", "file to keep the last record in for node_exporter's textfile collector, such as "
        "/var/lib/node_exporter/llama_fn.prom (extra prometheus)", False, path=True,
    )  # fmt: skip
    tensorboard: bool = opt(True, "write TensorBoard events into workdir/tensorboard", False)


@dataclass(frozen=True)
class Config:
    """All settings of a run; every field is a flag: --model.num_layers."""

    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig()
