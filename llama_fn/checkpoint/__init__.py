"""Checkpoints of a run: written and read by Orbax, proven whole or damaged, and shared by several processes.

May import the ground, the maths' declarations of arrays, and distributed. Read orbax.py first; integrity.py says what
proves damage.
"""

from llama_fn.checkpoint.orbax import Checkpointer, SavedStep
from llama_fn.checkpoint.store import Store

__all__ = ["Checkpointer", "SavedStep", "Store"]
