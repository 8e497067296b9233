"""What the artifact is worth: its samples against the uncompressed bundle's, and its speed and memory beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..compiler.calibrate import example_conditions
from ..compiler.execute import run
from ..compiler.program import Program
from ..runtime import load
from ..runtime.manifest import Contract

_BATCH = 24


def sample(bundle: Path, count: int, threads: int | None, progress: Callable[[float], None]) -> NDArray[np.float32]:
    """`count` samples, seeds 0 and up, labels in turn: the same requests whatever the bundle."""
    parts = []
    with load(bundle, threads=threads) as session:
        contract = session.manifest.contract
        conditions = eval_conditions(contract, count)
        size = min(_BATCH, contract.batch.max)
        for start in range(0, count, size):
            stop = min(start + size, count)
            given = {name: values[start:stop] for name, values in conditions.items()}
            parts.append(session.generate(conditions=given, seed=list(range(start, stop))))
            progress(stop / count)
    return np.concatenate(parts)


def sample_program(program: Program, count: int, progress: Callable[[float], None]) -> NDArray[np.float32]:
    """The same requests, answered by the program in PyTorch."""
    conditions = eval_conditions(program.contract, count)
    parts = []
    for start in range(0, count, _BATCH):
        stop = min(start + _BATCH, count)
        given = {name: values[start:stop] for name, values in conditions.items()}
        parts.append(run(program, given, list(range(start, stop))).numpy())
        progress(stop / count)
    return np.concatenate(parts)


def eval_conditions(contract: Contract, count: int) -> dict[str, NDArray[Any]]:
    """Labels 0, 1, ... in turn; noise for conditions that are no labels."""
    conditions = example_conditions(contract, count)
    for condition in contract.conditions:
        if condition.classes is not None:
            conditions[condition.name] = (np.arange(count) % condition.classes).astype(condition.dtype)
    return conditions


def eval_labels(contract: Contract, count: int) -> NDArray[np.int64] | None:
    """The labels of `sample`, where the model has classes."""
    for condition in contract.conditions:
        if condition.classes is not None:
            return np.arange(count) % condition.classes
    return None
