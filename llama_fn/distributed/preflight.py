"""What the machines of a run have, compared before anything compiles, so that one that is slow or other is named.

Each process says what its machine shows (`seen`), all say it to all, and `judge` finds what is wrong, which would give
wrong numbers or end the run, and what is only slow or odd.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from llama_fn.distributed import bandwidth
from llama_fn.distributed.processes import Processes
from llama_fn.errors import SaidElsewhere, UserError
from llama_fn.launch import launched
from sharding.collectives import axes_of

SLOW = 0.5  # of the other groups' rate, or of what the hardware table says
CLOCK_S = 5.0  # times of files and logs are compared between machines
BYTES, MOST = 8 << 20, 64 << 20  # that a device gives to a gather, and that all give: memory is for the step
DRIVERS = ("/usr/local/Ascend/driver/version.info", "/proc/driver/nvidia/version")
ALIKE = ("driver", "device")  # what may differ, and rarely should
SAME = ("llama_fn", "commit", "torch", "torch_npu")  # versions of what the numbers come from


@dataclass(frozen=True)
class Seen:
    """What one process says. `free` and `needed`: bytes by folder; `rates`: bytes/s that it sends along each axis, and
    `groups` with whom, by ranks."""

    host: str
    rank: int
    devices: int
    wanted: int
    device: str
    driver: str
    versions: dict[str, str]
    clock: float
    shares: bool
    free: dict[str, int]
    needed: dict[str, int]
    rates: dict[str, float] = field(default_factory=dict)
    groups: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """Something about some machines; `wrong` where the run must not begin."""

    text: str
    wrong: bool = False


def check(
    processes: Processes, device: str, expected: Mapping[str, float], workdir: Path, needed: Mapping[str, int],
    versions: Mapping[str, str], strict: bool,
) -> tuple[list[str], str]:  # fmt: skip
    """Look at all machines; what is odd, and a line on how they are. UserError for what is wrong, and with `strict` for
    what is odd. `expected`: bytes/s by axis, where known; `needed`: bytes that this machine must have by folder."""
    began = time.perf_counter()
    mine = seen(processes, device, workdir, needed, versions)
    told = [Seen(**json.loads(word)) for word in processes.words("preflight", json.dumps(vars(mine)))]
    found = judge(told, expected)
    if wrong := [each.text for each in found if each.wrong or strict]:
        said = "before anything was compiled, the machines of this run were compared:\n  " + "\n  ".join(wrong)
        if processes.chief:
            raise UserError(said + "\n--run.preflight=off leaves this out")
        raise SaidElsewhere(said)
    rates = {axis: min(each.rates[axis] for each in told) for axis in mine.rates}
    speeds = "".join(f", {axis} {rate / 1e9:.1f} GB/s" for axis, rate in rates.items())
    hosts = len({each.host for each in told})
    line = f"{hosts} machines with {len(told)} processes compared in {time.perf_counter() - began:.1f} s{speeds}"
    return [each.text for each in found], line


def seen(
    processes: Processes, device: str, workdir: Path, needed: Mapping[str, int], versions: Mapping[str, str]
) -> Seen:
    """What this process has to say; every process must ask."""
    token = workdir / f".preflight_{processes.by_chief(lambda: uuid.uuid4().hex)}"
    if processes.chief:
        token.touch()
    dist.barrier()
    clock, shares = time.time(), token.exists()
    dist.barrier()
    if processes.chief:
        token.unlink()
    rows = bandwidth.by_axis(processes, device, 1, BYTES, MOST)
    kind = torch.device(device).type
    module = torch.get_device_module(kind)
    if kind != "cpu":
        module.empty_cache()
    return Seen(
        host=socket.gethostname(), rank=processes.rank, devices=module.device_count() if kind != "cpu" else 0,
        wanted=launched().local_world if kind != "cpu" else 0,
        device=module.get_device_name() if kind != "cpu" else "cpu", driver=_driver(), versions=dict(versions),
        clock=clock, shares=shares, free={folder: _free(Path(folder)) for folder in needed}, needed=dict(needed),
        rates={row["axis"]: row["bytes_per_s"] for row in rows},
        groups={row["axis"]: list(processes.mesh.group_of(processes.rank, axes_of(row["axis"]))) for row in rows},
    )  # fmt: skip


def _driver() -> str:
    """The first line of what a driver says of itself."""
    for path in DRIVERS:
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as f:
                return f.readline().strip()
    return ""


def _free(folder: Path) -> int:
    """Bytes, of the nearest folder that exists."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def judge(told: Sequence[Seen], expected: Mapping[str, float]) -> list[Finding]:
    """What is wrong or odd about the machines, each named. `expected`: bytes/s by axis, where known."""
    hosts = {each.host: each for each in told}  # one process of a machine speaks for it
    return [
        *_devices(hosts), *_shared(hosts), *_versions(hosts), *_others(hosts), *_clocks(hosts), *_disks(hosts),
        *_rates(told, expected),
    ]  # fmt: skip


