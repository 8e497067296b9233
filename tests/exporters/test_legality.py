"""What each target is refused before any work, and that the nearest legal choice it names is one."""

from __future__ import annotations

import re
from itertools import product

import pytest

from dcompile.compiler.errors import RecipeError
from dcompile.exporters.legality import (
    KNOWN,
    LEAST,
    PORTABLE,
    RULES,
    check_capabilities,
    check_legal,
    default_capabilities,
    formats_by_target,
)
from dcompile.passes.quantize import Quantize

EVERY = [(target, weights, activations) for target in RULES for weights, activations in RULES[target]]


def test_every_target_has_a_rule_for_every_pair_that_quantize_takes() -> None:
    pairs = set()
    for weights, activations in product(("int8", "fp8", "nvfp4", "int4"), ("static", "dynamic", "none")):
        try:
            Quantize(format=weights, activations=activations)  # type: ignore[arg-type]
        except RecipeError:
            continue
        pairs.add((weights, activations))
    assert {frozenset(rules) for rules in RULES.values()} == {frozenset(pairs)}


@pytest.mark.parametrize(("target", "weights", "activations"), EVERY)
def test_a_refusal_gives_the_reason_and_a_choice_that_is_legal(target: str, weights: str, activations: str) -> None:
    rule = RULES[target][weights, activations]
    if rule.runs != "refused":
        check_legal(target, weights, activations, symmetric=rule.symmetric, group=64)
        return
    with pytest.raises(RecipeError) as refused:
        check_legal(target, weights, activations)
    assert rule.note in str(refused.value)
    instead = dict(re.findall(r"(format|activations)=(\w+)", rule.instead))
    weights = instead.get("format", weights)
    activations = instead.get("activations", "none" if weights == "int4" else activations)
    if (weights, activations) not in RULES[target]:
        activations = "static"  # what int8 takes where nothing is said
    nearest = RULES[target][weights, activations]
    check_legal(target, weights, activations, symmetric=nearest.symmetric, group=64)


def test_zero_points_are_not_for_tensorrt() -> None:
    check_legal("trt", "int8", "static", symmetric=True)
    with pytest.raises(RecipeError, match=r"'trt' does not multiply uint8 with a zero point; take symmetric=true"):
        check_legal("trt", "int8", "static", symmetric=False)


def test_one_grid_a_token_is_not_for_onnx_runtime() -> None:
    with pytest.raises(RecipeError, match=r"'onnx' does not multiply one int8 grid a token; take symmetric=false"):
        check_legal("onnx", "int8", "dynamic", symmetric=True)


@pytest.mark.parametrize(
    ("target", "group", "nearest"), [("openvino", 16, 32), ("trt", 256, 128), ("trt", 48, 32), ("onnx", 8, 16)]
)
def test_groups_are_powers_of_two_within_limits(target: str, group: int, nearest: int) -> None:
    with pytest.raises(RecipeError, match=rf"group is {group}; .* take group={nearest}$"):
        check_legal(target, "int4", "none", group=group)
    check_legal(target, "int4", "none", group=nearest)


def test_a_gpu_that_lacks_a_format() -> None:
    message = (
        r"--compute-capability 8\.0: such GPUs do not compute in fp8, which needs 8\.9 or above; take format=int8,"
    )
    with pytest.raises(RecipeError, match=message + r" or --compute-capability 8\.9$"):
        check_legal("trt", "fp8", "static", compute_capabilities=("8.0", "8.9"))
    with pytest.raises(RecipeError, match=r"take format=fp8, or --compute-capability 12\.0,12\.1"):
        check_legal("trt", "nvfp4", "none", compute_capabilities=("8.9",))
    with pytest.raises(RecipeError, match=r"7\.5: such GPUs do not compute in bf16.*; take --precision=fp16"):
        check_legal("trt", "int8", "none", compute_capabilities=("7.5",), precision="bf16")


def test_a_gpu_that_it_does_not_build_for() -> None:
    with pytest.raises(RecipeError, match=r"9\.0: TensorRT builds for 7\.5, 8\.0, .* here; other GPUs need full"):
        check_capabilities(("9.0",), ["fp16"])
    with pytest.raises(RecipeError, match=r"8\.0: TensorRT builds for 9\.0 here$"):
        check_capabilities(("8.0",), ["fp16"], known=("9.0",))


@pytest.mark.parametrize(
    ("formats", "expected"),
    [(["fp16"], PORTABLE), (["fp16", "int8"], PORTABLE), (["fp16", "fp8"], ("8.9", "12.0")), (["nvfp4"], ("12.0",))],
)
def test_the_default_is_the_portable_set_without_those_that_cannot(
    formats: list[str], expected: tuple[str, ...]
) -> None:  # fmt: skip
    assert default_capabilities(formats) == expected
    check_capabilities(expected, formats)


def test_every_format_runs_on_something() -> None:
    assert all(set(default_capabilities([name])) <= set(KNOWN) for name in LEAST)
    assert all(default_capabilities([name]) for name in LEAST)


def test_the_table_for_users_says_all_of_it() -> None:
    rows = {(weights, activations): verdicts for weights, activations, verdicts in formats_by_target()}
    assert all(verdicts.keys() == RULES.keys() for verdicts in rows.values())
    assert rows["nvfp4", "dynamic"]["trt"] == "native, GPU 10.0 and above"
    assert rows["int4", "none"]["openvino"] == "weights only, group 32 to 256"
    assert rows["fp8", "static"]["onnx"] == "no: there is no FP8 kernel for CPUs"
