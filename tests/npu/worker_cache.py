"""Compiles a step's GE graphs with --run.npu_cache on HCCL groups of the CANN stand-in, by a GE that only keeps house.

    torchrun ... tests/npu/worker_cache.py CACHE --flags

What stands for GE does what its ModelCache (hicann/ge, compiler/graph/build/model_cache.cc) does with the two options:
a lock by key in the folder, which has to exist, an index that names the compiled graph, compiled where there is none.
Prints a line for each graph: its key and what was done.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch_npu  # noqa: F401
from absl import flags

from llama_fn import config_checks
from llama_fn.compiler.backends import npu
from llama_fn.distributed import start
from llama_fn.errors import UserError
from llama_fn.planner import config_stages
from llama_fn.tools import config_flags


def run_as_ge(self: npu._Graph, flat: list[torch.Tensor]) -> list[torch.Tensor]:
    """What stands for the run of a graph."""
    options, _ = self.ge.graph._normalize_ge_option()
    folder, key = Path(options["ge.graph_compiler_cache_dir"]), options["ge.graph_key"]
    with open(folder / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        index, done = folder / f"{key}.idx", "loaded"
        if not index.exists():
            time.sleep(0.5)
            (folder / f"{key}_1.om").write_bytes(self.ge.proto.SerializeToString())
            index.write_text(json.dumps({"cache_file_list": [{"cache_file_name": f"{key}_1.om", "graph_key": key}]}))
            done = "compiled"
    os.write(1, f"GE {done} {key}\n".encode())  # at once: the other process writes to the same pipe
    return []


def main() -> None:
    config_flags.define_flags()
    flags.FLAGS([sys.argv[0], *sys.argv[2:]])
    cfg = config_checks.resolved(config_flags.build_config())
    mesh = config_stages.mesh(cfg)
    torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
    processes = start(mesh, "npu", 60)
    assert processes is not None
    lowered = config_stages.lower(config_stages.train(cfg), cfg, mesh).of_rank(processes.rank)
    npu._Graph.run = run_as_ge  # type: ignore[method-assign]
    options = {"device": f"npu:{processes.rank}", "processes": processes, "form": "whole", "cache": Path(sys.argv[1])}
    try:
        lowered.compile("npu", **options).executable.run([])
    except UserError as error:
        print(f"error: {error}")
    processes.close()


main()
