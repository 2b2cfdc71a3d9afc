"""What benchmarks/step.py measures: a shape of model and batch, and the tables of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama_fn.model.presets import preset


@dataclass(frozen=True)
class Cell:
    """One comparison. A size of None is the preset's."""

    preset: str = "llama_tiny"
    dtype: str = "fp32"
    device: str = "cpu"
    threads: int = 1
    batch: int | None = None
    seq: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    vocab: int | None = None
    layers: int | None = None
    attention: str = "auto"

    def spec(self) -> dict[str, Any]:
        """Every size as a number, for the workers."""
        cfg, (batch, seq) = preset(self.preset), BATCHES[self.preset]
        heads = self.heads or cfg.num_heads
        return {
            "dtype": self.dtype, "device": self.device, "threads": self.threads, "attention": self.attention,
            "batch": self.batch or batch, "seq": self.seq or seq, "layers": self.layers or cfg.num_layers,
            "dim": cfg.embed_dim, "heads": heads, "kv_heads": self.kv_heads or heads, "mlp": cfg.mlp_dim,
            "vocab": self.vocab or cfg.vocab_size,
        }  # fmt: skip

    def title(self) -> str:
        """What differs from the preset is named."""
        spec = self.spec()
        sizes = [f"batch {spec['batch']} x {spec['seq']}", f"{self.threads} thread{'s' * (self.threads > 1)}"]
        names = ("heads", "kv_heads", "vocab", "layers")
        sizes += [f"{name} {value}" for name in names if (value := getattr(self, name)) is not None]
        return f"{self.preset} {self.dtype} on {self.device}, {', '.join(sizes)}"


BATCHES = {"llama_tiny": (8, 256), "llama_60m": (4, 512), "llama_1b": (8, 2048)}


def tables(cell: Cell) -> dict[str, Sequence[Cell]]:
    """The cells of each table, on the device and threads of `cell`: `models` by dtype, and `shapes` that users have."""
    models = [replace(cell, preset=name, dtype=dtype) for name in ("llama_tiny", "llama_60m") for dtype in DTYPES]
    shapes: list[dict[str, Any]] = [
        {"batch": 2, "seq": 1024},
        {"batch": 1, "seq": 2048},
        {"batch": 1, "seq": 4096},
        {"kv_heads": 2},
        {"heads": 4},
        {"vocab": 128256, "batch": 2},
        {"batch": 1},
        {"threads": 1},
    ]
    return {"models": models, "shapes": [replace(cell, **{"preset": "llama_60m", **shape}) for shape in shapes]}


DTYPES = ("fp32", "bf16")
