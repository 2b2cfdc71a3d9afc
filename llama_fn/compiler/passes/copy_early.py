"""New values are written over the old as soon as nothing reads those any more, and read there.

    %new = add(%old, %update)                     %new = add(%old, %update)
    %a = sum(%new, [1, 2])                        %same = copy_(%old, %new)
    %same = copy_(%old, %new)             ->      %a = sum(%same, [1, 2])
    return %a                                     return %a

A compiler that cannot compute `%a` in the loop that makes `%new` would else keep `%new` in memory of its own up to the
end, and copy it then.
"""

from __future__ import annotations

import torch

from llama_fn.compiler import ir

COPY = torch.ops.aten.copy_.default


def copy_early(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """`gm`, a graph without calls, with its copies into inputs moved up."""
    for copy in [node for node in ir.calls(gm.graph) if node.target is COPY]:
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        old, new = copy.all_input_nodes
        last = max({new, *_readers(old)} - {copy}, key=order.__getitem__)
        late = [user for user in new.users if order[last] < order[user] < order[copy]]
        if not late or old.op != "placeholder":
            continue
        last.append(copy)
        for user in late:
            user.replace_input_with(new, copy)
    gm.graph.lint()
    gm.recompile()
    return gm


def _readers(node: torch.fx.Node) -> set[torch.fx.Node]:
    """What reads the memory of a value, through views as well."""
    found = set(node.users)
    for user in node.users:
        if ir.may_be_view(user):
            found |= _readers(user)
    return found
