"""Quantised layers rewritten for TensorRT: the same numbers, no overflow, shared roundings, promises in ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from dcompile.compiler import rewrite
from dcompile.compiler.errors import UnsupportedError
from dcompile.compiler.rewrite import aten
from dcompile.compiler.step_graph import flatten
from dcompile.exporters.onnx.graph import to_onnx
from dcompile.exporters.precision import to_precision
from dcompile.exporters.tensorrt.forms import count_quantised, to_tensorrt_forms
from dcompile.exporters.tensorrt.graph import TRANSLATIONS, convert_constants, promises
from dcompile.quant import formats

OPS = torch.ops.dcompile
K, N = 64, 32
PAIRS = [
    ("int8", "int8"), ("int8", "token"), ("fp8", "fp8"), ("nvfp4", "nvfp4"), ("int8", None), ("fp8", None),
    ("int4", None), ("nvfp4", None),
]  # fmt: skip
STORED = {"int8": "int8", "fp8": "fp8", "int4": "int4", "nvfp4": "fp4"}


def stored(weight: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor | None, str, int]:
    if kind == "nvfp4":
        return *formats.quantize_nvfp4(weight), kind, 1
    if kind == "int4":
        return *formats.quantize_int4(weight, 16), None, kind, 1
    quantize = formats.quantize_int8 if kind == "int8" else formats.quantize_fp8
    return *quantize(weight), None, kind, 0


class Layer(nn.Module):
    """One quantised linear layer; `rounded` is what it reads."""

    def __init__(self, weights: str, columns: int = K, rows: int = N, gain: float = 1.0) -> None:
        super().__init__()
        weight = gain * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) / columns**0.5
        q, scale, whole, self.kind, self.axis = stored(weight, weights)
        self.q, self.scale = nn.Buffer(q), nn.Buffer(scale)
        self.whole = nn.Buffer(whole) if whole is not None else None
        self.bias = nn.Parameter(torch.linspace(-1, 1, rows))

    def forward(self, rounded: Tensor) -> Tensor:
        weight = OPS.dequantize(self.q, self.scale, self.whole, self.kind, self.axis)
        return nn.functional.linear(rounded, weight, self.bias)


class Rounding(nn.Module):
    def __init__(self, activations: str | None, largest: float = 4.0) -> None:
        super().__init__()
        self.activations = activations
        divisor = {"int8": 127.0, "fp8": 448.0, "nvfp4": 6 * 448.0}.get(activations or "", 1.0)
        self.scale = nn.Buffer(torch.tensor(largest / divisor))

    def forward(self, x: Tensor) -> Tensor:
        if self.activations is None:
            return x
        if self.activations == "token":
            result: Tensor = OPS.quantize_dequantize_dynamic(x, "int8")
        elif self.activations == "nvfp4":
            result = OPS.quantize_dequantize_nvfp4(x, self.scale)
        else:
            result = OPS.quantize_dequantize(x, self.scale, None, self.activations)
        return result


class Attention(nn.Module):
    """q, k and v read one rounded tensor."""

    def __init__(self, weights: str, activations: str | None) -> None:
        super().__init__()
        self.round = Rounding(activations)
        self.q, self.k, self.v = (Layer(weights, rows=N, gain=gain) for gain in (1.0, 0.9, -0.8))

    def forward(self, x: Tensor) -> Tensor:
        rounded = self.round(x)
        heads = [layer(rounded).unflatten(-1, (2, N // 2)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        return nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def exported(network: nn.Module, *shape: int, **more: Tensor) -> fx.GraphModule:
    """The graph of a network at `net`, its first input [batch, *shape]; inputs in `more` have no batch."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network

        def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
            result: Tensor = self.net(x, *rest)
            return result

    batch = torch.export.Dim("batch", min=1, max=64)
    inputs = (torch.randn(2, *shape), *more.values())
    dynamic: Any = ({0: batch}, *([tuple(None for _ in more)] if more else []))
    with torch.no_grad():
        program = torch.export.export(Step().eval(), inputs, dynamic_shapes=dynamic)
    return flatten(program.module(), ["x", *more])


def in_forms(graph: fx.GraphModule, precision: str) -> fx.GraphModule:
    half = graph if precision == "fp32" else to_precision(graph, precision, convert_weights=False)
    return to_tensorrt_forms(half, precision)


def onnx_of(forms: fx.GraphModule) -> ir.Model:
    inputs = list(rewrite.placeholders(forms))
    model = to_onnx(forms, inputs, ["y"], TRANSLATIONS, transpose_weights=False)
    convert_constants(model)
    return model


