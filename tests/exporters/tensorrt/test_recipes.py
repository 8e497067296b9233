"""Each form of a quantised layer as ONNX, built to a real engine: TensorRT compiles it to the kernel that it promises.

And the forms that look right and fall back to half precision: the check refuses every one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx_graphs import FLOAT, FP4, FP8, HALF, INT4, INT8, Graph, fp8_weight, int4_weight, int8_weight, nvfp4_weight

from dcompile.exporters.legality import PORTABLE
from dcompile.exporters.tensorrt.builder import FOR_RTX, build_engine
from dcompile.exporters.tensorrt.graph import promises
from dcompile.exporters.tensorrt.layers import Layer, check_promises, count_kernels
from dcompile.runtime.errors import EngineError

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")

M, K, N = 128, 256, 512
X_SCALE = 0.03
ADA, BLACKWELL = ("8.9", "12.0"), ("12.0",)
TURING = ("7.5", *PORTABLE)


def weight() -> NDArray[np.float32]:
    values: NDArray[np.float32] = np.random.default_rng(0).standard_normal((N, K)).astype(np.float32)
    return values / np.float32(K**0.5)


def build(graph: Graph, folder: Path, capabilities: tuple[str, ...]) -> tuple[Layer, ...]:
    path = folder / "graph.onnx"
    onnx.save(graph.model(), path)
    return build_engine("test", path, folder / "graph.engine", capabilities, [], FOR_RTX).layers


def built_as_promised(
    graph: Graph, folder: Path, capabilities: tuple[str, ...], count: int = 1
) -> dict[str, int]:  # fmt: skip
    """Build the graph, hold it to what its Q/DQ promise, and count its kernels."""
    layers = build(graph, folder, capabilities)
    promised = promises(graph.ir())
    assert len(promised) == count
    check_promises("test", layers, promised)
    return count_kernels(layers, ("batch",))


def rounded(graph: Graph, x: str, scale: float, kind: int, kept: float) -> str:
    """x / scale as integers, times `kept`, in half precision."""
    zero, real = graph.constant(0, kind), graph("Cast", x, to=FLOAT)
    integers = graph("QuantizeLinear", real, graph.constant(scale, FLOAT), zero)
    return str(graph("DequantizeLinear", integers, graph.constant(kept, HALF), zero))


def product(graph: Graph, x: str, kind: int, scale: float, *, name: str = "net.fc/linear") -> str:
    """x @ W.T of plain stored values, then the real scales, in float32."""
    stored, scales = (int8_weight if kind == INT8 else fp8_weight)(weight())
    plain = graph("DequantizeLinear", graph.constant(stored, kind), graph.constant(1.0, HALF))
    y = graph("MatMul", x, graph("Transpose", plain, perm=[1, 0]), name=name)
    real = graph.constant(scale * scales, FLOAT)
    return str(graph("Mul", graph("Cast", y, to=FLOAT), real))


def finish(graph: Graph, y: str) -> Graph:
    y = graph("Add", y, graph.constant(np.zeros(N), FLOAT))
    graph.output(graph("Cast", y, to=HALF), HALF)
    return graph


def nvfp4_factor(graph: Graph) -> str:
    """W.T from a two-level DequantizeLinear."""
    values, scales, whole = nvfp4_weight(weight())
    steps = graph("DequantizeLinear", graph.constant(scales, FP8), graph.constant(whole, FLOAT))
    real = graph("DequantizeLinear", graph.constant(values, FP4), steps, axis=-1, block_size=16)
    return str(graph("Transpose", graph("Cast", real, to=HALF), perm=[1, 0]))


def nvfp4_rounded(graph: Graph, x: str) -> str:
    whole = graph.constant(4 / 2688, HALF)
    attributes: dict[str, Any] = {"axis": -1, "block_size": 16, "scale_type": 17}
    values, scales = graph("TRT_FP4DynamicQuantize", x, whole, domain="trt", results=2, **attributes)
    steps = graph("DequantizeLinear", scales, whole)
    return str(graph("DequantizeLinear", values, steps, axis=-1, block_size=16))


# --- the recipes ---


def test_r1_nvfp4_weights_and_activations(tmp_path: Path) -> None:
    graph = Graph()
    x = nvfp4_rounded(graph, graph.input("x", HALF, M, K))
    graph.output(graph("MatMul", x, nvfp4_factor(graph), name="net.fc/linear"), HALF)
    kernels = built_as_promised(graph, tmp_path, BLACKWELL)
    assert kernels == {"gemm fp4": 1, "quantize": 1}


def test_r1_one_rounding_serves_several_layers(tmp_path: Path) -> None:
    graph = Graph()
    x = nvfp4_rounded(graph, graph.input("x", HALF, M, K))
    for name in "qkv":
        graph.output(graph("MatMul", x, nvfp4_factor(graph), name=f"net.attn.{name}/linear"), HALF)
    kernels = built_as_promised(graph, tmp_path, BLACKWELL, count=3)
    assert kernels["quantize"] == 1


def test_r1_in_three_dimensions_only_moves_scales_about(tmp_path: Path) -> None:
    """Why the exporter flattens: two more kernels for the same product."""
    flat, deep = Graph(), Graph()
    for graph, shape in ((flat, (M, K)), (deep, (2, M // 2, K))):
        x = nvfp4_rounded(graph, graph.input("x", HALF, *shape))
        graph.output(graph("MatMul", x, nvfp4_factor(graph), name="net.fc/linear"), HALF)
    few, more = (sum(built_as_promised(graph, tmp_path, BLACKWELL).values()) for graph in (flat, deep))
    assert more == few + 2


def test_r2_nvfp4_weights_alone_stay_in_four_bits(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input("x", HALF, M, K)
    graph.output(graph("MatMul", x, nvfp4_factor(graph), name="net.fc/linear"), HALF)
    kernels = built_as_promised(graph, tmp_path, BLACKWELL)
    assert kernels["gemm fp16"] == 1  # multiplied in half precision, dequantised by a kernel of its own
    assert (tmp_path / "graph.engine").stat().st_size < 2 * N * K


@pytest.mark.parametrize(("kind", "capabilities", "expected"), [(INT8, TURING, "int8"), (FP8, ADA, "fp8")])
def test_r3_static_scales(kind: int, capabilities: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    graph = Graph()
    x = rounded(graph, graph.input("x", HALF, M, K), X_SCALE, kind, kept=2**-9)
    finish(graph, product(graph, x, kind, X_SCALE * 2**9))
    kernels = built_as_promised(graph, tmp_path, capabilities)
    assert kernels == {f"gemm {expected}": 1, "pointwise": 2}  # rounding before, scales and bias after


def convolution() -> Graph:
    graph = Graph()
    x = rounded(graph, graph.input("x", HALF, 1, 32, 16, 16), X_SCALE, INT8, kept=2**-9)
    stored = np.random.default_rng(0).integers(-127, 128, (32, 32, 3, 3))
    plain = graph("DequantizeLinear", graph.constant(stored, INT8), graph.constant(1.0, HALF))
    y = graph("Cast", graph("Conv", x, plain, name="net.conv/conv2d", pads=[1, 1, 1, 1]), to=FLOAT)
    y = graph("Mul", y, graph.constant(np.full((32, 1, 1), 0.01), FLOAT))
    graph.output(graph("Cast", y, to=HALF), HALF)
    return graph


def test_r3_int8_convolution(tmp_path: Path) -> None:
    assert built_as_promised(convolution(), tmp_path, PORTABLE)["conv int8"] == 1


def test_r3_the_oldest_gpus_convolve_in_half_precision(tmp_path: Path) -> None:
    layers = build(convolution(), tmp_path, ("7.5",))
    with pytest.raises(EngineError, match=r"net\.conv is promised in int8, TensorRT compiled conv in fp16"):
        check_promises("test", layers, promises(convolution().ir()))


def test_r4_int8_with_a_scale_for_each_token(tmp_path: Path) -> None:
    graph = Graph()
    x = graph("Cast", graph.input("x", HALF, M, K), to=FLOAT)
    axes = np.array([-1])
    amax = graph("ReduceMax", graph("Abs", x), graph.constant(axes, onnx.TensorProto.INT64), keepdims=1)
    token = graph("Max", amax, graph.constant(1e-12, FLOAT))
    unit = rounded(graph, graph("Div", x, token), 1 / 127, INT8, kept=2**-9)
    y = product(graph, unit, INT8, 2**9 / 127)
    finish(graph, graph("Mul", y, token))
    assert built_as_promised(graph, tmp_path, TURING)["gemm int8"] == 1


@pytest.mark.parametrize(("kind", "capabilities", "expected"), [(INT8, TURING, "int8"), (FP8, ADA, "fp8")])
def test_r4_a_scale_that_comes_by_step(
    kind: int, capabilities: tuple[str, ...], expected: str, tmp_path: Path
) -> None:  # fmt: skip
    graph = Graph()
    x, scale = graph("Cast", graph.input("x", HALF, M, K), to=FLOAT), graph.input("scale", FLOAT, 1, 1)
    unit = rounded(graph, graph("Div", x, scale), 1.0, kind, kept=2**-9)
    finish(graph, graph("Mul", product(graph, unit, kind, 2**9), scale))
    assert built_as_promised(graph, tmp_path, capabilities)[f"gemm {expected}"] == 1


def test_r5_the_form_for_cpus_is_refused_by_name(tmp_path: Path) -> None:
    """DynamicQuantizeLinear and MatMulInteger are what ONNX Runtime wants; TensorRT takes neither."""
    graph = Graph()
    x = graph("DynamicQuantizeLinear", graph.input("x", FLOAT, M, K), name="net.fc/round", results=3)
    graph.output(graph("DequantizeLinear", *x), FLOAT)
    with pytest.raises(Exception, match=r"does not take operator DynamicQuantizeLinear of net\.fc"):
        build(graph, tmp_path, PORTABLE)


def test_r6_attention_in_fp8_is_one_kernel(tmp_path: Path) -> None:
    graph = Graph()
    q, k, v = (graph.input(name, HALF, 2, 4, 64, 64) for name in "qkv")
    keys = graph("Transpose", k, perm=[0, 1, 3, 2])
    scores = graph("MatMul", *(rounded(graph, x, 0.02, FP8, kept=0.02) for x in (q, keys)), name="net.attn/scores")
    shares = graph("Softmax", graph("Mul", scores, graph.constant(0.125, HALF)), axis=-1)
    factors = rounded(graph, shares, 1 / 448, FP8, kept=1 / 448), rounded(graph, v, 0.02, FP8, kept=0.02)
    graph.output(graph("MatMul", *factors, name="net.attn/values"), HALF)
    kernels = built_as_promised(graph, tmp_path, ADA, count=2)
    assert kernels["attention fp8"] == 1
    assert not any(kernel.startswith("gemm") for kernel in kernels)


@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_r7_int4_weights_alone(group: int, tmp_path: Path) -> None:
    graph = Graph()
    stored, scales = int4_weight(weight(), group)
    held = (graph.constant(stored, INT4), graph.constant(scales, HALF))
    real = graph("DequantizeLinear", *held, axis=1, block_size=group)
    x = graph.input("x", HALF, M, K)
    graph.output(graph("MatMul", x, graph("Transpose", real, perm=[1, 0]), name="net.fc/linear"), HALF)
    assert built_as_promised(graph, tmp_path, PORTABLE) == {"gemm fp16 x int4": 1}


@pytest.mark.parametrize(("kind", "capabilities", "expected"), [(INT8, PORTABLE, "int8"), (FP8, ADA, "fp8")])
def test_r7_eight_bit_weights_alone(kind: int, capabilities: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    graph = Graph()
    stored, scales = (int8_weight if kind == INT8 else fp8_weight)(weight())
    real = graph("DequantizeLinear", graph.constant(stored, kind), graph.constant(scales, FLOAT), axis=0)
    factor = graph("Transpose", graph("Cast", real, to=HALF), perm=[1, 0])
    graph.output(graph("MatMul", graph.input("x", HALF, M, K), factor, name="net.fc/linear"), HALF)
    assert built_as_promised(graph, tmp_path, capabilities) == {f"gemm fp16 x {expected}": 1}


# --- forms that build and then run in half precision ---


def run_time_scale(graph: Graph) -> str:
    x, scale, zero = graph.input("x", HALF, M, K), graph.input("scale", HALF), graph.constant(0, INT8)
    x = graph("DequantizeLinear", graph("QuantizeLinear", x, scale, zero), scale, zero)
    stored, scales = int8_weight(weight())
    plain = graph("DequantizeLinear", graph.constant(stored, INT8), graph.constant(scales, HALF), axis=0)
    return str(graph("MatMul", x, graph("Transpose", plain, perm=[1, 0]), name="net.fc/linear"))


def fp8_activations_with_nvfp4_weights(graph: Graph) -> str:
    x = rounded(graph, graph.input("x", HALF, M, K), X_SCALE, FP8, kept=X_SCALE)
    return str(graph("MatMul", x, nvfp4_factor(graph), name="net.fc/linear"))


def int8_activations_with_nvfp4_weights(graph: Graph) -> str:
    x = rounded(graph, graph.input("x", HALF, M, K), X_SCALE, INT8, kept=X_SCALE)
    return str(graph("MatMul", x, nvfp4_factor(graph), name="net.fc/linear"))


def static_fp4_activations(graph: Graph) -> str:
    x, blocks = graph.input("x", HALF, M, K), graph.constant(np.full((M, K // 16), 0.5), HALF)
    zero = graph.constant(np.zeros((M, K // 16)), FP4)
    values = graph("QuantizeLinear", x, blocks, zero, axis=1, block_size=16)
    real = graph("DequantizeLinear", values, blocks, zero, axis=1, block_size=16)
    return str(graph("MatMul", real, nvfp4_factor(graph), name="net.fc/linear"))


FALLBACKS: list[Callable[[Graph], str]] = [
    run_time_scale, fp8_activations_with_nvfp4_weights, int8_activations_with_nvfp4_weights, static_fp4_activations
]  # fmt: skip


@pytest.mark.parametrize("form", FALLBACKS, ids=lambda form: form.__name__)
def test_a_silent_fallback_is_found(form: Callable[[Graph], str], tmp_path: Path) -> None:
    graph = Graph()
    graph.output(form(graph), HALF)
    layers = build(graph, tmp_path, BLACKWELL)  # TensorRT says nothing
    with pytest.raises(EngineError, match=r"engine 'test': net\.fc is promised in (int8|fp4), TensorRT compiled gemm"):
        check_promises("test", layers, promises(graph.ir()))
