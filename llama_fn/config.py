"""Every default of the project, in frozen dataclasses without torch. A Config builds nothing and holds nothing live.

Field metadata: `help` is the flag's help text; `numbers=True` marks fields that change the numbers of a run, so that
a resume with another value is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from llama_fn.errors import UserError, nearest


def opt(default: Any, help: str, numbers: bool = True) -> Any:
    return field(default=default, metadata={"help": help, "numbers": numbers})


@dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of a LLaMA. Letters: D embed, N heads, K kv_heads, F mlp, V vocab, L layers."""

    preset: str = opt("llama_tiny", "model preset; the other --model flags change single values of it")
    num_layers: int = opt(4, "L")
    embed_dim: int = opt(256, "D")
    num_heads: int = opt(4, "N, query heads; head_dim is D / N")
    num_kv_heads: int = opt(4, "K, key and value heads; N / K query heads share one (GQA)")
    mlp_dim: int = opt(688, "F")
    vocab_size: int = opt(4096, "V, rows of the embedding, padding included")
    norm_eps: float = opt(1e-6, "epsilon of RMSNorm")
    rope_theta: float = opt(10000.0, "base of the rotary frequencies")
    tie_embeddings: bool = opt(False, "use the embedding table as the output head")
    init_std: float = opt(0.02, "standard deviation of the initial matrices")
    init_scaled: bool = opt(True, "divide the std of wo and w_down by sqrt(2 L)")
    compute_dtype: Literal["fp32", "bf16", "fp16", "fp64"] = opt(
        "fp32", "dtype of forward and backward; masters are fp32, or fp64 to check against"
    )
    fused_head: bool = opt(False, "compute head and loss in blocks of tokens: less memory, one more head product")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with global-norm clipping and a schedule over iterations."""

    lr: float = opt(3e-4, "peak learning rate")
    min_lr: float = opt(3e-5, "learning rate at the end of the decay")
    schedule: Literal["cosine", "linear", "constant"] = opt("cosine", "decay after the warmup")
    warmup_steps: int = opt(0, "iterations of linear warmup; iteration i uses lr * i / warmup")
    decay_steps: int = opt(0, "iterations until min_lr, warmup included; 0 means run.steps")
    b1: float = opt(0.9, "decay of the first moment")
    b2: float = opt(0.95, "decay of the second moment")
    eps: float = opt(1e-8, "AdamW epsilon")
    weight_decay: float = opt(0.1, "decoupled weight decay, on matrices only")
    clip: float = opt(1.0, "largest global gradient norm; 0 means no clipping")
    initial_loss_scale: float = opt(65536.0, "fp16 only: first loss scale")
    loss_scale_window: int = opt(1000, "fp16 only: good iterations before the loss scale doubles")
    reduce_dtype: Literal["fp32", "compute"] = opt("fp32", "dtype in which gradients are summed over devices")
    reduce_per_microbatch: bool = opt(
        False, "gather weights and reduce gradients for every microbatch instead of once a step: less memory"
    )


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and how they are batched."""

    path: str = opt("", "text file, .jsonl file, folder of text, or PREFIX of PREFIX.bin/.idx; empty: Python's library")
    tokenizer: str = opt("", "sentencepiece tokenizer.model; empty: train one of model.vocab_size on the corpus")
    jsonl_key: str = opt("text", "field of a .jsonl line that holds the text")
    split: str = opt("949,50,1", "weights of train, validation and test parts of the documents")
    seq_len: int = opt(256, "T, tokens per sample")
    global_batch_size: int = opt(8, "samples per iteration over all devices")
    microbatches: int = opt(1, "parts that the global batch is computed in, gradients summed")


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged."""

    axes: str = opt(
        "", "mesh as NAME:SIZE,... of node, data, context and model, outermost first; empty is one device", False
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
    remat_gb: float = opt(
        0.0, "remat=budget: GB per device that layers may keep for the backward of a microbatch", False
    )
    regather: bool = opt(
        False,
        "sharded weights: gather them again for the backward instead of keeping them whole from the forward",
        False,
    )
    rules: str = opt(
        "fsdp_tp", "sharding rules: dp, zero1, fsdp, tp_sp, fsdp_tp or fsdp_tp_ulysses (docs/sharding.md)", False
    )


@dataclass(frozen=True)
class RunConfig:
    """The run around the step."""

    workdir: str = opt(
        "work/run", "folder for checkpoints, logs and the tokenized corpus; resumes what it holds", False
    )
    steps: int = opt(300, "iterations to train in all")
    seed: int = opt(1234, "seed of the initial parameters and of the sample order")
    backend: Literal["inductor", "interpret", "eager", "npu"] = opt("inductor", "how the step graph is executed")
    device: str = opt(
        "auto", "cpu, cuda or npu; auto: npu for backend npu, else cpu. Of several, each process takes its own", False
    )
    deterministic: bool = opt(False, "sums in a fixed order on CUDA and NPU, slower; CPU runs are always repeatable")
    compile_only: bool = opt(
        False, "stop before the first weight: lower, say what a step takes and needs, dump if asked, and compile", False
    )
    dump_dir: str = opt("", "folder for the graph after every stage, a summary and pages (docs/debugging.md)", False)
    dump_ranks: str = opt("0", "ranks that write to dump_dir, comma-separated, or all", False)
    profile_steps: str = opt(
        "", "FIRST:LAST iterations to profile by scope into workdir/profile (docs/debugging.md)", False
    )
    attention: Literal["auto", "reference", "blocked", "flash"] = opt(
        "auto", "form of the attention kernel in compiled code; auto: flash on cuda in bf16 and fp16, else blocked"
    )
    log_every: int = opt(1, "iterations between log lines", False)
    checkpoint_every: int = opt(100, "iterations between checkpoints", False)
    keep_latest: int = opt(2, "how many of the newest checkpoints to keep", False)
    keep_every: int = opt(0, "also keep each checkpoint whose iteration is a multiple of this; 0: none", False)
    eval_every: int = opt(100, "iterations between validations; 0: never", False)
    eval_batches: int = opt(4, "global batches in one validation", False)
    timeout_s: int = opt(600, "several processes: seconds without a sign of life after which the others give up", False)
    compile_cache: str = opt("", "folder of compiled code; empty: ~/.cache/llama_fn", False)
    threads: int = opt(0, "CPU threads; 0: one per physical core", False)
    accept_changes: bool = opt(False, "resume although flags that change the numbers differ", False)
    wandb: str = opt("", "Weights & Biases project to log to; empty: none, no network", False)
    tensorboard: bool = opt(True, "write TensorBoard events into workdir/tensorboard", False)


@dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig()


def _llama(name: str, layers: int, dim: int, heads: int, mlp: int, **more: Any) -> Callable[[], ModelConfig]:
    kv_heads = more.pop("kv_heads", heads)
    shape = {"num_layers": layers, "embed_dim": dim, "num_heads": heads, "num_kv_heads": kv_heads, "mlp_dim": mlp}
    return lambda: ModelConfig(preset=name, **{"vocab_size": 32000, **shape, **more})


# Shapes: LLaMA (Touvron et al. 2023a, table 2), LLaMA-2 (2023b), Llama 3 (Dubey et al. 2024, table 3).
PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "llama_tiny": ModelConfig,
    "llama_60m": _llama("llama_60m", 8, 512, 8, 1376),
    "llama_1b": _llama("llama_1b", 22, 2048, 16, 5504),
    "llama_7b": _llama("llama_7b", 32, 4096, 32, 11008),
    "llama_13b": _llama("llama_13b", 40, 5120, 40, 13824),
    "llama_33b": _llama("llama_33b", 60, 6656, 52, 17920),
    "llama_65b": _llama("llama_65b", 80, 8192, 64, 22016, norm_eps=1e-5),
    "llama_65b_8layers": _llama("llama_65b_8layers", 8, 8192, 64, 22016, norm_eps=1e-5),
    "llama2_70b": _llama("llama2_70b", 80, 8192, 64, 28672, kv_heads=8, norm_eps=1e-5),
    "llama3_8b": _llama(
        "llama3_8b", 32, 4096, 32, 14336, kv_heads=8, norm_eps=1e-5, vocab_size=128256, rope_theta=500000.0
    ),
}


def preset(name: str) -> ModelConfig:
    """The model preset `name`; UserError with the nearest name for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"--model.preset={name} is not a preset. {nearest(name, PRESETS)}")
    return PRESETS[name]()


