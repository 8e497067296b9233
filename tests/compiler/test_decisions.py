"""Decisions at run time: every rule against its definition in plain PyTorch, in both layouts, and frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import example_conditions
from dcompile.compiler.decisions import decide, limit_of
from dcompile.compiler.errors import PassError
from dcompile.compiler.execute import run, zero_state
from dcompile.compiler.plan import Plan, Predicate, Site, taylor
from dcompile.compiler.program import Decision, Program
from dcompile.compiler.validate import validate
from dcompile.compiler.variants import build_probe
from dcompile.exporters.interpret import run_lowered
from dcompile.exporters.lower import Layout, choose_layout, lower
from dcompile.passes.cache_steps import CacheSteps
from dcompile.runtime.manifest import Jump

SEEDS = [3, 4, 5]
LAYOUTS: tuple[Layout, ...] = ("variants", "segments")
Floats = NDArray[np.float32]


def with_decision(program: Program, rule: Any, below: float, **options: Any) -> Program:
    """Blocks whose delta is reused as a predicate decides: from step 1 (a history: 2) to the last but one."""
    cached = CacheSteps(site="range", predictor="delta", front=1, interval=100).apply(program, Decision()).program
    plan = cached.plan
    first = 2 if rule == "history" else 1
    names = tuple(site.name for site in plan.sites)
    watched = {} if rule == "history" else {"indicator": plan.sites[0].base, "base": None}
    open_steps = tuple(first <= step < program.steps - 1 for step in range(program.steps))
    predicate = Predicate("middle", names, rule, below, open_steps, **{**watched, **options})
    return replace(cached, plan=replace(with_rows(plan, [not each for each in open_steps]), predicates=(predicate,)))


def with_rows(plan: Plan, computed: Sequence[bool]) -> Plan:
    """All sites computed at these steps."""
    return replace(plan, sites=tuple(replace(site, computed=tuple(computed)) for site in plan.sites))


def ran(program: Program, seeds: list[int] = SEEDS) -> tuple[Tensor, list[bool]]:
    """(samples, per step whether it computed the sites)."""
    computed: list[bool] = []
    found = run(
        program, example_conditions(program.contract, len(seeds)), seeds,
        on_inputs=lambda step, mask, values: computed.append(all(mask)),
    )  # fmt: skip
    return found, computed


def relative(a: Tensor, b: Tensor) -> Floats:
    axes = tuple(range(1, a.dim()))
    result: Floats = ((a - b).abs().mean(axes) / b.abs().mean(axes).clamp_min(1e-12)).numpy()
    return result


def watch(program: Program, node: str, minus: str | None = None) -> list[Tensor]:
    """The node's value at every step of this program's own run."""
    taps = [node] if minus is None else [node, minus]
    seen: dict[str, list[Tensor]] = {name: [] for name in taps}
    run(
        program, example_conditions(program.contract, len(SEEDS)), SEEDS,
        tap=lambda step, name, value: seen[name].append(value), taps=taps,
    )  # fmt: skip
    return seen[node] if minus is None else [a - b for a, b in zip(seen[node], seen[minus], strict=True)]


def by_hand(program: Program, predicate: Predicate) -> list[bool]:
    """What the predicate's definition says on the values that the program's own run shows."""
    values = watch(program, predicate.indicator or "", predicate.base)
    computed, total, reused = [], np.zeros(len(values[0]), np.float32), 0
    reference = values[0]
    for step, value in enumerate(values):
        if predicate.rule == "compare":
            score = relative(value, reference)
        else:
            change = relative(value, values[step - 1]) if step else total
            counted = np.polyval(predicate.polynomial, change)
            total = total + np.where(change <= predicate.fitted_to, counted, limit_of(predicate))
            score = total
        over = predicate.longest and reused >= predicate.longest
        computes = not predicate.open[step] or over or not score.max() < predicate.below
        computed.append(bool(computes))
        reused = 0 if computes else reused + 1
        if computes:
            reference, total = value, np.zeros_like(total)
    return computed


CASES: list[tuple[str, float, dict[str, Any]]] = [
    ("compare", 0.25, {}),
    ("compare", 9.0, {"longest": 2}),
    ("accumulate", 0.4, {}),
    ("accumulate", 0.5, {"polynomial": (0.5, 1.0, 0.05)}),
    ("accumulate", 9.0, {"polynomial": (-40.0, 1.0, 0.05), "fitted_to": 0.22}),  # beyond, it would count for nothing
]


@pytest.mark.parametrize(("rule", "below", "options"), CASES)
def test_a_rule_decides_as_it_is_defined(rule: str, below: float, options: dict[str, Any], dit: Program) -> None:
    program = with_decision(dit, rule, below, **options)
    _, computed = ran(program)
    assert computed == by_hand(program, program.plan.predicates[0])
    assert {computed[0], computed[-1]} == {True}
    assert set(computed[1:-1]) == {True, False}  # it decides both ways


def test_teacaches_golden_decisions() -> None:
    """rel_i = .02 (1 + i mod 5), threshold .15, 20 steps, the polynomial that changes nothing: systems/cache.md 4."""
    changes = np.array([0.02 * (1 + i % 5) for i in range(20)])
    values = torch.from_numpy(np.cumprod(1 + np.concatenate([[0], changes[1:]]))).float()
    open_steps = (False, *[True] * 18, False)
    predicate = Predicate("sum", (), "accumulate", 0.15, open_steps, "x")
    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    module = fx.GraphModule({}, graph)
    x = rewrite.node_named(module, "x")
    x.meta["val"] = torch.ones(1, 4)
    states: dict[str, str] = {}

    def new_input(name: str, slot: str, example: fx.Node) -> fx.Node:
        if slot not in states.values():
            states[name] = slot
            return rewrite.add_input(module, name, torch.zeros(()))
        return rewrite.node_named(module, name)

    nodes = decide(module, predicate, lambda name: x, (), rewrite.output_node(module), new_input)
    kept = {**nodes.computing}, {**nodes.reusing}
    rewrite.output_node(module).args = ((nodes.decision, *kept[0].values(), *kept[1].values()),)
    module = fx.GraphModule(module, module.graph)
    held = {slot: torch.zeros(1, 4) if "reference" in slot else torch.zeros(1) for slot in states.values()}
    computed = []
    for step in range(20):
        decision, *rest = module(values[step].expand(1, 4), *[held[states[name]] for name in states])
        computes = not open_steps[step] or not float(decision) < predicate.below
        computing, reusing = rest[: len(kept[0])], rest[len(kept[0]) :]
        held |= zip(kept[0], computing, strict=True) if computes else zip(kept[1], reusing, strict=True)
        computed.append(computes)
    assert [step for step, computes in enumerate(computed) if computes] == [0, 3, 6, 9, 13, 16, 19]


def test_a_history_goes_by_what_the_sites_did(dit: Program) -> None:
    """Changes of the delta between computed steps, for each step between them, times the steps since."""
    program = with_decision(dit, "history", 1.3)
    site = program.plan.sites[0]
    _, computed = ran(program)
    full = replace(program, plan=replace(with_rows(program.plan, [True] * 6), predicates=()))
    assert False in computed
    deltas = watch(full, site.value, site.base)  # up to the first reuse the two runs are one
    first = computed.index(False)
    rate = relative(deltas[first - 1], deltas[first - 2]).max()
    assert rate < 1.3
    rates = [relative(deltas[step], deltas[step - 1]).max() for step in range(1, first - 1)]
    assert all(not rate < 1.3 for rate in rates)
    never, _ = ran(with_decision(dit, "history", 0.0))
    torch.testing.assert_close(never, ran(dit)[0], rtol=0, atol=0)


@pytest.mark.parametrize(("rule", "below", "options"), [*CASES, ("history", 1.3, {})])
def test_both_layouts_decide_and_compute_alike(rule: str, below: float, options: dict[str, Any], dit: Program) -> None:
    program = with_decision(dit, rule, below, **options)
    expected, computed = ran(program)
    for layout in LAYOUTS:
        lowered = lower(program, layout)
        assert any(isinstance(row, Jump) for row in lowered.script)
        called: list[str] = []
        found = run_lowered(
            program, lowered, example_conditions(program.contract, 3), SEEDS,
            on_call=lambda _, name, *rest, seen=called: seen.append(name),
        )  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        if layout == "variants":
            assert [name == "full" for name in called if not name.startswith("probe")] == computed


@pytest.mark.parametrize("rule", ["compare", "accumulate", "history"])
def test_a_threshold_that_nothing_is_below_changes_nothing(rule: str, dit: Program) -> None:
    found, computed = ran(with_decision(dit, rule, 0.0))
    assert all(computed)
    torch.testing.assert_close(found, ran(dit)[0], rtol=0, atol=0)
    _, computed = ran(with_decision(dit, rule, 1e9))
    assert not any(computed[2:-1])


def test_a_batch_goes_by_its_most_careful_sample(dit: Program) -> None:
    """Never averaged: where one sample would be computed at the first open step if it were alone, all are."""
    deciding = with_decision(dit, "compare", 1e9)
    predicate = deciding.plan.predicates[0]
    first = [value[: 2 * len(SEEDS)] for value in watch(dit, str(predicate.indicator))[:2]]
    scores = relative(first[1], first[0])  # both halves of guidance
    assert scores.std() > 0
    between = float(scores.max()) * 0.999
    assert scores.mean() < between
    assert ran(with_decision(dit, "compare", between))[1][1]
    assert not ran(with_decision(dit, "compare", float(scores.max()) * 1.001))[1][1]


def test_what_is_not_a_number_is_computed(dit: Program) -> None:
    program = with_decision(dit, "compare", 0.5)
    probe = build_probe(program, (True,), program.plan.predicates[0])
    values = [zero_state(node, 2) for node in rewrite.placeholders(probe.graph).values()]
    values = [value * torch.nan if value.is_floating_point() else value for value in values]
    (decision,) = probe.graph(*values)[0].tolist()
    assert decision == limit_of(program.plan.predicates[0])


def test_lists_that_decide_apart(program_of: Callable[[str], Program]) -> None:
    """Two block lists, two decisions a step: four kinds of steps, and the second decides after the first is done."""
    program = program_of("flux")
    cached = CacheSteps(site="range", predictor="delta", front=1, interval=100).apply(program, Decision()).program
    lists: dict[str, list[Site]] = {}
    for site in cached.plan.sites:
        lists.setdefault("single" if "single" in site.name else "double", []).append(site)
    assert len(lists) == 2
    open_steps = (False, *[True] * (program.steps - 2), False)
    for below in (0.02, 0.1, 0.3):
        predicates = tuple(
            Predicate(
                name, tuple(site.name for site in sites), "compare", below * (1 + 2 * number), open_steps, sites[0].base
            )
            for number, (name, sites) in enumerate(lists.items())
        )
        plan = with_rows(cached.plan, [not each for each in open_steps])
        deciding = replace(cached, plan=replace(plan, predicates=predicates))
        conditions = example_conditions(program.contract, 2)
        expected = run(deciding, conditions, SEEDS[:2])
        for layout in LAYOUTS:
            found = run_lowered(deciding, lower(deciding, layout), conditions, SEEDS[:2])
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert len(deciding.plan.masks) == 4


def test_decisions_take_segments_by_themselves(dit: Program) -> None:
    choice = choose_layout(with_decision(dit, "compare", 0.3), shares_weights=True)
    assert choice.layout == "segments"
    assert "because what a step decides by is then computed once" in choice.reason


def test_what_a_plan_refuses(dit: Program) -> None:
    program = with_decision(dit, "compare", 0.3)
    (predicate,) = program.plan.predicates
    with pytest.raises(PassError, match="decision 'middle': needed one entry for each of 6 steps, and step 0 decided"):
        replace(program.plan, predicates=(replace(predicate, open=(True,) * 6),))
    reuse, refresh = taylor(program.plan.sites[0].computed, 1)
    site = replace(program.plan.sites[0], reuse=reuse, refresh=refresh)
    with pytest.raises(PassError, match=r" states or a correction, and decision 'middle' leaves open which steps"):
        replace(program.plan, sites=(site,))
    with pytest.raises(PassError, match=r"decision 'middle' is about 'other', which is no site of the plan"):
        validate(with_predicate(program, sites=("other",)))
    with pytest.raises(PassError, match=r"decision 'middle': the graph has no node 'nowhere'; plan it again"):
        validate(with_predicate(program, indicator="nowhere"))
    late = program.plan.sites[0].value
    with pytest.raises(PassError, match=rf"goes by '{late}', which follows from the site 'transformer_blocks_1_2'"):
        validate(with_predicate(program, indicator=late))
    validate(program)


def with_predicate(program: Program, **changes: Any) -> Program:
    (predicate,) = program.plan.predicates
    return replace(program, plan=replace(program.plan, predicates=(replace(predicate, **changes),)))
