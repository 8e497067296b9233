"""Bundles of TensorRT engines, built here for GPUs that are elsewhere: real files, promises kept, numbers compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.errors import InternalError, RecipeError, UnsupportedError
from dcompile.compiler.program import Decision, Program
from dcompile.exporters.export import TOLERANCE
from dcompile.exporters.legality import PORTABLE
from dcompile.exporters.lower import lower
from dcompile.exporters.parity import Parity, check_parity
from dcompile.exporters.target import TargetOptions, Written
from dcompile.exporters.tensorrt import target
from dcompile.exporters.tensorrt.target import PROFILES, TARGET
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.mixture_of_experts import MixtureOfExperts
from dcompile.passes.quantize import Quantize
from dcompile.runtime.cuda import why_no_gpu
from dcompile.runtime.errors import EngineError
from dcompile.runtime.manifest import StateSpec
from dcompile.runtime.tensorrt_engine import read_facts

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
elsewhere = pytest.mark.skipif(why_no_gpu() is None, reason="a GPU is here: engines are opened, not their ONNX")

FP16 = TargetOptions(precision="fp16")


def write(program: Program, folder: Path, options: TargetOptions = FP16, layout: str = "variants") -> Written:
    (folder / "bundle").mkdir()
    return TARGET.write(lower(program, layout), folder / "bundle", options, lambda name: None)  # type: ignore[arg-type]


def parity(program: Program, written: Written, layout: str = "variants") -> tuple[Parity, ...]:
    """Raises InternalError where an engine is further from the program than its precision and rounding allow."""
    tolerance = TOLERANCE[written.open_precision]
    lowered = lower(program, layout)  # type: ignore[arg-type]
    return check_parity(program, lowered, written.open, lambda fraction: None, tolerance=tolerance)


@pytest.fixture(scope="module")
def quantised(tokens: Program) -> Callable[..., Program]:
    """The token network with every layer that bears it in a format."""
    from dcompile.compiler.calibrate import calibrate

    calibration: Calibration = calibrate(tokens, 2)

    def make(format: str, activations: str) -> Program:
        symmetric = True if format == "int8" and activations != "none" else None
        group = 16 if format == "int4" else 64
        step = Quantize(format, activations, symmetric, group, max_error=1.0, min_share=0.0)  # type: ignore[arg-type]
        return step.apply(tokens, step.decide(tokens, calibration)).program

    return make


# --- precision ---


@elsewhere
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_engines_of_a_cached_program(precision: str, cached: Program, tmp_path: Path) -> None:
    told: list[str] = []
    folder = tmp_path / "bundle"
    folder.mkdir()
    written = TARGET.write(lower(cached), folder, TargetOptions(precision=precision), told.append)
    assert told == ["full", "reuse"]
    assert written.files == {"full": "engines/full.engine", "reuse": "engines/reuse.engine"}
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        "full.engine", "full.json", "reuse.engine", "reuse.json"
    ]  # fmt: skip
    assert written.checked == (
        f"built for compute capability {', '.join(PORTABLE)}, not executed here; its ONNX source was evaluated by ONNX "
        "Runtime instead"
    )
    assert written.batch == (1, 16)
    assert any(kernel == f"gemm {precision}" for kernel in written.kernels["full"])
    assert ("net.blocks.0.up", "gemm", precision) in written.regions["full"]
    assert all(result.relative_error < TOLERANCE[precision] for result in parity(cached, written))


def test_what_lies_beside_an_engine_tells_how_to_run_it(cached: Program, tmp_path: Path) -> None:
    write(cached, tmp_path)
    facts = read_facts(tmp_path / "bundle/engines/full.engine")
    assert (facts.package, facts.precision, facts.compute_capabilities) == ("tensorrt_rtx", "fp16", PORTABLE)
    assert facts.profiles == PROFILES
    variant = lower(cached).engines["full"]
    assert list(facts.inputs) == list(variant.inputs)
    assert facts.inputs["sample"] == facts.outputs["next_sample"] == StateSpec((("batch", 1), 6, 4), "float32")
    assert facts.inputs["row"] == StateSpec((6,), "float32")


# --- formats ---


@elsewhere
@pytest.mark.parametrize(
    ("format", "activations", "kernel"),
    [
        ("int8", "static", "gemm int8"), ("int8", "dynamic", "gemm int8"), ("fp8", "static", "gemm fp8"),
        ("nvfp4", "dynamic", "gemm fp4"), ("int8", "none", "gemm fp16 x int8"), ("int4", "none", "gemm fp16 x int4"),
        ("nvfp4", "none", "gemm fp16"),
    ],
)  # fmt: skip
def test_every_format_is_built_as_promised_and_computes_the_program(
    format: str, activations: str, kernel: str, quantised: Callable[..., Program], tmp_path: Path
) -> None:
    program = quantised(format, activations)
    assert len(program.history) == 0 or program.history[-1].changed
    written = write(program, tmp_path)
    assert written.kernels["full"][kernel] >= 6
    capabilities = read_facts(tmp_path / "bundle/engines/full.engine").compute_capabilities
    expected = {"fp8": ("8.9", "12.0"), "nvfp4": ("12.0",)}.get(format, PORTABLE)
    assert capabilities == expected
    (result,) = parity(program, written)
    assert result.relative_error < result.tolerance


@elsewhere
@pytest.mark.parametrize("layout", ["variants", "segments"])
def test_the_card(layout: str, dit: Program, calibration_of: Callable[[Program], Calibration], tmp_path: Path) -> None:
    """A DiT, cached and in INT8: both layouts, every engine compared on every call of a trajectory."""
    cached = CacheSteps(interval=3, warmup=1).apply(dit, Decision()).program
    step = Quantize("int8", "static", symmetric=True, max_error=1.0, min_share=0.0)
    program = step.apply(cached, step.decide(cached, calibration_of(cached))).program
    written = write(program, tmp_path, layout=layout)
    products = [types for rows in written.regions.values() for _, kernel, types in rows if kernel == "gemm"]
    assert products.count("int8") > products.count("fp16") + products.count("fp32")
    assert any(kernel == "attention fp16" for kernels in written.kernels.values() for kernel in kernels)
    parity(program, written, layout)


def test_engines_share_the_weights_they_are_built_from(cached: Program, tmp_path: Path) -> None:
    """External data: every weight that is no handful of numbers lies in one file, once, and is gone afterwards."""
    written = write(cached, tmp_path)
    (source,) = [path for path in tmp_path.iterdir() if path.name != "bundle"]
    assert source.name.startswith(".bundle.onnx-")
    places = {}
    for name in ("full", "reuse"):
        model = onnx.load(source / f"{name}.onnx", load_external_data=False)
        entries = [{entry.key: entry.value for entry in each.external_data} for each in model.graph.initializer]
        places[name] = {(entry["location"], entry["offset"]) for entry in entries if entry}
    assert len(places["full"]) == 6  # two of each block
    assert places["reuse"] < places["full"]
    del written
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


# --- profiles and GPUs ---


@elsewhere
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_experts(
    precision: str, dit: Program, calibration_of: Callable[[Program], Calibration], tmp_path: Path
) -> None:
    step = MixtureOfExperts(experts=4, active=1)
    program = step.apply(dit, step.decide(dit, calibration_of(dit))).program
    written = write(program, tmp_path, TargetOptions(precision=precision))
    assert any(kernel == f"gemm {precision}" for kernel in written.kernels["full"])
    found = parity(program, written)  # in fp16 other tokens may be chosen where two score alike
    assert precision == "fp16" or all(result.relative_error < 1e-5 for result in found)


def test_named_profiles(tokens: Program, tmp_path: Path) -> None:
    options = replace(FP16, profiles={"one": (1, 1, 1), "some": (2, 4, 8)}, compute_capabilities=("8.9",))
    written = write(tokens, tmp_path, options)
    assert written.batch == (1, 8)
    assert {kernel.split(":")[0] for kernel in written.kernels["full"]} == {"one", "some"}
    facts = json.loads((tmp_path / "bundle/engines/full.json").read_text())
    assert facts["profiles"] == {"one": [1, 1, 1], "some": [2, 4, 8]}
    assert facts["compute_capabilities"] == ["8.9"]


@pytest.mark.parametrize(
    ("capabilities", "message"),
    [(("8.0", "8.9"), "8.0: such GPUs do not compute in fp8"), (("9.0",), "9.0: TensorRT builds for 7.5, 8.0")],
)
def test_gpus_that_cannot_are_refused_before_any_work(
    capabilities: tuple[str, ...], message: str, quantised: Callable[..., Program], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        write(quantised("fp8", "static"), tmp_path, replace(FP16, compute_capabilities=capabilities))
    assert list((tmp_path / "bundle").iterdir()) == []


# --- what goes wrong ---


def test_an_operator_that_it_does_not_take_is_named_with_its_region(tokens: Program, tmp_path: Path) -> None:
    """ONNX has a determinant, TensorRT has none."""
    graph = rewrite.clone(tokens.graph)
    product = next(node for node in graph.graph.nodes if rewrite.is_call(node, torch.ops.aten.linear.default))
    after = product.next
    square = rewrite.call(graph, after, torch.ops.aten.slice.Tensor, product, 2, 0, 6, like=product)
    number = rewrite.call(graph, after, torch.ops.aten.det.default, square, like=product)
    shaped = rewrite.call(graph, after, torch.ops.aten.reshape.default, number, [-1, 1, 1], like=product)
    total = rewrite.call(graph, after, torch.ops.aten.add.Tensor, product, shaped, like=product)
    product.replace_all_uses_with(total, delete_user_cb=lambda user: user not in (square, total))
    message = (
        r"engine 'full': TensorRT for RTX does not take operator Det of net\.enter; rewrite that part of the model"
    )
    with pytest.raises(UnsupportedError, match=message):
        write(tokens.with_graph(rewrite.finish(graph)), tmp_path, replace(FP16, precision="fp32"))


def test_a_layer_that_falls_back_fails_the_build(
    quantised: Callable[..., Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form of other targets, whose scale for the weights TensorRT refuses beside constants of another type."""
    from dcompile.exporters.tensorrt.layers import Promise

    promised = Promise("net.blocks.1.up/linear_3", "fp4", "fp4")
    monkeypatch.setattr(target, "promises", lambda model: (promised,) * 8)
    program = quantised("int8", "static")
    monkeypatch.setattr(target, "count_quantised", lambda graph: 8)
    with pytest.raises(EngineError, match=r"engine 'full': net\.blocks\.1\.up is promised in fp4, TensorRT compiled"):
        write(program, tmp_path)


