"""Which layers become INT8 and with which ranges, the numbers of one layer by hand, and the layers that stay."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import models
import pytest
import torch

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.errors import PassError
from dcompile.compiler.execute import run
from dcompile.compiler.flops import sample_flops
from dcompile.compiler.network import NetworkSpec
from dcompile.compiler.program import Decision, PassResult, Program
from dcompile.compiler.regions import find_regions
from dcompile.compiler.step_graph import Step, export_step
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.fold_timestep import FoldTimestep
from dcompile.passes.prune_layers import PruneLayers
from dcompile.passes.quantize import Quantize
from dcompile.quant.int8 import affine_range, fake_quantize, quantize_weight

CalibrationOf = Callable[[Program], Calibration]
INT8 = ("linear_int8", "linear_int8_dynamic", "conv2d_int8")


def quantize(program: Program, calibration: Calibration, **options: Any) -> PassResult:
    step = Quantize(**options)
    return step.apply(program, step.decide(program, calibration))


def calls(program: Program, *names: str) -> dict[str, torch.fx.Node]:
    """Calls by the operator's name, without its namespace."""
    nodes = [node for node in program.graph.graph.nodes if node.op == "call_function"]
    return {node.name: node for node in nodes if getattr(node.target, "_opname", None) in names}


def widened(program: Program, network: torch.nn.Module) -> Program:
    """A program of this network with the sampler of `tokens`."""
    spec = NetworkSpec(sample="x", timestep="sigma", sample_shape=(6, 4), predicts="flow")
    return replace(program, graph=export_step(Step(models.randomise(network), spec, program.sampler, 1.0)))


# ---- structure ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_graph_after(
    tokens: Program, calibration_of: CalibrationOf, golden: Callable[[str, str], None], activations: str
) -> None:
    result = quantize(tokens, calibration_of(tokens), activations=activations)
    golden(f"quantize/{activations}", models.graph_text(result.program.graph))


def test_layers_keep_their_names_regions_and_flops(dit: Program, calibration_of: CalibrationOf) -> None:
    result = quantize(dit, calibration_of(dit))
    before, after = calls(dit, "linear", "conv2d"), calls(result.program, *INT8)
    assert set(after) < set(before)
    assert result.record.changed == len(after) == result.record.details["layers"]
    assert set(before) - set(after) == {name for name, _ in result.record.refused}
    for old, new in zip(find_regions(dit.graph), find_regions(result.program.graph), strict=True):
        assert (new.path, new.inputs, new.outputs, new.streams) == (old.path, old.inputs, old.outputs, old.streams)
    assert sample_flops(result.program) == pytest.approx(sample_flops(dit))


def test_weights_take_a_quarter(dit: Program, calibration_of: CalibrationOf) -> None:
    result = quantize(dit, calibration_of(dit))
    before, after = rewrite.weights(dit.graph), rewrite.weights(result.program.graph)
    for node in calls(result.program, *INT8).values():
        path = str(node.args[1].target)  # type: ignore[union-attr]
        integers = after[path] if node.target is torch.ops.dcompile.conv2d_int8.default else after[path].t()
        assert after[path].dtype == torch.int8
        expected, scale = quantize_weight(before[path])
        assert torch.equal(integers, expected)
        assert torch.equal(after[f"{path}_scale"], scale)
    kept = {name for name in before if name in after and before[name] is after[name]}
    changed = {str(node.args[1].target) for node in calls(result.program, *INT8).values()}  # type: ignore[union-attr]
    assert kept == set(before) - changed


def test_layers_that_read_one_tensor_share_its_range(dit: Program, calibration_of: CalibrationOf) -> None:
    result = quantize(dit, calibration_of(dit))
    by_input: dict[str, set[tuple[str, str]]] = {}
    for node in calls(result.program, "linear_int8").values():
        scale, zero_point = node.args[4:6]
        assert isinstance(scale, torch.fx.Node)
        assert isinstance(zero_point, torch.fx.Node)
        by_input.setdefault(str(node.args[0]), set()).add((str(scale.target), str(zero_point.target)))
    assert all(len(constants) == 1 for constants in by_input.values())
    readers = [str(node.args[0]) for node in calls(result.program, "linear_int8").values()]
    assert max(readers.count(name) for name in readers) == 3  # query, key and value


