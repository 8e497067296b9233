"""The twin that does not round: what it keeps, and what of the network's numbers is left between the two."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dcompile.compiler.calibrate import calibrate
from dcompile.compiler.program import Program
from dcompile.compiler.rewrite import weights
from dcompile.compiler.variants import build_variant
from dcompile.exporters.rounding import without_rounding
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
    twin = without_rounding(program.graph)
    assert twin is not None
    stored = {name for name in weights(program.graph) if not name.startswith("ranges.")}
    assert set(weights(twin)) == stored  # of the same weights, none is made real
    only = quantised(tokens, {**options, "activations": "none"})
    assert {str(node.target) for node in twin.graph.nodes if "dcompile" in str(node.target)} == operators(only)
    inputs = [torch.randn(2, 6, 4), *(table[0] for table in (tokens.tables["timestep"], tokens.tables["row"]))]
    (found,), (expected,), (rounded,) = twin(*inputs), only.graph(*inputs), program.graph(*inputs)
    assert torch.equal(found, expected)
    assert not torch.equal(found, rounded)


def test_what_rounds_nothing_has_no_twin(tokens: Program) -> None:
    assert without_rounding(tokens.graph) is None
    assert without_rounding(quantised(tokens, {"activations": "none"}).graph) is None


def test_the_graph_that_was_given_is_whole(tokens: Program) -> None:
    program = quantised(tokens, {})
    graph = build_variant(program, ()).graph
    before = [node.format_node() for node in graph.graph.nodes]
    without_rounding(graph)
    assert [node.format_node() for node in graph.graph.nodes] == before
