"""Data, and a work folder to be damaged."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from guard_runs import attempt

from llama_fn.data import writer


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x"
    random = np.random.default_rng(0)
    writer.write(path, [random.integers(0, 64, n) for n in random.integers(5, 60, 200)], np.uint16)
    return path


@pytest.fixture(scope="module")
def trained(prefix, tmp_path_factory):
    """A work folder with four iterations, checkpoints 2 and 4; to be copied."""
    workdir = tmp_path_factory.mktemp("trained")
    assert attempt(prefix, workdir)[0] == 0
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return tmp_path / "run"
