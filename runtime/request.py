"""What a caller asks for -> arrays the engines take, or one line that says what to change."""

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import numpy as np

from .engines import Array
from .errors import RequestError, did_you_mean
from .manifest import Condition, Contract

Label = str | int


def read_conditions(
    contract: Contract, labels: Label | Sequence[Label] | None, conditions: Mapping[str, Any] | None
) -> dict[str, Array]:
    """Every condition of the contract as an array [B, *shape] of its dtype; one B for all."""
    given = dict(conditions or {})
    known = {each.name: each for each in contract.conditions}
    if labels is not None:
        labelled = [each for each in contract.conditions if each.classes is not None and each.name not in given]
        if len(labelled) != 1:
            hint = f"needed 1; use conditions={{name: values}}, {did_you_mean('', known)}"
            raise RequestError(f"labels: {len(labelled)} conditions that are not given otherwise take labels, {hint}")
        several = [labels] if isinstance(labels, str | int | np.integer) else labels
        given[labelled[0].name] = np.array([_class_number(labelled[0], each) for each in several], dtype=np.int64)
    for name in given:
        if name not in known:
            raise RequestError(f"no condition is called {name!r}; {did_you_mean(name, known)}")
    for name, condition in known.items():
        if name not in given:
            also = " or labels=[...]" if condition.classes is not None else ""
            raise RequestError(f"condition {name!r} is missing: give conditions={{{name!r}: ...}}{also}")
        given[name] = _values(condition, given[name])
    if len({len(values) for values in given.values()}) > 1:
        sizes = ", ".join(f"{name} has {len(values)}" for name, values in given.items())
        raise RequestError(f"conditions of one request must have one batch: {sizes}")
    return given


def as_labels(contract: Contract, texts: Sequence[str]) -> list[Label]:
    """Labels as typed: what looks like a number is one, unless a class has it for a name."""
    names = {name for condition in contract.conditions for name in condition.labels or ()}
    return [int(text) if text.isdecimal() and text not in names else text for text in texts]


def read_seeds(contract: Contract, seed: int | Sequence[int], conditions: Mapping[str, Array]) -> list[int]:
    """One seed a sample: `seed`, `seed` + 1, ..., or the list given, whose length is B where no condition sets it."""
    batch = next((len(values) for values in conditions.values()), None)
    if isinstance(seed, int | np.integer):
        seeds = [int(seed) + i for i in range(1 if batch is None else batch)]
    else:
        seeds = [index(each) for each in seed]
    batch = len(seeds) if batch is None else batch
    least, most = contract.batch.min, contract.batch.max
    if not least <= batch <= most:
        hint = "split the request, or compile for a larger batch" if batch > most else "ask for more samples at once"
        raise RequestError(f"batch {batch}: this bundle takes {least}..{most}; {hint}")
    if len(seeds) != batch:
        raise RequestError(f"{len(seeds)} seeds for a batch of {batch}: give one seed for each sample, or a single int")
    if not all(0 <= each < 2**64 for each in seeds):
        raise RequestError(f"seed {next(each for each in seeds if not 0 <= each < 2**64)} is outside 0..2**64 - 1")
    return seeds


def _class_number(condition: Condition, label: Label) -> int:
    if isinstance(label, int | np.integer):
        return int(label)
    if not isinstance(label, str):
        raise RequestError(f"label {label!r} of {condition.name!r}: needed a name or a whole number")
    if condition.labels is None:
        hint = f"give a number below {condition.classes}"
        raise RequestError(f"label {label!r}: {condition.name!r} has no label names in this bundle; {hint}")
    if label not in condition.labels:
        hint = did_you_mean(label, condition.labels)
        raise RequestError(f"no label of {condition.name!r} is called {label!r}; {hint}")
    return condition.labels.index(label)


def _values(condition: Condition, values: Any) -> Array:
    """Checked and cast to [B, *condition.shape]."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise RequestError(f"condition {condition.name!r}: rows of unequal length; needed one array") from error
    if not np.can_cast(array.dtype, condition.dtype, "same_kind"):
        raise RequestError(f"condition {condition.name!r}: dtype {array.dtype}, needed {condition.dtype}")
    if array.ndim == 0 or array.shape[1:] != condition.shape:
        needed = ", ".join(["batch", *map(str, condition.shape)])
        raise RequestError(f"condition {condition.name!r}: shape {list(array.shape)}, needed [{needed}]")
    if condition.classes is not None:
        for wrong in array[(array < 0) | (array >= condition.classes)].flat:
            last = condition.classes - 1
            raise RequestError(f"label {wrong} of {condition.name!r}: this bundle knows {condition.classes}, 0..{last}")
    return np.asarray(array, dtype=condition.dtype, order="C")
