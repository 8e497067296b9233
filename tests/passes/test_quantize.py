"""Which layers get fewer bits and with which ranges, the numbers of one layer by hand, and the layers that stay."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import models
import pytest
import torch

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.errors import PassError, RecipeError
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
from dcompile.quant import formats

CalibrationOf = Callable[[Program], Calibration]
Ops = torch.ops.dcompile
CONV = torch.ops.aten.conv2d.default

# Every kind of layer: options of the pass -> (format of the weights, operator on activations, its format).
KINDS: dict[str, tuple[dict[str, Any], str, str | None, str | None]] = {
    "int8": ({}, "int8", "quantize_dequantize", "uint8"),
    "int8 symmetric": ({"symmetric": True}, "int8", "quantize_dequantize", "int8"),
    "int8 dynamic": ({"activations": "dynamic"}, "int8", "quantize_dequantize_dynamic", "uint8"),
    "int8 by token": ({"activations": "dynamic", "symmetric": True}, "int8", "quantize_dequantize_dynamic", "int8"),
    "int8 weights": ({"activations": "none"}, "int8", None, None),
    "fp8": ({"format": "fp8"}, "fp8", "quantize_dequantize", "fp8"),
    "fp8 weights": ({"format": "fp8", "activations": "none"}, "fp8", None, None),
    "nvfp4": ({"format": "nvfp4"}, "nvfp4", "quantize_dequantize_nvfp4", None),
    "nvfp4 weights": ({"format": "nvfp4", "activations": "none"}, "nvfp4", None, None),
    "int4": ({"format": "int4", "group": 16}, "int4", None, None),
}


def quantize(program: Program, calibration: Calibration, **options: Any) -> PassResult:
    step = Quantize(**options)
    return step.apply(program, step.decide(program, calibration))


def calls(program: Program, *names: str) -> dict[str, torch.fx.Node]:
    """Calls by the operator's name, without its namespace."""
    nodes = [node for node in program.graph.graph.nodes if node.op == "call_function"]
    return {node.name: node for node in nodes if getattr(node.target, "_opname", None) in names}


def quantised(program: Program) -> dict[str, torch.fx.Node]:
    """The layers whose weight is stored in fewer bits, by the name of what others read: of a convolution, rounded."""
    layers = [node for node in calls(program, "linear", "conv2d").values() if stored(node) is not None]
    return {next(iter(node.users)).name if node.target is CONV else node.name: node for node in layers}


def stored(node: torch.fx.Node) -> torch.fx.Node | None:
    """The `dequantize` that a layer's weight comes from."""
    weight = node.args[1]
    assert isinstance(weight, torch.fx.Node)
    return weight if rewrite.is_call(weight, Ops.dequantize.default) else None


def path_of(argument: Any) -> str:
    assert argument.op == "get_attr"
    return str(argument.target)


def weight_path(node: torch.fx.Node) -> str:
    weight = stored(node)
    assert weight is not None
    return path_of(weight.args[0])


def rounding(node: torch.fx.Node) -> torch.fx.Node:
    """The operator that rounds what a layer reads."""
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    assert source.target.namespace == "dcompile"  # type: ignore[union-attr]
    return source


def widened(program: Program, network: torch.nn.Module) -> Program:
    """A program of this network with the sampler of `tokens`."""
    spec = NetworkSpec(sample="x", timestep="sigma", sample_shape=(6, 4), predicts="flow")
    return replace(program, graph=export_step(Step(models.randomise(network), spec, program.sampler, 1.0)))


