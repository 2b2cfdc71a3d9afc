"""A billion samples: how long the order takes to make once, and then to open, with how much memory, in several ranks.

    python benchmarks/orders.py [--samples=1000000000] [--ranks=8]

A file of as many tokens, documents of a thousand, samples of one. Every rank is a process of its own that opens the
order, which lies on disk, and looks up a thousand samples. Memory is the proportional set size of all ranks together,
what they have before they open it taken off; after the lookups, of pages that are no file's alone, because the kernel
maps the file's in pieces of up to 2 MB around each number that is read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

DOCUMENT = 1000  # tokens


def opened(folder: Path, count: int):
    from llama_fn.data.indexed import IndexedDataset
    from llama_fn.data.samples import Samples

    data = IndexedDataset(folder / "data")
    return Samples(data, (0, len(data)), 1, count, 1234, "train", folder / "cache")


def held(what: str = "Pss:") -> int:
    """Bytes of this process, pages that it shares divided among those that have them."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise AssertionError


def rank(folder: Path, count: int) -> None:
    """Open, look up, and stay until told to go, so that all are there at a time."""
    import llama_fn.data.samples

    assert llama_fn.data.samples
    print(json.dumps({"before": held()}), flush=True)
    sys.stdin.readline()
    before, anonymous, began = held(), held("Pss_Anon:"), time.perf_counter()
    samples = opened(folder, count)
    seconds = time.perf_counter() - began
    more = held() - before
    for k in np.random.default_rng(0).integers(0, count, 1000):
        samples.row(int(samples.shuffle[k]))
    print(json.dumps({"seconds": seconds}), flush=True)
    sys.stdin.readline()
    print(json.dumps({"more": more, "looked_up": held("Pss_Anon:") - anonymous}), flush=True)


def make(folder: Path, count: int) -> None:
    from llama_fn.data import writer

    documents = count // DOCUMENT + 1
    one = np.zeros(DOCUMENT, np.uint16)
    writer.write(folder / "data", (one for _ in range(documents)), np.uint16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10**9)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rank_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        rank(Path(args.rank_of), args.samples)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, args.samples)
        began = time.perf_counter()
        opened(folder, args.samples)
        print(f"{args.samples:,} samples: made once in {time.perf_counter() - began:.0f} s", flush=True)
        words = [sys.executable, __file__, f"--samples={args.samples}", f"--rank_of={folder}"]
        ranks = [subprocess.Popen(words, stdin=-1, stdout=-1, text=True) for _ in range(args.ranks)]

        def all_say() -> list[dict[str, float]]:
            return [json.loads(each.stdout.readline()) for each in ranks]

        def go() -> None:
            for each in ranks:
                each.stdin.write("\n")
                each.stdin.flush()

        all_say()
        go()
        seconds = [said["seconds"] for said in all_say()]
        go()
        more, looked_up = (sum(column) / 1e6 for column in zip(*(said.values() for said in all_say()), strict=True))
        print(f"{args.ranks} ranks open it in at most {max(seconds):.2f} s, with {more:.0f} MB together,")
        print(f"and have {looked_up:.0f} MB of their own after a thousand lookups each")


if __name__ == "__main__":
    main()
