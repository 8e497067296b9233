"""Engines as AOTInductor packages: what they compute, what runs inside, and one copy of the weights."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, fx, nn

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.execute import batch_factor
from dcompile.compiler.program import Decision, Program
from dcompile.compiler.step_graph import flatten
from dcompile.compiler.variants import Variant
from dcompile.exporters.aoti import package as aoti_package
from dcompile.exporters.aoti import target as aoti
from dcompile.exporters.aoti.forms import to_cpu_forms, to_gpu_forms
from dcompile.exporters.lower import Lowered, lower
from dcompile.exporters.precision import to_precision
from dcompile.exporters.target import TargetOptions, Written
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.mixture_of_experts import MixtureOfExperts
from dcompile.quant import formats
from dcompile.runtime.aoti_engine import AotiEngine, read_metadata
from dcompile.runtime.errors import EngineError

Ops = torch.ops.dcompile


# --- a whole program: two variants over the same weights ---


@pytest.fixture(scope="module")
def lowered(dit: Program) -> Lowered:
    """Steps that compute the last two blocks, and steps that extrapolate them."""
    return lower(CacheSteps(interval=3, warmup=1).apply(dit, Decision()).program, "variants")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("aoti")


@pytest.fixture(scope="module")
def written(lowered: Lowered, folder: Path) -> Written:
    told: list[str] = []
    made = aoti.write(lowered, folder, TargetOptions("fp32", threads=1), told.append)
    assert told == ["full", "reuse"]
    assert dict(made.files) == {"full": "engines/full.pt2", "reuse": "engines/reuse.pt2"}
    return made


def arguments_of(graph: fx.GraphModule, batch: int) -> dict[str, Tensor]:
    found = {}
    for name, node in rewrite.placeholders(graph).items():
        example = rewrite.tensor_of(node)
        assert example is not None
        shape = [size if isinstance(size, int) else batch_factor(size) * batch for size in example.shape]
        is_real = example.dtype.is_floating_point
        found[name] = torch.randn(shape) if is_real else torch.randint(0, 10, shape, dtype=example.dtype)
    return found


def errors_of(written: Written, lowered: Lowered, batch: int) -> dict[str, float]:
    """Engine and output -> relative error against the graph."""
    found = {}
    for name, variant in lowered.engines.items():
        arguments = arguments_of(variant.graph, batch)
        outputs = written.open[name]().run({port: value.numpy() for port, value in arguments.items()})
        with torch.no_grad():
            expected = variant.graph(*arguments.values())
        assert list(outputs) == [f"next_{slot}" for slot in variant.outputs]
        for (port, value), real in zip(outputs.items(), expected, strict=True):
            assert value.dtype == np.float32
            found[f"{name}.{port}"] = float(np.linalg.norm(value - real.numpy()) / np.linalg.norm(real.numpy()))
    return found


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_any_batch_gives_what_the_graph_gives(batch: int, written: Written, lowered: Lowered) -> None:
    assert written.open_precision == "fp32"
    assert max(errors_of(written, lowered, batch).values()) < 1e-5  # sums are taken in another order


def test_experts(dit: Program, calibration_of: Callable[[Program], Calibration], tmp_path: Path) -> None:
    step = MixtureOfExperts(experts=4, active=1)
    lowered = lower(step.apply(dit, step.decide(dit, calibration_of(dit))).program)
    written = aoti.write(lowered, tmp_path, TargetOptions("fp32", threads=1), lambda name: None)
    assert max(errors_of(written, lowered, 3).values()) < 1e-5
    assert written.kernels["full"]["add_tokens, as plain operators"] == 3


def test_each_weight_is_in_one_file_once(written: Written, lowered: Lowered, folder: Path) -> None:
    assert written.files
    with safe_open(folder / aoti.WEIGHTS_FILE, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = {value.numpy().tobytes() for value in stored.values()}
    assert len(content) == len(stored)
    for variant in lowered.engines.values():
        for name, value in rewrite.weights(variant.graph).items():
            assert value.detach().numpy().tobytes() in content, name
    assert torch.equal(stored["net.proj_out_2.weight"], rewrite.weights(variant.graph)["net.proj_out_2.weight"])


def test_engines_of_a_bundle_hold_one_copy(written: Written) -> None:
    full, reuse = (written.open[name]() for name in ("full", "reuse"))
    assert isinstance(full, AotiEngine)
    assert isinstance(reuse, AotiEngine)
    constants = [set(engine._loader.get_constant_fqns()) for engine in (full, reuse)]
    assert constants[1] < constants[0]  # what a step does not compute, it does not read
    assert full._weights is reuse._weights
    assert len(full._weights._tensors) <= len(constants[0])


def test_a_package_holds_neither_sources_nor_weights(written: Written, lowered: Lowered, folder: Path) -> None:
    for name, file in written.files.items():
        with zipfile.ZipFile(folder / file) as archive:
            names = archive.namelist()
            content = b"".join(archive.read(each) for each in names)
        assert not [each for each in names if each.endswith((".cpp", ".py"))]
        assert b"step_graph.py" not in content  # where each operator came from
        for weight, value in rewrite.weights(lowered.engines[name].graph).items():
            raw = value.detach().numpy().tobytes()
            assert len(raw) < 64 or raw not in content, weight


def test_kernels_are_those_of_the_generated_code(written: Written) -> None:
    full, reuse = written.kernels["full"], written.kernels["reuse"]
    assert full["flash attention"] == 3
    assert reuse["flash attention"] == 1
    assert full["addmm"] > reuse["addmm"] > 6
    assert full["fused by inductor"] > 0
    assert not [name for name in full if "plain operators" in name]


# --- number formats ---


class Stored(nn.Module):
    """Holds weights as the quantise pass writes them: `stored("a", "int8")` is a node of them."""

    def __init__(self, **shapes: tuple[str, tuple[int, ...]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.formats = {name: number_format for name, (number_format, _) in shapes.items()}
        for name, (number_format, shape) in shapes.items():
            real = torch.randn(shape, generator=generator) / np.prod(shape[1:]) ** 0.5
            q, scale, *more = {
                "int8": formats.quantize_int8,
                "fp8": formats.quantize_fp8,
                "int4": lambda value: formats.quantize_int4(value, 16),
                "nvfp4": formats.quantize_nvfp4,
            }[number_format](real)
            self.register_buffer(name, q)
            self.register_buffer(f"{name}_scale", scale)
            setattr(self, f"{name}_global", nn.Buffer(more[0]) if more else None)
            self.register_buffer(f"{name}_bias", 0.1 * torch.randn(shape[0], generator=generator))
        scale_value, zero = formats.affine_range(-3.0, 4.0)
        self.register_buffer("scale", torch.tensor(scale_value))
        self.register_buffer("zero", torch.tensor(zero, dtype=torch.uint8))
        self.register_buffer("symmetric", torch.tensor(formats.symmetric_range(-3.0, 4.0)))
        self.register_buffer("fp8_scale", torch.tensor(4 / 448))
        self.register_buffer("global_scale", formats.nvfp4_global_scale(4.0))

    def stored(self, name: str) -> Tensor:
        axis = 1 if self.formats[name] in ("int4", "nvfp4") else 0
        parts = (getattr(self, f"{name}{end}") for end in ("", "_scale", "_global"))
        return Ops.dequantize(*parts, self.formats[name], axis)  # type: ignore[no-any-return]

    def linear(self, x: Tensor, name: str, bias: bool = True) -> Tensor:
        return nn.functional.linear(x, self.stored(name), getattr(self, f"{name}_bias") if bias else None)

    def conv(self, x: Tensor, name: str, bias: bool = True, **geometry: Any) -> Tensor:
        return nn.functional.conv2d(x, self.stored(name), getattr(self, f"{name}_bias") if bias else None, **geometry)

    def affine(self, x: Tensor) -> Tensor:
        return Ops.quantize_dequantize(x, self.scale, self.zero, "uint8")  # type: ignore[no-any-return]

    def signed(self, x: Tensor) -> Tensor:
        return Ops.quantize_dequantize(x, self.symmetric, None, "int8")  # type: ignore[no-any-return]


def int8(*shapes: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: ("int8", shape) for name, shape in zip("abcdefg", shapes, strict=False)}


class Linear(Stored):
    """Three layers on one rounded tensor, an activation between two, a residual beside a rounding, then no tokens."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rounded = self.affine(x)
        q, k, v = self.linear(rounded, "a"), self.linear(rounded, "b", bias=False), self.linear(rounded, "c")
        hidden = self.linear(self.signed(nn.functional.gelu(q * k, approximate="tanh") + v), "d")
        wide = nn.functional.gelu(self.linear(self.signed(hidden), "e"), approximate="tanh")
        back = self.linear(self.signed(wide), "f") + hidden
        return back, self.linear(self.affine(back.mean(dim=1)), "g")


