"""What every pass promises, over the whole catalogue: a new pass is tested on arrival."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.errors import PassError
from dcompile.compiler.execute import run
from dcompile.compiler.pipeline import apply_checked
from dcompile.compiler.program import Decision, PassResult, Program
from dcompile.passes import PASSES, SHORT_NAMES
from dcompile.passes.experts.feed_forward import find_feed_forwards

CalibrationOf = Callable[..., Calibration]

# Options under which a pass has something to do on a network of three blocks, and those that ask for nothing.
WORKING: dict[str, dict[str, Any]] = {
    "prune_layers": {"count": 1},
    "mixture_of_experts": {"experts": 4, "active": 1},
    "recover": {"steps": 8, "batch": 4},
    "elastic_blocks": {"share": 0.6, "steps": 4, "batch": 4},
    "choose_steps": {"count": 4, "of": 12, "trials": 6},
    "quantize": {"min_share": 0.0, "max_error": 0.5},
}
IDLE: dict[str, dict[str, Any]] = {
    "prune_layers": {"count": 0},
    "mixture_of_experts": {"experts": 7},
    "elastic_blocks": {"share": 1.0, "width": 1.0, "tune": False, "steps": 1},
    "choose_steps": {"count": 6, "of": 6, "trials": 1},
    "cache_steps": {"interval": 1},
    "quantize": {"min_share": 1.0},
}
# Relative error that these options may cost on a random network: far from it would be a bug, not a loss.
BOUND = {
    "prune_layers": 1.0,
    "mixture_of_experts": 1.0,
    "recover": 1.0,
    "elastic_blocks": 1.0,
    "choose_steps": 1.0,
    "cache_steps": 0.5,
    "quantize": 0.2,
    "fold_timestep": 1e-5,
}


def apply(name: str, program: Program, calibration: Calibration, **options: Any) -> PassResult:
    step = PASSES[name](**options)
    return apply_checked(step, program, step.decide(program, calibration))


def has_work(name: str, program: Program) -> bool:
    """A network of convolutions has no feed-forwards on tokens."""
    return name != "mixture_of_experts" or bool(find_feed_forwards(program.graph))


def start(name: str, program: Program, calibration: Calibration) -> Program:
    """What the pass is for: recovery is of what another pass cut."""
    return apply("prune_layers", program, calibration, count=1).program if name == "recover" else program


def text(program: Program) -> str:
    return str(program.graph.graph) + repr(program.plan) + repr(sorted(program.tables))


@pytest.fixture(scope="module", params=["dit", "unet"])
def program(request: pytest.FixtureRequest) -> Program:
    """Blocks in a row and linear layers; nested stages and convolutions."""
    found: Program = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def results(program: Program, calibration_of: CalibrationOf) -> dict[str, PassResult]:
    calibration = calibration_of(program)
    starts = {name: start(name, program, calibration) for name in PASSES if has_work(name, program)}
    return {name: apply(name, each, calibration, **WORKING.get(name, {})) for name, each in starts.items()}


@pytest.fixture(autouse=True)
def work_to_do(request: pytest.FixtureRequest) -> None:
    if "name" in request.fixturenames:
        name, program = (request.getfixturevalue(each) for each in ("name", "program"))
        if not has_work(name, program):
            pytest.skip(f"{name} has nothing to do on {program.name}")


@pytest.fixture
def given(name: str, program: Program, calibration_of: CalibrationOf) -> Program:
    return start(name, program, calibration_of(program))


def test_every_pass_has_a_short_name() -> None:
    assert sorted(SHORT_NAMES.values()) == sorted(PASSES)


@pytest.mark.parametrize("name", PASSES)
class TestPass:
    def test_has_work_to_do_and_says_so(self, name: str, given: Program, results: dict[str, PassResult]) -> None:
        assert results[name].record.changed > 0
        before, after = (rewrite.weights(each.graph) for each in (given, results[name].program))
        moved = any(not torch.equal(before[key], value) for key, value in after.items() if key in before)
        assert moved or text(results[name].program) != text(given)

    def test_leaves_its_input_alone(
        self, name: str, program: Program, given: Program, calibration_of: CalibrationOf
    ) -> None:
        def state() -> tuple[str, dict[str, tuple[int, int]]]:
            weights = rewrite.weights(given.graph)
            return text(given), {key: (id(value), value._version) for key, value in weights.items()}

        before = state()
        apply(name, given, calibration_of(program), **WORKING.get(name, {}))
        assert before == state()

    def test_is_deterministic(
        self, name: str, program: Program, given: Program, calibration_of: CalibrationOf, results: dict[str, PassResult]
    ) -> None:
        again = apply(name, given, calibration_of(program), **WORKING.get(name, {})).program
        assert text(again) == text(results[name].program)
        for key, value in rewrite.weights(results[name].program.graph).items():
            assert torch.equal(value, rewrite.attribute(again.graph, key))

    def test_what_it_makes_runs_and_is_close_to_the_teacher(
        self, name: str, calibration_of: CalibrationOf, program: Program, results: dict[str, PassResult]
    ) -> None:
        found = results[name].program
        found.graph.graph.lint()
        assert calibration_of(program).error(found)["relative_error"] < BOUND[name]

    def test_its_record_is_json(self, name: str, results: dict[str, PassResult]) -> None:
        record = results[name].record
        told = [
            record.name,
            dict(record.options),
            record.changed,
            [list(r) for r in record.refused],
            dict(record.details),
        ]
        assert json.loads(json.dumps(told)) == told

    def test_asked_for_nothing_it_changes_nothing(
        self, name: str, program: Program, calibration_of: CalibrationOf, results: dict[str, PassResult]
    ) -> None:
        if name == "fold_timestep":  # it has no such option; what is folded has nothing left to fold
            program = results[name].program
        result = apply(name, program, calibration_of(program), **IDLE.get(name, {}))
        assert result.record.changed == 0
        assert text(result.program) == text(program)

    def test_what_it_decided_survives_json(
        self, name: str, program: Program, given: Program, calibration_of: CalibrationOf, results: dict[str, PassResult]
    ) -> None:
        """As the store keeps it: applied again, it makes the same."""
        step = PASSES[name](**WORKING.get(name, {}))
        decision = step.decide(given, calibration_of(program))
        kept = Decision(json.loads(json.dumps(dict(decision.choices))), dict(decision.tensors))
        again = apply_checked(step, given, kept)
        assert text(again.program) == text(results[name].program)
        assert again.record == results[name].record

    def test_a_second_run_changes_nothing_or_is_refused(
        self, name: str, program: Program, calibration_of: CalibrationOf, results: dict[str, PassResult]
    ) -> None:
        once = results[name].program
        if name == "prune_layers":  # every run removes what it is asked to, while two blocks are left
            assert apply(name, once, calibration_of(program), count=1).record.changed == 1
            return
        if name == "mixture_of_experts":  # the shared parts are feed-forwards again
            assert apply(name, once, calibration_of(program), **WORKING[name]).record.changed > 0
            return
        if name == "recover":  # it trains on from there
            assert apply(name, once, calibration_of(program), **WORKING[name]).record.changed > 0
            return
        if name == "choose_steps":  # it chooses anew, of the long schedule
            assert apply(name, once, calibration_of(program), **WORKING[name]).record.changed > 0
            return
        if name == "elastic_blocks":
            with pytest.raises(PassError, match="a plan of what steps compute came before"):
                apply(name, once, calibration_of(program), **WORKING[name])
            return
        if name == "cache_steps":
            with pytest.raises(Exception, match="already has cache sites"):
                apply(name, once, calibration_of(program))
            return
        assert apply(name, once, calibration_of(program), **WORKING.get(name, {})).record.changed == 0


def test_interval_1_equals_no_cache_bit_for_bit(program: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(program)
    cached = apply("cache_steps", program, calibration, interval=1).program
    expected = run(program, calibration.conditions, calibration.seeds)
    assert torch.equal(run(cached, calibration.conditions, calibration.seeds), expected)


def test_reused_steps_do_differ(
    program: Program, calibration_of: CalibrationOf, results: dict[str, PassResult]
) -> None:
    calibration = calibration_of(program)
    expected = run(program, calibration.conditions, calibration.seeds)
    found = run(results["cache_steps"].program, calibration.conditions, calibration.seeds)
    assert (found - expected).abs().max() > 1e-4
