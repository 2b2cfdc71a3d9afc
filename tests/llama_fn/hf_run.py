"""hf_models.py in a process and folder of its own, with nothing of the project on its path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def transformers(folder, *arguments):
    """What it prints."""
    script = Path(folder) / "hf_models.py"
    script.write_text(Path(__file__).with_name("hf_models.py").read_text())
    done = subprocess.run([sys.executable, str(script), *arguments], cwd=folder, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout
