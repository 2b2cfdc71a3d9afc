"""Generation and evaluation against transformers, and against reading everything anew for each token."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_run import transformers

from llama_fn.checkpoint import layout
from llama_fn.checkpoint.weights import Weights
from llama_fn.compiler.passes.partition import rules_named
from llama_fn.config import ModelConfig
from llama_fn.data import tokenizer, writer
from llama_fn.errors import UserError
from llama_fn.model import arrays, llama, random, weights
from llama_fn.run.decoding import Decoder, Sampling, drawn
from llama_fn.tools import convert_in
from sharding import Mesh

ROOT = Path(__file__).resolve().parents[2]
CFG = ModelConfig(
    num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, mlp_dim=96, vocab_size=128, init_std=0.2, rope_factor=4.0,
    rope_length=16,
)  # fmt: skip
PROMPTS = [[1, 5, 9, 3], [7, 2, 4, 8, 1, 3, 100], [*range(70)]]


@pytest.fixture(scope="module")
def params():
    return arrays.materialize(llama.abstract_params(CFG), random.key(0))


def anew(params, prompt, count):
    """The likeliest tokens, each from all that stands before it."""
    gathered, ids = weights.gather(params, llama.abstract_params(CFG)), list(prompt)
    for _ in range(count):
        ids.append(int(llama.logits(gathered, torch.tensor([ids]), cfg=CFG)[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_greedy_tokens_are_those_of_reading_everything_anew(backend, params):
    """Prompts of different lengths together, one longer than a bucket, up to the end of the cache."""
    said = list(Decoder(CFG, 90, backend).load(params).generate(PROMPTS, Sampling()))
    assert len(said) == 90 - 70 + 1
    for i, prompt in enumerate(PROMPTS):
        assert [tokens[i] for tokens in said] == anew(params, prompt, len(said)), i


@pytest.mark.parametrize(("axes", "rules"), [("model:2", None), ("model:2", "tp_sp"), ("data:2,model:2", "fsdp_tp")])
def test_a_mesh_gives_the_tokens_of_one_device(axes, rules, params):
    """From weights laid out for decoding, and from those of a training."""
    named = rules_named(rules) if rules else None
    decoder = Decoder(CFG, 90, "interpret", Mesh.parse(axes), named).load(params)
    want = list(Decoder(CFG, 90, "eager").load(params).generate(PROMPTS, Sampling()))
    assert list(decoder.generate(PROMPTS, Sampling())) == want


@pytest.mark.parametrize("name", ["llama", "llama3", "mistral", "qwen2", "qwen3"])
def test_greedy_tokens_are_those_of_transformers(name, models, tmp_path):
    convert_in.convert(models / name, tmp_path, None)
    found = Weights(tmp_path, "--source")
    infos = llama.abstract_params(found.cfg)
    held = found.load(infos, layout.parts(infos, None, Mesh(), 0), "cpu")
    prompts = (torch.arange(2 * 24).reshape(2, 24) * 7 % 256)[:, :9].tolist()
    said = list(Decoder(found.cfg, 29, "eager").load(held).generate(prompts, Sampling()))
    want = np.load(models / name / "answers.npz")["greedy"]
    assert np.array(said[:20]).T.tolist() == want.tolist()


def test_a_row_that_ended_gives_its_stop_on_and_the_last_ends_all(params):
    first = anew(params, PROMPTS[0], 12)
    stop = first[4]
    said = list(Decoder(CFG, 90, "eager").load(params).generate(PROMPTS[:1], Sampling(), stop))
    assert [tokens[0] for tokens in said] == first[: first.index(stop) + 1]
    both = list(Decoder(CFG, 40, "eager").load(params).generate(PROMPTS[:2], Sampling(), stop))
    ended = [tokens[0] for tokens in both].index(stop)
    assert all(tokens[0] == stop for tokens in both[ended:]) and len(both) > ended + 1


def test_a_seed_repeats_and_narrow_choices_are_the_likeliest(params):
    decoder = Decoder(CFG, 30, "eager").load(params)

    def said(**sampling):
        return [tokens[0] for tokens in decoder.generate(PROMPTS[:1], Sampling(**sampling))]

    assert said(temperature=1.5, seed=3) == said(temperature=1.5, seed=3) != said(temperature=1.5, seed=4)
    assert said() == said(temperature=1.0, top_k=1) == said(temperature=1.0, top_p=1e-6)


def test_tokens_are_drawn_by_their_probabilities():
    logits, generator = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20000, 4), torch.Generator().manual_seed(0)

    def shares(**sampling):
        counts = Counter(drawn(logits, Sampling(1.0, **sampling), generator).tolist())
        return [counts[i] / 20000 for i in range(4)]

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.015)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.015)
    assert shares(top_p=0.9) == pytest.approx([0.526, 0.316, 0.158, 0], abs=0.015)


def test_prompts_that_leave_no_room_are_refused(params):
    for prompt in ([], [1] * 30):
        with pytest.raises(UserError, match="it needs 1 to 29 of --length"):
            next(Decoder(CFG, 30, "eager").load(params).generate([prompt], Sampling()))


@pytest.fixture(scope="module")
def model(models, tmp_path_factory):
    """A converted model with a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "ours"
    convert_in.convert(models / "llama", folder, None)
    texts = [p.read_text() for p in sorted(Path(subprocess.__file__).parent.glob("*.py"))[:20]]
    tokenizer.train(texts, 400, folder / "tokenizer.model")
    return folder


