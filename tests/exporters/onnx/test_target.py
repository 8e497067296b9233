"""Engines as ONNX files: weights shared between them, and quantised layers that really run in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from torch import Tensor, fx, nn

from dcompile.compiler import rewrite
from dcompile.compiler.errors import InternalError
from dcompile.compiler.step_graph import flatten
from dcompile.exporters.lower import Lowered
from dcompile.exporters.onnx.forms import transpose_linear_weights
from dcompile.exporters.onnx.fusion import check_fusion, fused_operators
from dcompile.exporters.onnx.graph import IR_VERSION, OPSET, to_onnx
from dcompile.exporters.onnx.runtime_forms import TRANSLATIONS, rewrite_for_onnx_runtime
from dcompile.exporters.onnx.target import WEIGHTS_FILE, export_engines
from dcompile.exporters.onnx.weights import ALIGNMENT
from dcompile.quant import formats
from dcompile.runtime.errors import EngineError
from dcompile.runtime.onnx_engine import OnnxEngine

Ops = torch.ops.dcompile


def outside(path: Path) -> dict[str, tuple[int, int]]:
    """Initialiser -> (offset, length) of those that lie in the weights file."""
    found = {}
    for value in onnx.load(path, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in value.external_data}
        if entries:
            assert entries["location"] == Path(WEIGHTS_FILE).name
            found[value.name] = (int(entries["offset"]), int(entries["length"]))
    return found


def test_engines_share_one_copy_of_each_weight(exported: Path) -> None:
    full, reuse = (outside(exported / f"engines/{name}.onnx") for name in ("full", "reuse"))
    shared = full.keys() & reuse.keys()
    assert {"net.blocks.0.up.weight", "net.blocks.0.down.weight"} <= shared
    assert all(full[name] == reuse[name] for name in shared)
    assert "net.blocks.2.up.weight" in full.keys() - reuse.keys()  # what a step does not compute, it does not read
    end = 0
    for offset, length in sorted(set(full.values()) | set(reuse.values())):
        assert offset == -(-end // ALIGNMENT) * ALIGNMENT  # on the next page after the one before: no gap, no copy
        end = offset + length
    assert (exported / WEIGHTS_FILE).stat().st_size == end


def test_the_weights_file_holds_the_weights(exported: Path, lowered: Lowered) -> None:
    content = (exported / WEIGHTS_FILE).read_bytes()
    weights = rewrite.weights(transpose_linear_weights(lowered.engines["full"].graph))
    for name, (offset, length) in outside(exported / "engines/full.onnx").items():
        assert content[offset : offset + length] == weights[name].numpy().tobytes()


def test_equal_content_is_written_once_whatever_its_name(lowered: Lowered, tmp_path: Path) -> None:
    full = lowered.engines["full"]
    twins = rewrite.clone(full.graph)
    rewrite.assign(twins, "net.blocks.2.up.weight", rewrite.attribute(twins, "net.blocks.1.up.weight").clone())
    export_engines(replace(lowered, engines={"full": replace(full, graph=twins)}), tmp_path)
    found = outside(tmp_path / "engines/full.onnx")
    assert found["net.blocks.2.up.weight"] == found["net.blocks.1.up.weight"] != found["net.blocks.0.up.weight"]


def test_engines_are_plain_onnx_that_tells_nothing_of_the_machine_that_made_it(exported: Path) -> None:
    model = onnx.load(exported / "engines/full.onnx", load_external_data=False)
    assert model.ir_version == IR_VERSION
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == OPSET
    assert {node.domain for node in model.graph.node} == {""}
    text = (exported / "engines/full.onnx").read_bytes()
    assert b".py" not in text
    assert str(Path.cwd()).encode() not in text


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_any_batch_gives_what_the_graph_gives(batch: int, exported: Path, lowered: Lowered) -> None:
    for name, variant in lowered.engines.items():
        engine = OnnxEngine(exported / f"engines/{name}.onnx")
        inputs = {}
        for port, node in rewrite.placeholders(variant.graph).items():
            shape = [size if isinstance(size, int) else batch for size in rewrite.shape_of(node)]
            inputs[port] = torch.randn(shape)
        outputs = engine.run({port: value.numpy() for port, value in inputs.items()})
        with torch.no_grad():
            for slot, expected in zip(variant.outputs, variant.graph(*inputs.values()), strict=True):
                np.testing.assert_allclose(outputs[f"next_{slot}"], expected.numpy(), rtol=1e-4, atol=1e-4)


def test_what_onnx_refuses_is_a_bug_of_ours(lowered: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise onnx.checker.ValidationError("node 3 is odd\nand more")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    told: list[str] = []
    with pytest.raises(InternalError, match=r"full\.onnx: ONNX's checker refuses it \(node 3 is odd\); please report"):
        export_engines(lowered, tmp_path, told.append)
    assert told == ["full"]  # each engine as it is begun


class Quantised(nn.Module):
    """Layers in the forms that the pass writes, as named: weights [N, ...], ranges from -4 to 4, with a bias."""

    def __init__(self, weights: str, activations: str | None, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.weights, self.activations = weights, activations
        seeded = torch.Generator().manual_seed(0)  # it is made when tests are collected, before any is seeded
        scale, zero_point = formats.affine_range(-4.0, 4.0)
        if activations == "int8":
            scale = formats.symmetric_range(-4.0, 4.0)
        self.register_buffer("x_scale", torch.tensor(scale))
        self.register_buffer("x_zero", torch.tensor(zero_point, dtype=torch.uint8))
        for name, shape in shapes.items():
            real = torch.randn(shape, generator=seeded) / np.prod(shape[1:]) ** 0.5
            q, scales = formats.quantize_int8(real) if weights == "int8" else formats.quantize_int4(real, 16)
            self.register_buffer(name, q)
            self.register_buffer(f"{name}_scale", scales)
            self.register_buffer(f"{name}_bias", 0.1 * torch.randn(shape[0], generator=seeded))

    def rounded(self, x: Tensor) -> Tensor:
        if self.activations is None:
            return x
        if self.activations == "dynamic":
            dynamic: Tensor = Ops.quantize_dequantize_dynamic(x, "uint8")
            return dynamic
        zero_point = self.x_zero if self.activations == "uint8" else None
        result: Tensor = Ops.quantize_dequantize(x, self.x_scale, zero_point, self.activations)
        return result

    def stored(self, name: str) -> Tensor:
        axis = 0 if self.weights == "int8" else 1
        weight: Tensor = Ops.dequantize(
            self.get_buffer(name), self.get_buffer(f"{name}_scale"), None, self.weights, axis
        )
        return weight

    def bias(self, name: str, wanted: bool) -> Tensor | None:
        return self.get_buffer(f"{name}_bias") if wanted else None


class Linear(Quantised):
    """With tokens and without (the timestep's layers are [B, K]), with a bias and without, two that share an input."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.rounded(x)
        y = self.layer(x, "a") + self.layer(x, "e")
        y = self.layer(self.rounded(y), "b", bias=False)
        y = self.layer(self.rounded(y.mean(dim=1)), "c")
        return self.layer(self.rounded(y), "d", bias=False)

    def layer(self, x: Tensor, name: str, bias: bool = True) -> Tensor:
        return nn.functional.linear(x, self.stored(name), self.bias(name, bias))


class Convolved(Quantised):
    """Padded, strided, grouped, one by one; a sum in between is what a residual block has."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolve(x, "a", padding=1)
        y = y + self.convolve(y, "b", padding=2, dilation=2, bias=False)
        y = self.convolve(y, "c", stride=2, padding=1)
        return self.convolve(y, "d", groups=2)

    def convolve(self, x: Tensor, name: str, *, bias: bool = True, **geometry: int) -> Tensor:
        y = nn.functional.conv2d(self.rounded(x), self.stored(name), self.bias(name, bias), **geometry)
        return self.rounded(y)


def graph_of(network: nn.Module, x: Tensor) -> fx.GraphModule:
    batch = torch.export.Dim("batch", min=1, max=64)
    return flatten(torch.export.export(network, (x,), dynamic_shapes=({0: batch},)).module(), ["x"])


LINEAR = {"a": (48, 32), "e": (48, 32), "b": (32, 48), "c": (48, 32), "d": (7, 48)}
CONV = {"a": (8, 4, 3, 3), "b": (8, 8, 3, 3), "c": (8, 8, 3, 3), "d": (6, 4, 1, 1)}


def write(graph: fx.GraphModule, path: Path) -> Path:
    model = to_onnx(graph, ["x"], ["y"], TRANSLATIONS)
    rewrite_for_onnx_runtime(model)
    onnx_ir.save(model, path)
    return path


@pytest.mark.parametrize(
    ("network", "shape", "fused"),
    [
        (Linear("int8", "uint8", **LINEAR), (2, 6, 32), {"MatMulIntegerToFloat": 5, "QuantizeLinear": 4}),
        (Linear("int8", "int8", **LINEAR), (2, 6, 32), {"MatMulIntegerToFloat": 5, "QuantizeLinear": 4}),
        (
            Linear("int8", "dynamic", **LINEAR),
            (2, 6, 32),
            {"DynamicQuantizeMatMul": 3, "MatMulIntegerToFloat": 2, "DynamicQuantizeLinear": 1},
        ),
        (Linear("int8", None, **LINEAR), (2, 6, 32), {"MatMulNBits": 5}),
        (Linear("int4", None, **LINEAR), (2, 6, 32), {"MatMulNBits": 5}),
        (Convolved("int8", "uint8", **CONV), (2, 4, 8, 8), {"QLinearConv": 4}),
        (Convolved("int8", "int8", **CONV), (2, 4, 8, 8), {"QLinearConv": 4}),
    ],
    ids=lambda value: (
        f"{type(value).__name__} {value.weights} {value.activations}" if isinstance(value, nn.Module) else ""
    ),
)
def test_quantised_layers_run_as_promised(
    network: nn.Module, shape: tuple[int, ...], fused: Mapping[str, int], tmp_path: Path
) -> None:
    x = torch.randn(shape).clamp(-4, 4)
    graph = graph_of(network, x)
    path = write(graph, tmp_path / "engine.onnx")
    operators = fused_operators(path)
    assert {name: count for name, count in operators.items() if name in fused} == fused
    assert not operators.keys() & {"MatMul", "Gemm", "Conv"}  # nothing is left in fp32
    check_fusion("full", graph, operators)
    expected = network(x).numpy()
    found = OnnxEngine(path).run({"x": x.numpy()})["y"]
    # A sum that lies on a rounding edge may fall on the other side: then one integer differs by one, and more after it.
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < (0.03 if network.activations else 1e-5)


def test_a_layer_that_would_run_in_fp32_is_not_passed_over() -> None:
    graph = graph_of(Linear("int8", "uint8", **LINEAR), torch.randn(2, 6, 32))
    words = r"engine 'reuse': 5 int8 linear layers are promised, ONNX Runtime runs 4 as MatMulIntegerToFloat or "
    with pytest.raises(EngineError, match=words):
        check_fusion("reuse", graph, {"MatMulIntegerToFloat": 4, "MatMul": 1})
    with pytest.raises(EngineError, match="runs 0 as"):
        check_fusion("reuse", graph, {"QLinearConv": 4})
    weights = graph_of(Linear("int4", None, **LINEAR), torch.randn(2, 6, 32))
    with pytest.raises(
        EngineError, match="5 linear layers with quantised weights are promised, ONNX Runtime runs 2 as"
    ):
        check_fusion("reuse", weights, {"MatMulNBits": 2, "MatMulIntegerToFloat": 3})
    convolutions = graph_of(Convolved("int8", "uint8", **CONV), torch.randn(2, 4, 8, 8))
    with pytest.raises(EngineError, match="4 int8 convolutions are promised, ONNX Runtime runs 0 as QLinearConv"):
        check_fusion("reuse", convolutions, {"Conv": 4})


class Unsupported(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("scale", torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor
        if self.kind == "nvfp4":
            result = Ops.quantize_dequantize_nvfp4(x, self.scale)
        elif self.kind == "fp8":
            result = Ops.quantize_dequantize(x, self.scale, None, "fp8")
        else:
            result = Ops.quantize_dequantize_dynamic(x, "int8")
        return result + 1


@pytest.mark.parametrize(("kind", "said"), [("nvfp4", "nvfp4"), ("fp8", "fp8"), ("int8", "int8, by token")])
def test_what_onnx_runtime_does_not_multiply_in_is_refused_before_anything_is_written(
    kind: str, said: str, lowered: Lowered, tmp_path: Path
) -> None:
    graph = graph_of(Unsupported(kind), torch.randn(2, 32))
    engines = {"full": replace(lowered.engines["full"], graph=graph)}
    words = rf"engine 'full': node 'quantize_dequantize\w*' is {said}, which ONNX Runtime does not multiply in"
    with pytest.raises(EngineError, match=words):
        export_engines(replace(lowered, engines=engines), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_full_temporary_disk_is_said(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("could not write optimised.onnx\nand more")

    monkeypatch.setattr("onnxruntime.InferenceSession", fail)
    with pytest.raises(EngineError, match=r"^full\.onnx: ONNX Runtime cannot optimise it into .*: could not write op"):
        fused_operators(exported / "engines/full.onnx")


def test_fp32_engines_promise_nothing(exported: Path, lowered: Lowered) -> None:
    operators = fused_operators(exported / "engines/full.onnx")
    check_fusion("full", lowered.engines["full"].graph, operators)
    assert sum(count for name, count in operators.items() if "MatMul" in name or name == "Gemm") >= 8
