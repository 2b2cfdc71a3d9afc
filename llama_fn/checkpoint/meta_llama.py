"""Weights as Meta publishes them: params.json and consolidated.00.pth, .01.pth and so on, each with a part of all.

Products are [out, in], as Hugging Face has them. Of those that are parallel over what comes out (queries, keys, values,
gate, up, head) the files hold rows one after the other, of the others (output projection, down) columns; the embedding
lies by columns in LLaMA 1 and 2, and by rows in LLaMA 3. Heads of queries and keys turn neighbouring numbers by the
rotary angle, where Hugging Face and we turn the two halves. Source: Meta's model.py, and its fairscale layers.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from llama_fn.checkpoint.huggingface import Tensor
from llama_fn.config import ModelConfig
from llama_fn.errors import UserError

_TOP = {"embed": "tok_embeddings.weight", "final_norm": "norm.weight", "lm_head": "output.weight"}
_LAYER = {
    "attn_norm": "attention_norm", "wq": "attention.wq", "wk": "attention.wk", "wv": "attention.wv",
    "wo": "attention.wo", "mlp_norm": "ffn_norm", "w_gate": "feed_forward.w1", "w_up": "feed_forward.w3",
    "w_down": "feed_forward.w2",
}  # fmt: skip
_BY_COLUMNS = frozenset({"wo", "w_down"})
_WHOLE = frozenset({"attn_norm", "mlp_norm", "final_norm"})
# Of Llama 3.2's models for text, whose params.json says no more of the scaling than that of Llama 3.1 does.
_FACTOR_32 = frozenset({2048, 3072})


class MetaFolder:
    """A folder of Meta's; files are mapped into memory, and a tensor is read when it is asked for.

    UserError where the files are no such model, or hold more than tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.paths = folder, sorted(folder.glob("consolidated.*.pth"))
        self.shards = [_loaded(path) for path in self.paths]
        self.cfg = self._config()

    def _config(self) -> ModelConfig:
        path = self.folder / "params.json"
        try:
            params = json.loads(path.read_bytes())
            heads, dim = params["n_heads"], params["dim"]
            scaled = params.get("use_scaled_rope", False)
            gate, rows = self._shapes("layers.0.feed_forward.w1.weight"), self._shapes(_TOP["embed"])
            vocabulary = rows[0][0] if rows[0][1] < dim or len(rows) == 1 else sum(shape[0] for shape in rows)
            return ModelConfig(
                preset="converted", num_layers=params["n_layers"], embed_dim=dim, num_heads=heads,
                num_kv_heads=params.get("n_kv_heads") or heads, mlp_dim=sum(shape[0] for shape in gate),
                vocab_size=vocabulary, norm_eps=float(params["norm_eps"]),
                rope_theta=float(params.get("rope_theta", 10000.0)),
                rope_factor=(32.0 if dim in _FACTOR_32 else 8.0) if scaled else 1.0,
                tie_embeddings=_TOP["lm_head"] not in self.shards[0],
            )  # fmt: skip
        except FileNotFoundError:
            raise UserError(f"{path} does not exist: Meta's weights come with it") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is not what Meta writes: {error}") from None
        except KeyError as missing:
            raise UserError(f"{self.folder} lacks {missing}, which params.json or every file has") from None

    def _shapes(self, name: str) -> list[tuple[int, ...]]:
        return [tuple(shard[name].shape) for shard in self.shards]

    @property
    def names(self) -> set[str]:
        """What there is, but for rotary tables."""
        return {name for shard in self.shards for name in shard if not name.endswith("rope.freqs")}

    def name(self, each: Tensor) -> str:
        """What Meta calls it."""
        return _TOP[each.kind] if each.layer is None else f"layers.{each.layer}.{_LAYER[each.kind]}.weight"

    def where(self, each: Tensor) -> str:
        """In which file it lies: in all of them."""
        return "consolidated.*.pth"

    def dtype(self) -> torch.dtype:
        """That of the embedding."""
        return self.shards[0][_TOP["embed"]].dtype

    def tensor(self, each: Tensor) -> torch.Tensor:
        """The whole of it as Hugging Face would have it."""
        parts = [shard[self.name(each)] for shard in self.shards]
        if len(parts) == 1 or each.kind in _WHOLE:
            whole = parts[0]
        elif each.kind in _BY_COLUMNS or (each.kind == "embed" and parts[0].shape[1] < self.cfg.embed_dim):
            whole = torch.cat(parts, 1)
        else:
            whole = torch.cat(parts, 0)
        return self._halves(whole, each.kind)

    def _halves(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        """Numbers 0, 2, 4.. of each head of queries and keys, and then 1, 3, 5.."""
        heads = {"wq": self.cfg.num_heads, "wk": self.cfg.num_kv_heads}.get(kind)
        if heads is None:
            return x
        return x.reshape(heads, self.cfg.head_dim // 2, 2, -1).transpose(1, 2).reshape(x.shape)


def _loaded(path: Path) -> dict[str, Any]:
    """Its tensors, mapped and not read; torch makes nothing else of a file than tensors and containers of them."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from None
    if not isinstance(held, dict) or not all(isinstance(x, torch.Tensor) for x in held.values()):
        raise UserError(f"{path} holds something else than tensors by name")
    return held
