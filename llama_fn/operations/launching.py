"""What starts a run on one machine, on several, in a SLURM job or on Kubernetes: commands and manifests, as data."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llama_fn.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = "configs"  # in ROOT: scripts and manifests
GRACE_S = 600  # that the scripts and manifests leave for a last save
PLACEHOLDER = "registry.example/"


@dataclass(frozen=True)
class Job:
    """A run of `machines` x `devices` processes. `flagfile` and `more`, further flags, are train.py's; `rank` of this
    machine and `host`, the first one, are for a start by hand."""

    name: str
    flagfile: str
    workdir: str
    machines: int
    devices: int
    more: Sequence[str] = ()
    rank: str = "NODE_RANK"
    host: str = "FIRST_HOST"
    image: str = ""

    @property
    def flags(self) -> list[str]:
        """Of train.py, behind the flagfile."""
        return [f"--run.workdir={self.workdir}", *self.more]


@dataclass(frozen=True)
class Launch:
    """`words`: a command to run here, or on every machine; `given`: what it reads from its standard input; `starts`:
    the command that it makes each machine run, for a reader."""

    words: list[str]
    everywhere: bool = False
    given: str = ""
    starts: str = ""

    @property
    def shown(self) -> str:
        """As one types it."""
        return shlex.join(self.words)


def one(job: Job) -> Launch:
    """On this machine."""
    if job.machines != 1:
        raise UserError(f"--on=one starts one machine, and the mesh takes {job.machines} of {job.devices} devices")
    return Launch(["bash", f"{CONFIGS}/torchrun_one_node.sh", str(job.devices), job.flagfile, *job.flags])


def nodes(job: Job) -> Launch:
    """By hand on each of several machines."""
    return Launch(_on_each(job, job.rank, job.host), everywhere=True)


def slurm(job: Job) -> Launch:
    """As a job of SLURM, requeued after preemption."""
    if "," in f"{job.flagfile}{job.workdir}":
        raise UserError(f"sbatch divides at commas: {job.flagfile} or {job.workdir} has one; name it without")
    export = f"--export=ALL,FLAGFILE={job.flagfile},WORKDIR={job.workdir},DEVICES={job.devices}"
    script = f"{CONFIGS}/launch/slurm.sbatch"
    words = ["sbatch", f"--nodes={job.machines}", f"--job-name={job.name}", export, script, *job.more]
    return Launch(words, starts=shlex.join([*_on_each(job, "SLURM_NODEID", "FIRST_HOST"), f"--run.grace_s={GRACE_S}"]))


def pytorchjob(job: Job) -> Launch:
    """As a PyTorchJob of Kubeflow's operator."""
    manifest = _manifest("pytorchjob.yaml", job)
    manifest["spec"]["nprocPerNode"] = str(job.devices)
    worker = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]
    worker["replicas"] = job.machines
    container = _container(worker["template"], job)
    before = container["args"][: container["args"].index("train.py") + 1]
    container["args"] = [*before, f"--flagfile={job.flagfile}", *job.flags, f"--run.grace_s={GRACE_S}"]
    return _applied(manifest, shlex.join([*container["command"], *container["args"]]))


def volcano(job: Job) -> Launch:
    """As a job of Volcano, with MindCluster's labels."""
    manifest = _manifest("volcano_ascend.yaml", job)
    (task,) = manifest["spec"]["tasks"]
    manifest["spec"]["minAvailable"] = task["replicas"] = job.machines
    words = shlex.join([*_on_each(job, "RANK", "HOST"), f"--run.grace_s={GRACE_S}"])
    words = words.replace(" RANK HOST ", ' "$VK_TASK_INDEX" "${VC_WORKER_HOSTS%%,*}" ', 1)
    _container(task["template"], job)["args"] = [f"exec {words}"]
    return _applied(manifest, words)


def _on_each(job: Job, rank: str, host: str) -> list[str]:
    script = f"{CONFIGS}/torchrun_nodes.sh"
    return ["bash", script, str(job.machines), rank, host, str(job.devices), job.flagfile, *job.flags]


def _manifest(name: str, job: Job) -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load((ROOT / CONFIGS / "launch" / name).read_text())
    made["metadata"]["name"] = re.sub("[^a-z0-9]+", "-", job.name.lower()).strip("-")  # all that Kubernetes takes
    return made


def _container(template: dict[str, Any], job: Job) -> dict[str, Any]:
    """The one of a pod, with the job's image and devices."""
    container: dict[str, Any]
    (container,) = template["spec"]["containers"]
    container["image"] = job.image or container["image"]
    for amounts in container["resources"].values():
        for resource in amounts:
            amounts[resource] = job.devices
    return container


def _applied(manifest: dict[str, Any], starts: str) -> Launch:
    return Launch(["kubectl", "apply", "-f", "-"], given=yaml.safe_dump(manifest, sort_keys=False), starts=starts)


WAYS: dict[str, Callable[[Job], Launch]] = {
    "one": one, "nodes": nodes, "slurm": slurm, "pytorchjob": pytorchjob, "volcano": volcano,
}  # fmt: skip
