"""Steps that run as one batch: the same samples as one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.errors import PassError
from dcompile.compiler.execute import run
from dcompile.compiler.plan import Plan
from dcompile.compiler.program import Decision, Program
from dcompile.compiler.spans import build_span
from dcompile.compiler.validate import validate
from dcompile.exporters.interpret import run_lowered
from dcompile.exporters.lower import choose_layout, lower
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.fold_timestep import FoldTimestep
from dcompile.passes.quantize import Quantize
from dcompile.runtime.manifest import Call

CalibrationOf = Callable[[Program], Calibration]


def cached(program: Program, span: int, **options: Any) -> Program:
    step = CacheSteps(**{"method": "faster_diffusion", "interval": 3, "span": span, **options})
    return step.apply(program, Decision()).program


def check_same(program: Program, calibration: Calibration, tolerance: float = 1e-5) -> None:
    """In spans as serially, and the spans do run."""
    serial = run(program, calibration.conditions, calibration.seeds)
    lowered = lower(program)
    assert program.plan.spans
    for first, count in program.plan.spans:
        called = [row.call for row in lowered.script if isinstance(row, Call) and first <= row.row < first + count]
        assert called == [f"ahead{count}", *[f"update{count}"] * count]
    found = run_lowered(program, lowered, calibration.conditions, calibration.seeds)
    torch.testing.assert_close(found, serial, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("interval", "span"), [(3, 2), (6, 5), (6, 2), (6, 4)])
def test_a_unet_under_guidance(interval: int, span: int, unet: Program, calibration_of: CalibrationOf) -> None:
    check_same(cached(unet, span, interval=interval), calibration_of(unet))


def test_its_noise_is_added_step_by_step(unet: Program, calibration_of: CalibrationOf) -> None:
    check_same(cached(unet, 2, prior=0.1), calibration_of(unet))


def test_folded_and_quantised(unet: Program, calibration_of: CalibrationOf) -> None:
    calibration, program = calibration_of(unet), cached(unet, 2)
    folded = FoldTimestep().apply(program, Decision()).program
    assert folded.tables.keys() != program.tables.keys()
    check_same(folded, calibration)
    quantise = Quantize(max_error=1.0, min_share=0.0)
    quantised = quantise.apply(program, quantise.decide(program, calibration)).program
    check_same(quantised, calibration, 1e-4)


@pytest.mark.parametrize("network", ["unet2d", "unet_condition"])
def test_unets_without_guidance(
    network: str, program_of: Callable[[str], Program], calibration_of: CalibrationOf
) -> None:
    program = program_of(network)
    check_same(cached(program, 3, interval=4), calibration_of(program))


def test_extrapolated_states_have_coefficients_of_each_step(unet: Program, calibration_of: CalibrationOf) -> None:
    check_same(cached(unet, 2, predictor="taylor1", schedule="interval", warmup=2), calibration_of(unet))


def test_the_batch_holds_all_steps(unet: Program) -> None:
    program = cached(unet, 2)
    span = build_span(program, (False,) * len(program.plan.sites), 2)
    inputs = {source for _, source in span.ahead.inputs.values()}
    assert "timestep.ahead2" in inputs
    widest = max(
        node.meta["val"].shape[0].node.hint for node in span.ahead.graph.graph.nodes
        if node.op == "call_function" and node.target is torch.ops.aten.conv2d.default
    )  # fmt: skip
    serial = max(
        node.meta["val"].shape[0].node.hint for node in program.graph.graph.nodes
        if node.op == "call_function" and node.target is torch.ops.aten.conv2d.default
    )  # fmt: skip
    assert widest == 2 * serial
    assert not [node for node in span.update.graph.graph.nodes if node.op == "get_attr"]


@pytest.mark.parametrize(
    ("computed", "span", "expected"),
    [
        ("100100", 1, ()),
        ("100100", 2, ((1, 2), (4, 2))),
        ("100100", 9, ((1, 2), (4, 2))),
        ("100000", 2, ((1, 2), (3, 2))),
        ("100000", 3, ((1, 3), (4, 2))),
        ("110101", 4, ()),
    ],
)
def test_spans_of_a_plan(computed: str, span: int, expected: tuple[tuple[int, int], ...], unet: Program) -> None:
    program = cached(unet, span)
    row = tuple(bit == "1" for bit in computed)
    sites = tuple(replace(site, computed=row) for site in program.plan.sites)
    assert Plan(6, sites, (), span).spans == expected


def test_the_layout_follows(unet: Program) -> None:
    choice = choose_layout(cached(unet, 2), shares_weights=False)
    assert choice.layout == "variants"
    assert "run as one batch" in choice.reason


def test_a_network_that_reads_the_sample_is_refused(dit: Program, unet: Program) -> None:
    for program, options in ((dit, {"method": "interval"}), (unet, {"method": "deepcache"})):
        with pytest.raises(PassError, match=r"one batch: \w+ of a step that reuses reads the sample; give span=1"):
            validate(cached(program, 2, **options))


def test_states_that_each_step_leaves_behind_are_refused(dit: Program) -> None:
    with pytest.raises(PassError, match="each of them leaves"):
        validate(cached(dit, 2, method="lesa"))


def test_steps_without_layers_are_refused(dit: Program) -> None:
    with pytest.raises(PassError, match="one that reuses has no layers left to run; give span=1"):
        validate(cached(dit, 2, method="fora", site="output", schedule="interval"))