class Dynamic(Stored):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        by_token = Ops.quantize_dequantize_dynamic(x, "int8")
        y = self.linear(by_token, "a") + self.linear(by_token, "b", bias=False)
        y = self.linear(Ops.quantize_dequantize_dynamic(y, "uint8"), "c")
        return y, self.linear(Ops.quantize_dequantize_dynamic(y.mean(dim=1), "int8"), "d", bias=False)


class Conv(Stored):
    """Padded, strided, dilated, grouped, one by one; a rounded result that a plain operator reads as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        image = x.reshape(x.shape[0], 4, 8, 6)
        y = self.affine(self.conv(self.affine(image), "a", padding=1))
        z = self.signed(nn.functional.silu(self.conv(y, "b", bias=False, padding=2, dilation=2)))
        z = self.signed(nn.functional.gelu(self.conv(z, "c", stride=2, padding=1))) + y[..., ::2, ::2]
        return z, self.signed(self.conv(self.signed(z), "d", groups=2))


class Emulated(Stored):
    """Formats that no kernel of the CPU computes in: rounded as the program says, multiplied in float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        fp8 = Ops.quantize_dequantize(x, self.fp8_scale, None, "fp8")
        nvfp4 = Ops.quantize_dequantize_nvfp4(x, self.global_scale)
        return (*(self.linear(x, name) for name in "abcd"), self.linear(fp8, "b"), self.linear(nvfp4, "d"))