# ---- structure ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "int8 dynamic", "nvfp4", "int4"])
def test_graph_after(
    tokens: Program, calibration_of: CalibrationOf, golden: Callable[[str, str], None], kind: str
) -> None:
    result = quantize(tokens, calibration_of(tokens), **KINDS[kind][0])
    golden(f"quantize/{kind.replace(' ', '_')}", models.graph_text(result.program.graph))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_keep_their_names_regions_and_flops(dit: Program, calibration_of: CalibrationOf, kind: str) -> None:
    result = quantize(dit, calibration_of(dit), **KINDS[kind][0])
    before, after = calls(dit, "linear", "conv2d"), quantised(result.program)
    assert set(after) <= set(before)
    assert result.record.changed == len(after) == result.record.details["layers"] > 20
    assert set(before) - set(after) == {name for name, _ in result.record.refused}
    assert len(calls(result.program, "linear", "conv2d")) == len(before)
    for old, new in zip(find_regions(dit.graph), find_regions(result.program.graph), strict=True):
        assert (new.path, new.inputs, new.outputs, new.streams) == (old.path, old.inputs, old.outputs, old.streams)
        assert len(new.nodes) > len(old.nodes)  # what was added belongs to the region
    assert sample_flops(result.program) == pytest.approx(sample_flops(dit))
    assert result.program.parameters == dit.parameters


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_stored_in_their_format_under_their_own_path(
    dit: Program, calibration_of: CalibrationOf, kind: str
) -> None:
    options, format, _, _ = KINDS[kind]
    result = quantize(dit, calibration_of(dit), **options)
    before, after = rewrite.weights(dit.graph), rewrite.weights(result.program.graph)
    for node in quantised(result.program).values():
        path, weight = weight_path(node), stored(node)
        assert weight is not None
        quantise: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]] = {
            "int8": formats.quantize_int8,
            "fp8": formats.quantize_fp8,
            "nvfp4": formats.quantize_nvfp4,
            "int4": lambda value: formats.quantize_int4(value, 16),
        }
        expected = quantise[format](before[path])
        ends = ("", "_scale", "_global_scale")
        assert [path_of(argument) for argument in weight.args[:3] if argument is not None] == [
            f"{path}{end}" for end in ends[: len(expected)]
        ]
        assert weight.args[3:] == (format, 1 if format in ("int4", "nvfp4") else 0)
        for end, value in zip(ends, expected, strict=False):
            assert after[f"{path}{end}"].dtype == value.dtype
            assert torch.equal(after[f"{path}{end}"].float(), value.float())
    kept = {name for name in before if name in after and before[name] is after[name]}
    assert kept == set(before) - {weight_path(node) for node in quantised(result.program).values()}


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_rounded_in_their_format(dit: Program, calibration_of: CalibrationOf, kind: str) -> None:
    options, _, operator, format = KINDS[kind]
    result = quantize(dit, calibration_of(dit), **options)
    rounded = calls(result.program, "quantize_dequantize", "quantize_dequantize_dynamic", "quantize_dequantize_nvfp4")
    if operator is None:
        assert not rounded
        return
    assert {getattr(node.target, "_opname", None) for node in rounded.values()} == {operator}
    assert {node.args[-1] for node in rounded.values() if isinstance(node.args[-1], str)} == {format} - {None}
    for node in quantised(result.program).values():
        assert rounding(node).name in rounded


@pytest.mark.parametrize("kind", [kind for kind, (_, _, operator, _) in KINDS.items() if operator])
def test_layers_that_read_one_tensor_share_its_rounding(dit: Program, calibration_of: CalibrationOf, kind: str) -> None:
    result = quantize(dit, calibration_of(dit), **KINDS[kind][0])
    layers = list(calls(result.program, "linear").values())
    by_source: dict[str, set[str]] = {}
    for node in layers:
        if stored(node) is not None:
            by_source.setdefault(str(rounding(node).args[0]), set()).add(rounding(node).name)
    assert all(len(rounded) == 1 for rounded in by_source.values())
    readers = [rounding(node).name for node in layers if stored(node) is not None]
    assert sorted(readers.count(name) for name in set(readers))[-3:] == [3, 3, 3]  # query, key and value of each block


def test_rounding_is_not_shared_from_block_to_block(
    program_of: Callable[[str], Program], calibration_of: CalibrationOf
) -> None:
    """Every block's cross-attention reads the same text; its rounded copy would be one more tensor between blocks."""
    program = program_of("pixart")
    result = quantize(program, calibration_of(program), min_share=0.0, max_error=1.0)
    readers: dict[str, set[str]] = {}
    for node in quantised(result.program).values():
        if node.target is torch.ops.aten.linear.default:
            readers.setdefault(str(rounding(node).args[0]), set()).add(rounding(node).name)
    assert max(len(rounded) for rounded in readers.values()) == 2  # one a block
    for old, new in zip(find_regions(program.graph), find_regions(result.program.graph), strict=True):
        assert (new.inputs, new.outputs) == (old.inputs, old.outputs)


