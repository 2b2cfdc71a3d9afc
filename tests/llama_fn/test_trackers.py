"""Numbers that leave the work folder: MLflow, Prometheus and Weights & Biases, each without a network."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llama_fn.config import Config, RunConfig
from llama_fn.errors import UserError
from llama_fn.run.trackers import trackers

ROWS = [{"iteration": i, "lm_loss": 5.0 - i, "mfu": None, "tokens_per_second": 100.0 * i} for i in (1, 2)]
LOSSES = {"validation_loss": 2.5, "validation_loss/wiki": 3.5}


def logged(run, workdir):
    (tracker,) = trackers(replace(Config(), run=replace(run, workdir=str(workdir))), workdir)
    for row in ROWS:
        tracker.write(row, LOSSES if row["iteration"] == 2 else {})
    tracker.close()


def test_prometheus_reads_the_last_record(tmp_path):
    parser = pytest.importorskip("prometheus_client.parser", reason="the extra prometheus is missing; runs in nightly")
    path = tmp_path / "node" / "llama_fn.prom"
    logged(RunConfig(prometheus=str(path)), tmp_path)
    families = {family.name: family.samples for family in parser.text_string_to_metric_families(path.read_text())}
    (loss,) = families["llama_fn_lm_loss"]
    assert loss.value == 3.0 and loss.labels["workdir"] == str(tmp_path)
    assert {s.labels["source"]: s.value for s in families["llama_fn_validation_loss"]} == {"": 2.5, "wiki": 3.5}
    assert "llama_fn_mfu" not in families and families["llama_fn_record_time_seconds"][0].value > 1.7e9
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing lies beside it"
    with pytest.raises(UserError, match=r"end in \.prom"):
        trackers(Config(run=RunConfig(prometheus=str(tmp_path / "x.txt"))), tmp_path)


def test_mlflow_goes_on_with_the_run_of_the_work_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is missing; runs in make nightly")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for _ in range(2):
        logged(RunConfig(mlflow="pretraining"), tmp_path)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("pretraining")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["optim.lr"] == str(Config().optim.lr)
    assert run.data.metrics["lm_loss"] == 3.0 and run.data.metrics["validation_loss/wiki"] == 3.5
    assert {m.step for m in client.get_metric_history(run.info.run_id, "lm_loss")} == {1, 2}


def test_wandb_writes_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is missing; runs in make nightly")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged(RunConfig(wandb="pretraining"), tmp_path)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize("flag", ["wandb", "mlflow", "prometheus"])
def test_a_missing_package_is_named_with_its_extra(flag, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr("llama_fn.run.trackers.import_module", missing)
    with pytest.raises(UserError, match=rf"--run\.{flag} needs the package .*llama_fn\[{flag}\]"):
        trackers(Config(run=RunConfig(**{flag: "x.prom"})), tmp_path)