def test_ranges_are_those_of_the_whole_trajectory(tokens: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(tokens)
    result = quantize(tokens, calibration)
    sources = {str(node.args[0]) for node in calls(result.program, "linear_int8").values()}
    seen: dict[str, list[torch.Tensor]] = {}
    run(
        tokens,
        calibration.conditions,
        calibration.seeds,
        tap=lambda step, name, value: seen.setdefault(name, []).append(value),
        taps=sources,
    )
    after = rewrite.weights(result.program.graph)
    growing = 0
    for name, values in seen.items():
        low, high = float(torch.stack(values).min()), float(torch.stack(values).max())
        scale, zero_point = affine_range(low, high)
        assert len(values) == 6
        assert after[f"ranges.{name}_scale"].item() == pytest.approx(scale, rel=1e-6)
        assert after[f"ranges.{name}_zero_point"].item() == zero_point
        growing += (float(values[0].min()), float(values[0].max())) != (low, high)
    assert growing  # the first step would not have done


def test_convolutions_of_a_unet_are_rounded_on_both_sides(unet: Program, calibration_of: CalibrationOf) -> None:
    result = quantize(unet, calibration_of(unet))
    convolutions = calls(result.program, "conv2d_int8")
    assert len(convolutions) > 5
    after = rewrite.weights(result.program.graph)
    for name, node in convolutions.items():
        scale, zero_point = (str(argument.target) for argument in node.args[6:8])  # type: ignore[union-attr]
        assert (scale, zero_point) == (f"ranges.{name}_scale", f"ranges.{name}_zero_point")
        assert after[scale].dtype == torch.float32
        assert after[zero_point].dtype == torch.uint8
    strides = {tuple(node.args[8]) for node in convolutions.values()}  # type: ignore[arg-type]
    assert strides == {(1, 1), (2, 2)}  # the downsampler too


# ---- numbers ------------------------------------------------------------------------------------------------------


def test_a_layer_by_hand(tokens: Program, calibration_of: CalibrationOf) -> None:
    """x and weight rounded, then multiplied in float32."""
    calibration = calibration_of(tokens)
    result = quantize(tokens, calibration)
    name = "linear_2"
    seen: dict[str, torch.Tensor] = {}
    node = calls(result.program, "linear_int8")[name]
    source = str(node.args[0])
    inside = {"tap": lambda s, n, v: seen.setdefault(n, v), "taps": [name, source]}
    run(result.program, calibration.conditions, calibration.seeds, **inside)  # type: ignore[arg-type]
    before, after = rewrite.weights(tokens.graph), rewrite.weights(result.program.graph)
    integers, scale = quantize_weight(before["net.blocks.0.up.weight"])
    x = fake_quantize(seen[source], after[f"ranges.{source}_scale"], after[f"ranges.{source}_zero_point"])
    expected = torch.nn.functional.linear(x, integers * scale[:, None], before["net.blocks.0.up.bias"])
    torch.testing.assert_close(seen[name], expected, rtol=1e-5, atol=1e-5)


def test_recorded_errors_are_those_of_the_layers_alone(tokens: Program, calibration_of: CalibrationOf) -> None:
    """Of the layer's output over the trajectory of the program before the pass."""
    calibration = calibration_of(tokens)
    decision = Quantize().decide(tokens, calibration)
    name = "linear_7"  # the last block's second
    seen: dict[str, list[torch.Tensor]] = {}
    source = str(rewrite.node_named(tokens.graph, name).args[0])
    run(
        tokens,
        calibration.conditions,
        calibration.seeds,
        tap=lambda s, n, v: seen.setdefault(n, []).append(v),
        taps=[name, source],
    )
    x, expected = torch.stack(seen[source]), torch.stack(seen[name])
    scale, zero_point = affine_range(*decision.choices["ranges"][name])
    weights = rewrite.weights(tokens.graph)
    integers, weight_scale = quantize_weight(weights["net.blocks.2.down.weight"])
    rounded = fake_quantize(x, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.uint8))
    bias = weights["net.blocks.2.down.bias"].detach()
    found = torch.nn.functional.linear(rounded, integers * weight_scale[:, None], bias)
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < 0.02
    assert decision.choices["errors"][name] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("name", ["tokens", "dit", "unet"])
@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_samples_stay_close_and_change(
    name: str, activations: str, request: pytest.FixtureRequest, calibration_of: CalibrationOf
) -> None:
    program: Program = request.getfixturevalue(name)
    calibration = calibration_of(program)
    error = calibration.error(quantize(program, calibration, activations=activations).program)
    assert 0 < error["relative_error"] < 0.05


def test_ranges_hold_what_reused_steps_extrapolate(tokens: Program, calibration_of: CalibrationOf) -> None:
    """The last layer reads the cached blocks' value as it is: computed on three steps, extrapolated on three."""
    calibration = calibration_of(tokens)
    program = CacheSteps(interval=4, warmup=2, predictor="taylor1").apply(tokens, Decision()).program
    assert [step for step, computed in enumerate(program.plan.sites[0].computed) if computed] == [0, 1, 5]
    source = str(rewrite.node_named(program.graph, "linear_8").args[0])
    assert source == program.plan.sites[0].value
    seen: dict[str, list[torch.Tensor]] = {}

    def tap(step: int, name: str, value: torch.Tensor) -> None:
        seen.setdefault(name, []).append(value)

    run(program, calibration.conditions, calibration.seeds, tap=tap, taps=[source, "linear_8"])
    assert len(seen[source]) == len(seen["linear_8"]) == 6
    weights = rewrite.weights(tokens.graph)
    layer = weights["net.leave.weight"].detach(), weights["net.leave.bias"].detach()
    found = torch.nn.functional.linear(torch.stack(seen[source]), *layer)
    torch.testing.assert_close(found, torch.stack(seen["linear_8"]))  # so this is what the layer read
    low, high = Quantize().decide(program, calibration).choices["ranges"]["linear_8"]
    assert (low, high) == (float(torch.stack(seen[source]).min()), float(torch.stack(seen[source]).max()))