def _with_device(cfg: Config) -> Config:
    """cfg with its device named; UserError where backend and device do not go together."""
    r = cfg.run
    device = r.device if r.device != "auto" else "npu" if r.backend == "npu" else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda", "npu"):
        raise UserError(f"--run.device={device}: expected auto, cpu, cuda or npu")
    if (r.backend == "npu") != device.startswith("npu"):
        raise UserError(
            f"--run.device={device} does not go with --run.backend={r.backend}: an NPU runs graphs of backend npu, and "
            "nothing else does"
        )
    ranks = r.dump_ranks.split(",")
    if r.dump_ranks != "all" and not all(rank.strip().isdigit() for rank in ranks):
        raise UserError(f"--run.dump_ranks={r.dump_ranks} is neither all nor ranks such as 0,8")
    return replace(cfg, run=replace(r, device=device))


def profiled(cfg: Config) -> range:
    """The iterations that --run.profile_steps names; empty for none. UserError for anything but FIRST:LAST."""
    text = cfg.run.profile_steps
    first, _, last = text.partition(":")
    if text and not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last) <= cfg.run.steps):
        raise UserError(f"--run.profile_steps={text} is not FIRST:LAST within 1..{cfg.run.steps}, such as 10:12")
    return range(int(first), int(last) + 1) if text else range(0)


