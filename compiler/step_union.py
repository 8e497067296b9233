"""One graph that holds what any step of a plan may compute: the step graph, every site's states and what replaces it.

A site's value is defined twice in it, once as the network computes it and once from its states. Readers name the first;
which one they mean depends on the step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import fx

from . import rewrite
from .plan import Mask
from .program import Program
from .rewrite import aten
from .variants import graph_inputs, refreshed_states, result_slots, reused_value, state_slot

Kinds = frozenset[int]  # kinds of steps, as positions in `StepUnion.masks`


@dataclass(frozen=True)
class StepUnion:
    """What every kind of step computes, in one module.

    inputs: graph input -> ("slot" or "table", name). outputs: (slot, node, kinds of steps that write it).
    stand_ins: value of a site -> what a step that reuses the site reads instead: a node, or the state's input (a copy).
    computed: value of a site -> the kinds of steps that compute it. masks: the plan's distinct rows.
    """

    module: fx.GraphModule
    inputs: Mapping[str, tuple[str, str]]
    outputs: tuple[tuple[str, fx.Node, Kinds], ...]
    stand_ins: Mapping[fx.Node, fx.Node]
    computed: Mapping[fx.Node, Kinds]
    masks: tuple[Mask, ...]

    @property
    def every_kind(self) -> Kinds:
        return frozenset(range(len(self.masks)))

    def meant(self, node: fx.Node, kind: int) -> fx.Node:
        """What a reader of the node reads in a step of this kind."""
        return node if node not in self.computed or kind in self.computed[node] else self.stand_ins[node]

    def kinds(self) -> dict[fx.Node, Kinds]:
        """The kinds of steps that need each node; nodes that none needs are left out."""
        needed: dict[fx.Node, set[int]] = {}
        for kind in self.every_kind:
            for node in self._needed(kind):
                needed.setdefault(node, set()).add(kind)
        return {node: frozenset(kinds) for node, kinds in needed.items()}

    def _needed(self, kind: int) -> set[fx.Node]:
        found: set[fx.Node] = set()
        waiting = [node for _, node, kinds in self.outputs if kind in kinds]
        while waiting:
            node = self.meant(waiting.pop(), kind)
            if node not in found:
                found.add(node)
                waiting += node.all_input_nodes
        return found


def unite(program: Program) -> StepUnion:
    """The union over the distinct rows of the program's plan."""
    module = rewrite.clone(program.graph)
    kept = {name for site in program.plan.sites for name in (site.value, site.base) if name is not None}
    _merge_equal(module, kept)
    _store_apart(module)
    inputs = graph_inputs(program, module)
    masks = program.plan.masks
    every = frozenset(range(len(masks)))
    values = {site.value: _alone(module, rewrite.node_named(module, site.value)) for site in program.plan.sites}
    stand_ins: dict[fx.Node, fx.Node] = {}
    computed: dict[fx.Node, Kinds] = {}
    outputs: list[tuple[str, fx.Node, Kinds]] = []
    for index, site in enumerate(program.plan.sites):
        value, base = values[site.value], None
        if site.base is not None:
            base = values[site.base] if site.base in values else rewrite.node_named(module, site.base)
        kinds = frozenset(kind for kind, mask in enumerate(masks) if mask[index])
        states = refreshed_states(module, site, value, base, inputs)
        outputs += [(state_slot(site, order), state, kinds) for order, state in enumerate(states)]
        stand_ins[value] = reused_value(module, site, value, base, inputs)
        computed[value] = kinds
    slots = result_slots(module)
    results = [_unread(module, node, computed) for node in rewrite.output_values(module)]
    outputs = [(slot, node, every) for slot, node in zip(slots, results, strict=True)] + outputs
    rewrite.output_node(module).args = (tuple(node for _, node, _ in outputs),)
    return StepUnion(module, inputs, tuple(outputs), stand_ins, computed, masks)


def _merge_equal(module: fx.GraphModule, kept: Collection[str]) -> None:
    """One node for each weight, and for each vector that is worked out twice: steps of different kinds may share it.

    Not for anything longer than a vector: a broadcast mask costs more to hand on than to work out again.
    """
    first: dict[tuple[str, ...], fx.Node] = {}
    for node in module.graph.nodes:
        is_vector = (
            node.op == "call_function" and len(rewrite.shape_of(node)) <= 2 and rewrite.tensor_of(node) is not None
        )
        if node.name not in kept and (is_vector or node.op == "get_attr"):
            key = (node.op, str(node.target), repr(node.args), repr(node.kwargs))
            if key in first:
                node.replace_all_uses_with(first[key])
            first.setdefault(key, node)


def _store_apart(module: fx.GraphModule) -> None:
    """A dequantised weight for each layer that reads it: only beside its stored form does it multiply in few bits."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not str(node.target).startswith("dcompile.dequantize"):
            continue
        for user in list(node.users)[1:]:
            with module.graph.inserting_before(node):
                copies = {source: module.graph.node_copy(source) for source in node.all_input_nodes}
                copy = module.graph.node_copy(node, copies.__getitem__)
            user.replace_input_with(node, copy)


def _alone(module: fx.GraphModule, value: fx.Node) -> fx.Node:
    """The value as a node that can be left out: one of several results of an operator goes by another name."""
    source = value.args[0] if value.args else None
    if not isinstance(source, fx.Node) or rewrite.tensor_of(source) is not None or len(source.users) == 1:
        return value
    alias = rewrite.call(module, value.next, aten.alias.default, value, like=value)
    value.replace_all_uses_with(alias, delete_user_cb=lambda user: user is not alias)
    return alias


def _unread(module: fx.GraphModule, result: fx.Node, computed: Collection[fx.Node]) -> fx.Node:
    """The result by a name that nothing reads and no step replaces: whatever writes results comes last in a step."""
    if result not in computed and len(result.users) == 1:
        return result
    return rewrite.call(module, rewrite.output_node(module), aten.alias.default, result)