@torch.no_grad()
def relative_error(found: fx.GraphModule, expected: fx.GraphModule, *inputs: Tensor) -> float:
    (a,), (b,) = found(*inputs), expected(*inputs)
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("weights", "activations"), PAIRS)
def test_in_float32_a_form_computes_what_the_program_does(weights: str, activations: str | None) -> None:
    graph, x = exported(Attention(weights, activations), 8, K), torch.randn(2, 8, K)
    # By token x is divided and then rounded by a constant, which may turn a tie; else sums are taken in another order.
    assert relative_error(in_forms(graph, "fp32"), graph, x) < (2e-3 if activations == "token" else 1e-5)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(("weights", "activations"), PAIRS)
def test_in_half_precision_it_is_as_near_as_rounding_is_to_it(
    weights: str, activations: str | None, precision: str
) -> None:  # fmt: skip
    """A value by a rounding edge may fall on its other side, so the bound is what rounding itself costs."""
    graph, x = exported(Attention(weights, activations), 8, K), torch.randn(2, 8, K)
    rounding = relative_error(graph, exported(Attention(weights, None), 8, K), x)
    bits = {"fp16": 2e-3, "bf16": 1.6e-2}[precision]
    assert relative_error(in_forms(graph, precision), graph, x) < bits + rounding


@pytest.mark.parametrize(("weights", "activations"), PAIRS)
def test_the_onnx_promises_every_layer(weights: str, activations: str | None) -> None:
    graph = exported(Attention(weights, activations), 8, K)
    found = promises(onnx_of(in_forms(graph, "fp16")))
    expected = {"token": "int8", "nvfp4": "fp4"}.get(activations or "", activations)
    assert [(each.activations, each.weights) for each in found] == [(expected, STORED[weights])] * 3
    assert [each.node.rpartition("/")[0] for each in found] == ["net.q", "net.k", "net.v"]
    assert count_quantised(graph) == len(found)


def test_equal_layers_that_become_one_are_one_promise() -> None:
    network = Attention("int4", None)
    network.k.load_state_dict(network.q.state_dict())
    graph = exported(network, 8, K)
    assert len(promises(onnx_of(in_forms(graph, "fp16")))) == count_quantised(graph) == 2


@pytest.mark.parametrize(
    ("activations", "operator"), [("int8", "trt_round"), ("token", "trt_round"), ("nvfp4", "trt_nvfp4")]
)
def test_layers_that_read_one_tensor_share_its_rounding(activations: str, operator: str) -> None:
    weights = "nvfp4" if activations == "nvfp4" else "int8"
    forms = in_forms(exported(Attention(weights, activations), 8, K), "fp16")
    assert sum(node.target is getattr(OPS, operator).default for node in forms.graph.nodes) == 1


def test_nvfp4_layers_multiply_matrices() -> None:
    forms = in_forms(exported(Attention("nvfp4", "nvfp4"), 8, K), "fp16")
    products = [node for node in forms.graph.nodes if rewrite.is_call(node, aten.linear.default)]
    assert [len(rewrite.shape_of(node)) for node in products] == [2, 2, 2]


