"""Each form against the one it replaces: in ONNX Runtime, on the same input."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx_reference import Array
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from dcompile.compiler.step_graph import flatten
from dcompile.exporters.onnx.fusion import fused_operators
from dcompile.exporters.onnx.graph import to_onnx
from dcompile.exporters.onnx.runtime_forms import TRANSLATIONS, pack_blocks, rewrite_for_onnx_runtime
from dcompile.quant import formats
from dcompile.runtime.onnx_engine import OnnxEngine

Ops = torch.ops.dcompile


def graph_of(network: nn.Module, x: Tensor) -> fx.GraphModule:
    batch = torch.export.Dim("batch", min=1, max=64)
    return flatten(torch.export.export(network, (x,), dynamic_shapes=({0: batch},)).module(), ["x"])


def both(network: nn.Module, x: Tensor, folder: Path) -> tuple[Counter[str], Counter[str], Array, Array]:
    """(operators as written, as rewritten, output as written, as rewritten)."""
    model = to_onnx(graph_of(network, x), ["x"], ["y"], TRANSLATIONS)
    found: list[tuple[Counter[str], Array]] = []
    for name in ("before", "after"):
        path = folder / f"{name}.onnx"
        onnx_ir.save(model, path)
        operators = Counter(node.op_type for node in model.graph)
        found.append((operators, OnnxEngine(path, threads=1).run({"x": x.numpy()})["y"]))
        rewrite_for_onnx_runtime(model)
    (before, first), (after, second) = found
    return before, after, first, second


class Attention(nn.Module):
    """Of tokens on themselves, or on 5 others; `turned` normalises the heads' queries, as SD3 and FLUX do."""

    def __init__(self, *, cross: bool = False, turned: bool = False, masked: bool = False) -> None:
        super().__init__()
        self.cross, self.turned, self.masked = cross, turned, masked
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.other = nn.Parameter(torch.randn(5, 32))

    def forward(self, x: Tensor) -> Tensor:
        source = self.other[None].expand(x.shape[0], -1, -1) if self.cross else x
        q, k, v = (
            layer(each).unflatten(-1, (4, 8)).transpose(1, 2)
            for layer, each in ((self.q, x), (self.k, source), (self.v, source))
        )
        if self.turned:
            q = nn.functional.normalize(q, dim=-1)
        mask = torch.ones(6, k.shape[2]).tril().bool() if self.masked else None
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("options", [{}, {"cross": True}, {"masked": True}], ids=str)
def test_attention_needs_no_transposition(options: dict[str, bool], tmp_path: Path) -> None:
    before, after, expected, found = both(Attention(**options).eval(), torch.randn(2, 6, 32), tmp_path)
    assert before["Transpose"] == 4
    assert after["Transpose"] == 0
    assert after["Attention"] == before["Attention"] == 1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_attention_on_heads_that_something_else_reads_stays(tmp_path: Path) -> None:
    before, after, expected, found = both(Attention(turned=True).eval(), torch.randn(2, 6, 32), tmp_path)
    assert after == before
    np.testing.assert_array_equal(found, expected)


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x + torch.tanh(x))
        return result


def test_a_sum_and_its_norm_stay_two_operators(tmp_path: Path) -> None:
    before, after, expected, found = both(Normalised().eval(), torch.randn(2, 6, 32), tmp_path)
    assert (before["Add"], before["Sum"]) == (1, 0)
    assert (after["Add"], after["Sum"]) == (0, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert fused_operators(tmp_path / "before.onnx")["SkipLayerNormalization"] == 1  # what it must not become
    assert fused_operators(tmp_path / "after.onnx")["LayerNormalization"] == 1


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(2, 8, 5, 6), (2, 8, 7)])
def test_group_norm_is_an_instance_norm(affine: bool, shape: tuple[int, ...], tmp_path: Path) -> None:
    network = nn.GroupNorm(4, 8, affine=affine, eps=1e-3)
    if affine:
        nn.init.normal_(network.weight)
        nn.init.normal_(network.bias)
    x = 3 + torch.randn(shape)
    model = to_onnx(graph_of(network, x), ["x"], ["y"], TRANSLATIONS)
    onnx_ir.save(model, tmp_path / "engine.onnx")
    operators = fused_operators(tmp_path / "engine.onnx")
    assert operators["InstanceNormalization"] == 1
    assert sum(operators.values()) <= 6
    found = OnnxEngine(tmp_path / "engine.onnx").run({"x": x.numpy()})["y"]
    np.testing.assert_allclose(found, network(x).detach().numpy(), rtol=1e-4, atol=1e-5)


