"""LLaMA pre-training as one compiled graph: pure functions over trees, explicit sharding, a thin loop."""

__version__ = "0.1.0"