INTEGER = {
    "linear": Linear(**int8((32, 32), (32, 32), (32, 32), (32, 32), (64, 32), (32, 64), (8, 32))),
    "dynamic": Dynamic(**int8((48, 32), (48, 32), (32, 48), (8, 32))),
    "conv": Conv(**int8((8, 4, 3, 3), (8, 8, 3, 3), (8, 8, 3, 3), (6, 4, 1, 1))),
}
KINDS = ("int8", "fp8", "int4", "nvfp4")
ALL = {**INTEGER, "emulated": Emulated(**{name: (kind, (48, 32)) for name, kind in zip("abcd", KINDS, strict=True)})}


class Together(nn.Module):
    """All of them side by side: one compilation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict(ALL)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(y for module in self.net.values() for y in module(x))


def graph_of(network: nn.Module, x: Tensor) -> fx.GraphModule:
    batch = torch.export.Dim("batch", min=1, max=64)
    return flatten(torch.export.export(network, (x,), dynamic_shapes=({0: batch},)).module(), ["x"])


@pytest.fixture(scope="module")
def example() -> Tensor:
    return torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1)).clamp(-3, 4)


def test_every_number_format_computes_what_the_program_computes(example: Tensor, tmp_path: Path) -> None:
    network = Together()
    graph = graph_of(network, example)
    slots = tuple(f"y{index}" for index in range(len(network(example))))
    lowered = Lowered({"all": Variant(graph, {"x": ("slot", "sample")}, slots)}, (), {}, {})
    written = aoti.write(lowered, tmp_path, TargetOptions("fp32", threads=1), lambda name: None)
    kernels = written.kernels["all"]
    assert kernels["oneDNN linear int8"] == 7 + 4
    assert kernels["oneDNN convolution int8"] == 4
    assert kernels["addmm"] == 6  # of the emulated ones
    plain = {name.removesuffix(", as plain operators"): n for name, n in kernels.items() if "plain" in name}
    weights = {f"dequantize {kind}": 1 for kind in KINDS}
    assert plain == {
        **weights, "dequantize fp8": 2, "dequantize nvfp4": 2, "quantize_dequantize fp8": 1,
        "quantize_dequantize_nvfp4": 1, "quantize_dequantize int8": 1,  # the last follows a GELU that stands alone
    }  # fmt: skip
    for batch in (1, 2, 5):
        x = torch.randn(batch, 6, 32).clamp(-3, 4)
        found = written.open["all"]().run({"x": x.numpy()})
        for value, expected in zip(found.values(), network(x), strict=True):
            # A value that lies on a rounding edge may fall on the other side: one of 127 steps of one value.
            assert np.linalg.norm(value - expected.numpy()) / np.linalg.norm(expected.numpy()) < 0.01
            assert np.median(np.abs(value - expected.numpy())) < 1e-5
    assert (tmp_path / aoti.WEIGHTS_FILE).stat().st_size < 40_000  # as stored, not as float32


# --- the forms of a graph, without a compiler ---


def test_linear_layers_in_bfloat16_are_packed(lowered: Lowered) -> None:
    with torch.no_grad():
        graph = to_precision(lowered.engines["full"].graph, "bf16")
    linear = [node for node in graph.graph.nodes if rewrite.is_call(node, rewrite.aten.linear.default)]
    half = [node for node in linear if node.meta["val"].dtype == torch.bfloat16]
    formed = to_cpu_forms(graph)
    assert len(half) >= 3 * 7
    assert calls(formed.graph) == ["mkldnn._linear_pointwise.default"] * len(half)
    assert set(formed.packing.values()) == {"linear"}
    assert formed.packing.keys() <= rewrite.weights(formed.graph).keys()
    activations = [node.args[3] for node in formed.graph.graph.nodes if str(node.target).startswith("mkldnn")]
    assert activations.count("gelu") == 3  # done inside the kernel


def calls(graph: fx.GraphModule) -> list[str]:
    return [
        str(node.target)
        for node in graph.graph.nodes
        if node.op == "call_function" and str(node.target).startswith(("onednn", "mkldnn", "dcompile"))
    ]


@pytest.mark.parametrize(("name", "layers"), [("linear", 7), ("dynamic", 4), ("conv", 4)])
def test_integer_layers_become_integer_kernels(name: str, layers: int, example: Tensor) -> None:
    graph = graph_of(INTEGER[name], example)
    before = calls(graph)
    formed = to_cpu_forms(graph)
    assert formed.integer_layers == layers
    kernel = "qconv" if name == "conv" else "qlinear"
    assert calls(formed.graph) == [f"onednn.{kernel}_pointwise.tensor"] * layers
    assert calls(graph) == before  # the given graph is left as it was
    assert sorted(formed.packing.values()) == {
        "conv": ["qconv:1,1:0,0:1,1:2", "qconv:1,1:1,1:1,1:1", "qconv:1,1:2,2:2,2:1", "qconv:2,2:1,1:1,1:1"]
    }.get(name, ["qlinear"] * layers)


def test_what_follows_a_layer_is_done_inside_its_kernel(example: Tensor) -> None:
    formed = to_cpu_forms(graph_of(INTEGER["linear"], example))
    kernels = [node for node in formed.graph.graph.nodes if str(node.target).startswith("onednn")]
    # the fifth: GELU, then the integers that the sixth reads
    assert [str(node.args[10]) for node in kernels] == ["none"] * 4 + ["gelu", "none", "none"]
    assert [node.args[9] for node in kernels] == [torch.float32] * 4 + [torch.uint8] + [torch.float32] * 2
    assert kernels[5].args[0] is kernels[4]
    formed = to_cpu_forms(graph_of(INTEGER["conv"], example))
    kernels = [node for node in formed.graph.graph.nodes if str(node.target).startswith("onednn")]
    # the third: no kernel of a convolution does GELU
    assert [str(node.args[14]) for node in kernels] == ["none", "swish", "none", "none"]
    assert [node.args[13] for node in kernels] == [torch.uint8, torch.uint8, torch.float32, torch.uint8]
    assert kernels[1].args[0] is kernels[0]


def test_layers_in_float32_stay_as_they_are(lowered: Lowered) -> None:
    graph = lowered.engines["full"].graph
    formed = to_cpu_forms(graph)
    assert not formed.packing
    assert not formed.integer_layers
    assert [str(n.target) for n in formed.graph.graph.nodes] == [str(n.target) for n in graph.graph.nodes]


class Mixed(Stored):
    """Integers times what are no integers: no kernel computes it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.signed(x), "a")


