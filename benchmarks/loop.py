"""What an iteration takes outside of its compiled step: data, log lines, TensorBoard, events, checks of signals.

    python benchmarks/loop.py --preset llama_tiny --iterations 500

The loop of train.py runs with a step that sleeps, so that all the rest of the time is the loop's own. It logs every
iteration and reads a corpus that is prepared first. Prints the mean, median and slowest iteration without their sleep.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from llama_fn import compat
from llama_fn.compiler import ir
from llama_fn.compiler.backends import Executable, Program
from llama_fn.config import Config, DataConfig, OptimConfig, RunConfig
from llama_fn.config_checks import resolved
from llama_fn.model.presets import PRESETS, preset
from llama_fn.run import loop, records

WARM = 20  # iterations at the start that do not count


class Sleeper:
    """Has a backend whose step sleeps, as a step on a device leaves Python alone, and returns zeros; `slept` is for how
    long each did."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.slept: list[float] = []

    def asleep(self, program: Program, **options: object) -> Executable:
        values = [compat.node_value(node) for node in ir.results(program.graph_of(None).graph)]
        results = [torch.zeros(value.shape, dtype=value.dtype) for value in values]

        def run(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            began = time.perf_counter()
            time.sleep(self.seconds)
            self.slept.append(time.perf_counter() - began)
            return results

        return Executable(run, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama_tiny", choices=PRESETS)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--step_ms", type=float, default=20.0, help="how long a step sleeps")
    parser.add_argument("--all", action="store_true", help="with all monitors: norms and Prometheus too")
    args = parser.parse_args()
    backend = Sleeper(args.step_ms / 1e3)
    with tempfile.TemporaryDirectory() as name:
        cfg = Config(
            model=preset(args.preset),
            data=DataConfig(seq_len=args.seq_len, global_batch_size=args.batch),
            optim=OptimConfig(schedule="constant"),
            run=RunConfig(
                steps=args.iterations + WARM,
                workdir=name,
                eval_every=0,
                checkpoint_every=10**9,
                log_every=1,
                norms_every=10 if args.all else 0,
                prometheus=f"{name}/metrics.prom" if args.all else "",
            ),
        )
        loop.run(resolved(cfg), backend=backend.asleep)
        rows = records.read(Path(name))[WARM:]
    took = [row["step_time_ms"] - slept * 1e3 for row, slept in zip(rows, backend.slept[WARM:], strict=True)]
    waits = [row["data_wait_ms"] for row in rows]
    mean = statistics.mean(took)
    print(f"\n{args.preset}, batch {args.batch} x {args.seq_len}, {len(rows)} iterations outside of their step")
    print(f"mean {mean:.3f} ms, median {statistics.median(took):.3f} ms, slowest {max(took):.3f} ms")
    print(f"of it waiting for data: mean {statistics.mean(waits):.3f} ms")


if __name__ == "__main__":
    main()
