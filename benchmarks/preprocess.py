"""preprocess beside a plain loop over the same tokenizer: MB/s of text, per process and on all cores.

    python benchmarks/preprocess.py [--mb=60] [--rounds=3] [--megatron=FOLDER]
    python benchmarks/preprocess.py --memory_gb=2      the most that the command and its processes hold for so much text

The loop reads JSON lines, encodes each text, appends to one array, and writes the file: what nobody could do faster
with one core and this library. Both begin with files in the page cache; preprocess's time is that of the whole command,
its start included. Its bound on n cores is n times the loop. FOLDER is a checkout of Megatron-LM, whose
tools/preprocess_data.py takes part; it needs triton and typing_extensions.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llama_fn import compat
from llama_fn.data import tokenizer
from llama_fn.tools import corpus


def texts(size: int) -> list[str]:
    """Real ones, each once, again and again until there are enough."""
    once = list(corpus.documents(0, "ccnet", 8_000_000))
    held: list[str] = []
    while sum(map(len, held)) < size:
        held += once
    return held


def loop(source: Path, model: Path, out: Path) -> float:
    pieces, began, tokens = tokenizer.load(model), time.perf_counter(), []
    with open(source, encoding="utf-8") as lines:
        for line in lines:
            tokens.append(np.array([*pieces.encode(json.loads(line)["text"]), pieces.eos_id()], np.uint16))
    np.concatenate(tokens).tofile(out)
    return time.perf_counter() - began


def command(source: Path, model: Path, out: Path, workers: int) -> float:
    words = [str(source), f"--tokenizer={model}", f"--out={out}", f"--workers={workers}"]
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "llama_fn.tools.preprocess", *words], check=True, capture_output=True)
    return time.perf_counter() - began


# Of Python 3.12, which Megatron-LM asks for though the rest of it runs on 3.11.
OVERRIDE = "import typing, typing_extensions as t, runpy, sys; typing.override = t.override; sys.argv = sys.argv[1:]; "


def megatron(checkout: Path, source: Path, model: Path, out: Path, workers: int) -> float:
    words = [
        "tools/preprocess_data.py", f"--input={source}", f"--output-prefix={out}", f"--tokenizer-model={model}",
        "--tokenizer-type=SentencePieceTokenizer", f"--workers={workers}", "--append-eod",
    ]  # fmt: skip
    run, began = f"{OVERRIDE}runpy.run_path(sys.argv[0], run_name='__main__')", time.perf_counter()
    path = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH", ""))))
    subprocess.run(
        [sys.executable, "-c", run, *words], check=True, capture_output=True, cwd=checkout,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    took = time.perf_counter() - began
    os.rename(f"{out}_text_document.bin", f"{out}.bin")
    return took


def held_by(pid: int) -> int:
    """Bytes of a process and those below it, pages that they share divided among them (PSS)."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total = int(line.split()[1]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(held_by(int(child)) for child in (task / "children").read_text().split())
    except OSError:  # it has ended
        pass
    return total


def memory(gb: float, cores: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        once = texts(8_000_000)
        source, model = folder / "texts.jsonl", folder / "tokenizer.model"
        tokenizer.train(once[:2000], 4096, model)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in once).encode()
        with open(source, "wb") as f:
            while f.tell() < gb * 1e9:
                f.write(lines)
        words = [str(source), f"--tokenizer={model}", f"--out={folder / 'out'}", f"--workers={cores}"]
        began, most = time.perf_counter(), 0
        run = subprocess.Popen(
            [sys.executable, "-m", "llama_fn.tools.preprocess", *words], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while run.poll() is None:
            most = max(most, held_by(run.pid))
            time.sleep(0.2)
        assert run.returncode == 0, "the command failed"
        took, size = time.perf_counter() - began, source.stat().st_size
        print(f"{size / 1e9:.2f} GB of JSON lines, {cores} processes: {took:.0f} s, at most {most / 2**30:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory_gb", type=float, default=0)
    parser.add_argument("--megatron", type=Path)
    parser.add_argument("--mb", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    args, cores = parser.parse_args(), compat.physical_cores()
    if args.memory_gb:
        memory(args.memory_gb, cores)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        held = texts(int(args.mb * 1e6))
        source, model = folder / "texts.jsonl", folder / "tokenizer.model"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in held), encoding="utf-8")
        tokenizer.train(held[:2000], 4096, model)
        contestants: dict[str, Callable[[Path], float]] = {
            "plain loop": lambda out: loop(source, model, Path(f"{out}.bin")),
            "preprocess, 1 process": lambda out: command(source, model, out, 1),
            f"preprocess, {cores} processes": lambda out: command(source, model, out, cores),
        }
        if args.megatron:
            for workers in (1, cores):
                contestants[f"Megatron's tool, {workers}"] = functools.partial(
                    lambda workers, out: megatron(args.megatron.absolute(), source, model, out, workers), workers
                )
        size, rows = source.stat().st_size / 1e6, []
        for i in range(args.rounds):
            rows.append([run(folder / f"{n}_{i}") for n, run in enumerate(contestants.values())])
            made = sorted(folder.glob("*.bin"))
            assert len({path.read_bytes() for path in made}) == 1 and len(made) == len(contestants), "the tokens differ"
            for path in made:
                os.remove(path)
        best = [min(column) for column in zip(*rows, strict=True)]
        print(f"{size:.0f} MB of JSON lines, best of {args.rounds} rounds, {cores} cores")
        for what, seconds in zip(contestants, best, strict=True):
            print(f"{what:26}{size / seconds:7.2f} MB/s   {best[0] / seconds:5.2f} times the loop")


if __name__ == "__main__":
    main()
