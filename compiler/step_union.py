"""One graph that holds what any step of a plan may compute: the step graph, every site's states and what replaces it.

A site's value is defined twice in it, once as the network computes it and once from its states. Readers name the first;
which one they mean depends on the step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import fx

from . import rewrite
from .decisions import Deciding, decision_slot
from .plan import Mask, Plan, Predicate
from .program import Program
from .rewrite import aten
from .variants import decision_nodes, graph_inputs, refreshed_states, result_slots, reused_value, state_slots

Kinds = frozenset[int]  # kinds of steps, as positions in `StepUnion.masks`


@dataclass(frozen=True)
class StepUnion:
    """What every kind of step computes, in one module.

    inputs: graph input -> ("slot" or "table", name). outputs: (slot, node, kinds of steps that write it).
    stand_ins: value of a site -> what a step that reuses the site reads instead: a node, or the state's input (a copy).
    computed: value of a site -> the kinds of steps that compute it. masks: the plan's distinct rows.
    closing: outputs that replace what the step started from: nothing may read that after them.
    deciding: node of a decision -> pairs of kinds (computing, reusing) between which it decides.
    """

    module: fx.GraphModule
    inputs: Mapping[str, tuple[str, str]]
    outputs: tuple[tuple[str, fx.Node, Kinds], ...]
    stand_ins: Mapping[fx.Node, fx.Node]
    computed: Mapping[fx.Node, Kinds]
    masks: tuple[Mask, ...]
    closing: frozenset[fx.Node]
    deciding: Mapping[fx.Node, frozenset[tuple[int, int]]] = field(default_factory=dict)

    @property
    def every_kind(self) -> Kinds:
        return frozenset(range(len(self.masks)))

    def waits(self, kinds: Kinds) -> frozenset[fx.Node]:
        """The decisions before which nobody knows whether to run what these kinds of steps need."""
        return frozenset(
            node
            for node, pairs in self.deciding.items()
            if any((one in kinds) != (other in kinds) for one, other in pairs)
        )

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
    kept = {name for site in program.plan.sites for name in (site.value, site.base, site.network) if name is not None}
    kept |= {name for each in program.plan.predicates for name in (each.indicator, each.base) if name is not None}
    _merge_equal(module, kept)
    _store_apart(module)
    inputs = graph_inputs(program, module)
    masks = program.plan.masks
    emits = [program.plan.emits(mask) for mask in masks]
    every = frozenset(range(len(masks)))
    values = {site.value: _alone(module, rewrite.node_named(module, site.value)) for site in program.plan.sites}

    def find(name: str) -> fx.Node:
        return values[name] if name in values else rewrite.node_named(module, name)

    stand_ins: dict[fx.Node, fx.Node] = {}
    computed: dict[fx.Node, Kinds] = {}
    outputs: list[tuple[str, fx.Node, Kinds]] = []
    closing: set[fx.Node] = set()
    for index, site in enumerate(program.plan.sites):
        value, base = values[site.value], None
        if site.base is not None:
            base = find(site.base)
        kinds = frozenset(kind for kind, mask in enumerate(masks) if mask[index])
        emitting = frozenset(kind for kind in kinds if emits[kind][index])
        states = refreshed_states(module, site, value, base, inputs)
        stand_in = reused_value(module, site, value, base, inputs)
        if (
            states and states[0] is value and emitting != kinds
        ):  # who reads a copy must not read the state: it may be an older one
            states[0] = rewrite.call(module, rewrite.output_node(module), aten.alias.default, value)
            if stand_in.op == "placeholder":
                stand_in = rewrite.call(module, value, aten.alias.default, stand_in)
        written = every if site.rolling else emitting
        outputs += [(slot, state, written) for slot, state in zip(state_slots(site), states, strict=True)]
        closing.update(states if site.rolling else ())
        stand_ins[value] = stand_in
        computed[value] = kinds
    fresh = {slot: node for slot, node, _ in outputs}
    decisions = {}
    for predicate in program.plan.predicates:
        decision = decision_nodes(program.plan, module, predicate, find, fresh, inputs)
        computing = frozenset(kind for kind, mask in enumerate(masks) if program.plan.computes(mask, predicate))
        decisions[predicate] = decision.decision
        outputs.append((decision_slot(predicate), decision.decision, every))
        outputs += _remembered(module, decision, computing, every - computing)
    slots = result_slots(program, module)
    results = [_unread(module, node, computed) for node in rewrite.output_values(module)[: len(slots)]]
    outputs = [(slot, node, every) for slot, node in zip(slots, results, strict=True)] + outputs
    rewrite.output_node(module).args = (tuple(node for _, node, _ in outputs),)
    return StepUnion(
        module,
        inputs,
        tuple(outputs),
        stand_ins,
        computed,
        masks,
        frozenset({*results, *closing}),
        _deciding(program.plan, masks, decisions),
    )


def _remembered(
    module: fx.GraphModule, decision: Deciding, computing: Kinds, reusing: Kinds
) -> list[tuple[str, fx.Node, Kinds]]:
    """Outputs for what a decision leaves behind.

    What only some kinds of steps write goes by a name of its own, so that no engine of all kinds writes it.
    """
    both = {slot for slot, node in decision.computing.items() if decision.reusing.get(slot) is node}
    found = [(slot, decision.computing[slot], computing | reusing) for slot in both]
    for kept, kinds in ((decision.computing, computing), (decision.reusing, reusing)):
        for slot, node in kept.items():
            if slot not in both:
                named = rewrite.call(module, rewrite.output_node(module), aten.alias.default, node)
                found.append((slot, named, kinds))
    return found


def _deciding(
    plan: Plan, masks: tuple[Mask, ...], decisions: Mapping[Predicate, fx.Node]
) -> dict[fx.Node, frozenset[tuple[int, int]]]:
    """Kinds of steps between which each decides; two decisions of one step may be one node."""
    found: dict[fx.Node, set[tuple[int, int]]] = {node: set() for node in decisions.values()}
    for predicate, node in decisions.items():
        for kind, mask in enumerate(masks):
            other = plan.decided(mask, predicate, computes=False)
            if plan.computes(mask, predicate) and other in masks:
                found[node].add((kind, masks.index(other)))
    return {node: frozenset(pairs) for node, pairs in found.items()}


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