class Stored(nn.Module):
    """A layer with stored weights; its activations are not rounded, or by a range known before."""

    def __init__(self, weights: str, columns: int, rounds: bool = False) -> None:
        super().__init__()
        self.weights, self.rounds = weights, rounds
        real = torch.randn(6, columns)
        q, scale = formats.quantize_int8(real) if weights == "int8" else formats.quantize_int4(real, 16)
        self.register_buffer("weight", q)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", torch.randn(6))
        self.register_buffer("scale", torch.tensor(0.02))
        self.register_buffer("zero", torch.tensor(130, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        if self.rounds:
            x = Ops.quantize_dequantize(x, self.scale, self.zero, "uint8")
        axis = 0 if self.weights == "int8" else 1
        weight = Ops.dequantize(self.weight, self.weight_scale, None, self.weights, axis)
        return nn.functional.linear(x, weight, self.get_buffer("bias"))


@pytest.mark.parametrize("tokens", [(), (3,)], ids=["[B, K]", "[B, L, K]"])
def test_an_int8_layer_is_one_operator_with_its_bias(tokens: tuple[int, ...], tmp_path: Path) -> None:
    network, x = Stored("int8", 32, rounds=True), torch.randn(2, *tokens, 32)
    _, after, _, found = both(network, x, tmp_path)
    assert after == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}
    assert fused_operators(tmp_path / "after.onnx") == after
    np.testing.assert_allclose(found, network(x).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [16, 48, 256, 20])  # 20 is no whole number of blocks
def test_stored_int8_is_multiplied_in_float32(columns: int, tmp_path: Path) -> None:
    check_stored(Stored("int8", columns), columns, tmp_path)


@pytest.mark.parametrize("columns", [16, 64])
def test_stored_int4_is_multiplied_in_float32(columns: int, tmp_path: Path) -> None:
    check_stored(Stored("int4", columns), columns, tmp_path)


def check_stored(network: Stored, columns: int, folder: Path) -> None:
    """ONNX Runtime's own fusion rounds the activations, which costs a percent; nobody asked for that."""
    x = torch.randn(2, 3, columns)
    _, after, _, found = both(network, x, folder)
    assert after == {"MatMulNBits": 1}
    np.testing.assert_allclose(found, network(x).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_layers_with_equal_weights_keep_their_own(weights: str, tmp_path: Path) -> None:
    """torch.onnx makes equal initialisers one, and a form that edits it would edit it twice."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = Stored(weights, 32)
            self.b = copy.deepcopy(self.a)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.a(x) * self.b(torch.tanh(x))
            return result

    network, x = Twins(), torch.randn(2, 3, 32)
    _, after, _, found = both(network, x, tmp_path)
    assert after["MatMulNBits"] == 2
    np.testing.assert_allclose(found, network(x).numpy(), rtol=1e-4, atol=1e-4)


@given(integers=arrays(np.int8, st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=st.integers(-8, 7)),
       bits=st.sampled_from([4, 8]))  # fmt: skip
def test_blocks_hold_the_integers_around_their_middle(integers: Array, bits: int) -> None:
    packed = pack_blocks(integers, bits, 16)
    rows, columns = integers.shape
    assert packed.shape == (rows, -(-columns // 16), 2 * bits)
    codes = packed.reshape(rows, -1)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(rows, -1)
    values = codes.astype(int) - 2 ** (bits - 1)
    np.testing.assert_array_equal(values[:, :columns], integers)
    assert not values[:, columns:].any()
