"""The twin of a graph: what it keeps, what of the numbers is left between the two, and where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dcompile.compiler.calibrate import calibrate, calibration_requests
from dcompile.compiler.execute import initial_slots, step_values
from dcompile.compiler.program import Program
from dcompile.compiler.rewrite import weights
from dcompile.compiler.variants import build_variant
from dcompile.exporters.twins import twin_of
from dcompile.passes.mixture_of_experts import MixtureOfExperts
from dcompile.passes.quantize import Quantize


def quantised(program: Program, options: dict[str, Any]) -> Program:
    step = Quantize(min_share=0.0, max_error=1.0, **options)
    return step.apply(program, step.decide(program, calibrate(program, 2))).program


def operators(program: Program) -> set[str]:
    return {str(node.target) for node in program.graph.graph.nodes if str(node.target).startswith("dcompile")}


@pytest.mark.parametrize(
    ("options", "rounds"),
    [
        ({}, "dcompile.quantize_dequantize.default"),
        ({"activations": "dynamic"}, "dcompile.quantize_dequantize_dynamic.default"),
        ({"format": "nvfp4"}, "dcompile.quantize_dequantize_nvfp4.default"),
    ],
)
def test_the_twin_multiplies_the_same_weights_without_rounding(
    tokens: Program, options: dict[str, Any], rounds: str
) -> None:
    program = quantised(tokens, options)
    assert operators(program) == {rounds, "dcompile.dequantize.default"}
    twin = twin_of(program.graph, 0.0)
    assert twin is not None
    stored = {name for name in weights(program.graph) if not name.startswith("ranges.")}
    assert set(weights(twin)) == stored  # of the same weights, none is made real
    only = quantised(tokens, {**options, "activations": "none"})
    assert {str(node.target) for node in twin.graph.nodes if "dcompile" in str(node.target)} == operators(only)
    inputs = [torch.randn(2, 6, 4), *(table[0] for table in (tokens.tables["timestep"], tokens.tables["row"]))]
    (found,), (expected,), (rounded,) = twin(*inputs), only.graph(*inputs), program.graph(*inputs)
    assert torch.equal(found, expected)
    assert not torch.equal(found, rounded)


def test_what_neither_rounds_nor_chooses_has_no_twin(tokens: Program) -> None:
    assert twin_of(tokens.graph, 1e-5) is None
    assert twin_of(quantised(tokens, {"activations": "none"}).graph, 1e-5) is None


def test_the_twin_of_experts_takes_other_tokens_where_two_score_alike(dit: Program) -> None:
    step = MixtureOfExperts(experts=4, active=1)
    program = step.apply(dit, step.decide(dit, calibrate(dit, 2))).program
    inputs = step_values(program, 1, initial_slots(program, *calibration_requests(program.contract, 2)))
    expected = program.graph(*inputs)[0]
    errors = []
    for off in (0.0, 1e-5, 0.3):
        twin = twin_of(program.graph, off)
        assert twin is not None
        errors.append(float(((twin(*inputs)[0] - expected).norm() / expected.norm()).detach()))
    assert errors[0] == 0.0
    assert errors[1] < 0.1 * errors[2]  # none of these few tokens, or one
    assert errors[2] > 1e-3


def test_the_graph_that_was_given_is_whole(tokens: Program) -> None:
    program = quantised(tokens, {})
    graph = build_variant(program, ()).graph
    before = [node.format_node() for node in graph.graph.nodes]
    twin_of(graph, 1e-5)
    assert [node.format_node() for node in graph.graph.nodes] == before