class DynamicConv(Stored):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(Ops.quantize_dequantize_dynamic(x.reshape(-1, 4, 8, 6), "uint8"), "a")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Mixed(a=("fp8", (8, 32))), r"no kernel for integer activations .* with fp8 weights in this layer, and would"),
        (DynamicConv(a=("int8", (8, 4, 3, 3))), r"no kernel for integer activations \(dcompile.quantize_dequantize_dy"),
    ],
    ids=["weights", "convolution"],
)
def test_an_integer_layer_without_a_kernel_is_refused(network: nn.Module, message: str, example: Tensor) -> None:
    with pytest.raises(EngineError, match=message):
        to_cpu_forms(graph_of(network, example))


@torch.library.custom_op("dcompile_tests::odd", mutates_args=())
def odd(x: Tensor) -> Tensor:
    return x + 1


@odd.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.dcompile_tests.odd(x) * 2  # type: ignore[no-any-return]


def test_an_operator_without_code_is_refused_by_name_and_place(example: Tensor) -> None:
    network = nn.Sequential(nn.Identity(), Inner())
    for form in (to_cpu_forms, lambda graph: to_gpu_forms(graph, "cpu")):
        with pytest.raises(EngineError, match=r"^1, node 'odd': target 'aoti' has no code for .* dcompile_tests\.odd"):
            form(graph_of(network, example))


