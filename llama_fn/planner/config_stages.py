"""From a Config to the stages of its step: mesh, traced, lowered."""

from __future__ import annotations

from dataclasses import replace

from llama_fn.compiler import passes, stages
from llama_fn.compiler.passes.partition import rules_named
from llama_fn.compiler.passes.remat_regions import Remat
from llama_fn.config import Config
from llama_fn.errors import UserError
from llama_fn.model import train_step
from sharding import Mesh


def mesh(cfg: Config) -> Mesh:
    """The mesh of --mesh.axes; UserError for what is none."""
    try:
        return Mesh.parse(cfg.mesh.axes)
    except ValueError as error:
        raise UserError(f"--mesh.axes={cfg.mesh.axes}: {error}") from None


def train(cfg: Config) -> stages.Traced:
    """The training step, its state donated."""
    wrapped = stages.jit(train_step.make_train_step(cfg), donate=0)
    return wrapped.trace(train_step.abstract_state(cfg), train_step.abstract_batch(cfg))


def evaluation(cfg: Config) -> stages.Traced:
    """The validation step of cfg, traced."""
    state, batch = train_step.abstract_state(cfg), train_step.abstract_batch(cfg)
    return stages.jit(train_step.make_eval_step(cfg)).trace(state.params, batch)


def lower(
    traced: stages.Traced, cfg: Config, mesh: Mesh, observe: passes.Observer = passes.unobserved
) -> stages.Lowered:
    """`traced` for one device of `mesh`, as cfg's mesh section says; UserError where it cannot be partitioned."""
    m = cfg.mesh
    names = tuple(name.strip() for name in m.remat_names.split(",") if name.strip())
    remat = Remat(m.remat, names, int(m.remat_gb * 1e9), m.regather)
    copies = tuple(name.strip() for name in m.replicated.split(",") if name.strip())
    for name in copies:
        if name not in dict(mesh.axes):
            raise UserError(f"--mesh.replicated={m.replicated}: {mesh} has no axis {name}")
    without = [name.strip() for name in m.without.split(",") if name.strip()]
    rules = replace(rules_named(m.rules), replicated=copies)
    return traced.lower(mesh, rules, without, m.fuse, remat, observe)
