"""Specialise a program's graph for one row of its plan: reused sites become inputs, computed ones also outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from . import rewrite
from .plan import Mask, Site
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


def cache_tables(program: Program) -> dict[str, Tensor]:
    """Per-step coefficients of every site, as '<site>.reuse', '.refresh' and '.correction': see Site."""
    tables = {}
    for site in program.plan.sites:  # copies: sites of one plan may share an array, which a file of tables may not hold
        tables[f"{site.name}.reuse"] = torch.from_numpy(site.reuse).clone()
        if site.states > 1:
            tables[f"{site.name}.refresh"] = torch.from_numpy(site.refresh).clone()
        if site.correction is not None:
            tables[f"{site.name}.correction"] = torch.from_numpy(site.correction).clone()
    return tables


def build_variant(program: Program, mask: Mask) -> Variant:
    """The graph that a step with this mask runs. A mask of all True still refreshes the states of every site."""
    module = rewrite.clone(program.graph)
    inputs = graph_inputs(program, module)
    slots = list(result_slots(module))
    states: list[fx.Node] = []
    reused: dict[str, fx.Node] = {}  # copies: a later site whose base is one of these values means what stands for it
    for site, computed in zip(program.plan.sites, mask, strict=True):
        value, base = rewrite.node_named(module, site.value), None
        if site.base is not None:
            base = reused[site.base] if site.base in reused else rewrite.node_named(module, site.base)
        if computed:
            slots += [state_slot(site, order) for order in range(site.states)]
            states += refreshed_states(module, site, value, base, inputs)
            continue
        stand_in = reused_value(module, site, value, base, inputs)
        if stand_in.op == "call_function":  # it takes the name of what it stands for: taps see it, later sites find it
            rewrite.change_call(value, stand_in.target, *stand_in.args)
        else:
            value.replace_all_uses_with(stand_in)
            reused[site.value] = stand_in
    rewrite.output_node(module).args = ((*rewrite.output_values(module), *states),)
    rewrite.drop_dead(module)
    for name, node in rewrite.placeholders(module).items():
        if not node.users:
            module.graph.erase_node(node)
            del inputs[name]
    ordered = {name: inputs[name] for name in rewrite.placeholders(module)}
    return Variant(rewrite.finish(module), ordered, tuple(slots))


def graph_inputs(program: Program, module: fx.GraphModule) -> dict[str, tuple[str, str]]:
    """Where each input of the step graph comes from."""
    return {name: ("table" if name in program.tables else "slot", name) for name in rewrite.placeholders(module)}


def result_slots(module: fx.GraphModule) -> tuple[str, ...]:
    """The slots of what the step graph returns."""
    return ("sample", "history")[: len(rewrite.output_values(module))]


def refreshed_states(
    module: fx.GraphModule, site: Site, value: fx.Node, base: fx.Node | None, inputs: dict[str, tuple[str, str]]
) -> list[fx.Node]:
    """The states that a step leaves behind when it computes the site, as new nodes at the graph's end."""
    end = rewrite.output_node(module)
    states = [value if base is None else rewrite.call(module, end, aten.sub.Tensor, value, base)]
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
    coefficients = _table_input(module, site, "reuse", inputs) if site.states > 1 else None
    total = None
    for order in range(site.states):
        term = _state_input(module, site, order, value, inputs)
        if coefficients is not None:
            factor = rewrite.call(module, value, aten.select.int, coefficients, 0, order)
            term = rewrite.call(module, value, aten.mul.Tensor, term, factor)
        total = term if total is None else rewrite.call(module, value, aten.add.Tensor, total, term)
    assert total is not None
    if site.correction is not None:
        total = _corrected(module, site, value, total, inputs)
    return total if base is None else rewrite.call(module, value, aten.add.Tensor, base, total)


def _corrected(
    module: fx.GraphModule, site: Site, value: fx.Node, total: fx.Node, inputs: dict[str, tuple[str, str]]
) -> fx.Node:
    rows = _table_input(module, site, "correction", inputs)
    rank = len(rewrite.shape_of(value))
    shape = [-1] + [1] * (rank - 2) if rank >= 4 else [-1]
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
