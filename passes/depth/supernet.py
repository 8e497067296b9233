"""A network whose blocks have gates and whose layers may move a little: what TinyFusion searches in (2412.01199)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, fx

from ...compiler import rewrite
from ...compiler.regions import Region
from ...compiler.rewrite import aten

RANK, SCALE = 8, 2.0  # of the updates of layers; what they are multiplied with
UPDATES = "tinyfusion_updates"  # module path of what is added


def masks(keep: int, of: int) -> Tensor:
    """float32 [combinations, of]: every way of keeping `keep` of `of` blocks, in lexicographic order."""
    chosen = list(combinations(range(of), keep))
    found = torch.zeros(len(chosen), of)
    for row, kept in zip(found, chosen, strict=True):
        row[list(kept)] = 1.0
    return found


def gated(graph: fx.GraphModule, blocks: Sequence[Region]) -> fx.GraphModule:
    """The graph with a gate for each block, as inputs `gate0`, `gate1`, ... of [rows of its streams] or [1].

    Of 1, the block is what it was; of 0, its streams go past it, bit for bit.
    """
    module = rewrite.clone(graph)
    named = {node.name: node for node in module.graph.nodes}
    past: dict[fx.Node, fx.Node] = {}  # exit of a block -> what is read in its place
    for index, block in enumerate(blocks):
        gate = rewrite.add_input(module, f"gate{index}", torch.ones(1))
        for stream in block.streams:
            left, entered = named[stream.exit], named[stream.entry]
            readers = list(left.users)
            rank = len(rewrite.shape_of(left))
            after = left.next
            wide = rewrite.call(module, after, aten.reshape.default, gate, [-1] + [1] * (rank - 1))
            with module.graph.inserting_before(after):
                mixed = module.graph.call_function(aten.lerp.Tensor, (past.get(entered, entered), left, wide))
            mixed.meta["val"] = left.meta["val"]
            past[left] = mixed
            for reader in readers:
                reader.replace_input_with(left, mixed)
    return rewrite.finish(module)


def with_updates(graph: fx.GraphModule, seed: int = 0) -> tuple[fx.GraphModule, list[str]]:
    """(the graph with a low-rank update on every linear layer, the paths of its weights). Untrained it is the same."""
    module, generator, paths = rewrite.clone(graph), torch.Generator().manual_seed(seed), []
    for index, node in enumerate([each for each in module.graph.nodes if rewrite.is_call(each, aten.linear.default)]):
        weight = node.args[1]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            continue
        out, width = rewrite.attribute(module, str(weight.target)).shape
        down = torch.empty(RANK, width).uniform_(-1, 1, generator=generator) / math.sqrt(width)  # as nn.Linear begins
        readers, after, value = list(node.users), node.next, node.args[0]
        for name, start in (("down", down), ("up", torch.zeros(out, RANK))):
            path = f"{UPDATES}.{index}.{name}"
            rewrite.assign(module, path, start)
            paths.append(path)
            value = rewrite.call(module, after, aten.linear.default, value, rewrite.read_weight(module, path, after))
        scaled = rewrite.call(module, after, aten.mul.Tensor, value, SCALE)
        total = rewrite.call(module, after, aten.add.Tensor, node, scaled)
        for reader in readers:
            reader.replace_input_with(node, total)
    return rewrite.finish(module), paths
