"""Our side of benchmarks/decode.py."""

from __future__ import annotations

import sys
import time
from itertools import islice
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import contender  # noqa: E402


def main() -> None:
    spec = contender.spec()
    import torch

    from llama_fn import tree
    from llama_fn.checkpoint import layout
    from llama_fn.checkpoint.weights import Weights
    from llama_fn.model import llama
    from llama_fn.run.decoding import Decoder, Sampling
    from sharding import Mesh

    contender.prepare(spec["threads"])
    weights = Weights(Path(spec["ours"]), "--source")
    cfg = weights.cfg.__class__(**{**vars(weights.cfg), "compute_dtype": spec["dtype"]})
    infos = llama.abstract_params(cfg)
    params = weights.load(infos, layout.parts(infos, None, Mesh(), 0), "cpu")
    decoder = Decoder(cfg, spec["prompt"] + spec["tokens"], device="cpu").load(params)
    prompts = contender.batch(cfg.vocab_size, spec["batch"], spec["prompt"] - 1, "cpu").tolist()
    said: list[list[int]] = []

    def run() -> None:
        steps = islice(decoder.generate(prompts, Sampling()), spec["tokens"])
        said[:] = [list(row) for row in zip(*steps, strict=True)]

    run()
    held = tree.leaves(decoder.params)
    read = sum(x.nbytes for x in held) - held[0].nbytes  # of the embedding a row is read
    contender.serve(run, "cpu", {"tokens": said, "bytes": read, "bandwidth": bandwidth(torch)})


def bandwidth(torch) -> float:
    """Bytes/s of summing 400 MB, the best of five."""
    x, best = torch.ones(100_000_000), 1e9
    for _ in range(5):
        began = time.perf_counter()
        x.sum()
        best = min(best, time.perf_counter() - began)
    return x.nbytes / best


if __name__ == "__main__":
    main()
