"""The same OpenVINO model in forms that its CPU plugin runs faster; each gives the same numbers up to rounding.

Found by the profile of the glyph DiT (12 blocks, 160 wide, batch 16, one thread of a CPU with AMX).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset14 as op

from .forms import constant

_ROUNDED_ROW = (64, 32, 16, 8)  # widths of the identity that rounds states


def fold_zero_points(model: ov.Model) -> None:
    """Rounded activations of linear layers as integer * scale, without the zero point, which goes into the bias.

    x W + b = (x - low) W + (b + low W), low being the value of integer 0. OpenVINO would subtract low W after each
    multiplication, on its own: 278 us for a layer [2048, 160] x [160, 160], 136 us so. A convolution keeps its zero
    point, because its padding is the real 0.
    """
    for rounding in _nodes(model, "FakeQuantize"):
        low = float(_value(rounding.input_value(3)).item())
        layers = [user for user in _users(rounding) if _is_linear(user.get_node()) and user.get_index() == 0]
        if low == 0.0 or not layers:
            continue
        ends = [rounding.input_value(index) for index in (1, 2)]
        high = float(_value(rounding.input_value(4)).item())
        levels = rounding.get_attributes()["levels"]
        lifted = op.fake_quantize(rounding.input_value(0), *ends, constant(0.0), constant(high - low), levels=levels)
        lifted.set_friendly_name(f"{rounding.friendly_name}/lifted")
        for user in layers:
            user.replace_source_output(lifted.output(0))
            _add_to_bias(user.get_node(), low)


def _is_linear(node: Any) -> bool:
    return node.get_type_name() == "MatMul" and _real_weight(node.input_value(1)) is not None


def _add_to_bias(layer: Any, low: float) -> None:
    weight = _real_weight(layer.input_value(1))
    assert weight is not None
    axis = 1 if layer.get_attributes()["transpose_b"] else 0
    offset = low * weight.sum(axis, dtype=np.float64)
    users = _users(layer)
    after = users[0].get_node() if len(users) == 1 else None
    if after is not None and after.get_type_name() == "Add":
        bias = after.input(1 - users[0].get_index())
        if bias.get_source_output().get_node().get_type_name() == "Constant":
            value = _value(bias.get_source_output())
            if value.size == offset.size:
                bias.replace_source_output(constant(value + offset.reshape(value.shape)).output(0))
                return
    added = op.add(layer, constant(offset))
    for user in users:
        user.replace_source_output(added.output(0))


def spell_out_attention(model: ov.Model) -> None:
    """Attention without a mask as softmax(scale q kᵀ) v over k as it lies.

    OpenVINO does so itself, but moves k to [..., dim, tokens] first, as a separate operator: 214 us a block, 54 us so.
    """
    for attention in _nodes(model, "ScaledDotProductAttention"):
        q, k, v = (attention.input_value(index) for index in range(3))
        width = q.get_partial_shape()[len(q.get_partial_shape()) - 1]
        if attention.get_input_size() > 3 or attention.get_attributes()["causal"] or width.is_dynamic:
            continue
        scaled = op.multiply(q, constant(1 / math.sqrt(width.get_length())))
        weights = op.softmax(op.matmul(scaled, k, False, True), axis=-1)
        result = op.matmul(weights, v, False, False)
        result.set_friendly_name(attention.friendly_name)
        attention.output(0).replace(result.output(0))


def round_states(model: ov.Model, exact: Collection[str]) -> None:
    """Multiply every result but those called `exact` by an identity: for models that run in bf16.

    OpenVINO keeps in fp32 what lies between the last multiplications and a result. A state of the cache is the
    difference of two block outputs, so every residual sum before it would be in fp32, and be converted for each
    layer: 37.9 ms a step, 34.5 ms so, and the samples are as near to the program's (47.0 dB, against 47.5 dB). The
    identity rounds the state to bf16, and nothing else.
    """
    for result in model.get_results():
        source = result.input_value(0)
        shape = source.get_partial_shape()
        row = _row(shape)
        if result.friendly_name in exact or row is None or source.get_element_type() != ov.Type.f32:
            continue
        rows = op.reshape(source, constant([-1, row], np.int64), special_zero=False)
        rounded = op.matmul(rows, constant(np.eye(row)), False, True)
        sizes = [-1, *(dim.get_length() for dim in list(shape)[1:])]
        whole = op.reshape(rounded, constant(sizes, np.int64), special_zero=False)
        names = source.get_tensor().get_names()
        source.get_tensor().set_names(set())
        whole.output(0).get_tensor().set_names(names)
        result.input(0).replace_source_output(whole.output(0))
    model.validate_nodes_and_infer_types()


def _row(shape: Any) -> int | None:
    """A width that divides the value whatever the batch is; None if there is none."""
    inner = list(shape)[1:]
    if not inner or any(dim.is_dynamic for dim in inner):
        return None
    size = math.prod(dim.get_length() for dim in inner)
    return next((row for row in _ROUNDED_ROW if size % row == 0), None)


def _nodes(model: ov.Model, kind: str) -> Iterator[Any]:
    return (node for node in model.get_ordered_ops() if node.get_type_name() == kind)


def _users(node: Any) -> list[Any]:
    """The inputs that read the node's only output."""
    return list(node.output(0).get_target_inputs())


def _value(output: Any) -> NDArray[Any]:
    value: NDArray[Any] = output.get_node().data
    return value


def _real_weight(output: Any) -> NDArray[Any] | None:
    """What a stored INT8 weight stands for; None if it is none."""
    node = output.get_node()
    if node.get_type_name() == "Constant":
        return _value(output)
    if node.get_type_name() == "Convert":
        stored = _real_weight(node.input_value(0))
        return None if stored is None else stored.astype(np.float32)
    if node.get_type_name() == "Multiply":
        stored, scale = (_real_weight(node.input_value(index)) for index in range(2))
        return None if stored is None or scale is None else stored * scale
    return None