def _devices(hosts: Mapping[str, Seen]) -> list[Finding]:
    return [
        Finding(f"{host} shows {each.devices} devices, and {each.wanted} processes were started on it", True)
        for host, each in hosts.items()
        if each.devices < each.wanted
    ]


def _shared(hosts: Mapping[str, Seen]) -> list[Finding]:
    blind = [host for host, each in hosts.items() if not each.shares]
    if not blind:
        return []
    text = f"{_named(blind)} does not see what rank 0 writes into --run.workdir: it must be a folder that all share"
    return [Finding(text, True)]


def _versions(hosts: Mapping[str, Seen]) -> list[Finding]:
    """Other code of ours or torch's gives other numbers, or waits for collectives that nobody enters."""
    found = []
    for name in sorted({name for each in hosts.values() for name in each.versions}):
        values = {host: each.versions.get(name, "none") for host, each in hosts.items()}
        if text := _unlike(name, values):
            found.append(Finding(text, name in SAME))
    return found


def _others(hosts: Mapping[str, Seen]) -> list[Finding]:
    texts = [_unlike(name, {host: getattr(each, name) or "none" for host, each in hosts.items()}) for name in ALIKE]
    return [Finding(text) for text in texts if text]


def _unlike(name: str, values: Mapping[str, str]) -> str:
    """Whose value is not that of most, "" where all are alike."""
    (usual, _), *others = Counter(values.values()).most_common()
    if not others:
        return ""
    odd = [f"{host} has {value}" for host, value in values.items() if value != usual]
    return f"{name}: {'; '.join(odd)}; the others have {usual}"


def _clocks(hosts: Mapping[str, Seen]) -> list[Finding]:
    usual = statistics.median(each.clock for each in hosts.values())
    return [
        Finding(f"the clock of {host} is {each.clock - usual:+.0f} s off: logs, locks and pulse compare times")
        for host, each in hosts.items()
        if abs(each.clock - usual) > CLOCK_S
    ]


def _disks(hosts: Mapping[str, Seen]) -> list[Finding]:
    return [
        Finding(f"{host}: {folder} has {each.free[folder] / 1e9:.1f} GB free, and {needed / 1e9:.1f} will be written")
        for host, each in hosts.items()
        for folder, needed in each.needed.items()
        if each.free[folder] < needed
    ]


def _rates(told: Sequence[Seen], expected: Mapping[str, float]) -> list[Finding]:
    """Groups that are slow beside others of their axis, or beside what the hardware table has."""
    found = []
    for axis in told[0].rates:
        slowest: dict[tuple[int, ...], float] = defaultdict(lambda: float("inf"))
        for each in told:
            group = tuple(each.groups[axis])
            slowest[group] = min(slowest[group], each.rates[axis])
        usual = max(statistics.median(slowest.values()), expected.get(axis, 0.0))
        for group, rate in slowest.items():
            if rate < SLOW * usual:
                hosts = list(dict.fromkeys(each.host for each in told if each.rank in group))
                what = "the hardware table has" if usual == expected.get(axis) else "other groups have"
                found.append(
                    Finding(
                        f"axis {axis} among {_named(hosts)} (ranks {', '.join(map(str, group))}) sends "
                        f"{rate / 1e9:.2f} GB/s, {what} {usual / 1e9:.2f}"
                    )
                )
    return found


def _named(hosts: Sequence[str]) -> str:
    return ", ".join(hosts)
