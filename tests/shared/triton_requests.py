"""Requests to a deployed model, as tritonclient takes them: the same for HTTP and gRPC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

_DATATYPES = {"int64": "INT64", "float32": "FP32", "object": "BYTES"}


def inputs(
    client: ModuleType,
    seeds: Sequence[int],
    *,
    label: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> list[Any]:
    """A sample a seed. client: tritonclient.http or tritonclient.grpc. label, steps: the inputs of these names."""
    values = {"seed": np.array(seeds, np.int64), **(conditions or {})}
    if label is not None:
        values["label"] = np.array([text.encode() for text in label], object)
    if steps is not None:
        values["steps"] = np.array(steps, np.int64)
    return [_input(client, name, np.asarray(value)) for name, value in values.items()]


def _input(client: ModuleType, name: str, value: Any) -> Any:
    value = value.reshape(-1, 1) if value.ndim == 1 else value
    tensor = client.InferInput(name, list(value.shape), _DATATYPES[str(value.dtype)])
    tensor.set_data_from_numpy(value)
    return tensor
