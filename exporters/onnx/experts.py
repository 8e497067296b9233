"""Tokens to experts and back, as ONNX: translations of `kernels.experts` for the tables of targets."""

from __future__ import annotations

from math import prod
from typing import Any

from onnxscript import opset23 as op


def take_tokens(x: Any, places: Any) -> Any:
    """Whole rows of [B * N, D]: gathering within each sample would go element by element, and the wrong way round."""
    _, tokens, width = x.shape
    first = op.Mul(op.Range(_integer(0), op.Squeeze(_samples(places)), _integer(1)), _integer(tokens))
    lines: Any = op.Transpose(op.Add(places, op.Reshape(first, _integers(-1, 1, 1))), perm=[1, 0, 2])
    return op.Gather(op.Reshape(x, _integers(-1, width)), op.Reshape(lines, _integers(places.shape[1], -1)), axis=0)


def add_by_product(x: Any, places: Any, rows: Any) -> Any:
    """A product with a matrix of zeros and ones, tokens by rows."""
    tokens, slots = int(x.shape[1]), prod(places.shape[1:])
    columns = op.Reshape(places, _integers(-1, 1, slots))
    ones: Any = op.Expand(_real(1.0, x), op.Shape(columns))
    zeros: Any = op.Expand(_real(0.0, x), op.Concat(_samples(places), _integers(tokens, slots), axis=0))
    matrix = op.ScatterElements(zeros, columns, ones, axis=1)
    return op.Add(x, op.MatMul(matrix, _by_sample(places, rows)))


def add_one_by_one(x: Any, places: Any, rows: Any) -> Any:
    """Element by element: what long sequences take, whose matrix would be large."""
    added = _by_sample(places, rows)
    lines = op.Reshape(places, _integers(-1, prod(places.shape[1:]), 1))
    return op.ScatterElements(x, op.Expand(lines, op.Shape(added)), added, axis=1, reduction="add")


def _by_sample(places: Any, rows: Any) -> Any:
    """[E, B * C, D] -> [B, E * C, D]"""
    _, experts, each = places.shape
    width = rows.shape[2]
    turned: Any = op.Transpose(op.Reshape(rows, _integers(experts, -1, each, width)), perm=[1, 0, 2, 3])
    return op.Reshape(turned, _integers(-1, experts * each, width))


def _samples(places: Any) -> Any:
    """[1]: the batch. Of `places` alone, so that a runtime sees where two of them are the same."""
    return op.Shape(places, start=0, end=1)


def _integers(*values: Any) -> Any:
    return op.Constant(value_ints=[int(value) for value in values])


def _integer(value: Any) -> Any:
    return op.Constant(value_int=int(value))


def _real(value: float, like: Any) -> Any:
    number: Any = op.Constant(value_float=value)
    return op.Cast(number, to=int(like.dtype))