def test_a_quantised_layer_that_the_onnx_lost_is_a_bug_of_ours(
    quantised: Callable[..., Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "promises", lambda model: ())
    with pytest.raises(InternalError, match=r"engine 'full': \d+ layers are quantised, its ONNX has 0; please report"):
        write(quantised("int8", "static"), tmp_path)


@elsewhere
def test_a_wrong_engine_is_found(tokens: Program, tmp_path: Path) -> None:
    """Parity is no formality: other weights than the program's are told apart."""
    graph = rewrite.clone(tokens.graph)
    weight = rewrite.attribute(graph, "net.blocks.1.up.weight")
    rewrite.assign(graph, "net.blocks.1.up.weight", -weight)
    written = write(tokens.with_graph(graph), tmp_path)
    with pytest.raises(InternalError, match=r"engine 'full' is .* from the program"):
        parity(tokens, written)


def test_the_target_says_what_it_is() -> None:
    assert (TARGET.name, TARGET.extra, TARGET.packages) == ("trt", "trt", ("tensorrt_rtx", "tensorrt"))
    assert TARGET.precisions() == ("fp16", "bf16", "fp32")
    assert TARGET.quantize == {"symmetric": True}
    assert why_no_gpu() in (None, TARGET.cannot_run())
    assert np.array(PROFILES["batch"]).tolist() == sorted(PROFILES["batch"])
