"""LLaMA pre-training as one compiled graph: pure functions over trees, explicit sharding, a thin loop."""

import importlib
import os

# An installed torch_npu breaks `import torch` on a machine without CANN. We load it ourselves, where it is asked for,
# and say what is missing (llama_fn/ascend/requirements.py).
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`from llama_fn import stages`: what a notebook begins with; torch is imported with it only."""
    if name == "stages":
        return importlib.import_module("llama_fn.compiler.stages")
    raise AttributeError(f"module llama_fn has no attribute {name!r}")
