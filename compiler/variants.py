"""Specialise a program's graph for one row of its plan: reused sites become inputs, computed ones also outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from . import rewrite
from .decisions import Change, Deciding, decide, decision_slot
from .plan import Mask, Plan, Predicate, Site
from .program import Program
from .rewrite import aten


@dataclass(frozen=True)
class Variant:
    """One static graph of the program.

    inputs: graph input -> ("slot", name) or ("table", name), in the graph's order.
    outputs: the slot that each output goes to, in order.
    """

    graph: fx.GraphModule
    inputs: dict[str, tuple[str, str]]
    outputs: tuple[str, ...]


def state_slot(site: Site, order: int) -> str:
    return f"{site.name}.state{order}"


def state_slots(site: Site) -> tuple[str, ...]:
    """Where the site's states live between steps."""
    return (f"{site.name}.states",) if site.rolling else tuple(state_slot(site, order) for order in range(site.states))


def cache_tables(program: Program) -> dict[str, Tensor]:
    """Per-step coefficients of every site, as '<site>.reuse', '.refresh' and '.correction': see Site."""
    tables = {}
    for site in program.plan.sites:  # copies: sites of one plan may share an array, which a file of tables may not hold
        if site.states:
            tables[f"{site.name}.reuse"] = torch.from_numpy(site.reuse).clone()
        if site.states > 1 and not site.rolling:
            tables[f"{site.name}.refresh"] = torch.from_numpy(site.refresh).clone()
        if site.correction is not None:
            tables[f"{site.name}.correction"] = torch.from_numpy(site.correction).clone()
    return tables


def build_variant(program: Program, mask: Mask) -> Variant:
    """The graph that a step with this mask runs. A mask of all True still refreshes the states of every site."""
    module, inputs, states, decisions = _specialised(program, mask)
    slots = result_slots(program, module)
    written = [*zip(slots, rewrite.output_values(module)[: len(slots)], strict=True), *states]
    for predicate, decision in zip(program.plan.predicates, decisions, strict=True):
        kept = decision.computing if program.plan.computes(mask, predicate) else decision.reusing
        written += kept.items()
    return returning(module, inputs, written)


def build_probe(program: Program, mask: Mask, predicate: Predicate) -> Variant:
    """The part of a step with this mask that decides about a predicate's sites."""
    module, inputs, _, decisions = _specialised(program, mask)
    decision = decisions[program.plan.predicates.index(predicate)].decision
    return returning(module, inputs, [(decision_slot(predicate), decision)])


_Slots = list[tuple[str, fx.Node]]


def _specialised(
    program: Program, mask: Mask
) -> tuple[fx.GraphModule, dict[str, tuple[str, str]], _Slots, list[Deciding]]:
    """(graph with what is reused in place, its inputs, states of the computed sites, decisions)."""
    module = rewrite.clone(program.graph)
    inputs = graph_inputs(program, module)
    states: _Slots = []
    reused: dict[str, fx.Node] = {}  # copies: whoever names one of these values means what stands for it

    def find(name: str) -> fx.Node:
        return reused[name] if name in reused else rewrite.node_named(module, name)

    for site, computed, emitted in zip(program.plan.sites, mask, program.plan.emits(mask), strict=True):
        if computed and not emitted:
            continue
        value, base = rewrite.node_named(module, site.value), None
        if site.base is not None:
            base = find(site.base)
        used = value
        if not computed:
            stand_in = reused_value(module, site, value, base, inputs)
            if stand_in.op == "call_function":  # it takes the name of what it stands for: taps and later sites find it
                rewrite.change_call(value, stand_in.target, *stand_in.args)
            else:
                value.replace_all_uses_with(stand_in)
                reused[site.value] = used = stand_in
        if computed or site.rolling:
            refreshed = refreshed_states(module, site, used, base, inputs)
            states += zip(state_slots(site), refreshed, strict=True)
    fresh = dict(states)
    decisions = [
        decision_nodes(program.plan, module, predicate, find, fresh, inputs) for predicate in program.plan.predicates
    ]
    return module, inputs, states, decisions


def returning(
    module: fx.GraphModule, inputs: dict[str, tuple[str, str]], written: Sequence[tuple[str, fx.Node]]
) -> Variant:
    """The graph as far as these (slot, node) need it."""
    rewrite.output_node(module).args = (tuple(node for _, node in written),)
    rewrite.drop_dead(module)
    for name, node in rewrite.placeholders(module).items():
        if not node.users:
            module.graph.erase_node(node)
            del inputs[name]
    ordered = {name: inputs[name] for name in rewrite.placeholders(module)}
    return Variant(rewrite.finish(module), ordered, tuple(slot for slot, _ in written))


def decision_nodes(
    plan: Plan, module: fx.GraphModule, predicate: Predicate, find: Callable[[str], fx.Node],
    states: Mapping[str, fx.Node], inputs: dict[str, tuple[str, str]],
) -> Deciding:  # fmt: skip
    """A predicate's nodes at the graph's end. states: slot -> the new state of a site that is computed."""

    def new_input(name: str, slot: str, example: fx.Node) -> fx.Node:
        value = rewrite.tensor_of(example)
        assert value is not None
        return _input(module, name, ("slot", slot), value, inputs)

    changes = []
    for site in plan.sites_of(predicate) if predicate.rule == "history" else ():
        value = rewrite.node_named(module, site.value)
        new = states.get(state_slot(site, 0), value)  # of a site that is reused, nothing reads the change
        changes.append(Change(new, _state_input(module, site, 0, value, inputs)))
    return decide(module, predicate, find, tuple(changes), rewrite.output_node(module), new_input)


