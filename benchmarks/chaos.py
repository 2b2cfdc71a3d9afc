"""A run under supervise to which something happens again and again, against one that is left alone: the same losses?

    python benchmarks/chaos.py [--processes=2] [--faults=24] [--seed=0]      as root, on Linux: it mounts a small disk

A small model trains in processes over gloo, in a work folder on a disk of 400 MB. Its text holds a line that is none,
which makes the loss jump (--run.on_spike=skip). In turn and in a random order: a process is killed; one is stopped, so
that the others wait for it; the launcher is asked to end; all are killed and a file of the newest checkpoint is
damaged; the disk is filled, and freed when the run has ended; the clock jumps by an hour. Each time the script waits
until the run trains again, and says how long that took and what the attempt's last word was. Nothing may wait longer
than twice its limit: other processes for one that is stopped (--run.timeout_s), and then torchrun for that one to end
(30 s, whatever it is told to wait after a signal). At the end it compares every iteration's loss with the undisturbed
run's, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S, SHUTDOWN_S, LAUNCHER_S, BETWEEN = 15, 10, 30, 25
CLOCK = """
import os, threading, time
if os.environ.get("CHAOS_CLOCK"):
    real, shift = time.time, [0.0]
    def follow():
        while True:
            try:
                shift[0] = float(open(os.environ["CHAOS_CLOCK"]).read() or 0)
            except (OSError, ValueError):
                pass
            time.sleep(0.2)
    time.time = lambda: real() + shift[0]
    threading.Thread(target=follow, daemon=True).start()
