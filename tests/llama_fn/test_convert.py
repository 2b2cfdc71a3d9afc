"""Weights of transformers to ours and back: the same bits, and the same logits before, between and after."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_run import transformers
from safetensors.torch import load_file, save_file

from llama_fn import tree
from llama_fn.checkpoint import huggingface, layout
from llama_fn.checkpoint.weights import Weights
from llama_fn.errors import UserError
from llama_fn.model import llama, weights
from llama_fn.tools import convert_in, convert_out
from sharding import Mesh

NAMES = ("llama", "llama3", "tied", "mistral", "qwen2", "qwen3")
TOKENS = torch.arange(2 * 24).reshape(2, 24) * 7 % 256


def logits_of(folder, mesh=None):
    """Of ours, in float32."""
    found = Weights(folder, "--source")
    infos = llama.abstract_params(found.cfg)
    params = found.load(infos, layout.parts(infos, None, Mesh(), 0), "cpu")
    return llama.logits(weights.gather(params, infos), TOKENS, cfg=found.cfg).numpy()


def all_tensors(folder):
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers_and_every_bit_comes_back(name, models, tmp_path):
    convert_in.convert(models / name, tmp_path / "ours", None)
    want = np.load(models / name / "answers.npz")["logits"]
    np.testing.assert_allclose(logits_of(tmp_path / "ours"), want, rtol=0, atol=2e-5 * np.abs(want).max())
    convert_out.convert(tmp_path / "ours", tmp_path / "back", "bfloat16")
    before, after = all_tensors(models / name), all_tensors(tmp_path / "back")
    assert set(before) == set(after)
    assert all(x.dtype == after[n].dtype and torch.equal(x, after[n]) for n, x in before.items())


def test_transformers_loads_what_is_written(models, tmp_path, monkeypatch):
    convert_in.convert(models / "llama3", tmp_path / "ours", "float32")
    monkeypatch.setattr(convert_out, "SHARD_BYTES", 100_000)
    convert_out.convert(tmp_path / "ours", tmp_path / "back", "float32")
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 3
    transformers(tmp_path, "read", str(tmp_path / "back"), str(tmp_path / "read.npz"))
    want, got = (np.load(p)["logits"] for p in (models / "llama3" / "answers.npz", tmp_path / "read.npz"))
    assert np.array_equal(want, got)


def test_a_dtype_that_is_asked_for_is_written(models, tmp_path):
    convert_in.convert(models / "llama", tmp_path / "ours", "float32")
    convert_out.convert(tmp_path / "ours", tmp_path / "half", "float16")
    before, after = all_tensors(models / "llama"), all_tensors(tmp_path / "half")
    assert all(torch.equal(x.half(), after[n]) for n, x in before.items())


def changed(models, tmp_path, **config):
    """A copy of a model with another config.json."""
    folder = tmp_path / "changed"
    folder.mkdir()
    values = json.loads((models / "llama" / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").symlink_to(models / "llama" / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"architectures is \['GPT2LMHeadModel'\]; llama_fn computes"),
        ({"attention_bias": True}, "attention_bias=True, which llama_fn does not compute"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', which"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'; llama_fn computes default and llama3"),
        ({"intermediate_size": 80}, r"mlp\.gate_proj\.weight is \[96, 64\], which is not \[64, 80\]"),
        ({"num_hidden_layers": 2}, r"has model.layers.2.*, which have no place here"),
        ({"num_hidden_layers": 4}, r"lacks model.layers.3.input_layernorm.weight"),
    ],
)
def test_what_is_not_ours_is_refused_by_name(config, said, models, tmp_path, caplog):
    with pytest.raises((UserError, OSError), match=said):
        convert_in.convert(changed(models, tmp_path, **config), tmp_path / "ours", None)
    assert not (tmp_path / "ours" / "checkpoints" / "0").exists()


def test_old_names_of_the_rope_parameters_are_read(models):
    old = {"rope_theta": 500000.0, "rope_scaling": {
        "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }}  # fmt: skip
    config = json.loads((models / "llama" / "config.json").read_text())
    config.pop("rope_parameters", None)
    cfg = huggingface.model_config(config | old, Path("x"))
    assert cfg.rope_theta == 500000.0 and cfg.rope_scaling == (8.0, 1.0, 4.0, 8192.0)
    again = huggingface.model_config(huggingface.hf_config(cfg, "bfloat16", 64, {}), Path("x"))
    assert again == cfg


@pytest.mark.slow
def test_memory_is_that_of_a_few_tensors(tmp_path):
    """A model of 400 MB in a process whose data may grow by 150 MB."""
    folder, layers, dim = tmp_path / "large", 12, 1024
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, "hidden_size": dim, "vocab_size": 1024,
        "num_attention_heads": 8, "intermediate_size": 4096, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    cfg = huggingface.model_config(config, folder)
    infos = tree.by_path({"params": llama.abstract_params(cfg)})
    held = {}
    for each in huggingface.tensors(cfg):
        shape = infos[each.path].shape[each.layer is not None :]
        held[each.name] = each.theirs(torch.zeros(shape, dtype=torch.bfloat16))
    save_file(held, folder / "model.safetensors")
    size = sum(x.nbytes for x in held.values())
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "import orbax.checkpoint, torch\n"
        "from llama_fn.tools import convert_in, convert_out\n"
        "used = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1]) / 1e3\n"
        "import threading, time\n"
        "before, peak, done = used(), [0], []\n"
        "def watch():\n"
        "    while not done: peak[0] = max(peak[0], used()); time.sleep(0.002)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "convert_in.convert(Path(sys.argv[1]), Path(sys.argv[2]), None)\n"
        "done.append(1); print('MB', peak[0] - before)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "ours")], cwd=root, capture_output=True, text=True
    )  # fmt: skip
    assert not done.returncode, done.stderr
    assert size > 390e6 and float(done.stdout.split("MB")[1]) < 200


def test_a_run_begins_with_converted_weights_on_any_mesh(models, tmp_path):
    convert_in.convert(models / "llama3", tmp_path / "ours", None)
    found = Weights(tmp_path / "ours", "--run.init_from")
    infos = llama.abstract_params(found.cfg)
    whole = found.load(infos, layout.parts(infos, None, Mesh(), 0), "cpu")
    assert all(x.dtype == torch.float32 for x in tree.leaves(whole))
    theirs = all_tensors(models / "llama3")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(whole.layers.wq[0], theirs.float().T.reshape(64, 4, 16))


def test_a_folder_without_weights_is_told(tmp_path):
    with pytest.raises(UserError, match=r"--run\.init_from=.* has no checkpoints: name a work folder"):
        Weights(tmp_path, "--run.init_from")


@pytest.mark.slow
def test_a_training_begins_with_them_on_another_mesh(models, tmp_path):
    """With a learning rate of 0, so that what it saves is what it read."""
    convert_in.convert(models / "llama3", tmp_path / "ours", None)
    flags = [
        f"--flagfile={tmp_path / 'ours' / 'flags.txt'}", f"--run.init_from={tmp_path / 'ours'}",
        f"--run.workdir={tmp_path / 'run'}", "--run.steps=1", "--run.backend=interpret", "--mesh.axes=data:2,model:2",
        "--mesh.rules=fsdp_tp", "--optim.lr=0", "--optim.min_lr=0", "--data.seq_len=16", "--data.global_batch_size=4",
        f"--data.path={Path(json.__file__).parent}", "--run.eval_every=0", "--run.tensorboard=false",
    ]  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "train.py", *flags], cwd=root, capture_output=True, text=True)
    assert not done.returncode and "with the weights of" in done.stderr, done.stderr[-3000:]
    before, after = (Weights(tmp_path / name, "--source") for name in ("ours", "run"))
    infos = llama.abstract_params(before.cfg)
    parts = layout.parts(infos, None, Mesh(), 0)
    assert after.step == 1 and before.cfg.rope_scaling == after.cfg.rope_scaling
    for a, b in zip(*(tree.leaves(w.load(infos, parts, "cpu")) for w in (before, after)), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match=r"params\.layers\.w_up: there \[3,64,96\], needed \[3,64,80\]"):
        before.refuse_others(llama.abstract_params(replace(before.cfg, mlp_dim=80)))