class Alone(nn.Module):
    def __init__(self, weights: str, activations: str | None, largest: float = 4.0, **kwargs: Any) -> None:
        super().__init__()
        self.round, self.layer = Rounding(activations, largest), Layer(weights, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(self.round(x))
        return result


@given(st.sampled_from(["int8", "fp8"]), st.sampled_from([64, 200, 3072]), st.floats(1e-4, 1e3), st.floats(1e-4, 1e3))
def test_no_scale_makes_a_product_leave_fp16(kind: str, columns: int, largest: float, gain: float) -> None:
    """All activations at their end of the range, all weights of one sign: the largest sum that there is."""
    network = Alone(kind, kind, largest, columns=columns, rows=4, gain=gain)
    network.layer.q.copy_(torch.full_like(network.layer.q.float(), 127 if kind == "int8" else 448))
    graph = exported(network, columns)
    forms = in_forms(graph, "fp16")
    x = torch.full((1, columns), min(largest, 6e4))
    product = next(node for node in forms.graph.nodes if rewrite.is_call(node, aten.linear.default))
    seen = {}

    class Look(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n.name] = result = super().run_node(n)
            return result

    with torch.no_grad():
        Look(forms).run(x)
    assert torch.isfinite(seen[product.name]).all()
    assert seen[product.name].abs().min() > 2**-14  # and loses no bits at the other end


class Stepwise(nn.Module):
    """A scale that comes by step, as a table's row."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, Layer(kind)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        result: Tensor = self.layer(OPS.quantize_dequantize(x, scale, None, self.kind))
        return result


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_scale_that_is_an_input_is_divided_by_before_and_multiplied_after(kind: str) -> None:
    graph = exported(Stepwise(kind), 8, K, scale=torch.tensor(0.03))
    forms = in_forms(graph, "fp16")
    model = onnx_of(forms)
    (rounding,) = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert rounding.inputs[1] is not None
    assert float(rounding.inputs[1].const_value.numpy()) == 1.0  # type: ignore[union-attr]
    for scale in (0.01, 0.03):
        x, row = torch.randn(2, 8, K), torch.tensor(scale)
        # int8 and fp8 round by at most 1/2 of 1/127 and by 1/16, of the largest and of each value.
        assert relative_error(forms, graph, x, row) < {"int8": 5e-3, "fp8": 4e-2}[kind]


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.round, self.after = Rounding("int8"), Rounding("int8", 8.0)
        weight = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0)) / 72**0.5
        q, scale = formats.quantize_int8(weight)
        self.q, self.scale, self.bias = nn.Buffer(q), nn.Buffer(scale), nn.Parameter(torch.linspace(-1, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        weight = OPS.dequantize(self.q, self.scale, None, "int8", 0)
        y = nn.functional.conv2d(self.round(x), weight, self.bias, stride=2, padding=1)
        result: Tensor = self.after(y)
        return result


def test_a_convolution_keeps_its_geometry_and_the_rounding_after_it() -> None:
    graph, x = exported(Convolution(), 8, 12, 12), torch.randn(2, 8, 12, 12)
    assert relative_error(in_forms(graph, "fp32"), graph, x) < 1e-2  # a sum by an edge of the rounding after it
    model = onnx_of(in_forms(graph, "fp16"))
    (found,) = promises(model)
    assert (found.activations, found.weights) == ("int8", "int8")
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == 2


class Attention8(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (Rounding("fp8") for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(self.q(x), self.k(x * 0.5), self.v(x))


def test_attention_between_fp8_values_is_written_out() -> None:
    graph, x = exported(Attention8(), 2, 16, 8), torch.randn(2, 2, 16, 8)
    forms = in_forms(graph, "fp16")
    # The shares are rounded to E4M3 as well: to 1/16 of themselves, in no one direction.
    assert relative_error(forms, graph, x) < 4e-2
    found = promises(onnx_of(forms))
    assert [(each.activations, each.weights, each.stored) for each in found] == [("fp8", "fp8", False)] * 2
    assert count_quantised(graph) == 0


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.round, self.layer = Rounding("int8"), Layer("nvfp4")

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(self.round(x))
        return result


def test_formats_that_it_would_multiply_in_half_precision_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"net\.layer: TensorRT would multiply nvfp4 weights and int8"):
        in_forms(exported(Mixed(), 8, K), "fp16")


def test_other_layers_are_left_alone() -> None:
    graph = exported(nn.Sequential(nn.Linear(K, N), nn.GELU()), 8, K)
    assert str(in_forms(graph, "fp32").graph) == str(graph.graph)


def test_small_global_scales_keep_their_bits_in_fp16() -> None:
    """Activations of 1e-3: fp16 would hold their global scale with three bits."""
    graph = exported(Alone("nvfp4", "nvfp4", largest=1e-3), 8, K)
    x = 3e-4 * torch.randn(4, 8, K)
    rewrite.attribute(graph, "net.layer.bias").data.zero_()
    rounding = relative_error(graph, exported(Alone("nvfp4", None), 8, K), x)
    assert relative_error(in_forms(graph, "fp16"), graph, x) < rounding


def test_weights_are_converted_as_they_are_written() -> None:
    network = nn.Linear(256, 256)
    graph = exported(network, 8, 256)
    model = onnx_of(in_forms(graph, "fp16"))
    (product,) = [node for node in model.graph if node.op_type == "MatMul"]
    held = product.inputs[1]
    assert held is not None
    assert held.name == "net.weight.float16.transposed"
    assert isinstance(held.const_value, ir.LazyTensor)
    np.testing.assert_array_equal(held.const_value.numpy(), network.weight.detach().half().numpy().T)
    assert "net.weight" not in model.graph.initializers
