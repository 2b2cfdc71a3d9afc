"""A trace for other sizes is what tracing for them gives, node for node, and on a mesh too."""

from dataclasses import replace

import pytest
import torch

from llama_fn import config
from llama_fn.compiler import stages
from llama_fn.model import presets, train_step
from llama_fn.model.arrays import ArrayInfo
from llama_fn.planner import config_stages
from sharding import Mesh


def sized(batch, per_microbatch=False, fused_head=False, seq_len=64):
    cfg = config.Config(model=replace(presets.preset("llama_tiny"), num_layers=2, fused_head=fused_head))
    data = replace(cfg.data, microbatches=2, global_batch_size=batch, seq_len=seq_len)
    return replace(cfg, data=data, optim=replace(cfg.optim, reduce_per_microbatch=per_microbatch))


@pytest.mark.parametrize("per_microbatch", [False, True])
@pytest.mark.parametrize("fused_head", [False, True])
def test_a_resized_step_is_as_if_traced(per_microbatch, fused_head):
    small, large = (sized(batch, per_microbatch, fused_head) for batch in (8, 24))
    given = config_stages.train(small).resized(*train_step.abstract_arguments(large))
    wanted = config_stages.train(large)
    assert given.as_text() == wanted.as_text() and given.signature == wanted.signature
    mesh, rules = Mesh.parse("data:2,model:2"), "fsdp_tp"
    assert given.lower(mesh, rules).as_text() == wanted.lower(mesh, rules).as_text()


def test_an_op_that_names_the_size_is_refused():
    def fn(x):
        return x + torch.ones(4)

    traced = stages.jit(fn).trace(ArrayInfo((4,), torch.float32, ("batch",)))
    with pytest.raises(ValueError, match=r"aten.add.Tensor in step, forward .* trace for it instead"):
        traced.resized(ArrayInfo((8,), torch.float32, ("batch",)))


def test_more_than_another_batch_size_is_refused():
    traced, longer = config_stages.train(sized(8)), sized(8, seq_len=128)
    with pytest.raises(ValueError, match=r"batch.tokens .* traced for .*\[2,4,64\].* given is .*\[2,4,128\]"):
        traced.resized(*train_step.abstract_arguments(longer))
    double = stages.jit(lambda x: x * 2).trace(ArrayInfo((4,), torch.float32, ("batch",)))
    with pytest.raises(ValueError, match="x differs in more"):
        double.resized(ArrayInfo((4,), torch.bfloat16, ("batch",)))
    with pytest.raises(ValueError, match="another structure"):
        double.resized([ArrayInfo((4,), torch.float32, ("batch",))])