"""


class Job:
    """The supervised run."""

    def __init__(self, folder: Path, workdir: Path, processes: int, steps: int) -> None:
        self.workdir, self.clock, self.processes = workdir, folder / "clock", processes
        self.environ = {
            **os.environ, "CHAOS_CLOCK": str(self.clock), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_S),
            "PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        (folder / "sitecustomize.py").write_text(CLOCK)
        self.command = [*launcher(processes), *flags(folder, processes, steps), f"--run.workdir={workdir}"]
        self.log = open(folder / "supervise.log", "ab")  # noqa: SIM115
        self.start()

    def start(self) -> None:
        supervise = [sys.executable, "-m", "llama_fn.tools.supervise", f"--workdir={self.workdir}", "--wait_s=0.5"]
        words = [*supervise, "--look_s=1", "--most=30", "--", *self.command]
        self.process = subprocess.Popen(words, cwd=ROOT, env=self.environ, stdout=self.log, stderr=self.log)

    def pids(self, launchers: bool) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                words = (entry / "cmdline").read_text().split("\0")
                ours = f"--run.workdir={self.workdir}" in words and "llama_fn.tools.supervise" not in words
                if ours and ("torch.distributed.run" in words) == launchers:
                    found.append(int(entry.name))
        return sorted(found)

    def iteration(self) -> int:
        path = self.workdir / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        whole = [line for line in lines[-2:] if line.endswith(b"}")]
        return json.loads(whole[-1])["iteration"] if whole else 0

    def starts(self) -> list[int]:
        """The iterations from which it has trained so far."""
        path = self.workdir / "events.jsonl"
        found = events(self.workdir) if path.exists() else []
        return [int(str(event["iteration"])) for event in found if event["event"] == "training"]

    def last_words(self) -> list[str]:
        """How its attempts ended."""
        found = [event for event in events(self.workdir) if event["event"] == "end"]
        return [f"status {event['status']}: {str(event['why'])[:90]}" for event in found]

    def fail(self, why: str) -> NoReturn:
        """The end of the script, with what supervise and the run said."""
        print("\n".join(Path(self.log.name).read_text(errors="replace").splitlines()[-40:]), file=sys.stderr)
        sys.exit(why)

    def kill(self) -> None:
        """All that belongs to it."""
        self.process.kill()
        for pid in [*self.pids(True), *self.pids(False)]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def ended(self, pids: list[int], limit_s: float) -> float:
        """Seconds until these processes of it are gone."""
        return self._seconds(lambda: not set(pids) & set(self.pids(False)), limit_s)

    def trains_again(self, before: int, limit_s: float) -> float:
        """Seconds until it has trained an iteration since more than `before` starts."""
        return self._seconds(lambda: len(s := self.starts()) > before and self.iteration() > s[-1], limit_s)

    def trains_beyond(self, iteration: int, limit_s: float) -> float:
        """Seconds until it does."""
        return self._seconds(lambda: self.iteration() > iteration, limit_s)

    def _seconds(self, there: Callable[[], bool], limit_s: float) -> float:
        began = time.monotonic()
        while not there():
            if self.process.poll() is not None:
                self.fail(f"the run ended with status {self.process.returncode}")
            if time.monotonic() - began > limit_s:
                self.fail(f"it is not there after {limit_s} s, but at iteration {self.iteration()}")
            time.sleep(0.05)
        return time.monotonic() - began


def launcher(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "train.py"]


def flags(folder: Path, processes: int, steps: int) -> list[str]:
    return [
        "--flagfile=configs/tiny_cpu.flags", "--model.num_layers=2", "--model.embed_dim=32", "--model.num_heads=2",
        "--model.num_kv_heads=2", "--model.mlp_dim=48", "--model.vocab_size=340", "--data.seq_len=32",
        "--data.split=1,0,0", f"--data.global_batch_size={2 * processes}", "--run.backend=eager", "--run.log_every=1",
        f"--mesh.axes=data:{processes}", "--mesh.rules=fsdp", "--run.eval_every=0", "--run.tensorboard=false",
        "--run.checkpoint_every=10", f"--run.steps={steps}", f"--data.path={folder / 'corpus'}", "--run.on_spike=skip",
        "--optim.lr=0.01", "--optim.warmup_steps=5", f"--run.timeout_s={TIMEOUT_S}",
    ]  # fmt: skip


def kill(job: Job, chance: random.Random) -> None:
    os.kill(chance.choice(job.pids(False)), signal.SIGKILL)


def stop(job: Job, chance: random.Random) -> None:
    os.kill(chance.choice(job.pids(False)), signal.SIGSTOP)


def ask(job: Job, chance: random.Random) -> None:
    for pid in job.pids(True):
        os.kill(pid, signal.SIGTERM)


def damage(job: Job, chance: random.Random) -> None:
    for pid in [*job.pids(True), *job.pids(False)]:  # the launchers first
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    steps = [p for p in (job.workdir / "checkpoints").iterdir() if p.name.isdigit()]
    newest = max(steps, key=lambda p: int(p.name))
    files = [p for p in sorted(newest.rglob("*")) if p.is_file() and p.stat().st_size]
    with open(chance.choice(files), "r+b") as f:
        data = f.read()
        at = chance.randrange(len(data))
        f.seek(at)
        f.write(bytes([data[at] ^ 0xFF]))


def fill(job: Job, chance: random.Random) -> None:
    filler = job.workdir / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as f:
        while f.write(bytes(4096)):
            pass
    starts = len(job.starts())
    while job.pids(False) and job.process.poll() is None and len(job.starts()) == starts:  # until the run has ended
        time.sleep(0.1)
    filler.unlink()
    while job.process.poll() is None and len(job.starts()) == starts:  # it is started again, or left to a person
        time.sleep(0.1)
    if job.process.poll() is not None:
        job.start()


def jump(job: Job, chance: random.Random) -> None:
    job.clock.write_text(str(chance.choice([-3600, 3600])))


FAULTS = (kill, stop, ask, damage, fill, jump)


def corpus(folder: Path, chance: random.Random, processes: int) -> None:
    """An epoch is as many iterations whatever the number of processes, so that the odd line comes as rarely."""
    folder.mkdir()
    for n in range(400 * processes):
        (folder / f"{n:04}.txt").write_text("the quick brown fox jumps over the lazy dog and runs on\n" * 8)
    (folder / "odd.txt").write_text("".join(chr(chance.randrange(0x4E00, 0x9FFF)) for _ in range(8)) + "\n")


def events(workdir: Path) -> list[dict[str, object]]:
    found = []
    for line in (workdir / "events.jsonl").read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # a line that a kill or a full disk cut off
            found.append(json.loads(line))
    return found


def losses(workdir: Path) -> list[tuple[int, float]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(row["iteration"], row["lm_loss"]) for row in map(json.loads, lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--faults", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance, steps = random.Random(args.seed), 2 * BETWEEN * (args.faults + 2)
    with tempfile.TemporaryDirectory() as name:
        folder, disk = Path(name), Path(name) / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", disk], check=True)
        try:
            corpus(folder / "corpus", chance, args.processes)
            job = Job(folder, disk, args.processes, steps)
            try:
                chaos(job, chance, args.faults)
            finally:
                job.kill()
            alone = [*launcher(args.processes), *flags(folder, args.processes, steps)]
            subprocess.run([*alone, f"--run.workdir={folder / 'alone'}"], cwd=ROOT, check=True, capture_output=True)
            compare(disk, folder / "alone", steps)
        finally:
            subprocess.run(["umount", "--lazy", disk], check=True)


def chaos(job: Job, chance: random.Random, count: int) -> None:
    began, waits, ends = time.monotonic(), dict.fromkeys(FAULTS, 0.0), dict.fromkeys(FAULTS, 0.0)
    order = [fault for _ in range(-(-count // len(FAULTS))) for fault in chance.sample(FAULTS, len(FAULTS))][:count]
    for fault in order:
        job.trains_beyond(job.iteration() + BETWEEN, 120)
        at, starts, words, pids = job.iteration(), len(job.starts()), len(job.last_words()), job.pids(False)
        fault(job, chance)
        ended = 0.0 if fault is jump else job.ended(pids, 2 * (TIMEOUT_S + LAUNCHER_S))
        waited = ended + (job.trains_beyond(at, 60) if fault is jump else job.trains_again(starts, 120))
        waits[fault], ends[fault] = max(waits[fault], waited), max(ends[fault], ended)
        word = job.last_words()[-1] if len(job.last_words()) > words else "no last word"
        times = f"ended after {ended:4.1f} s, trains again after {waited:4.1f} s"
        print(f"{fault.__name__:7} at iteration {at:5}: {times}  {word}", flush=True)
    status, took = job.process.wait(), (time.monotonic() - began) / 60
    each = ", ".join(f"{fault.__name__} {ends[fault]:.0f} and {wait:.0f} s" for fault, wait in waits.items())
    print(f"ended with status {status} after {took:.1f} min; the longest until it ended and trained again: {each}")


def compare(disturbed: Path, alone: Path, steps: int) -> None:
    found, wanted = losses(disturbed), losses(alone)
    assert [i for i, _ in found] == list(range(1, steps + 1)), "an iteration is lost or doubled"
    differ = [i for (i, a), (_, b) in zip(found, wanted, strict=True) if a != b]
    print(f"{steps} iterations, each once; losses that differ from the undisturbed run's: {len(differ)}{differ[:1]}")
    for name, workdir in (("disturbed", disturbed), ("undisturbed", alone)):
        spikes = [(e["iteration"], e["back_to"], e["from"], e["to"]) for e in events(workdir) if e["event"] == "spike"]
        print(f"{name}: jumps at, back to, samples passed over: {spikes}")
    happened = [event["event"] for event in events(disturbed)]
    print(f"events.jsonl: {happened.count('start')} starts, {happened.count('end')} last words, "
          f"{happened.count('spike')} spikes; of the undisturbed run {len(events(alone))} events")  # fmt: skip
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
