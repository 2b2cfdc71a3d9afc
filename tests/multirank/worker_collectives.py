"""One of two processes: rounds of functional collectives over gloo, all under way at once, each with a known result;
then how fast they are (distributed/bandwidth.py).

torchrun --nproc_per_node=2 tests/multirank/worker_collectives.py ROUNDS
"""

from __future__ import annotations

import sys
import warnings

import torch
import torch.distributed as dist

from llama_fn import compat
from llama_fn.distributed import bandwidth, processes
from sharding import Mesh

c10d = torch.ops._c10d_functional


def main(rounds: int) -> None:
    warnings.simplefilter("error", FutureWarning)  # what torch has another name for is said to every user
    torch.set_num_threads(1)
    members = processes.start(Mesh.parse("data:2"), "cpu", timeout_s=60)
    name, rank = compat.group_name(dist.group.WORLD), members.rank

    def half(x):
        return x.chunk(2)[rank]

    # Each as begun, and its result from what both processes give.
    kinds = [
        (lambda x: c10d.all_gather_into_tensor(x, 2, name), lambda a, b: torch.cat([a, b])),
        (lambda x: c10d.reduce_scatter_tensor(x, "sum", 2, name), lambda a, b: half(a + b)),
        (lambda x: c10d.all_reduce(x, "max", name), torch.maximum),
        (
            lambda x: c10d.all_to_all_single(x, [len(x) // 2] * 2, [len(x) // 2] * 2, name),
            lambda a, b: torch.cat([half(a), half(b)]),
        ),
    ]
    for begin, result in kinds:
        for i in range(rounds):
            mine = [torch.arange(n) + (10_000.0 * rank + i) for n in (6880, 4096, 256, 1310)]
            arrived = [c10d.wait_tensor(pending) for pending in [begin(x) for x in mine]]
            if i % 50 == 0:  # seldom, so that the next round begins while gloo's threads still end the last
                for x, found in zip(mine, arrived, strict=True):
                    other = x + 10_000.0 * (1 - 2 * rank)
                    assert torch.equal(found, result(*((other, x) if rank else (x, other)))), (i, x.shape)
    rows = bandwidth.by_axis(members, "cpu", per_machine=1, size=1 << 20)
    assert [(row["axis"], row["devices"], row["inside"]) for row in rows] == [("data", 2, False)]
    assert rows[0]["bytes_per_s"] > 0
    members.barrier()
    members.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
