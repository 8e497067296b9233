"""Engines as ONNX files: weights shared between them, and INT8 layers that really run in INT8."""

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
from dcompile.exporters.lower import Lowered, transpose_linear_weights
from dcompile.exporters.onnx import (
    ALIGNMENT,
    IR_VERSION,
    OPSET,
    WEIGHTS_FILE,
    check_fusion,
    export_engines,
    fused_operators,
    to_onnx,
)
from dcompile.quant.int8 import affine_range, quantize_weight
from dcompile.runtime.engines import OnnxEngine
from dcompile.runtime.errors import EngineError

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
    """Layers in the forms that the pass writes: weights [N, ...] as it finds them, ranges from -4 to 4."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        scale, zero_point = affine_range(-4.0, 4.0)
        self.register_buffer("x_scale", torch.tensor(scale))
        self.register_buffer("x_zero", torch.tensor(zero_point, dtype=torch.uint8))
        for name, shape in shapes.items():
            real = torch.randn(shape, generator=generator) / np.prod(shape[1:]) ** 0.5
            integers, scales = quantize_weight(real)
            self.register_buffer(name, integers.t().contiguous() if len(shape) == 2 else integers)
            self.register_buffer(f"{name}_scale", scales)
            self.register_buffer(f"{name}_bias", 0.1 * torch.randn(shape[0], generator=generator))

    def arguments(self, name: str, bias: bool = True) -> tuple[Tensor | None, ...]:
        weight, scale, added = (getattr(self, f"{name}{end}") for end in ("", "_scale", "_bias"))
        return weight, scale, added if bias else None

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        return self.get_buffer("x_scale"), self.get_buffer("x_zero")


class Static(Quantised):
    """With tokens and without (the timestep's layers are [B, K]), with a bias and without."""

    def forward(self, x: Tensor) -> Tensor:
        y = Ops.linear_int8(x, *self.arguments("a"), *self.range)
        y = Ops.linear_int8(y, *self.arguments("b", bias=False), *self.range)
        y = Ops.linear_int8(y.mean(dim=1), *self.arguments("c"), *self.range)
        result: Tensor = Ops.linear_int8(y, *self.arguments("d", bias=False), *self.range)
        return result


class Dynamic(Quantised):
    def forward(self, x: Tensor) -> Tensor:
        y = Ops.linear_int8_dynamic(x, *self.arguments("a"))
        y = Ops.linear_int8_dynamic(y, *self.arguments("b", bias=False))
        y = Ops.linear_int8_dynamic(y.mean(dim=1), *self.arguments("c"))
        result: Tensor = Ops.linear_int8_dynamic(y, *self.arguments("d", bias=False))
        return result


class Convolved(Quantised):
    """Padded, strided, grouped, one by one; a sum in between is what a residual block has."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolve(x, "a", padding=1)
        y = y + self.convolve(y, "b", padding=2, dilation=2, bias=False)
        y = self.convolve(y, "c", stride=2, padding=1)
        return self.convolve(y, "d", groups=2)

    def convolve(
        self, x: Tensor, name: str, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1,
        bias: bool = True,
    ) -> Tensor:  # fmt: skip
        geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
        y: Tensor = Ops.conv2d_int8(x, *self.arguments(name, bias), *self.range, *self.range, *geometry)
        return y


def graph_of(network: nn.Module, x: Tensor) -> fx.GraphModule:
    batch = torch.export.Dim("batch", min=1, max=64)
    return flatten(torch.export.export(network, (x,), dynamic_shapes=({0: batch},)).module(), ["x"])


LINEAR = {"a": (48, 32), "b": (32, 48), "c": (48, 32), "d": (8, 48)}
CONV = {"a": (8, 4, 3, 3), "b": (8, 8, 3, 3), "c": (8, 8, 3, 3), "d": (6, 4, 1, 1)}


@pytest.mark.parametrize(
    ("network", "shape", "fused"),
    [
        (Static(**LINEAR), (2, 6, 32), {"MatMulIntegerToFloat": 4}),
        (Dynamic(**LINEAR), (2, 6, 32), {"DynamicQuantizeMatMul": 4}),
        (Convolved(**CONV), (2, 4, 8, 8), {"QLinearConv": 4}),
    ],
    ids=lambda value: type(value).__name__.lower() if isinstance(value, nn.Module) else None,
)
def test_int8_layers_run_in_int8(
    network: nn.Module, shape: tuple[int, ...], fused: Mapping[str, int], tmp_path: Path
) -> None:
    x = torch.randn(shape).clamp(-4, 4)
    graph = graph_of(network, x)
    onnx_ir.save(to_onnx(graph, ["x"], ["y"]), tmp_path / "engine.onnx")
    operators = fused_operators(tmp_path / "engine.onnx")
    assert {name: count for name, count in operators.items() if name in fused} == fused
    assert not operators.keys() & {"MatMul", "Gemm", "Conv"}  # nothing is left in fp32
    check_fusion("full", graph, operators)
    expected = network(x).numpy()
    found = OnnxEngine(tmp_path / "engine.onnx").run({"x": x.numpy()})["y"]
    # A sum that lies on a rounding edge may fall on the other side: then one integer differs by one.
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.01


def test_a_layer_that_would_run_in_fp32_is_not_passed_over() -> None:
    graph = graph_of(Static(**LINEAR), torch.randn(2, 6, 32))
    with pytest.raises(EngineError, match=r"engine 'reuse': 4 .*linear_int8.* are promised, ONNX Runtime runs 3 as "):
        check_fusion("reuse", graph, {"MatMulIntegerToFloat": 3, "MatMul": 1})
    with pytest.raises(EngineError, match="runs 0 as"):
        check_fusion("reuse", graph, {"QLinearConv": 4})


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