def test_a_gpu_gets_no_quantised_layers_and_keeps_our_kernels(example: Tensor) -> None:
    with pytest.raises(EngineError, match=r"target 'aoti' runs no quantised layers on a GPU .*or choose target 'trt'"):
        to_gpu_forms(graph_of(INTEGER["linear"], example), "cpu")

    class Modulated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Ops.modulate(x, x[:, 0], x[:, 1], 1e-6)  # type: ignore[no-any-return]

    graph = graph_of(Modulated(), example)
    assert calls(to_gpu_forms(graph, "cpu").graph) == ["dcompile.modulate.default"]
    assert calls(to_cpu_forms(graph).graph) == []


# --- what stops a build ---


def refused(lowered: Lowered, folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(EngineError, match=message):
        aoti.write(lowered, folder, TargetOptions(**options), lambda name: None)
    assert not list(folder.rglob("*.pt2"))


def test_a_missing_compiler_is_said_before_any_work(lowered: Lowered, tmp_path: Path) -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        refused(lowered, tmp_path, r"target 'aoti' compiles C\+\+ and found no compiler; install g\+\+")
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_here_is_said_before_any_work(
    lowered: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(lowered, tmp_path, r"--compute-capability 9\.0: .* sees none; leave it", compute_capabilities=("9.0",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    refused(lowered, tmp_path, r"9\.0: .* for this machine's GPU alone: 8\.9", compute_capabilities=("9.0",))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), r"engine 'full': compiling it ran out of memory and nothing was written"),
        (RuntimeError("g++: fatal error: Killed signal terminated program cc1plus"), r"ran out of memory"),
        (RuntimeError("In file x:\ny.cpp:3: error: no 'z'\nmore"), r"does not compile it \(y.cpp:3: error: no 'z'\)"),
    ],
    ids=["memory", "killed", "other"],
)
def test_a_failed_compilation_is_one_line(
    error: Exception, message: str, lowered: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("torch._inductor.aot_compile", fail)
    refused(lowered, tmp_path, message)


def test_a_promised_layer_that_does_not_run_in_int8_fails_the_build(
    example: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graph_of(INTEGER["dynamic"], example)
    lowered = Lowered({"full": Variant(graph, {"x": ("slot", "sample")}, ("sample", "rest"))}, (), {}, {})
    running = {"oneDNN linear int8": 3, "addmm": 1}
    fake: Callable[..., Any] = lambda *_: aoti_package.Compiled((), {}, running)  # noqa: E731
    monkeypatch.setattr(aoti, "compile_program", fake)
    refused(
        lowered, tmp_path, r"engine 'full': 4 INT8 layers are promised, AOTInductor runs 3 as oneDNN linear int8 or"
    )


def test_kernels_are_counted_by_call() -> None:
    code = """
    extern "C" void cpp_fused_add_0(const float* in);
    void AOTInductorModel::run_impl() {
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(buf0, a, b, c, 1L, 1L));
        cpp_fused_add_0((const float*)(buf0.data_ptr()));
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__qlinear_pointwise_tensor(x, y));
        cpp_fused_add_0((const float*)(buf1.data_ptr()));
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_convolution(x, y));
        triton_poi_fused_add_1(buf0, buf1);
    }"""
    assert aoti_package.count_kernels(code) == {
        "addmm": 1,
        "oneDNN linear int8": 1,
        "convolution": 1,
        "fused by inductor": 3,
    }


def test_the_target_says_what_it_can_do() -> None:
    assert aoti.TARGET.cannot_run() is None
    assert aoti.TARGET.quantize == {"symmetric": True}
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert aoti.TARGET.precisions()[0] == ("bf16" if native else "fp32")
    assert "fp32" in aoti.TARGET.precisions()


def test_metadata_is_made_of_words_and_lines(written: Written, lowered: Lowered, folder: Path) -> None:
    about: Mapping[str, str] = read_metadata(folder / written.files["full"])
    assert about["dcompile.inputs"].splitlines()[:2] == ["sample float32 1*batch 4 8 8", "class_labels int64 1*batch"]
    assert "net.proj_out_2.bias float32" in about["dcompile.constants"]
    assert len(about["dcompile.outputs"].splitlines()) == len(lowered.engines["full"].outputs)
    assert about["dcompile.torch"] == torch.__version__
