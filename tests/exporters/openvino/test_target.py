"""Engines for OpenVINO: exact in fp32, in few bits where that is promised, over one weights file."""

from __future__ import annotations

import dataclasses
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.program import Decision, Program
from dcompile.compiler.step_graph import flatten
from dcompile.compiler.variants import Variant
from dcompile.exporters.lower import Lowered, lower
from dcompile.exporters.parity import Parity, check_parity
from dcompile.exporters.target import TargetOptions, Written
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.mixture_of_experts import MixtureOfExperts
from dcompile.passes.quantize import Quantize
from dcompile.quant import formats
from dcompile.runtime.errors import EngineError
from dcompile.runtime.openvino_engine import PRECISION_INFO, WEIGHTS_FILE, OpenVinoEngine

ov = pytest.importorskip("openvino", reason="needs openvino: pip install 'dcompile[openvino]'")

from dcompile.exporters.openvino import running, target  # noqa: E402  # it needs the package above
from dcompile.exporters.openvino.weights import ALIGNMENT  # noqa: E402

Calibrate = Callable[[Program], Calibration]
Ops = torch.ops.dcompile
FP32 = TargetOptions("fp32", threads=1)


def write(lowered: Lowered, folder: Path, options: TargetOptions = FP32) -> Written:
    return target.write(lowered, folder, options, lambda name: None)


def parity(program: Program, lowered: Lowered, written: Written) -> tuple[Parity, ...]:
    """Raises InternalError where an engine is too far from the program."""
    return check_parity(program, lowered, written.open, lambda fraction: None)


def quantised(program: Program, calibration: Calibration, **options: object) -> Program:
    step = Quantize(max_error=1.0, min_share=0.0, **options)  # type: ignore[arg-type]
    result = step.apply(program, step.decide(program, calibration))
    assert result.record.changed >= 20  # the layers of the blocks
    return result.program


# --- whole programs ---


