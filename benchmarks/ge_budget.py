"""What the GE graphs of every recipe ask of a 910B, in both forms (docs/ascend.md): python benchmarks/ge_budget.py"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from llama_fn import config_checks
from llama_fn.ascend.budget import STREAMS
from llama_fn.compiler.backends.ge_choice import choose
from llama_fn.planner import config_stages, ge_budget
from llama_fn.tools import config_flags

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main() -> None:
    """Print a row per recipe and form."""
    config_flags.define_flags()
    print("| recipe | form | ops | collectives | streams: 3 tasks each | 245 tasks each | of 2024 | min to compile |")
    print("|" + " --- |" * 8)
    for file in sorted(CONFIGS.glob("*npu*.flags")):
        flags.FLAGS.unparse_flags()
        for name in flags.FLAGS:
            flags.FLAGS[name].unparse()
        config_flags.parse([sys.argv[0], f"--flagfile={file}"])
        cfg = config_checks.resolved(config_flags.build_config())
        mesh = config_stages.mesh(cfg)
        pieces = ge_budget.pieces(cfg, mesh)
        chosen, _ = choose(pieces, cfg.run.npu_form)
        for made in (pieces.in_form(form) for form in ("whole", "calls")):
            if made.form == "calls" and len(pieces.each) == 1:
                continue
            star = ", taken by auto" if chosen.form == made.form else ""
            streams = made.streams("AIV")
            print(
                f"| {file.stem} | {made.form}{star} | {made.total:,} | {made.collectives:,} | {streams:,} | "
                f"{made.streams('HOST'):,} | {made.streams('HOST') / STREAMS:.1%} | {made.compile_s / 60:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