def test_after_prune_and_cache(dit: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(dit)
    program = PruneLayers().apply(dit, Decision({"removed": ["net.transformer_blocks.1"]})).program
    program = CacheSteps(interval=2, warmup=2).apply(program, Decision()).program
    result = quantize(program, calibration)
    assert result.program.plan is program.plan
    before, after = (calibration.observe(p, [], lambda *_: None, "") for p in (program, result.program))
    assert 0 < (after - before).norm() / before.norm() < 0.05


# ---- left alone ---------------------------------------------------------------------------------------------------


def refused(result: PassResult) -> dict[str, str]:
    return dict(result.record.refused)


def test_layers_above_max_error(tokens: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(tokens)
    errors = quantize(tokens, calibration).record.details["largest_layer_error"]
    every = Quantize().decide(tokens, calibration).choices["errors"]
    limit = sorted(every.values())[2]
    result = quantize(tokens, calibration, max_error=limit)
    assert set(calls(result.program, "linear_int8")) == {name for name, error in every.items() if error <= limit}
    assert result.record.details["largest_layer_error"] == limit < errors
    whys = [why for why in refused(result).values() if "max_error" in why]
    assert len(whys) == len(every) - 3
    assert all(why.startswith("its relative error is 0.0") for why in whys)


def test_nothing_below_max_error_is_the_same_program(tokens: Program, calibration_of: CalibrationOf) -> None:
    result = quantize(tokens, calibration_of(tokens), max_error=0.0)
    assert result.program is tokens
    assert result.record.changed == 0


def test_layers_of_a_small_share(tokens: Program, calibration_of: CalibrationOf) -> None:
    """In and out are 128 weights of 13,000; a block's two layers are 2,048 each."""
    result = quantize(tokens, calibration_of(tokens), min_share=0.05)
    assert set(calls(result.program, "linear_int8")) == {f"linear_{i}" for i in range(2, 8)}
    assert set(refused(result)) == {"linear", "linear_1", "linear_8"}
    assert "of the weights, both below min_share 5.00 %" in refused(result)["linear"]


def test_layers_that_the_timestep_alone_decides(dit: Program, calibration_of: CalibrationOf) -> None:
    result = quantize(dit, calibration_of(dit))
    folded = [name for name, why in refused(result).items() if "depends on the timestep alone" in why]
    assert len(folded) == 2 * 2  # two layers a block; those of the first are read by the last layer too
    after_fold = FoldTimestep().apply(dit, Decision()).program
    assert not set(folded) & set(calls(after_fold, "linear"))


def test_convolutions_with_dynamic_activations(unet: Program, calibration_of: CalibrationOf) -> None:
    result = quantize(unet, calibration_of(unet), activations="dynamic")
    assert calls(result.program, "linear_int8_dynamic")
    assert not calls(result.program, "conv2d_int8", "linear_int8")
    convolutions = set(calls(unet, "conv2d"))
    whys = {why for name, why in refused(result).items() if name in convolutions}
    assert "a convolution needs static activations" in whys


class Sharing(models.Tokens):
    """One layer read twice, and one whose weight is computed."""

    def forward(self, x: Any, sigma: Any, extra: Any = None) -> Any:
        hidden = self.enter(x) + self.time(sigma[:, None] / 1000)[:, None]
        block: Any = self.blocks[0]
        for _ in range(2):
            hidden = hidden + block.down(block.act(block.up(hidden)))
        return torch.nn.functional.linear(hidden, torch.tanh(self.leave.weight), self.leave.bias)


def test_weights_that_are_shared_or_computed(tokens: Program, calibration_of: CalibrationOf) -> None:
    program = widened(tokens, Sharing(blocks=1))
    result = quantize(program, calibration_of(program))
    assert set(calls(result.program, "linear_int8")) == {"linear"}
    shared = [
        name for name, why in refused(result).items() if why == "its weight is computed, or shared with another layer"
    ]
    assert shared == ["linear_2", "linear_3", "linear_4", "linear_5", "linear_6"]


def test_second_run_changes_nothing(dit: Program, calibration_of: CalibrationOf) -> None:
    once = quantize(dit, calibration_of(dit)).program
    again = quantize(once, calibration_of(dit))
    assert again.program is once
    assert again.record.changed == 0


# ---- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensor_that_is_not_finite_is_named_with_its_step(
    tokens: Program, calibration_of: CalibrationOf, value: float
) -> None:
    timesteps = tokens.tables["timestep"].clone()
    timesteps[3] = value
    broken = replace(tokens, tables={**tokens.tables, "timestep": timesteps})
    words = r"quantize: tensor '\w+' is not finite at step 4; the calibration data or a pass before it is at fault"
    with pytest.raises(PassError, match=words):
        quantize(broken, calibration_of(tokens))
