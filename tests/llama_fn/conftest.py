"""What several files here need of transformers, made once."""

from __future__ import annotations

import os

import pytest
from filelock import FileLock
from hf_run import transformers


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """The folder of hf_models.py's models, with what transformers says of them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "hf_models"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            transformers(folder, "make", str(folder))
            (folder / "done").touch()
    return folder