@pytest.mark.parametrize("name", ["dit", "unet", "tokens"])
def test_fp32_engines_compute_what_the_program_does(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    program: Program = request.getfixturevalue(name)
    lowered = lower(program)
    written = write(lowered, tmp_path)
    assert written.files == {"full": "engines/full.xml"}
    assert all(result.relative_error < 1e-5 for result in parity(program, lowered, written))
    assert _layers_in_int8(written) == 0
    graph = lowered.engines["full"].graph
    for batch in (1, 3):
        inputs = _random_inputs(graph, batch)
        found = written.open["full"]().run({port: value.numpy() for port, value in inputs.items()})
        expected = graph(*inputs.values())[0].detach().numpy()
        np.testing.assert_allclose(found["next_sample"], expected, rtol=1e-4, atol=1e-4)  # another order of sums


def _layers_in_int8(written: Written) -> int:
    kinds = ("FullyConnected", "Convolution")
    kernels = written.kernels["full"].items()
    return sum(n for kernel, n in kernels if kernel.startswith(kinds) and kernel.lower().endswith("_i8"))


def _random_inputs(graph: fx.GraphModule, batch: int) -> dict[str, Tensor]:
    found = {}
    for port, node in rewrite.placeholders(graph).items():
        example = rewrite.tensor_of(node)
        assert example is not None
        shape = [size if isinstance(size, int) else batch for size in example.shape]
        found[port] = torch.randn(shape) if example.is_floating_point() else torch.ones(shape, dtype=example.dtype)
    return found


@pytest.mark.parametrize("layout", ["variants", "segments"])
def test_engines_of_a_cached_program_keep_its_states(layout: str, cached: Program, tmp_path: Path) -> None:
    lowered = lower(cached, layout)  # type: ignore[arg-type]
    assert len(lowered.engines) > 1
    assert all(result.relative_error < 1e-5 for result in parity(cached, lowered, write(lowered, tmp_path)))


def test_a_value_may_be_a_state_and_what_the_next_engine_takes(dit: Program, tmp_path: Path) -> None:
    program = CacheSteps(method="disca", interval=3, warmup=1).apply(dit, Decision()).program
    lowered = lower(program, "segments")
    twice = [e for e in lowered.engines.values() if len(set(rewrite.output_values(e.graph))) < len(e.outputs)]
    assert twice
    assert all(result.relative_error < 1e-5 for result in parity(program, lowered, write(lowered, tmp_path)))


def test_experts(dit: Program, calibration_of: Calibrate, tmp_path: Path) -> None:
    step = MixtureOfExperts(experts=4, active=1)
    program = step.apply(dit, step.decide(dit, calibration_of(dit))).program
    lowered = lower(program)
    assert all(result.relative_error < 1e-5 for result in parity(program, lowered, write(lowered, tmp_path)))


def test_steps_in_one_batch(unet: Program, tmp_path: Path) -> None:
    program = CacheSteps(method="faster_diffusion", interval=3, span=2).apply(unet, Decision()).program
    lowered = lower(program)
    assert list(lowered.engines) == ["full", "ahead2", "update2"]
    assert all(result.relative_error < 1e-5 for result in parity(program, lowered, write(lowered, tmp_path)))


@pytest.mark.parametrize(("name", "symmetric"), [("unet", False), ("dit", False), ("dit", True)])
def test_int8_layers_run_in_int8(
    name: str, symmetric: bool, calibration_of: Calibrate, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    program: Program = request.getfixturevalue(name)
    small = quantised(program, calibration_of(program), format="int8", symmetric=symmetric)
    lowered = lower(small)
    written = write(lowered, tmp_path)  # which raises for a layer in fp32
    promised = list(running.promises(lowered.engines["full"].graph))
    assert all(promise.in_integers for promise in promised)
    assert _layers_in_int8(written) >= len(promised)
    assert {path for path, _, _ in written.regions["full"]} == {promise.path for promise in promised}
    parity(small, lowered, written)


@pytest.mark.parametrize("options", [{"format": "int4", "group": 32}, {"format": "nvfp4"}], ids=lambda o: o["format"])
def test_weights_alone_in_few_bits_are_exact(
    options: Mapping[str, object], dit: Program, calibration_of: Calibrate, tmp_path: Path
) -> None:
    small = quantised(dit, calibration_of(dit), activations="none", **options)
    lowered = lower(small)
    written = write(lowered, tmp_path)
    assert all(result.relative_error < 1e-5 for result in parity(small, lowered, written))
    stored = {"int4": "i4", "nvfp4": "f4e2m1"}[str(options["format"])]
    assert {precision for _, _, precision in written.regions["full"]} == {stored}
    full = sum(value.nbytes for value in rewrite.weights(lower(dit).engines["full"].graph).values())
    assert (tmp_path / "engines" / WEIGHTS_FILE).stat().st_size < 0.7 * full  # embeddings stay as they are


def test_bf16_engines_say_so_and_states_are_no_worse(cached: Program, tmp_path: Path) -> None:
    lowered = lower(cached)
    written = write(lowered, tmp_path, TargetOptions("bf16", threads=1))
    # The identities that round states in bf16 change nothing in fp32.
    assert all(result.relative_error < 1e-5 for result in parity(cached, lowered, written))
    full = lowered.engines["full"]
    inputs = _random_inputs(full.graph, 2)
    found = OpenVinoEngine(tmp_path / written.files["full"]).run({n: v.numpy() for n, v in inputs.items()})
    for slot, expected in zip(full.outputs, full.graph(*inputs.values()), strict=True):
        difference = np.linalg.norm(found[f"next_{slot}"] - expected.detach().numpy())
        assert difference < 0.02 * np.linalg.norm(expected.detach().numpy())  # a few roundings of 2^-9
    assert 'precision value="bf16"' in (tmp_path / written.files["full"]).read_text()


# --- files ---


def _constants(path: Path) -> list[tuple[int, int]]:
    """(offset, size) of every constant of an .xml."""
    places = [data.attrib for data in ElementTree.parse(path).iter("data") if "offset" in data.attrib]
    return [(int(place["offset"]), int(place["size"])) for place in places]


@pytest.fixture(scope="session")
def engines(lowered: Lowered, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the engines of `lowered` in fp32; tests that write to it take a copy."""
    folder = tmp_path_factory.mktemp("openvino")
    assert write(lowered, folder).files == {"full": "engines/full.xml", "reuse": "engines/reuse.xml"}
    return folder / "engines"


def test_engines_share_one_copy_of_each_weight(lowered: Lowered, engines: Path) -> None:
    full, reuse = (set(_constants(engines / f"{name}.xml")) for name in ("full", "reuse"))
    weights = rewrite.weights(lowered.engines["reuse"].graph)
    assert sum(size for _, size in full & reuse) >= sum(value.nbytes for value in weights.values())
    assert sum(size for _, size in full - reuse) > 2 * 64 * 32 * 4  # what a step does not compute, it does not read
    end = 0
    for offset, size in sorted(full | reuse):
        assert offset == -(-end // ALIGNMENT) * ALIGNMENT  # no gap, no copy
        end = offset + size
    assert (engines / WEIGHTS_FILE).stat().st_size == end
    assert sorted(path.name for path in engines.iterdir()) == ["full.xml", "reuse.xml", WEIGHTS_FILE]


def test_the_weights_file_holds_the_weights(lowered: Lowered, engines: Path) -> None:
    content = (engines / WEIGHTS_FILE).read_bytes()
    for value in rewrite.weights(lowered.engines["full"].graph).values():
        assert value.detach().numpy().tobytes() in content


def test_engines_tell_nothing_of_the_machine_that_made_them(engines: Path) -> None:
    text = (engines / "full.xml").read_text()
    assert ".py" not in text
    assert str(Path.cwd()) not in text
    assert str(engines) not in text


def test_plain_openvino_reads_an_engine(lowered: Lowered, engines: Path) -> None:
    model = ov.Core().read_model(engines / "full.xml", engines / WEIGHTS_FILE)
    assert [each.any_name for each in model.inputs] == list(lowered.engines["full"].inputs)
    assert model.get_rt_info(list(PRECISION_INFO)).astype(str) == "fp32"


# --- layers ---


class Layers(nn.Module):
    """Linear layers and convolutions over one rounded tensor, whose zero point is far from the middle."""

    def __init__(self) -> None:
        super().__init__()
        scale, zero_point = formats.affine_range(-1.0, 5.0)
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero", torch.tensor(zero_point, dtype=torch.uint8))
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"a": (48, 32), "b": (24, 32), "c": (16, 8, 3, 3)}.items():
            q, scales = formats.quantize_int8(torch.randn(shape, generator=generator) / 8)
            module = nn.Module()
            module.register_buffer("weight", q)
            module.register_buffer("scale", scales)
            module.register_buffer("bias", torch.randn(shape[0], generator=generator))
            self.add_module(name, module)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rounded = Ops.quantize_dequantize(x, self.scale, self.zero, "uint8")  # [B, 8, 6, 32]
        return (
            nn.functional.linear(rounded, self.weight("a"), self.get_buffer("a.bias")),
            nn.functional.linear(rounded, self.weight("b")),
            nn.functional.conv2d(rounded, self.weight("c"), self.get_buffer("c.bias"), padding=1),
            rounded * 2,
        )

    def weight(self, name: str) -> Tensor:
        q, scale = (self.get_buffer(f"{name}.{part}") for part in ("weight", "scale"))
        value: Tensor = Ops.dequantize(q, scale, None, "int8", 0)
        return value


def _variant(network: nn.Module, x: Tensor, outputs: int) -> Variant:
    batch = torch.export.Dim("batch", min=1, max=64)
    graph = flatten(torch.export.export(network, (x,), dynamic_shapes=({0: batch},)).module(), ["x"])
    return Variant(graph, {"x": ("slot", "x")}, tuple(f"y{index}" for index in range(outputs)))


def _alone(variant: Variant) -> Lowered:
    return Lowered({"full": variant}, (), {}, {})


def test_a_zero_point_goes_into_biases_but_not_into_padding(tmp_path: Path) -> None:
    x = torch.rand(2, 8, 6, 32) * 6 - 1
    network = Layers()
    written = write(_alone(_variant(network, x, 4)), tmp_path)
    found = written.open["full"]().run({"x": x.numpy()})
    for index, expected in enumerate(network(x)):
        np.testing.assert_allclose(found[f"next_y{index}"], expected.numpy(), rtol=1e-4, atol=2e-4)
    assert _layers_in_int8(written) == 3
    layers = running.running_layers(tmp_path / "engines/full.xml", _variant(network, x, 4).graph)
    subtractions = [name for layer in layers for name in layer.made_from if "DequantizationSubtract" in name]
    assert not any(name.startswith(("a/", "b/")) for name in subtractions)


class Stored(nn.Module):
    """One linear layer over a weight in few bits."""

    def __init__(self, format: str, rows: int, columns: int, group: int) -> None:
        super().__init__()
        self.format = format
        real = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5
        global_scale = None
        if format == "nvfp4":
            q, scale, global_scale = formats.quantize_nvfp4(real)
        else:
            q, scale = formats.quantize_int8(real) if format == "int8" else formats.quantize_int4(real, group)
        self.layer = nn.Module()
        for name, value in (("weight", q), ("scale", scale), ("global_scale", global_scale)):
            self.layer.register_buffer(name, value)

    def stored(self) -> tuple[Any, ...]:
        parts = (getattr(self.layer, name) for name in ("weight", "scale", "global_scale"))
        return (*parts, self.format, 0 if self.format == "int8" else 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, Ops.dequantize(*self.stored()))


@pytest.mark.parametrize(
    ("format", "shape", "group"),
    [
        ("int8", (48, 32), 0),
        ("int4", (48, 32), 32),  # a single group
        ("int4", (640, 256), 64),
        ("int4", (640, 256), 128),
        ("nvfp4", (48, 16), 16),
        ("nvfp4", (640, 256), 16),
    ],
)
def test_a_stored_weight_is_the_oracles(format: str, shape: tuple[int, int], group: int, tmp_path: Path) -> None:
    network = Stored(format, *shape, group)
    x = torch.randn(3, 5, shape[1])
    written = write(_alone(_variant(network, x, 1)), tmp_path)
    expected = x.double() @ formats.dequantize(*network.stored()).double().T
    found = written.open["full"]().run({"x": x.numpy()})["next_y0"]
    assert np.linalg.norm(found - expected.numpy()) < 1e-6 * np.linalg.norm(expected.numpy())
    assert written.regions["full"][0][2] in ("i8", "i4", "f4e2m1")


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e4)
        plain = nn.functional.scaled_dot_product_attention(x, x, x)
        scaled = nn.functional.scaled_dot_product_attention(x, x, x, scale=0.5)
        causal = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return plain + 2 * scaled + 4 * causal + 8 * nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def test_every_kind_of_attention(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 6, 8)
    found = write(_alone(_variant(Masked(), x, 1)), tmp_path).open["full"]().run({"x": x.numpy()})["next_y0"]
    np.testing.assert_allclose(found, Masked()(x).numpy(), rtol=1e-5, atol=1e-5)


# --- refusals ---


def test_a_layer_that_would_run_in_fp32_is_not_passed_over(
    dit: Program, calibration_of: Calibrate, tmp_path: Path
) -> None:
    graph = lower(quantised(dit, calibration_of(dit), format="int8")).engines["full"].graph
    path = "net.transformer_blocks.1.ff.net.2"
    in_int8 = [
        running.RunningLayer("FullyConnected", "brgemm_I8", "u8", (f"{promise.path}/bias",))
        for promise in running.promises(graph)
    ]
    running.check_promises("full", graph, in_int8)
    in_fp32 = [
        dataclasses.replace(layer, primitive="gemm_f32") if path in layer.made_from[0] else layer for layer in in_int8
    ]
    with pytest.raises(EngineError, match=rf"engine 'full': layer '{path}' should run int8 times integers, found Fu"):
        running.check_promises("full", graph, in_fp32)
    with pytest.raises(EngineError, match=r"\(and \d+ more\) should run .*, found nothing: OpenVINO would"):
        running.check_promises("full", graph, [])


class Rounded(nn.Module):
    def __init__(self, dynamic: bool) -> None:
        super().__init__()
        self.dynamic = dynamic
        self.register_buffer("scale", torch.tensor(0.01))

    def forward(self, x: Tensor) -> Tensor:
        rounded = Ops.quantize_dequantize_dynamic(x, "int8") if self.dynamic else None
        value: Tensor = Ops.quantize_dequantize(x, self.scale, None, "fp8") if rounded is None else rounded
        return value * 2


@pytest.mark.parametrize(("dynamic", "what"), [(True, "activations with ranges of their own"), (False, "fp8")])
def test_formats_that_would_run_in_fp32_are_refused(dynamic: bool, what: str, tmp_path: Path) -> None:
    variant = _variant(Rounded(dynamic), torch.randn(2, 4), 1)
    with pytest.raises(EngineError, match=rf"^OpenVINO does not multiply {what} \('mul'\): take format=int8"):
        write(_alone(variant), tmp_path)


@torch.library.custom_op("test_openvino::odd", mutates_args=())
def odd(x: Tensor) -> Tensor:
    return x + 1


@odd.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = odd(x) * 2
        return value


def test_an_operator_that_openvino_lacks_is_named(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(4, 4), Odd())
    with pytest.raises(
        EngineError, match=r"^OpenVINO has no operator for test_openvino\.odd\.default in 1: take another --target"
    ):
        write(_alone(_variant(network, torch.randn(2, 4), 1)), tmp_path)


def test_a_damaged_weights_file_is_refused(engines: Path, tmp_path: Path) -> None:
    shutil.copytree(engines, tmp_path, dirs_exist_ok=True)
    (tmp_path / WEIGHTS_FILE).write_bytes((engines / WEIGHTS_FILE).read_bytes()[:-100])
    with pytest.raises(EngineError, match=r"full\.xml: OpenVINO [\d.]+ does not load it: Incorrect weights"):
        OpenVinoEngine(tmp_path / "full.xml")


def test_the_target_is_complete() -> None:
    assert target.TARGET.name == "openvino"
    assert target.TARGET.shares_weights
    assert set(target.TARGET.precisions()) <= {"bf16", "fp32"}
    assert target.TARGET.cannot_run() is None
