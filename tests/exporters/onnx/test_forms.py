"""Linear weights as ONNX engines multiply by them, and every quantised form evaluated by ONNX's own reference."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from models import Tokens, randomise
from onnx.reference import ReferenceEvaluator
from onnx_reference import Array
from torch import Tensor, fx, nn

from dcompile.compiler import rewrite
from dcompile.compiler.rewrite import aten
from dcompile.compiler.step_graph import flatten
from dcompile.exporters.onnx.forms import (
    DEQUANTIZE,
    QUANTIZE,
    Translations,
    dequantize,
    pack_nibbles,
    quantize_dequantize,
    transpose_linear_weights,
    unpack_nibbles,
)
from dcompile.exporters.onnx.graph import check, to_onnx
from dcompile.quant import formats

Ops = torch.ops.dcompile
PORTABLE: Translations = {QUANTIZE: quantize_dequantize, DEQUANTIZE: dequantize}


class TwiceTheSame(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = nn.Linear(4, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.own(self.shared(self.shared(x)))
        return result


def test_linear_weights_are_stored_as_the_engine_multiplies_by_them() -> None:
    network = randomise(Tokens())
    x, sigma = torch.randn(2, 6, 4), torch.tensor([3.0, 400.0])
    module = torch.export.export(network, (x, sigma)).module()
    before = {name: value.clone() for name, value in rewrite.weights(module).items()}
    moved = transpose_linear_weights(module)
    assert not any(rewrite.is_call(node, aten.linear.default) for node in moved.graph.nodes)
    after = rewrite.weights(moved)
    assert torch.equal(after["blocks.0.up.weight"], before["blocks.0.up.weight"].t())
    assert after["blocks.0.up.weight"].is_contiguous()
    torch.testing.assert_close(moved(x, sigma), network(x, sigma))
    assert all(
        torch.equal(value, before[name]) for name, value in rewrite.weights(module).items()
    )  # the input is whole


def test_a_weight_that_two_layers_read_stays_as_it_is() -> None:
    network, x = randomise(TwiceTheSame()), torch.randn(2, 4)
    moved = transpose_linear_weights(torch.export.export(network, (x,)).module())
    left = [node for node in moved.graph.nodes if rewrite.is_call(node, aten.linear.default)]
    assert len(left) == 2
    torch.testing.assert_close(moved(x), network(x))


# ---- quantised forms ----------------------------------------------------------------------------------------------


class Quantised(nn.Module):
    """Two linear layers on one stored weight format; activations rounded as named."""

    def __init__(self, weights: str, activations: str | None = None, rows: tuple[int, ...] = (7, 5)) -> None:
        super().__init__()
        self.weights, self.activations = weights, activations
        self.register_buffer("scale", torch.tensor(0.03))
        self.register_buffer("zero", torch.tensor(120, dtype=torch.uint8))
        self.layers = ("a", "b")[: len(rows)]
        for name, count in zip(self.layers, rows, strict=True):
            real = torch.randn(count, 32)
            stored = {
                "int8": formats.quantize_int8,
                "fp8": formats.quantize_fp8,
                "int4": lambda weight: formats.quantize_int4(weight, 16),
                "nvfp4": formats.quantize_nvfp4,
            }[weights](real)
            for end, value in zip(("", "_scale", "_global_scale"), stored, strict=False):
                self.register_buffer(f"{name}{end}", value)

    def weight(self, name: str) -> Tensor:
        global_scale = self.get_buffer(f"{name}_global_scale") if self.weights == "nvfp4" else None
        axis = 1 if self.weights in ("int4", "nvfp4") else 0
        q, scale = self.get_buffer(name), self.get_buffer(f"{name}_scale")
        result: Tensor = Ops.dequantize(q, scale, global_scale, self.weights, axis)
        return result

    def forward(self, x: Tensor) -> Tensor:
        if self.activations:
            zero = self.zero if self.activations == "uint8" else None
            x = Ops.quantize_dequantize(x, self.scale, zero, self.activations)
        return torch.cat([nn.functional.linear(x, self.weight(name)) for name in self.layers], dim=-1)


def graph_of(network: nn.Module, x: Tensor) -> fx.GraphModule:
    batch = torch.export.Dim("batch", min=1, max=64)
    return flatten(torch.export.export(network, (x,), dynamic_shapes=({0: batch},)).module(), ["x"])


TYPES = {"int8": "INT8", "fp8": "FLOAT8E4M3FN", "int4": "INT4", "nvfp4": "FLOAT4E2M1"}
PAIRS = [
    ("int8", "uint8"), ("int8", "int8"), ("int8", None), ("fp8", "fp8"), ("fp8", None), ("int4", None), ("nvfp4", None),
]  # fmt: skip


@pytest.mark.parametrize("transpose", [True, False], ids=["transposed", "as it is"])
@pytest.mark.parametrize(("weights", "activations"), PAIRS)
def test_standard_onnx_computes_the_same(
    weights: str, activations: str | None, transpose: bool, tmp_path: Path
) -> None:
    """The reference evaluator adds in another order, and that is all: in float32, 32 terms."""
    network, x = Quantised(weights, activations), torch.randn(3, 4, 32)
    graph = graph_of(network, x)
    model = to_onnx(graph, ["x"], ["y"], PORTABLE, transpose_weights=transpose)
    onnx_ir.save(model, tmp_path / "engine.onnx")
    check(tmp_path / "engine.onnx")
    written = onnx.load(tmp_path / "engine.onnx")
    assert {entry.domain for entry in written.opset_import} == {""}
    stored = {value.name: value for value in written.graph.initializer}
    turned = transpose and weights != "nvfp4"  # its block scales are not an initialiser, but made from two
    for name, rows in (("a", 7), ("b", 5)):
        assert stored[name].data_type == getattr(onnx.TensorProto, TYPES[weights])
        assert list(stored[name].dims) == ([32, rows] if turned else [rows, 32])
    (found,) = ReferenceEvaluator(written).run(None, {"x": x.numpy()})
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, network(x).numpy(), rtol=1e-5, atol=1e-5)


def test_an_activation_says_its_type_by_a_zero_point(tmp_path: Path) -> None:
    for activations, kind in (("int8", "INT8"), ("fp8", "FLOAT8E4M3FN")):
        network = Quantised("int8", activations)
        onnx_ir.save(to_onnx(graph_of(network, torch.randn(2, 32)), ["x"], ["y"], PORTABLE), tmp_path / "e.onnx")
        model = onnx.load(tmp_path / "e.onnx")
        stored = {value.name: value for value in model.graph.initializer}
        (quantize,) = (node for node in model.graph.node if node.op_type == "QuantizeLinear")  # one for both layers
        assert stored[quantize.input[2]].data_type == getattr(onnx.TensorProto, kind)


@pytest.mark.parametrize("weights", ["int4", "nvfp4"])
def test_packed_bytes_are_those_of_the_graph(weights: str, tmp_path: Path) -> None:
    """Not transposed, so byte for byte what quant/formats.py packed."""
    network = Quantised(weights)
    graph = graph_of(network, torch.randn(2, 32))
    model = to_onnx(graph, ["x"], ["y"], PORTABLE, transpose_weights=False)
    onnx_ir.save(model, tmp_path / "engine.onnx")
    stored = {value.name: value for value in onnx.load(tmp_path / "engine.onnx").graph.initializer}
    for name in network.layers:
        assert stored[name].raw_data == network.get_buffer(name).numpy().tobytes()


def test_transposed_int4_is_packed_without_a_gap(tmp_path: Path) -> None:
    """[K, N] with N odd: half a byte would be left over after every row."""
    network = Quantised("int4", rows=(7,))
    onnx_ir.save(to_onnx(graph_of(network, torch.randn(2, 32)), ["x"], ["y"], PORTABLE), tmp_path / "e.onnx")
    stored = {value.name: value for value in onnx.load(tmp_path / "e.onnx").graph.initializer}
    assert len(stored["a"].raw_data) == 7 * 32 // 2
    scale = onnx.numpy_helper.to_array(stored["a_scale"])
    real = onnx.numpy_helper.to_array(stored["a"]).astype(np.float32) * scale.repeat(16, axis=0)
    np.testing.assert_array_equal(real.T, network.weight("a").numpy())


@pytest.mark.parametrize("weights", ["int4", "nvfp4"])
@pytest.mark.parametrize("scaled", [1.0, 2.0], ids=["same scales", "other scales"])
def test_equal_weights_that_torch_made_one_are_each_typed(weights: str, scaled: float, tmp_path: Path) -> None:
    network, x = Quantised(weights, rows=(5, 5)), torch.randn(2, 32)
    for end in ("", "_scale", "_global_scale") if weights == "nvfp4" else ("", "_scale"):
        value = network.get_buffer(f"a{end}")
        network.register_buffer(
            f"b{end}", value.clone() if end != "_scale" else (value.float() * scaled).to(value.dtype)
        )
    onnx_ir.save(to_onnx(graph_of(network, x), ["x"], ["y"], PORTABLE), tmp_path / "e.onnx")
    (found,) = ReferenceEvaluator(onnx.load(tmp_path / "e.onnx")).run(None, {"x": x.numpy()})
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, network(x).numpy(), rtol=1e-5, atol=1e-5)


# ---- nibbles ------------------------------------------------------------------------------------------------------


@given(codes=arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.integers(0, 15)))
def test_nibbles_of_any_shape_are_packed_as_onnx_packs_them(codes: Array) -> None:
    proto = onnx.numpy_helper.from_array(codes.view(ml_dtypes.uint4))
    assert pack_nibbles(codes).tobytes() == proto.raw_data
    if codes.shape[1] % 2 == 0:
        np.testing.assert_array_equal(unpack_nibbles(pack_nibbles(codes).reshape(len(codes), -1)), codes)
