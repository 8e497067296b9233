"""Fewer steps at chosen timesteps: schedules, the search, blocks that a step leaves out, and engines of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from requests_of_programs import samples_of

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import Calibration, example_conditions, spread
from dcompile.compiler.errors import PassError, RecipeError, UnsupportedError
from dcompile.compiler.execute import run
from dcompile.compiler.probe_scheduler import make_scheduler, probe
from dcompile.compiler.program import Decision, Program
from dcompile.compiler.validate import validate
from dcompile.exporters.lower import lower
from dcompile.exporters.onnx.target import TARGET
from dcompile.exporters.parity import check_parity
from dcompile.exporters.target import TargetOptions
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.choose_steps import ChooseSteps
from dcompile.passes.recover import Recover
from dcompile.passes.stepping.candidates import Breeder, Candidate
from dcompile.passes.stepping.evolution import evolve

CalibrationOf = Callable[[Program], Calibration]
DIFFUSION = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


# ---- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [("euler", DIFFUSION), ("dpm++2m", DIFFUSION), ("unipc", DIFFUSION), ("ddpm", DIFFUSION), (None, FLOW),
     ("flow_dpm++2m", FLOW)],
)  # fmt: skip
def test_rows_of_a_schedule(name: str | None, config: dict[str, Any]) -> None:
    """All of them are the schedule itself; some lead from one to the next, and to the data."""
    sampler = probe(make_scheduler(name, config), 20)
    assert sampler.choose is not None
    same = sampler.choose(20, range(20))
    assert np.array_equal(same.row_table(), sampler.row_table())
    rows = [0, 3, 4, 9, 15, 18]
    fewer = sampler.choose(20, rows)
    assert np.array_equal(fewer.timesteps, sampler.timesteps[rows])
    assert fewer.drift() is not None
    assert fewer.drift() < 1e-3  # type: ignore[operator]
    assert not np.array_equal(fewer.row_table()[1:3, 1:], sampler.row_table()[[3, 4], 1:])  # steps are longer


@pytest.mark.parametrize("name", ["ddim", "heun"])
def test_samplers_with_timesteps_of_their_own_are_refused(name: str) -> None:
    sampler = probe(make_scheduler(name, DIFFUSION), 20)
    assert sampler.choose is not None
    with pytest.raises(UnsupportedError, match="cannot go through timesteps of one's choice: it misses them by"):
        sampler.choose(20, [0, 3, 4, 9, 15, 18])


def test_a_schedule_that_leads_elsewhere_drifts() -> None:
    sampler = probe(make_scheduler(None, FLOW), 20)
    assert sampler.signal is not None
    wrong = replace(sampler, signal=np.roll(sampler.signal, 1))
    assert wrong.drift() > 0.05 > 1e-6 > sampler.drift()  # type: ignore[operator]


# ---- the search -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(0, 8), st.integers(0, 4), st.integers(0, 9), st.integers(0, 99))
def test_candidates_keep_to_the_rules(count: int, more: int, units: int, skipped: int, seed: int) -> None:
    skipped = min(skipped, count * units)
    breeder = Breeder(count, count + more, units, skipped, np.random.default_rng(seed))
    born = [breeder.uniform(), breeder.new()]
    for _ in range(6):
        born.append(breeder.child(born))
    for each in born:
        assert each.rows[0] == 0
        assert (np.diff(each.rows) > 0).all()
        assert each.rows[-1] < count + more
        assert each.rows.shape == (count,)
        assert each.computes.shape == (count, units)
        assert each.skipped == skipped


def test_it_finds_the_best_schedule() -> None:
    wanted = np.array([0, 2, 7])

    def error(candidate: Candidate) -> float:
        return float(((candidate.rows - wanted) ** 2).sum() + candidate.computes[1, 0] + 3 * ~candidate.computes[0, 1])

    best, found = evolve(error, count=3, of=9, units=2, skipped=2, trials=160)
    assert best.rows.tolist() == [0, 2, 7]
    assert best.skipped == 2
    assert not best.computes[1, 0]
    assert found == 0.0


def test_fewer_trials_than_ways_of_skipping() -> None:
    best, _ = evolve(lambda candidate: float(candidate.skipped), 4, 20, 2, 3, trials=1)
    assert best.skipped == 3


def test_uniform_steps_are_among_what_is_tried() -> None:
    tried = []
    evolve(lambda candidate: float(len(tried.append(candidate.rows.tolist()) or [])), 4, 20, 0, 0, trials=8)  # type: ignore[func-returns-value]
    assert spread(20, 4) in tried
    assert len(tried) == len({tuple(each) for each in tried})


# ---- the pass -------------------------------------------------------------------------------------------------------


def test_every_row_changes_nothing(dit: Program) -> None:
    assert dit.sampler.choose is not None
    same = dit.with_sampler(dit.sampler.choose(dit.steps, range(dit.steps)))
    assert torch.equal(samples_of(same), samples_of(dit))


def test_it_beats_uniform_steps(dit: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(dit)
    step = ChooseSteps(count=3, of=12, trials=40)
    decision = step.decide(dit, calibration)
    found = calibration.error(step.apply(dit, decision).program)["relative_error"]
    errors = []
    for rows in combinations(range(1, 12), 2):
        other = step.apply(dit, Decision({"rows": [0, *rows]})).program
        errors.append(calibration.error(other)["relative_error"])
    uniform = calibration.error(step.apply(dit, Decision()).program)["relative_error"]
    assert found == pytest.approx(decision.choices["fitness"], rel=1e-4)
    assert uniform == pytest.approx(decision.choices["fitness_of_uniform_steps"], rel=1e-4)
    assert found <= sorted(errors)[2]  # of all 55
    assert found < uniform


@pytest.fixture(scope="module")
def skipping(dit: Program, calibration_of: CalibrationOf) -> Program:
    """Four steps of three blocks, four of the twelve left out."""
    step = ChooseSteps(count=4, of=10, skip=1 / 3, trials=12)
    decision = step.decide(dit, calibration_of(dit))
    made = step.apply(dit, decision)
    assert sum(map(len, decision.choices["skipped"].values())) == 4
    assert calibration_of(dit).error(made.program)["relative_error"] == pytest.approx(
        decision.choices["fitness"], rel=1e-4
    )
    assert made.record.details["timesteps"] == [round(float(each), 3) for each in made.program.sampler.timesteps]
    validate(made.program)
    return made.program


def test_a_step_leaves_blocks_out(dit: Program, skipping: Program) -> None:
    assert dit.sampler.choose is not None
    whole = dit.with_sampler(skipping.sampler)
    assert not torch.equal(samples_of(whole), samples_of(skipping))
    by_hand = samples_by_hand(whole, skipping)
    assert torch.equal(by_hand, samples_of(skipping))
    assert all(site.states == 0 for site in skipping.plan.sites)


def samples_by_hand(whole: Program, skipping: Program) -> torch.Tensor:
    """Each step with the graph that pruning its blocks would leave."""
    sample: torch.Tensor | None = None
    for step in range(whole.steps):
        graph = rewrite.clone(whole.graph)
        for site in skipping.plan.sites:
            if not site.computed[step]:
                value, base = (rewrite.node_named(graph, str(name)) for name in (site.value, site.base))
                value.replace_all_uses_with(base)
        pruned = whole.with_graph(rewrite.finish(graph))
        begin: list[torch.Tensor] = []

        def keep(at: int, mask: object, values: list[torch.Tensor], begin: list[torch.Tensor] = begin) -> None:
            begin.extend(values)

        if sample is None:
            run(pruned, example_conditions(whole.contract, 2), [0, 1], on_inputs=keep)
            sample = begin[0]
        inputs = list(rewrite.placeholders(pruned.graph))
        given = dict(zip(inputs, begin, strict=False)) if begin else {}
        given |= {name: table[step] for name, table in whole.tables.items()}
        given |= {
            name: torch.from_numpy(np.asarray(value))
            for name, value in example_conditions(whole.contract, 2).items()
        }  # fmt: skip
        given["sample"] = sample
        with torch.no_grad():
            sample = pruned.graph(*(given[name] for name in inputs))[0]
    assert sample is not None
    return sample


@pytest.mark.parametrize("layout", ["variants", "segments"])
def test_as_engines(layout: Any, skipping: Program, tmp_path: Path) -> None:
    lowered = lower(skipping, layout)
    assert len(lowered.engines) > 1
    assert not lowered.states  # what is left out leaves nothing behind
    written = TARGET.write(lowered, tmp_path, TargetOptions(threads=1), lambda name: None)
    parity = check_parity(skipping, lowered, written.open, lambda fraction: None)
    assert all(result.relative_error < 1e-5 for result in parity)


def test_a_cache_after_it(dit: Program, skipping: Program) -> None:
    fewer = ChooseSteps(count=6).apply(dit, Decision()).program
    assert CacheSteps(interval=2).apply(fewer, Decision()).program.plan.steps == 6
    with pytest.raises(PassError, match="already has cache sites"):
        CacheSteps(interval=2).apply(skipping, Decision())


def squares(found: NDArray[np.float32], teacher: NDArray[np.float32]) -> float:
    return float(np.square(found).mean())


def broken(found: NDArray[np.float32], teacher: NDArray[np.float32]) -> float:
    raise ValueError("no reference")


def test_a_fitness_of_ones_own(dit: Program, calibration_of: CalibrationOf) -> None:
    step = ChooseSteps(count=3, of=6, trials=6, fitness=f"{__name__}:squares")
    decision = step.decide(dit, calibration_of(dit))
    calibration = calibration_of(dit)
    samples = run(step.apply(dit, decision).program, calibration.conditions, calibration.seeds)
    assert decision.choices["fitness"] == pytest.approx(float(samples.square().mean()), rel=1e-4)
    with pytest.raises(PassError, match=r"fitness function failed on samples of shape .*ValueError: no reference"):
        replace(step, fitness=f"{__name__}:broken").decide(dit, calibration_of(dit))


def test_what_it_refuses(dit: Program, unet: Program, calibration_of: CalibrationOf) -> None:
    step = ChooseSteps(count=3)
    later = replace(dit, history=(CacheSteps(interval=3).apply(dit, Decision()).record,))
    with pytest.raises(PassError, match="choose_steps: cache_steps came before; put steps before it"):
        step.apply(later, Decision())
    stepped = step.apply(dit, Decision())
    with pytest.raises(PassError, match="recover: choose_steps came before"):
        Recover().decide(replace(stepped.program, history=(stepped.record,)), calibration_of(dit))
    unknown = replace(dit, sampler=replace(dit.sampler, choose=None))
    with pytest.raises(PassError, match="is not one of diffusers' schedulers"):
        step.apply(unknown, Decision())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 1}, "choose_steps: count is 1, needed 2 or more"),
        ({"count": 20, "of": 10}, "choose_steps: of is 10, needed 20 or more"),
        ({"skip": 1.0}, "choose_steps: skip is 1.0, needed 0 or more and less than 1"),
        ({"fitness": "fid"}, "choose_steps: fitness is 'fid', needed samples or package.module:function"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ChooseSteps(**options)
