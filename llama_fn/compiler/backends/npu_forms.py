"""As how many GE graphs a step runs, and on which streams its collectives stand: what torchair is given.

In form `whole` the step is one graph, every microbatch written out, its messages inside. In form `calls` each body is a
graph, and what stands between its calls others.
"""

from __future__ import annotations

import logging

import torch

from kernels.barrier import barrier
from llama_fn import compat
from llama_fn.ascend import environment
from llama_fn.ascend.budget import advice, refuse
from llama_fn.compiler import calls, ir, passes
from llama_fn.compiler.backends import Program, communication
from llama_fn.compiler.backends.ge_choice import choose, most_collectives, remedies
from llama_fn.compiler.backends.ge_counts import counted
from llama_fn.compiler.pieces import in_pieces
from llama_fn.compiler.pipeline.blocking import check_streams
from llama_fn.distributed import Messages, Processes
from sharding.collectives import axes_of
from sharding.messages import is_message, over_stages, received, send, stream_of, way

log = logging.getLogger("llama_fn.npu")


def laid_out(
    program: Program, processes: Processes | None, form: str, messages: Messages | None, by_axis: bool
) -> tuple[torch.fx.GraphModule, dict[str, str]]:
    """This process's graph, written out or in pieces, and the streams of its collectives by their groups, none unless
    `by_axis`. UserError for a pipeline that would wait for ever on the streams of a device."""
    communication(program, "npu", processes)  # makes the groups, by all processes in one order
    streams = {}
    if processes is not None:
        by_axes = processes.groups(())
        streams = {group.name: axes for axes, group in by_axes.items()}
        mine = {a: program.mesh.group_of(processes.rank, axes_of(a)) for a in by_axes}
        environment.check_groups(str(program.mesh), mine)
    gm = program.graph_of(processes)
    if chosen(program, form) == "calls":
        gm = in_pieces(passes.copy_graph(gm))
    else:
        gm = calls.inlined(gm)
        if messages is not None:
            check_streams(program.graphs, by_axis)
            streams |= _name_messages(gm, messages)
            _hold_unread(gm)
    return gm, streams if by_axis else {}


def chosen(program: Program, form: str) -> str:
    """whole or calls, with a word why. By the largest of all stages: messages inside of a GE graph do not reach a
    process that receives outside of one. UserError for graphs that no device has streams for."""
    largest = max(program.graphs, key=lambda gm: sum(times for _, times in calls.counted(gm)))
    if not calls.bodies(largest):  # nor as many ops as pass a limit: a stream has 2013 tasks, and there are 2024
        if form == "calls":
            log.warning(
                "--run.npu_form=calls: this step is one GE graph, as only steps of five microbatches or more call them"
            )
        return "whole"
    pieces = counted(largest)
    made, why = choose(pieces, form)
    log.info("npu_form %s: %s", made.form, why)
    instead = remedies(pieces, made)
    refuse(made, most_collectives(largest), instead)
    if doubt := advice(made, instead):
        log.warning("%s", doubt)
    return made.form


def _name_messages(gm: torch.fx.GraphModule, messages: Messages) -> dict[str, str]:
    """Name the messages of `gm` by their groups; returns the groups' streams, one for each direction and side."""
    streams = {}
    for node in filter(is_message, ir.calls(gm.graph)):
        _, step, tag = way(node)
        if node.target is not received.op:
            group, other = messages.named(step, node.target is send.op)
            streams[group] = stream_of(node)
            node.args = (*node.args[:-4], group, 2, other, tag)
    return streams


def _hold_unread(gm: torch.fx.GraphModule) -> None:
    """Make the first result wait for what other stages wait for, and torchair, or GE, would leave out as nobody here
    reads it."""
    together = [node for node in ir.calls(gm.graph) if node.target is send.op or over_stages(node)]
    out, unread = ir.output_node(gm.graph), [node for node in together if not node.users]
    first, *others = ir.results(gm.graph)
    with gm.graph.inserting_before(out):
        for node in unread:
            held = gm.graph.call_function(barrier.op, (first, node))
            held.meta = {"val": compat.node_value(first), "custom": dict(compat.labels(node))}
            first = held
    out.args = ([first, *others],)