def graph_inputs(program: Program, module: fx.GraphModule) -> dict[str, tuple[str, str]]:
    """Where each input of the step graph comes from."""
    states = {
        f"{site.name}_state{order}": state_slot(site, order)
        for site in program.plan.sites if site.network for order in range(site.states)
    }  # fmt: skip
    kinds = {name: "table" if name in program.tables else "slot" for name in rewrite.placeholders(module)}
    return {name: (kind, states.get(name, name)) for name, kind in kinds.items()}


def result_slots(program: Program, module: fx.GraphModule) -> tuple[str, ...]:
    """The slots of what the step graph returns, before the results of networks that predict sites."""
    networks = sum(site.network is not None for site in program.plan.sites)
    return ("sample", "history")[: len(rewrite.output_values(module)) - networks]


def refreshed_states(
    module: fx.GraphModule, site: Site, value: fx.Node, base: fx.Node | None, inputs: dict[str, tuple[str, str]]
) -> list[fx.Node]:
    """The states that a step leaves behind when it computes the site (a rolling one: always), as nodes at its end."""
    end = rewrite.output_node(module)
    if site.states == 0:
        return []
    states = [value if base is None else rewrite.call(module, end, aten.sub.Tensor, value, base)]
    if site.rolling:
        parts = [rewrite.call(module, end, aten.unsqueeze.default, states[0], 1)]
        if site.states > 1:
            old = _rolling_input(module, site, value, inputs)
            parts.append(rewrite.call(module, end, aten.slice.Tensor, old, 1, 0, site.states - 1))
        return [rewrite.call(module, end, aten.cat.default, parts, 1)]
    if site.states > 1:
        factors = _table_input(module, site, "refresh", inputs)
    for order in range(1, site.states):
        old = _state_input(module, site, order - 1, value, inputs)
        change = rewrite.call(module, end, aten.sub.Tensor, states[-1], old)
        factor = rewrite.call(module, end, aten.select.int, factors, 0, order - 1)
        states.append(rewrite.call(module, end, aten.mul.Tensor, change, factor))
    return states


def reused_value(
    module: fx.GraphModule, site: Site, value: fx.Node, base: fx.Node | None, inputs: dict[str, tuple[str, str]]
) -> fx.Node:
    """What stands for the site's value in a step that reuses it: new nodes before it; for a copy, its state's input."""
    if site.states == 0:
        assert base is not None
        return rewrite.call(module, value, aten.alias.default, base)
    is_mixed = site.states > 1 or site.rolling
    coefficients = _table_input(module, site, "reuse", inputs) if is_mixed else None
    total = None
    for order in range(site.states):
        if site.rolling:
            states = _rolling_input(module, site, value, inputs)
            term = rewrite.call(module, value, aten.select.int, states, 1, order)
        else:
            term = _state_input(module, site, order, value, inputs)
        if coefficients is not None:
            factor = rewrite.call(module, value, aten.select.int, coefficients, 0, order)
            term = rewrite.call(module, value, aten.mul.Tensor, term, factor)
        total = term if total is None else rewrite.call(module, value, aten.add.Tensor, total, term)
    assert total is not None
    if site.correction is not None:
        total = _corrected(module, site, value, total, inputs)
    if base is not None:
        total = rewrite.call(module, value, aten.add.Tensor, base, total)
    if site.network is not None:
        total = rewrite.call(module, value, aten.add.Tensor, total, rewrite.node_named(module, site.network))
    return total


def _corrected(
    module: fx.GraphModule, site: Site, value: fx.Node, total: fx.Node, inputs: dict[str, tuple[str, str]]
) -> fx.Node:
    rows = _table_input(module, site, "correction", inputs)
    shape = rewrite.by_channel(len(rewrite.shape_of(value)))
    slope, offset = (
        rewrite.call(
            module, value, aten.reshape.default, rewrite.call(module, value, aten.select.int, rows, 0, row), shape
        )
        for row in range(2)
    )
    scaled = rewrite.call(module, value, aten.mul.Tensor, total, slope)
    return rewrite.call(module, value, aten.add.Tensor, scaled, offset)


def _state_input(
    module: fx.GraphModule, site: Site, order: int, value: fx.Node, inputs: dict[str, tuple[str, str]]
) -> fx.Node:
    example = rewrite.tensor_of(value)
    assert example is not None
    return _input(module, f"{site.name}_state{order}", ("slot", state_slot(site, order)), example, inputs)


def _rolling_input(module: fx.GraphModule, site: Site, value: fx.Node, inputs: dict[str, tuple[str, str]]) -> fx.Node:
    example = rewrite.fake_result(lambda one: torch.stack([one] * site.states, dim=1), (value,))
    return _input(module, f"{site.name}_states", ("slot", f"{site.name}.states"), example, inputs)


def _table_input(module: fx.GraphModule, site: Site, kind: str, inputs: dict[str, tuple[str, str]]) -> fx.Node:
    rows = getattr(site, kind)
    return _input(module, f"{site.name}_{kind}", ("table", f"{site.name}.{kind}"), torch.from_numpy(rows[0]), inputs)


def _input(
    module: fx.GraphModule, name: str, source: tuple[str, str], example: Tensor, inputs: dict[str, tuple[str, str]]
) -> fx.Node:
    """The graph input of this name; a new one unless it is there already."""
    if name in inputs:
        return rewrite.node_named(module, name)
    inputs[name] = source
    return rewrite.add_input(module, name, example)
