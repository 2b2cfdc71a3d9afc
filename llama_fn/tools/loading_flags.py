"""The flags of every tool that loads a model (loading.py, which imports torch)."""

from __future__ import annotations

from absl import flags


def define() -> None:
    """Once, before flags are parsed."""
    flags.DEFINE_string("source", "", "work folder, checkpoint, or folder that convert wrote")
    flags.DEFINE_string("tokenizer", "", "tokenizer.model, where the source has none")
    flags.DEFINE_enum("dtype", "fp32", ["fp32", "bf16", "fp16"], "to compute in")
    flags.DEFINE_enum(
        "backend", "inductor", ["inductor", "eager", "interpret"],
        "inductor compiles, which takes seconds to minutes; interpret simulates a mesh in one process",
    )  # fmt: skip
    flags.DEFINE_enum("device", "cpu", ["cpu", "cuda"], "to compute on")
    flags.DEFINE_string("mesh", "", "model:N shares the model out over N processes, which torchrun starts")
    flags.DEFINE_enum(
        "begin", "auto", ["auto", "bos", "eos", "none"],
        "token before a text; auto: bos of converted weights, and of a run eos, behind which its documents begin",
    )  # fmt: skip
