"""Small ONNX graphs written by hand: what a test gives TensorRT when the exporter is not what it looks at."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
INT8, INT4 = TensorProto.INT8, TensorProto.INT4
FP8, FP4 = TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1
_NUMPY: dict[int, Any] = {
    HALF: np.float16, FLOAT: np.float32, INT8: np.int8, TensorProto.INT64: np.int64, FP8: ml_dtypes.float8_e4m3fn,
    FP4: ml_dtypes.float4_e2m1fn, INT4: ml_dtypes.int4,
}  # fmt: skip


class Graph:
    """Nodes in order; a call adds one and gives the name of its result (or of all of them)."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.constants: list[onnx.TensorProto] = []

    def input(self, name: str, kind: int, *shape: int | str) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def constant(self, value: Any, kind: int) -> str:
        array = np.asarray(value).astype(_NUMPY[kind])
        name = f"constant_{len(self.constants)}"
        raw = _packed(array) if kind in (FP4, INT4) else array.tobytes()
        self.constants.append(helper.make_tensor(name, kind, array.shape, raw, raw=True))
        return name

    def __call__(
        self, op: str, *inputs: str, name: str = "", results: int = 1, domain: str = "", **attributes: Any
    ) -> Any:
        name = name or f"{op}_{len(self.nodes)}"
        made = [f"{name}:{index}" for index in range(results)]
        self.nodes.append(helper.make_node(op, list(inputs), made, name=name, domain=domain, **attributes))
        return made[0] if results == 1 else made

    def output(self, value: str, kind: int) -> None:
        name = f"y{len(self.outputs)}"
        for node in self.nodes:
            node.output[:] = [name if each == value else each for each in node.output]
            node.input[:] = [name if each == value else each for each in node.input]
        self.outputs.append(helper.make_tensor_value_info(name, kind, None))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "graph", self.inputs, self.outputs, self.constants)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def ir(self) -> ir.Model:
        return ir.serde.deserialize_model(self.model())


def _packed(array: NDArray[Any]) -> bytes:
    codes = array.reshape(-1).view(np.uint8) & 0xF
    return bytes((codes[0::2] | (codes[1::2] << 4)).tobytes())


def int8_weight(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """[N, K] -> (int8 [N, K], scale [N])."""
    scale = np.abs(weight).max(1) / 127
    return np.round(weight / scale[:, None]).astype(np.int8), scale


def fp8_weight(weight: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """[N, K] -> (E4M3 [N, K], scale [N])."""
    scale = np.abs(weight).max(1) / 448
    return (weight / scale[:, None]).astype(ml_dtypes.float8_e4m3fn), scale


def int4_weight(weight: NDArray[np.float32], group: int) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """[N, K] -> (int4 [N, K], scale [N, K/group])."""
    blocks = weight.reshape(weight.shape[0], -1, group)
    scale = np.abs(blocks).max(-1) / 7
    return np.round(blocks / scale[..., None]).reshape(weight.shape).astype(ml_dtypes.int4), scale


def nvfp4_weight(weight: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any], np.float32]:
    """[N, K] -> (E2M1 [N, K], E4M3 scale [N, K/16], scale [])."""
    whole = np.float32(np.abs(weight).max() / (6 * 448))
    blocks = weight.reshape(weight.shape[0], -1, 16)
    scale = np.clip(np.abs(blocks).max(-1) / (6 * whole), 2**-9, 448).astype(ml_dtypes.float8_e4m3fn)
    values = blocks / (scale.astype(np.float32) * whole)[..., None]
    return values.reshape(weight.shape).astype(ml_dtypes.float4_e2m1fn), scale, whole


def shapes(name: str, *sizes: int, batches: tuple[int, int, int]) -> dict[str, Any]:
    """A profile for the one input `name` [batch, *sizes]."""
    return {name: tuple((batch, *sizes) for batch in batches)}