def validate(cfg: Config) -> Config:
    """cfg with its device named, or UserError naming the flag, what was expected and what was found."""
    cfg = _with_device(cfg)
    m, d, o, r = cfg.model, cfg.data, cfg.optim, cfg.run
    for section in (m, d):
        for f in fields(section):
            value = getattr(section, f.name)
            if type(value) is int and value < 1:
                raise UserError(f"--{_section(cfg, section)}.{f.name}={value} must be at least 1")
    for whole, part, why in (
        ("model.embed_dim", "model.num_heads", "head_dim is their quotient"),
        ("model.num_heads", "model.num_kv_heads", "each kv head serves the same number of query heads"),
        ("data.global_batch_size", "data.microbatches", "microbatches have equal sizes"),
    ):
        a, b = value_of(cfg, whole), value_of(cfg, part)
        if a % b:
            divisors = [n for n in range(1, a + 1) if a % n == 0][:12]
            raise UserError(f"--{whole}={a} is not divisible by --{part}={b} ({why}); {part} can be {divisors}")
    if m.head_dim % 2:
        raise UserError(f"head_dim = model.embed_dim / model.num_heads = {m.head_dim} is odd; rope turns pairs")
    if r.steps < 1 or r.log_every < 1 or r.checkpoint_every < 1 or r.keep_latest < 1:
        raise UserError("--run.steps, run.log_every, run.checkpoint_every and run.keep_latest must be at least 1")
    if r.eval_every < 0 or r.eval_batches < 1 or r.keep_every < 0:
        raise UserError("--run.eval_every and run.keep_every must be at least 0, run.eval_batches at least 1")
    if o.decay_steps and o.warmup_steps > o.decay_steps:
        raise UserError(f"--optim.warmup_steps={o.warmup_steps} is more than optim.decay_steps={o.decay_steps}")
    if (cfg.mesh.remat == "budget") != (cfg.mesh.remat_gb > 0):
        raise UserError(
            f"--mesh.remat={cfg.mesh.remat} with --mesh.remat_gb={cfg.mesh.remat_gb}: budget needs a size above 0, "
            "and the other policies take none"
        )
    profiled(cfg)
    parts = d.split.split(",")
    if not all(p.strip().replace(".", "", 1).isdigit() for p in parts) or not 1 <= len(parts) <= 3:
        raise UserError(f"--data.split={d.split} is not up to three non-negative numbers such as 949,50,1")
    return cfg


def _section(cfg: Config, section: Any) -> str:
    return next(f.name for f in fields(cfg) if getattr(cfg, f.name) is section)


def value_of(cfg: Config, dotted: str) -> Any:
    section, name = dotted.split(".")
    return getattr(getattr(cfg, section), name)


def flat(cfg: Config, numbers_only: bool = False) -> dict[str, Any]:
    """{"model.num_layers": 6, ...}; only the fields that change the numbers of a run where asked."""
    return {
        f"{s.name}.{f.name}": getattr(getattr(cfg, s.name), f.name)
        for s in fields(cfg)
        for f in fields(getattr(cfg, s.name))
        if f.metadata["numbers"] or not numbers_only
    }


def with_values(cfg: Config, values: dict[str, Any]) -> Config:
    """cfg with dotted names replaced; an unknown name is a UserError with the nearest one."""
    known = flat(cfg)
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{name} is not a setting. {nearest(name, known)}")
        section, leaf = name.split(".")
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{leaf: value})})
    return cfg
