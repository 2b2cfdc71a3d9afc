"""Where a run's numbers go besides its work folder, when a flag asks: Weights & Biases, MLflow, Prometheus.

Each needs its package, an extra of the same name. Weights & Biases uses a network, and so does MLflow where
MLFLOW_TRACKING_URI names a server.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from llama_fn.config import Config
from llama_fn.config_fields import flat
from llama_fn.errors import UserError
from llama_fn.files import atomic

log = logging.getLogger("llama_fn.metrics")
MLFLOW_RUN = "mlflow.json"  # in the work folder: which run of which server a resume goes on with
WRITE_EVERY_S = 1.0  # Prometheus asks a few times a minute


class Tracker(Protocol):
    """Gets each record with the validation losses behind it, numbers by name."""

    def write(self, row: Mapping[str, Any], losses: Mapping[str, float]) -> None:
        """One iteration."""
        ...

    def close(self) -> None:
        """The run ends."""
        ...


def trackers(cfg: Config, workdir: Path) -> list[Tracker]:
    """Those that the flags name. UserError for a package that is missing."""
    made: list[Tracker] = []
    if cfg.run.wandb:
        made.append(_Wandb(cfg, workdir))
    if cfg.run.mlflow:
        made.append(_Mlflow(cfg, workdir))
    if cfg.run.prometheus:
        made.append(_Prometheus(cfg))
    return made


def _package(name: str, flag: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise UserError(f"--run.{flag} needs the package {name}: pip install 'llama_fn[{extra}]'") from None


class _Wandb:
    def __init__(self, cfg: Config, workdir: Path) -> None:
        wandb = _package("wandb", "wandb", "wandb")
        self.run = wandb.init(project=cfg.run.wandb, dir=str(workdir), config=flat(cfg), resume="allow")

    def write(self, row: Mapping[str, Any], losses: Mapping[str, float]) -> None:
        self.run.log({**row, **losses}, step=row["iteration"])

    def close(self) -> None:
        self.run.finish()


class _Mlflow:
    """One MLflow run for all starts of a work folder; without MLFLOW_TRACKING_URI it is in the folder's mlflow.db."""

    def __init__(self, cfg: Config, workdir: Path) -> None:
        mlflow = _package("mlflow", "mlflow", "mlflow")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workdir.absolute() / 'mlflow.db'}"
        self.client = mlflow.MlflowClient(tracking_uri=uri)
        self.metric = mlflow.entities.Metric
        known = workdir / MLFLOW_RUN
        told = json.loads(known.read_text()) if known.exists() else {}
        if told.get("uri") == uri:
            self.run_id = str(told["run_id"])
            return
        experiment = self.client.get_experiment_by_name(cfg.run.mlflow)
        number = experiment.experiment_id if experiment else self.client.create_experiment(cfg.run.mlflow)
        self.run_id = self.client.create_run(number, run_name=workdir.name).info.run_id
        for name, value in flat(cfg).items():
            self.client.log_param(self.run_id, name, value)
        with atomic(known) as f:
            json.dump({"uri": uri, "run_id": self.run_id}, f)

    def write(self, row: Mapping[str, Any], losses: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        numbers = {name: value for name, value in {**row, **losses}.items() if value is not None}
        metrics = [self.metric(name, float(value), now, row["iteration"]) for name, value in numbers.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


class _Prometheus:
    """A text file that node_exporter's textfile collector reads: it names the last record, and when it was written."""

    def __init__(self, cfg: Config) -> None:
        self.package = _package("prometheus_client", "prometheus", "prometheus")
        self.path, self.written = Path(cfg.run.prometheus), -math.inf
        if self.path.suffix != ".prom":
            raise UserError(f"--run.prometheus={self.path}: node_exporter reads files whose names end in .prom")
        self.labels = {"workdir": str(Path(cfg.run.workdir).absolute()), "host": socket.gethostname()}
        self.registry, self.gauges = self.package.CollectorRegistry(), dict[str, Any]()
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, row: Mapping[str, Any], losses: Mapping[str, float]) -> None:
        for name, value in {**row, **losses, "record_time_seconds": time.time()}.items():
            if value is not None:
                self._gauge(name).set(value)
        if time.monotonic() - self.written >= WRITE_EVERY_S:
            self._write()

    def _gauge(self, name: str) -> Any:
        kind, _, source = name.partition("/")  # validation_loss of one source
        labels = {**self.labels, "source": source}
        if kind not in self.gauges:
            words = f"{kind} of the last record (docs/metrics.md)"
            self.gauges[kind] = self.package.Gauge(f"llama_fn_{kind}", words, list(labels), registry=self.registry)
        return self.gauges[kind].labels(**labels)

    def _write(self) -> None:
        self.written = time.monotonic()
        try:
            self.package.write_to_textfile(str(self.path), self.registry)  # aside, then renamed
        except OSError as error:
            log.warning("--run.prometheus=%s: %s", self.path, error.strerror)

    def close(self) -> None:
        self._write()
