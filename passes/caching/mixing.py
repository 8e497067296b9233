"""Step graphs whose sites are part computed, part kept from before: what gates and routers are trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from ...compiler import rewrite
from ...compiler.execute import zero_state
from ...compiler.program import Program
from ...compiler.rewrite import aten
from .sites import Candidate

# (module, number of the site, its value, its base) -> a node before the value: the gate
Gate = Callable[[fx.GraphModule, int, fx.Node, fx.Node | None], fx.Node]


def gate_input(module: fx.GraphModule, index: int, value: fx.Node, base: fx.Node | None) -> fx.Node:
    return rewrite.add_input(module, f"gate{index}", torch.zeros(()))


def mixed(
    graph: fx.GraphModule, sites: Sequence[Candidate], *, delta: bool = False, gate_of: Gate = gate_input
) -> fx.GraphModule:
    """The graph with each site's value as gate * value + (1 - gate) * state, and what it used behind its results.

    delta: the state is kept, and mixed, of the value less its base. Inputs after the graph's own: those of `gate_of`,
    then a state for each site.
    """
    module = rewrite.clone(graph)
    named = {node.name: node for node in module.graph.nodes}
    used: dict[fx.Node, fx.Node] = {}  # value of a site -> what is read in its place, by a later site's base too
    gates = []
    for index, site in enumerate(sites):
        base = named[site.base] if delta and site.base is not None else None
        gates.append(gate_of(module, index, named[site.value], base))
    kept = []
    for index, (site, gate) in enumerate(zip(sites, gates, strict=True)):
        value, example = named[site.value], rewrite.tensor_of(named[site.value])
        assert example is not None
        base = named[site.base] if delta and site.base is not None else None
        state = rewrite.add_input(module, f"state{index}", example)
        readers = list(value.users)
        after = value.next
        fresh = value if base is None else rewrite.call(module, after, aten.sub.Tensor, value, used.get(base, base))
        kept.append(_like(module, after, example, aten.lerp.Tensor, state, fresh, gate))
        total = kept[-1]
        if base is not None:
            total = _like(module, after, example, aten.add.Tensor, used.get(base, base), kept[-1])
        used[value] = total
        for reader in readers:
            reader.replace_input_with(value, total)
    rewrite.output_node(module).args = ((*rewrite.output_values(module), *kept),)
    module.graph.lint()
    return fx.GraphModule(module, module.graph)


def _like(module: fx.GraphModule, before: fx.Node, example: Tensor, target: object, *args: fx.Node) -> fx.Node:
    with module.graph.inserting_before(before):
        node = module.graph.call_function(target, args)  # type: ignore[arg-type]
    node.meta["val"] = example
    return node


def step_values(program: Program, step: int, slots: Mapping[str, Tensor]) -> list[Tensor]:
    """The inputs of the step graph."""
    tables, batch = program.tables, len(slots["sample"])
    return [
        tables[name][step] if name in tables else slots[name] if name in slots else zero_state(node, batch)
        for name, node in rewrite.placeholders(program.graph).items()
    ]
