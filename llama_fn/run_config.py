"""The section `run` of a Config: where a run is written, what runs it, when it stops and what watches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llama_fn.config_fields import number, opt


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
    on_spike: Literal["warn", "skip", "roll_back"] = opt(
        "warn",
        "what to do when the loss jumps: warn says it, skip goes back to the newest checkpoint and passes over the "
        "samples since, roll_back trains them again, as a machine may have computed wrong (docs/operations.md)",
        False,
    )
    spike_deviations: float = number(
        8.0, "a jump: so many deviations above the median of the last 128 losses; 0: none is one", 0.0, numbers=False
    )
    ranks_every: int = number(
        100, "iterations between two looks at how fast each process is, in ranks.jsonl; 0: none", 0, numbers=False
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
    preflight: Literal["warn", "strict", "off"] = opt(
        "warn",
        "several processes: compare their machines before anything compiles (devices, versions, clock, disk, shared "
        "folder, speed of each axis); what is wrong is an error, what is slow or odd a warning, or an error if strict",
        False,
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