def test_ranges_are_those_of_the_whole_trajectory(tokens: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(tokens)
    result = quantize(tokens, calibration)
    sources = {str(rounding(node).args[0]) for node in quantised(result.program).values()}
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
        scale, zero_point = formats.affine_range(low, high)
        assert len(values) == 6
        assert after[f"ranges.{name}_scale"].item() == pytest.approx(scale, rel=1e-6)
        assert after[f"ranges.{name}_zero_point"].item() == zero_point
        growing += (float(values[0].min()), float(values[0].max())) != (low, high)
    assert growing  # the first step would not have done


@pytest.mark.parametrize(("options", "largest"), [({"symmetric": True}, 127.0), ({"format": "fp8"}, 448.0)])
def test_symmetric_ranges_reach_the_larger_end(
    tokens: Program, calibration_of: CalibrationOf, options: dict[str, Any], largest: float
) -> None:
    step, calibration = Quantize(**options), calibration_of(tokens)
    decision = step.decide(tokens, calibration)
    after = step.apply(tokens, decision).program
    for name, node in quantised(after).items():
        low, high = decision.choices["ranges"][name]
        scale, zero_point = rounding(node).args[1:3]
        assert zero_point is None
        assert rewrite.attribute(after.graph, path_of(scale)) == pytest.approx(max(-low, high) / largest, rel=1e-6)


def test_the_global_scale_of_nvfp4_is_that_of_the_trajectory(tokens: Program, calibration_of: CalibrationOf) -> None:
    step, calibration = Quantize(format="nvfp4", min_share=0.05), calibration_of(tokens)
    decision = step.decide(tokens, calibration)
    after = step.apply(tokens, decision).program
    for name, node in quantised(after).items():
        path = path_of(rounding(node).args[1])
        assert path == f"ranges.{rounding(node).args[0]}_global_scale"
        amax = max(map(abs, decision.choices["ranges"][name]))
        assert rewrite.attribute(after.graph, path) == pytest.approx(amax / (6 * 448), rel=1e-6)


def test_only_what_needs_ranges_watches_for_them(tokens: Program, calibration_of: CalibrationOf) -> None:
    doing: list[str] = []
    calibration = replace(calibration_of(tokens), progress=lambda fraction, text: doing.append(text))
    for kind, (options, _, _, _) in KINDS.items():
        doing.clear()
        choices = Quantize(**options).decide(tokens, calibration).choices
        watches = kind in ("int8", "int8 symmetric", "fp8", "nvfp4")
        assert ("quantize: ranges" in doing) == watches == bool(choices["ranges"])


@pytest.mark.parametrize(("symmetric", "format"), [(False, "uint8"), (True, "int8")])
def test_convolutions_of_a_unet_are_rounded_on_both_sides(
    unet: Program, calibration_of: CalibrationOf, symmetric: bool, format: str
) -> None:
    result = quantize(unet, calibration_of(unet), symmetric=symmetric)
    convolutions = {name: node for name, node in quantised(result.program).items() if name.startswith("conv2d")}
    assert len(convolutions) > 5
    after = rewrite.weights(result.program.graph)
    for name, node in convolutions.items():
        (output,) = node.users
        assert output.name == name
        assert rewrite.is_call(output, Ops.quantize_dequantize.default)
        scale, zero_point, *_ = output.args[1:]
        assert path_of(scale) == f"ranges.{name}_scale"
        assert after[path_of(scale)].dtype == torch.float32
        assert output.args[3] == rounding(node).args[3] == format
        assert (zero_point is None) == symmetric
    strides = {tuple((*node.args, [1, 1])[3]) for node in convolutions.values()}  # type: ignore[arg-type]
    assert strides == {(1, 1), (2, 2)}  # the downsampler too


# ---- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_by_hand(tokens: Program, calibration_of: CalibrationOf, kind: str) -> None:
    """x and weight rounded, then multiplied in float32."""
    options, format, operator, _ = KINDS[kind]
    calibration = calibration_of(tokens)
    step = Quantize(**options)
    decision = step.decide(tokens, calibration)
    result = step.apply(tokens, decision)
    name, path = "linear_2", "net.blocks.0.up.weight"
    seen: dict[str, torch.Tensor] = {}
    source = str(rewrite.node_named(tokens.graph, name).args[0])
    inside = {"tap": lambda s, n, v: seen.setdefault(n, v), "taps": [name, source]}
    run(result.program, calibration.conditions, calibration.seeds, **inside)  # type: ignore[arg-type]
    before = rewrite.weights(tokens.graph)
    x, weight = seen[source], before[path].detach()
    low, high = decision.choices["ranges"].get(name, (0.0, 0.0))
    rounded = by_hand(kind, x, low, high)
    assert torch.equal(rounded, x) == (operator is None)
    if format == "int4":
        packed, scale = formats.quantize_int4(weight, 16)
        stored = formats.dequantize(packed, scale, None, "int4", 1)
    elif format == "nvfp4":
        stored = formats.round_nvfp4(weight, formats.nvfp4_global_scale(float(weight.abs().max())))
    else:
        largest = 127.0 if format == "int8" else 448.0
        scale = (weight.abs().amax(1) / largest)[:, None]
        stored = (torch.round(weight / scale) if format == "int8" else formats.to_fp8(weight / scale).float()) * scale
    expected = torch.nn.functional.linear(rounded, stored, before["net.blocks.0.up.bias"])
    torch.testing.assert_close(seen[name], expected, rtol=1e-5, atol=1e-5)


def by_hand(kind: str, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The activations as a layer of this kind multiplies them."""
    amax = max(-low, high)
    if kind == "int8":
        scale, zero_point = formats.affine_range(low, high)
        return formats.round_uint8(x, torch.tensor(scale), torch.tensor(zero_point))
    if kind == "int8 symmetric":
        return torch.round(x / (amax / 127)).clamp(-128, 127) * (amax / 127)
    if kind == "int8 dynamic":
        scale, zero_point = formats.affine_range(float(x.min()), float(x.max()))
        return formats.round_uint8(x, torch.tensor(scale), torch.tensor(zero_point))
    if kind == "int8 by token":
        tokens = x.abs().amax(-1, keepdim=True) / 127
        return torch.round(x / tokens) * tokens
    if kind == "fp8":
        return formats.to_fp8(x / (amax / 448)).float() * (amax / 448)
    if kind == "nvfp4":
        return formats.round_nvfp4(x, torch.tensor(amax / (6 * 448)))
    return x


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
    scale, zero_point = formats.affine_range(*decision.choices["ranges"][name])
    weights = rewrite.weights(tokens.graph)
    integers, weight_scale = formats.quantize_int8(weights["net.blocks.2.down.weight"])
    rounded = formats.round_uint8(x, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.uint8))
    bias = weights["net.blocks.2.down.bias"].detach()
    found = torch.nn.functional.linear(rounded, integers * weight_scale[:, None], bias)
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < 0.02
    assert decision.choices["errors"][name] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("name", ["tokens", "dit", "unet"])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_stay_close_and_change(
    name: str, kind: str, request: pytest.FixtureRequest, calibration_of: CalibrationOf
) -> None:
    """A layer's error is 0.01 in int8, 0.03 in fp8, 0.1 in four bits; on the way to a sample they do not grow."""
    program: Program = request.getfixturevalue(name)
    calibration = calibration_of(program)
    error = calibration.error(quantize(program, calibration, **KINDS[kind][0]).program)
    bound = {"int8": 0.05, "fp8": 0.1, "nvfp4": 0.3, "int4": 0.2}[KINDS[kind][1]]
    assert 0 < error["relative_error"] < bound


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


def test_a_site_on_a_convolution_means_its_rounded_value(unet: Program, calibration_of: CalibrationOf) -> None:
    """Else an engine would have to give out what comes before the rounding, and could not fuse the two."""
    cached = CacheSteps(interval=2, warmup=2).apply(unet, Decision()).program
    values = {site.value for site in cached.plan.sites} & set(calls(unet, "conv2d"))
    assert values
    result = quantize(cached, calibration_of(unet))
    assert values <= set(quantised(result.program))
    for node in quantised(result.program).values():
        if node.target is CONV:
            assert len(node.users) == 1


# ---- left alone ---------------------------------------------------------------------------------------------------


def refused(result: PassResult) -> dict[str, str]:
    return dict(result.record.refused)


def test_layers_above_max_error(tokens: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(tokens)
    errors = quantize(tokens, calibration).record.details["largest_layer_error"]
    every = Quantize().decide(tokens, calibration).choices["errors"]
    limit = sorted(every.values())[2]
    result = quantize(tokens, calibration, max_error=limit)
    assert set(quantised(result.program)) == {name for name, error in every.items() if error <= limit}
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
    assert set(quantised(result.program)) == {f"linear_{i}" for i in range(2, 8)}
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
    assert calls(result.program, "quantize_dequantize_dynamic")
    assert not calls(result.program, "quantize_dequantize")
    convolutions = set(calls(unet, "conv2d"))
    assert not convolutions & set(quantised(result.program))
    whys = {why for name, why in refused(result).items() if name in convolutions}
    assert "a convolution takes int8 with static activations, and nothing else" in whys


@pytest.mark.parametrize(
    ("options", "whys"),
    [
        ({"format": "nvfp4"}, {"linear": "it reads 4 values, no multiple of 16, the block of nvfp4"}),
        (
            {"format": "int4"},
            {
                "linear": "it reads 4 values, no multiple of 64, the block of int4",
                "linear_2": "it reads 32 values, no multiple of 64, the block of int4; group=32 fits it",
            },
        ),
    ],
)
def test_layers_that_do_not_fit_the_block(
    tokens: Program, calibration_of: CalibrationOf, options: dict[str, Any], whys: dict[str, str]
) -> None:
    found = refused(quantize(tokens, calibration_of(tokens), min_share=0.0, **options))
    assert whys.items() <= found.items()


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
    assert set(quantised(result.program)) == {"linear"}
    shared = [
        name for name, why in refused(result).items() if why == "its weight is computed, or shared with another layer"
    ]
    assert shared == ["linear_2", "linear_3", "linear_4", "linear_5", "linear_6"]


def test_second_run_changes_nothing(dit: Program, calibration_of: CalibrationOf) -> None:
    once = quantize(dit, calibration_of(dit)).program
    again = quantize(once, calibration_of(dit))
    assert again.program is once
    assert again.record.changed == 0
    assert list(refused(again).values()).count("it is quantised already") == len(quantised(once))


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_error": 2.0}, "quantize: max_error is 2.0, needed 0 to 1"),
        ({"min_share": -0.1}, "quantize: min_share is -0.1, needed 0 to 1"),
        (
            {"format": "fp8", "activations": "dynamic"},
            "quantize: format fp8 has no dynamic activations; take activations=static, or activations=none, or "
            "format=int8",
        ),
        (
            {"format": "int4", "activations": "static"},
            "quantize: format int4 has no static activations; take activations=none, or format=int8",
        ),
        (
            {"format": "nvfp4", "activations": "static"},
            "quantize: format nvfp4 has no static activations; take activations=dynamic, or activations=none, or "
            "format=int8",
        ),
        ({"format": "fp8", "symmetric": False}, "quantize: symmetric=false means nothing with format fp8"),
        ({"activations": "none", "symmetric": False}, "quantize: symmetric=false means nothing with activations=none"),
        ({"format": "int4", "group": 48}, "quantize: group is 48, needed one of 16, 32, 64, 128, 256; take 32"),
        ({"group": 32}, "quantize: group is of format int4, int8 has none; leave group out"),
    ],
)
def test_options_that_mean_nothing_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Quantize(**options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("given", "preferred", "expected"),
    [
        ({}, {"symmetric": False}, ("static", False, 0.05)),
        ({}, {"symmetric": True}, ("static", True, 0.1)),
        ({"symmetric": False}, {"symmetric": True}, ("static", False, 0.05)),
        ({"activations": "dynamic"}, {"symmetric": True}, ("dynamic", True, 0.05)),
        ({"activations": "none"}, {"symmetric": False}, ("none", None, 0.05)),
        ({"format": "fp8"}, {"symmetric": False}, ("static", None, 0.1)),
        ({"format": "nvfp4"}, {"symmetric": False}, ("dynamic", None, 0.25)),
        ({"format": "int4", "max_error": 0.2}, {"symmetric": True}, ("none", None, 0.2)),
    ],
)
def test_what_is_left_open_is_what_suits_the_format_and_the_target(
    given: dict[str, Any], preferred: dict[str, Any], expected: tuple[object, ...]
) -> None:
    step = Quantize(**given).resolved(preferred)
    assert (step.activations, step.symmetric, step.max_error) == expected
    assert step.resolved({}) == step