def tool(name, *arguments):
    command = [sys.executable, "-m", f"llama_fn.tools.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_tool_answers_one_prompt_or_several(model, tmp_path):
    one = tool("generate", f"--source={model}", "--prompt=import os", "--tokens=12", "--backend=eager")
    assert not one.returncode and one.stdout.startswith("import os") and "12 tokens in" in one.stderr, one.stderr
    (tmp_path / "prompts.txt").write_text("import os\n\ndef main(\n")
    two = tool("generate", f"--source={model}", f"--file={tmp_path / 'prompts.txt'}", "--tokens=12", "--backend=eager")
    assert f"--- import os\n{one.stdout.removeprefix('import os').rstrip()}" in two.stdout, "alone or with others"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "llama_fn.tools.generate"]
    flags = [f"--source={model}", "--prompt=import os", "--tokens=12", "--backend=eager", "--mesh=model:2"]
    both = subprocess.run([sys.executable, *launcher, *flags], cwd=ROOT, capture_output=True, text=True)
    assert not both.returncode and both.stdout == one.stdout, both.stderr
    assert "--- def main(" in two.stdout and "24 tokens in" in two.stderr
    for wrongs, said in (
        (["--prompt=x"], "give --source"),
        ([f"--source={tmp_path}", "--prompt=x"], "has no checkpoints: name a work folder"),
        ([*flags[:-1], "--mesh=data:2"], "a model is shared out over model:N"),
        (flags, "--mesh=model:2 has 2 devices, and one process was started: start them with torchrun"),
        ([f"--source={model}", "--file=/none"], "--file=/none cannot be read"),
    ):
        wrong = tool("generate", *wrongs)
        assert wrong.returncode == 2 and said in wrong.stderr, wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("where", [["--backend=eager"], ["--backend=interpret", "--mesh=model:2"]])
def test_evaluate_gives_the_loss_of_transformers(where, model, models, tmp_path):
    text = Path(json.__file__).read_text()[:3000]
    (tmp_path / "a.txt").write_text(text)
    pieces = tokenizer.load(model / "tokenizer.model")
    ids = np.array([*pieces.encode(text), pieces.eos_id()])
    writer.write(tmp_path / "b", [ids], np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    want = float(re.search(r"LOSS (\S+)", transformers(tmp_path, "loss", str(models / "llama"), "ids.npy"))[1])
    paths = [f"--path={tmp_path / 'a.txt'}", f"--path={tmp_path / 'b'}"]
    flags = ["--seq_len=32", "--batch=3", *where, f"--json={tmp_path / 'out.json'}"]
    done = tool("evaluate", f"--source={model}", *paths, *flags)
    assert not done.returncode, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["paths"]
    assert len(found) == 2 and all(one["tokens"] == len(ids) - 1 for one in found.values())
    assert all(one["loss"] == pytest.approx(want, rel=1e-5) for one in found.values())
    assert f"loss {want:.4f}" in done.stdout
