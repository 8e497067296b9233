"""Specialise a program's graph for one row of its plan: reused sites become inputs, computed ones also outputs."""

from __future__ import annotations

from collections.abc import Mapping
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
    """Per-step coefficients of every site: '<site>.reuse' [steps, states] and '<site>.refresh' [steps, states - 1]."""
    tables = {}
    for site in program.plan.sites:
        tables[f"{site.name}.reuse"] = torch.from_numpy(site.reuse)
        if site.states > 1:
            tables[f"{site.name}.refresh"] = torch.from_numpy(site.refresh)
    return tables


def build_variant(program: Program, mask: Mask) -> Variant:
    """The graph that a step with this mask runs. A mask of all True still refreshes the states of every site."""
    module = rewrite.clone(program.graph)
    inputs = {name: _source(program, name) for name in rewrite.placeholders(module)}
    slots = ["sample", "history"][: len(rewrite.output_values(module))]
    results = list(rewrite.output_values(module))
    reused: dict[str, fx.Node] = {}  # copies: a later site whose base is one of these values means what stands for it
    for site, computed in zip(program.plan.sites, mask, strict=True):
        emitted = (_refresh if computed else _reuse)(module, site, inputs, reused)
        slots += [state_slot(site, order) for order in range(len(emitted))]
        results += emitted
    rewrite.output_node(module).args = (tuple(results),)
    rewrite.drop_dead(module)
    for name, node in rewrite.placeholders(module).items():
        if not node.users:
            module.graph.erase_node(node)
            del inputs[name]
    ordered = {name: inputs[name] for name in rewrite.placeholders(module)}
    return Variant(rewrite.finish(module), ordered, tuple(slots))


def _source(program: Program, name: str) -> tuple[str, str]:
    return ("table", name) if name in program.tables else ("slot", name)


def _refresh(
    module: fx.GraphModule, site: Site, inputs: dict[str, tuple[str, str]], reused: Mapping[str, fx.Node]
) -> list[fx.Node]:
    end = rewrite.output_node(module)
    value = rewrite.node_named(module, site.value)
    if site.base is not None:
        value = rewrite.call(module, end, aten.sub.Tensor, value, _base(module, site.base, reused))
    states = [value]
    if site.states > 1:
        factors = _table_input(module, site, "refresh", inputs)
    for order in range(1, site.states):
        old = _state_input(module, site, order - 1, inputs)
        change = rewrite.call(module, end, aten.sub.Tensor, states[-1], old)
        factor = rewrite.call(module, end, aten.select.int, factors, 0, order - 1)
        states.append(rewrite.call(module, end, aten.mul.Tensor, change, factor))
    return states


def _reuse(
    module: fx.GraphModule, site: Site, inputs: dict[str, tuple[str, str]], reused: dict[str, fx.Node]
) -> list[fx.Node]:
    value = rewrite.node_named(module, site.value)
    coefficients = _table_input(module, site, "reuse", inputs) if site.states > 1 else None
    total = None
    for order in range(site.states):
        term = _state_input(module, site, order, inputs)
        if coefficients is not None:
            factor = rewrite.call(module, value, aten.select.int, coefficients, 0, order)
            term = rewrite.call(module, value, aten.mul.Tensor, term, factor)
        total = term if total is None else rewrite.call(module, value, aten.add.Tensor, total, term)
    assert total is not None
    if site.base is not None:
        total = rewrite.call(module, value, aten.add.Tensor, _base(module, site.base, reused), total)
    if total.op == "call_function":  # it takes the name of what it stands for: taps see it, later sites find it
        rewrite.change_call(value, total.target, *total.args)
    else:
        value.replace_all_uses_with(total)
        reused[site.value] = total
    return []


def _base(module: fx.GraphModule, name: str, reused: Mapping[str, fx.Node]) -> fx.Node:
    return reused[name] if name in reused else rewrite.node_named(module, name)


def _state_input(module: fx.GraphModule, site: Site, order: int, inputs: dict[str, tuple[str, str]]) -> fx.Node:
    name = f"{site.name}_state{order}"
    example = rewrite.tensor_of(rewrite.node_named(module, site.value))
    assert example is not None
    inputs[name] = ("slot", state_slot(site, order))
    return rewrite.add_input(module, name, example)


def _table_input(module: fx.GraphModule, site: Site, kind: str, inputs: dict[str, tuple[str, str]]) -> fx.Node:
    name = f"{site.name}_{kind}"
    rows = site.reuse if kind == "reuse" else site.refresh
    inputs[name] = ("table", f"{site.name}.{kind}")
    return rewrite.add_input(module, name, torch.from_numpy(rows[0]))
