"""ONNX's own reference evaluator: what a standard operator gives, in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

Array = NDArray[Any]


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def evaluate(nodes: Sequence[onnx.NodeProto], inputs: dict[str, Array]) -> list[Array]:
    """The outputs of the last node, by opset 23."""
    taken = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in inputs.items()
    ]
    given_back = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in nodes[-1].output]
    graph = helper.make_graph(list(nodes), "reference", taken, given_back)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    return list(ReferenceEvaluator(model).run(None, inputs))
