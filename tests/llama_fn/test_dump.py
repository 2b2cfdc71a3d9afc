"""Dumps: a numbered file per stage, an index that is written last, and differences in words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kernels import scope_names
from llama_fn.compiler import stages
from llama_fn.config import Config, DataConfig, MeshConfig, ModelConfig, RunConfig
from llama_fn.inspect import dump
from llama_fn.inspect.changes import changes, overview
from llama_fn.model import llama, train_step
from llama_fn.planner import config_stages
from llama_fn.run import loop

ROOT = Path(__file__).resolve().parents[2]


def config(folder, **mesh):
    model = ModelConfig(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=4, mlp_dim=48, vocab_size=64)
    return Config(
        model=model, data=DataConfig(seq_len=16, global_batch_size=4),
        mesh=MeshConfig(**{"axes": "data:2,model:2", **mesh}),
        run=RunConfig(compile_only=True, workdir=str(folder / "run"), dump_dir=str(folder / "dump")),
    )  # fmt: skip


@pytest.fixture(scope="module")
def dumped(tmp_path_factory):
    folders = []
    for mesh in ({}, {}, {"remat": "full"}):
        folder = tmp_path_factory.mktemp("dumped")
        assert loop.run(config(folder, **mesh)) == 0
        assert not (folder / "run" / "checkpoints").exists()
        folders.append(folder / "dump")
    return folders


def test_every_stage_has_a_numbered_text_with_what_a_node_costs(dumped):
    folder = dump.rank_folder(dumped[0], 0)
    texts = sorted(path.name for path in folder.glob("*.txt"))
    assert [name[3:-4] for name in texts] == [
        "traced", "partitioned", "sink_casts", "join_loss", "remat", "regather", "dead_code", "bucket", "overlap",
        "schedule", "roll", "donation", "lowered",
    ]  # fmt: skip
    assert [int(name[:2]) for name in texts] == list(range(len(texts)))
    lowered = (folder / texts[-1]).read_text()
    product = re.search(r"= llama_fn.einsum.default\('btd,dnh->btnh'.*", lowered)[0]
    # 2 x 16 tokens on a device, 32 upcast, 2 heads of 8 of it.
    assert "# forward microbatch/0/layers/0/attention llama.py:" in product
    assert f"| {2 * 16 * 2 * 8 * 4} B {2 * 2 * 16 * 32 * 2 * 8} FLOP P('data', None, 'model', None)" in product
    assert "f32[2,16,32]" in lowered and "f32[4,16,32]" in (folder / texts[0]).read_text()


def test_the_json_is_what_model_explorer_opens(dumped):
    """Its schema: ids, namespaces by scope, edges between nodes that exist, overlays by node id."""
    folder = dump.rank_folder(dumped[0], 0)
    for stage in ("traced", "lowered"):
        (path,) = folder.glob(f"*_{stage}.json")
        content = json.loads(path.read_text())
        (graph,) = content["graphs"]
        assert content["label"] == graph["id"] == path.stem, "without a label it is an unsupported format"
        ids = {node["id"] for node in graph["nodes"]}
        assert all(edge["sourceNodeId"] in ids for node in graph["nodes"] for edge in node["incomingEdges"])
        assert "backward/microbatch/0/layers/1/mlp" in {node["namespace"] for node in graph["nodes"]}
        for overlay in ("time_us", "bytes", "flop", "sent_bytes"):
            content = json.loads(path.with_suffix(f".{overlay}.json").read_text())
            results = content[graph["id"]]["results"]
            assert results.keys() <= ids and all(result["value"] > 0 for result in results.values())
            assert bool(results) == (overlay != "sent_bytes" or stage == "lowered")


def test_overlays_have_the_collectives_with_their_times(dumped):
    """A gather at the rate of the links takes longer than reading and writing memory."""
    (path,) = dump.rank_folder(dumped[0], 0).glob("*_lowered.json")
    sent, times = (
        json.loads(path.with_suffix(f".{overlay}.json").read_text())[path.stem]["results"]
        for overlay in ("sent_bytes", "time_us")
    )
    summary = json.loads((path.parent / dump.SUMMARY).read_text())
    assert sum(each["value"] for each in sent.values()) == sum(
        row["bytes"] * row["count"] for row in summary["collectives"]
    )
    assert sent.keys() <= times.keys()


def test_the_index_opens_every_file_and_says_what_counts(dumped):
    folder = dump.rank_folder(dumped[2], 0)
    page = (folder / dump.INDEX).read_text()
    links = re.findall(r"href='([^']+)'", page)
    assert {path.name for path in folder.iterdir()} == {*links, dump.INDEX}
    assert "reduce_scatter" in page and "peak_bytes" in page and "llama_fn.einsum.default recomputed" in page
    assert "http" not in page, "nothing from the network"


def stage_rows(page):
    """Of the table of stages: what is said of each by its name."""
    return dict(re.findall(r"<tr><td class=n>\d+</td><td>(\w+)</td><td>(.*?)</td>", page))


def test_the_index_groups_files_by_stage_and_marks_passes_that_changed_nothing(dumped):
    plain, recomputing = ((dump.rank_folder(folder, 0) / dump.INDEX).read_text() for folder in (dumped[0], dumped[2]))
    assert stage_rows(plain)["remat"] == "unchanged"
    assert re.fullmatch(r"\d+ nodes", stage_rows(recomputing)["remat"])
    assert re.fullmatch(r"[\d,]+ nodes", stage_rows(plain)["overlap"])
    assert stage_rows(plain)["lowered"] == "unchanged", "it is what the last pass left"
    assert re.search(r"<td>lowered</td>.*?12_lowered\.txt.*?12_lowered\.time_us\.json", plain)


def test_the_index_says_how_it_was_made(dumped):
    page = (dump.rank_folder(dumped[2], 0) / dump.INDEX).read_text()
    assert "--mesh.remat=full" in page and "--mesh.axes=data:2,model:2" in page
    assert re.search(r"<td>torch</td><td>2\.13\.0", page) and "<td>command</td>" in page


@pytest.mark.slow
def test_compiled_code_has_its_key_and_age_in_the_index_and_a_profile_an_overlay(tmp_path):
    cfg = config(tmp_path, axes="")
    run = replace(
        cfg.run, compile_only=False, profile_steps="2:3", steps=4, backend="inductor", tensorboard=False,
        eval_every=0, compile_cache=str(tmp_path / "cache"),
    )  # fmt: skip
    model, data = replace(cfg.model, vocab_size=512), replace(cfg.data, path=str(ROOT / "docs"))
    cfg = replace(cfg, model=model, data=data)
    said = []
    for n in range(2):
        assert loop.run(replace(cfg, run=replace(run, workdir=str(tmp_path / f"run{n}")))) == 0
        folder = dump.rank_folder(tmp_path / "dump", 0)
        page = (folder / dump.INDEX).read_text()
        said.append(re.findall(r"<tr><td>(\w{12})</td><td>(hit|miss)</td><td>(compiled .*?)</td>", page))
    (first, *_), (second, *_) = said
    assert first[0] == second[0] and (first[1:], second[1]) == (("miss", "compiled now"), "hit")
    (overlay,) = folder.glob("*_lowered.measured_us.json")
    assert f"href='{overlay.name}'" in page
    values = json.loads(overlay.read_text())[overlay.name.removesuffix(".measured_us.json")]["results"]
    table = (tmp_path / "run1" / "profile" / "rank_0_steps_2_3.txt").read_text().splitlines()
    whole = float(table[-2].split()[0])
    named = sum(float(line.split()[0]) for line in table[2:-2] if re.search("compute|memory", line))  # what has ops
    assert sum(each["value"] for each in values.values()) / 1e3 == pytest.approx(named, rel=0.02, abs=0.01)
    assert named > 0.5 * whole


@pytest.mark.slow
def test_a_pipeline_is_dumped_by_stage(tmp_path):
    cfg = config(tmp_path, axes="pipe:2")
    assert loop.run(cfg) == 0
    folder = dump.rank_folder(tmp_path / "dump", 0)
    index = (folder / "index.html").read_text()
    for stage in range(2):
        assert f"href='stage_{stage}/index.html'" in index
        (lowered,) = (folder / f"stage_{stage}").glob("*_lowered.txt")
        assert (
            f" layers/{stage}/attention" in lowered.read_text() and f" layers/{1 - stage}/" not in lowered.read_text()
        )
        numbers = json.loads((folder / f"stage_{stage}" / "summary.json").read_text())
        assert numbers["title"].endswith(f"stage {stage}")
        assert [row["count"] for row in numbers["collectives"] if row["kind"] == "send"] == [1]
    assert [change.text for change in changes(*(stage_summary(folder, stage) for stage in (1, 1)))] == []
    dump.DumpWriter(folder)
    assert not list(folder.glob("stage_*/*"))


def stage_summary(folder, stage):
    return json.loads((folder / f"stage_{stage}" / "summary.json").read_text())


def test_a_new_dump_takes_the_old_index_away_first(dumped, tmp_path):
    (tmp_path / dump.INDEX).write_text("old")
    (tmp_path / "99_old.txt").write_text("old")
    (tmp_path / "mine.txt").write_text("kept")
    cfg = config(tmp_path)
    traced = config_stages.train(cfg)
    record = dump.DumpWriter(tmp_path)
    record.observer(traced)
    assert not (tmp_path / dump.INDEX).exists() and not (tmp_path / "99_old.txt").exists()
    assert (tmp_path / "mine.txt").exists()


def diff(*words):
    command = [sys.executable, "-m", "llama_fn.tools.graph_diff", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_difference_is_said_in_words(dumped, tmp_path):
    same = diff(dumped[0], dumped[1])
    assert same.returncode == 0 and same.stdout.strip() == "rank_0: no difference"
    short = diff(dumped[0], dumped[2])
    assert short.returncode == 1
    title, *lines = short.stdout.splitlines()
    assert title == "rank_0: differs; --all lists every change"
    kinds = [line.split(":")[0].strip() for line in lines]
    assert sorted(kinds) == ["FLOPs", "collectives", "memory", "ops", "recomputed ops"], "one line per kind"
    assert kinds[0] == "recomputed ops" and kinds[1] == "collectives", "the costliest first"
    assert re.search(r"backward [\d,]+ -> [\d,]+ \(\+\d", short.stdout) and "now at" in short.stdout
    full = diff("--all", dumped[0], dumped[2])
    assert full.returncode == 1
    assert (
        "+2 llama_fn.attention.default recomputed in microbatch/*/layers/*/attention, backward (llama.py:"
        in full.stdout
    )
    assert re.search(
        r"\+2 reduce_scatter over model of [\d,]+ bytes float32 in .* \(llama.py:\d+",
        full.stdout,
    )
    none = diff(dumped[0], tmp_path)
    assert none.returncode == 2 and "holds no summary.json" in none.stderr
    cut_short = tmp_path / "rank_0"
    cut_short.mkdir()
    (cut_short / dump.SUMMARY).write_text("{}")
    assert "cut short" in diff(dumped[0], tmp_path).stderr


def summary(**mesh):
    cfg = config(Path("unused"), **mesh)
    lowered = config_stages.lower(config_stages.train(cfg), cfg, config_stages.mesh(cfg))
    return json.loads(json.dumps(dump.summary(lowered)))


@pytest.fixture(scope="module")
def plain():
    return summary()


def test_the_same_step_has_no_changes(plain):
    assert not changes(plain, summary())


def test_another_attention_scale_is_found(plain, monkeypatch):
    attention = llama.k.attention
    monkeypatch.setattr(llama.k, "attention", lambda q, k, v, scale: attention(q, k, v, 2 * scale))
    (line,) = overview(changes(plain, summary()))
    scale = 8**-0.5
    assert re.fullmatch(
        rf"constant arguments of ops: 2 changes; the largest: 2 llama_fn.attention\w*.default in "
        rf"microbatch/\*/layers/\*/attention, \w+: {scale} -> {2 * scale} \(test_dump.py:\d+\)", line
    ), line  # fmt: skip


def test_a_product_in_another_dtype_is_found(plain, monkeypatch):
    product = llama.k.einsum

    def narrow(equation, a, b):
        if equation != "btf,fd->btd":
            return product(equation, a, b)
        return product(equation, a.bfloat16(), b.bfloat16()).float()

    monkeypatch.setattr(llama.k, "einsum", narrow)
    found = [str(c) for c in changes(plain, summary()) if c.kind == "dtype of ops"]
    product = "2 llama_fn.einsum.default in microbatch/*/layers/*/mlp, forward: f32 -> bf16 (test_dump.py:"
    assert any(c.startswith(product) for c in found), found


def test_another_order_of_mesh_axes_is_found(plain):
    assert next(overview(changes(plain, summary(axes="model:2,data:2")))) == "mesh: data:2,model:2 -> model:2,data:2"


def test_a_lost_donation_is_found(plain):
    cfg = config(Path("unused"))
    step = stages.jit(train_step.make_train_step(cfg))
    traced = step.trace(*train_step.abstract_arguments(cfg))
    kept = json.loads(json.dumps(dump.summary(config_stages.lower(traced, cfg, config_stages.mesh(cfg)))))
    first = next(overview(changes(plain, kept)))
    assert first.startswith("donation: ") and "is no longer overwritten in place" in first


def test_a_renamed_weight_is_a_change_of_names():
    """Its scopes, its place in the state and its two moments: the summary that a step with it would have."""
    before = summary(without="bucket")  # else the scopes of small weights are one
    found = changes(before, json.loads(re.sub(r"\bw_gate\b", "gate_proj", json.dumps(before))))
    assert sorted((c.kind, c.text.partition(",")[0]) for c in found) == [
        ("renamed arguments", "w_gate -> gate_proj in 3 arguments"),
        ("renamed scopes", "w_gate -> gate_proj in 2 scopes"),
    ]


def test_a_renamed_scope_is_one_change(plain, monkeypatch):
    layer = scope_names.layer
    monkeypatch.setattr(llama, "layer", lambda i: layer(i, "blocks"))
    found = changes(plain, summary())
    assert [c.kind for c in found].count("renamed scopes") == 1
    (renamed,) = (c for c in found if c.kind == "renamed scopes")
    assert re.match(r"layers -> blocks in \d+ scopes", renamed.text)
    assert len(found) < 8, "and what follows from it is little: " + "\n".join(map(str, found))
