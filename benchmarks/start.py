"""How long `python train.py` takes to its first step, with and without compiled code there, and what of it is torch.

    python benchmarks/start.py --preset llama_tiny

Runs train.py on data that an earlier start prepared: once with an empty compile cache, then some times with what that
left. The parts are the phases that the run itself counts (events.jsonl) and the imports before it; `import torch` alone
is measured beside them, as what no program with torch can go below.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from step_cells import BATCHES

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("prepare", "compile", "restore", "step", "other")


def started(preset: str, folder: Path, cache: Path) -> dict[str, float]:
    """Seconds from the start of the process to the end of its first step, and of its parts."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / "events.jsonl").unlink(missing_ok=True)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    batch, seq = BATCHES[preset]
    flags = [
        f"--model.preset={preset}", f"--data.global_batch_size={batch}", f"--data.seq_len={seq}", "--run.steps=2",
        "--run.stop_at=1", f"--run.workdir={folder}", f"--run.compile_cache={cache}",
    ]  # fmt: skip
    began = time.time()
    process = subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True)
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        raise SystemExit(process.stderr)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    first, spent = events[0], next(event for event in events if event["event"] == "spent")
    parts = {name: spent[name] for name in PHASES}
    return {"first step": metrics.stat().st_mtime - began, "imports": first["time"] - began, **parts}


def importing(module: str) -> float:
    """Seconds of a process that imports a module."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], cwd=ROOT, check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama_tiny", choices=BATCHES)
    parser.add_argument("--warm", type=int, default=3, help="starts with compiled code there; the median is printed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name) / "run", Path(name) / "cache"
        started(args.preset, folder, Path(name) / "other_cache")  # prepares the data
        rows = {"cold": [started(args.preset, folder, cache)]}
        rows["warm"] = [started(args.preset, folder, cache) for _ in range(args.warm)]
    for kind, several in rows.items():
        parts = {part: statistics.median(row[part] for row in several) for part in several[0]}
        print(f"{args.preset} {kind}: " + ", ".join(f"{part} {value:.1f} s" for part, value in parts.items()))
    for module in ("torch", "llama_fn.run.loop"):
        print(f"a process that imports {module}: {statistics.median(importing(module) for _ in range(3)):.2f} s")
    began = time.perf_counter()
    subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, check=False, capture_output=True)
    print(f"train.py --help: {time.perf_counter() - began:.2f} s")


if __name__ == "__main__":
    main()
