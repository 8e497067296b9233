"""The ONNX given to TensorRT, evaluated on the CPU: against onnx's own evaluator, and the formats in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx_graphs import FLOAT, FP4, FP8, HALF, Graph, fp8_weight, nvfp4_weight

from dcompile.exporters.onnx.reference import open_reference
from dcompile.quant import formats

K, N = 64, 32
BF16 = onnx.TensorProto.BFLOAT16


class TRT_FP4DynamicQuantize(OpRun):
    """As NVIDIA describes it, on numpy and ml_dtypes: nothing of ours."""

    op_domain = "trt"

    def _run(self, x: NDArray[Any], whole: NDArray[Any], axis: int, block_size: int, scale_type: int) -> Any:
        assert (axis, block_size, scale_type) == (-1, 16, 17)
        blocks = x.reshape(*x.shape[:-1], -1, 16)
        amax = np.abs(blocks).max(-1)
        wanted = np.where(amax == 0, 1, amax / (6 * whole))
        scales = np.clip(wanted, 2**-9, 448).astype(ml_dtypes.float8_e4m3fn)
        values = blocks / (scales.astype(np.float32) * whole)[..., None]
        return np.clip(values, -6, 6).reshape(x.shape).astype(ml_dtypes.float4_e2m1fn), scales


def saved(graph: Graph, folder: Path) -> Path:
    path = folder / "graph.onnx"
    onnx.save(graph.model(), path)
    return path


def nvfp4_layer(kind: int = FLOAT, whole: float = 4 / 2688) -> Graph:
    graph = Graph()
    scale = graph.constant(whole, kind)
    attributes: dict[str, Any] = {"axis": -1, "block_size": 16, "scale_type": 17}
    x = graph.input("x", kind, "M", K)
    values, scales = graph("TRT_FP4DynamicQuantize", x, scale, domain="trt", results=2, **attributes)
    real = graph("DequantizeLinear", values, graph("DequantizeLinear", scales, scale), axis=-1, block_size=16)
    weight = np.random.default_rng(0).standard_normal((N, K)).astype(np.float32)
    stored, weight_scales, weight_whole = nvfp4_weight(weight)
    steps = graph("DequantizeLinear", graph.constant(weight_scales, FP8), graph.constant(weight_whole, FLOAT))
    factor = graph("DequantizeLinear", graph.constant(stored, FP4), steps, axis=-1, block_size=16)
    if kind != FLOAT:
        factor = graph("Cast", factor, to=kind)
    graph.output(graph("MatMul", real, graph("Transpose", factor, perm=[1, 0])), kind)
    return graph


def test_nvfp4_is_what_onnx_itself_computes(tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((8, K)).astype(np.float32)
    path = saved(nvfp4_layer(), tmp_path)
    evaluator = ReferenceEvaluator(onnx.load(path), new_ops=[TRT_FP4DynamicQuantize])
    expected: Any = next(iter(evaluator.run(None, {"x": x})))
    found = open_reference(path).run({"x": x})["y0"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # sums in another order


def test_in_half_precision_too(tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((8, K)).astype(np.float16)
    found = open_reference(saved(nvfp4_layer(HALF), tmp_path)).run({"x": x})["y0"]
    evaluator = ReferenceEvaluator(nvfp4_layer().model(), new_ops=[TRT_FP4DynamicQuantize])
    expected: Any = next(iter(evaluator.run(None, {"x": x.astype(np.float32)})))
    assert found.dtype == np.float16
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()  # the global scale has 11 bits


@pytest.fixture(scope="module")
def rounding(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """x [M, 16] rounded to NVFP4 under a global scale of 1: blocks scaled by amax / 6."""
    graph = Graph()
    one = graph.constant(1.0, FLOAT)
    attributes: dict[str, Any] = {"axis": -1, "block_size": 16, "scale_type": 17}
    made = graph("TRT_FP4DynamicQuantize", graph.input("x", FLOAT, "M", 16), one, domain="trt", results=2, **attributes)
    real = graph("DequantizeLinear", made[0], graph("DequantizeLinear", made[1], one), axis=-1, block_size=16)
    graph.output(graph("Identity", real), FLOAT)
    return open_reference(saved(graph, tmp_path_factory.mktemp("rounding")))


@given(arrays(np.float32, (3, 16), elements=st.floats(-3000, 3000, width=32)))
def test_rounding_to_nvfp4_is_bit_for_bit_that_of_the_program(rounding: Any, x: NDArray[np.float32]) -> None:
    expected = formats.round_nvfp4(torch.from_numpy(x), torch.tensor(1.0)).numpy()
    np.testing.assert_array_equal(rounding.run({"x": x})["y0"], expected)


def test_ties_go_to_the_even_code(rounding: Any) -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    block = np.array([[*ties, *(-tie for tie in ties), 6.0, 0.0]], np.float32)
    found = rounding.run({"x": block})["y0"][0]
    assert found[:7].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert np.abs(found[7:14]).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


def test_fp8_is_taken_as_it_is(tmp_path: Path) -> None:
    """ONNX Runtime's own fusion of Q/DQ would leave it with an operator that has no kernel."""
    graph = Graph()
    x, scale, zero = graph.input("x", FLOAT, "M", K), graph.constant(0.01, FLOAT), graph.constant(0, FP8)
    real = graph("DequantizeLinear", graph("QuantizeLinear", x, scale, zero), scale, zero)
    stored, scales = fp8_weight(np.random.default_rng(0).standard_normal((N, K)).astype(np.float32))
    factor = graph("DequantizeLinear", graph.constant(stored, FP8), graph.constant(scales, FLOAT), axis=0)
    graph.output(graph("MatMul", real, graph("Transpose", factor, perm=[1, 0])), FLOAT)
    path = saved(graph, tmp_path)
    x_value = np.random.default_rng(1).standard_normal((8, K)).astype(np.float32)
    found = open_reference(path).run({"x": x_value})["y0"]
    rounded = formats.round_fp8(torch.from_numpy(x_value), torch.tensor(0.01)).numpy()
    np.testing.assert_allclose(found, rounded @ (stored.astype(np.float32) * scales[:, None]).T, rtol=1e-4, atol=1e-4)
    assert list(tmp_path.iterdir()) == [path]


