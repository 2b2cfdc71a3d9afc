"""Meta's weights to ours: the logits of Meta's model, whatever the number of files."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch
from test_convert import TOKENS, logits_of

from llama_fn.errors import UserError
from llama_fn.tools import convert_in

DIM, HEADS, KV, HIDDEN, VOCAB, LAYERS, HEAD = 64, 4, 2, 96, 256, 2, 16


def weights():
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return (torch.randn(*shape, generator=generator) * 0.1).bfloat16()

    held = {"tok_embeddings.weight": rand(VOCAB, DIM), "norm.weight": 1 + rand(DIM), "output.weight": rand(VOCAB, DIM)}
    for i in range(LAYERS):
        shapes = {
            "attention.wq": (HEADS * HEAD, DIM), "attention.wk": (KV * HEAD, DIM), "attention.wv": (KV * HEAD, DIM),
            "attention.wo": (DIM, HEADS * HEAD), "feed_forward.w1": (HIDDEN, DIM), "feed_forward.w2": (DIM, HIDDEN),
            "feed_forward.w3": (HIDDEN, DIM),
        }  # fmt: skip
        held |= {f"layers.{i}.{name}.weight": rand(*shape) for name, shape in shapes.items()}
        held |= {f"layers.{i}.{name}.weight": 1 + rand(DIM) for name in ("attention_norm", "ffn_norm")}
    return held


def frequencies(theta, scaled):
    inverse = theta ** -(torch.arange(0, HEAD, 2).double() / HEAD)
    if not scaled:
        return inverse
    length, low, high, factor = 8192, 1, 4, 8
    kept = []
    for f in inverse:
        wave = 2 * math.pi / f
        if wave < length / high:
            kept.append(f)
        elif wave > length / low:
            kept.append(f / factor)
        else:
            smooth = (length / wave - low) / (high - low)
            kept.append((1 - smooth) * f / factor + smooth * f)
    return torch.stack(kept)


def meta_logits(held, theta, scaled):
    """In float64, heads turned as complex numbers of neighbours."""
    w = {name: x.double() for name, x in held.items()}
    t = TOKENS.shape[1]
    angle = torch.arange(t).double()[:, None] * frequencies(theta, scaled)
    turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w[name]

    def turned(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    x = w["tok_embeddings.weight"][TOKENS]
    for i in range(LAYERS):
        of = lambda name, i=i: w[f"layers.{i}.{name}.weight"]  # noqa: E731
        n = norm(x, f"layers.{i}.attention_norm.weight")
        heads = {"q": HEADS, "k": KV, "v": KV}
        q, k, v = ((n @ of(f"attention.w{x}").T).unflatten(-1, (count, HEAD)) for x, count in heads.items())
        q, k, v = (y.repeat_interleave(HEADS // y.shape[2], 2).transpose(1, 2) for y in (turned(q), turned(k), v))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + o.transpose(1, 2).flatten(2) @ of("attention.wo").T
        n = norm(x, f"layers.{i}.ffn_norm.weight")
        x = (
            x
            + (torch.nn.functional.silu(n @ of("feed_forward.w1").T) * (n @ of("feed_forward.w3").T))
            @ of("feed_forward.w2").T
        )
    return (norm(x, "norm.weight") @ w["output.weight"].T).numpy()


def publish(folder, held, files, params, embedding):
    """As fairscale's layers split it over so many devices."""
    folder.mkdir()
    dims = {"wo": 1, "w2": 1, "tok_embeddings": embedding}

    def part(name, x, i):
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        return x if x.dim() == 1 else x.chunk(files, dims.get(kind, 0))[i].clone()

    for i in range(files):
        shard = {name: part(name, x, i) for name, x in held.items()} | {"rope.freqs": torch.ones(HEAD // 2)}
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")
    known = {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV, "norm_eps": 1e-5, "multiple_of": 32}
    (folder / "params.json").write_text(json.dumps(known | params))


@pytest.mark.parametrize(
    ("files", "params", "embedding"),
    [
        (1, {"vocab_size": -1}, 1),  # LLaMA 1 and 2
        (2, {"vocab_size": -1}, 1),
        (2, {"vocab_size": VOCAB, "rope_theta": 500000.0, "use_scaled_rope": True}, 0),  # Llama 3.1
    ],
)
def test_logits_are_those_of_metas_model(files, params, embedding, tmp_path):
    held = weights()
    publish(tmp_path / "meta", held, files, params, embedding)
    convert_in.convert(tmp_path / "meta", tmp_path / "ours", None)
    want = meta_logits(held, params.get("rope_theta", 10000.0), params.get("use_scaled_rope", False))
    np.testing.assert_allclose(logits_of(tmp_path / "ours"), want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_what_is_no_such_model_is_refused(tmp_path):
    held = weights()
    publish(tmp_path / "lacks", {n: x for n, x in held.items() if n != "norm.weight"}, 1, {"vocab_size": -1}, 1)
    with pytest.raises(UserError, match=r"lacks norm\.weight"):
        convert_in.convert(tmp_path / "lacks", tmp_path / "ours", None)
    publish(tmp_path / "code", held, 1, {"vocab_size": -1}, 1)

    class Code:
        def __reduce__(self):
            return (print, ("this must not run",))

    (tmp_path / "code" / "consolidated.00.pth").write_bytes(pickle.dumps(Code()))
    with pytest.raises(UserError, match=r"consolidated\.00\.pth cannot be read as weights"):
        convert_in.convert(tmp_path / "code", tmp_path / "ours", None)
    publish(tmp_path / "alone", held, 1, {"vocab_size": -1}, 1)
    (tmp_path / "alone" / "params.json").unlink()
    with pytest.raises(UserError, match=r"params\.json does not exist"):
        convert_in.convert(tmp_path / "alone", tmp_path / "ours", None)
    assert not (tmp_path / "ours").exists()
