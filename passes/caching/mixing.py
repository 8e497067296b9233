"""Step graphs whose sites are part computed, part kept from before: what gates and routers are trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from ...compiler import rewrite
from ...compiler.calibrate import example_conditions
from ...compiler.rewrite import aten
from ...runtime.manifest import Contract
from .sites import Candidate

BATCH, BATCHES = 4, 16  # samples of a run; runs until conditions come again

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


class Batches:
    """Requests to train on, a batch of them for each run: noise is new in each, conditions come again."""

    def __init__(self, contract: Contract, first_seed: int) -> None:
        self._conditions = example_conditions(contract, BATCH * BATCHES)
        self._first_seed = first_seed

    def of(self, run: int) -> tuple[dict[str, NDArray[Any]], list[int]]:
        """(conditions, seeds) of one run."""
        part = slice(run % BATCHES * BATCH, (run % BATCHES + 1) * BATCH)
        seeds = [self._first_seed + run * BATCH + i for i in range(BATCH)]
        return {name: values[part] for name, values in self._conditions.items()}, seeds
