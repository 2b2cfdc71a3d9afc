"""Checkpoints of a run: written and read by Orbax, proven whole or damaged, and shared by several processes.

May import the ground, the maths' declarations of arrays, and distributed. Read store.py first; layout.py says who
writes what, tensors.py how it lies on disk, integrity.py what proves damage, local.py what is kept in between.
"""

from llama_fn.checkpoint.local import LocalCopies, run_folder
from llama_fn.checkpoint.orbax import SavedStep
from llama_fn.checkpoint.store import Store

__all__ = ["LocalCopies", "SavedStep", "Store", "run_folder"]