class Bf16Graph(Graph):
    def bf16(self, value: Any) -> str:
        array = np.asarray(value).astype(ml_dtypes.bfloat16)
        name = f"constant_{len(self.constants)}"
        self.constants.append(onnx.helper.make_tensor(name, BF16, array.shape, array.tobytes(), raw=True))
        return name


def test_bfloat16_is_rounded_after_every_operator(tmp_path: Path) -> None:
    graph = Bf16Graph()
    x = graph("Cast", graph.input("x", FLOAT, "M", K), to=BF16)
    y = graph("Mul", graph("Add", x, graph.bf16(np.linspace(-1, 1, K))), graph.bf16(1.7))
    y = graph("Sub", graph("Reshape", y, graph.constant([-1], onnx.TensorProto.INT64)), graph.bf16(0.3))
    graph.output(graph("Cast", y, to=FLOAT), FLOAT)
    x_value = np.random.default_rng(1).standard_normal((8, K)).astype(np.float32)
    found = open_reference(saved(graph, tmp_path)).run({"x": x_value})["y0"]
    torch_x, row = torch.from_numpy(x_value).bfloat16(), torch.linspace(-1, 1, K, dtype=torch.float64).bfloat16()
    seventeen, three = (torch.tensor(value).bfloat16() for value in (1.7, 0.3))
    expected = ((torch_x + row) * seventeen).reshape(-1) - three
    np.testing.assert_array_equal(found, expected.float().numpy())


def test_weights_beside_the_file_stay_there(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    onnx.save(nvfp4_layer().model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    x = np.random.default_rng(1).standard_normal((8, K)).astype(np.float32)
    within = open_reference(saved(nvfp4_layer(), tmp_path)).run({"x": x})["y0"]
    onnx.save(nvfp4_layer().model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    np.testing.assert_array_equal(open_reference(path).run({"x": x})["y0"], within)
    assert path.with_suffix(".reference.onnx").stat().st_size < 20_000
