"""Several callers' requests as one: generated together, answered one by one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .engines import Array
from .errors import DcompileError
from .manifest import Batch, Contract
from .request import Label, read_conditions, read_seeds
from .session import Session

Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Request:
    """What one caller asks for: a seed for each of its samples, labels or conditions as for `Session.generate`."""

    seeds: Sequence[int]
    labels: Sequence[Label] | None = None
    conditions: Mapping[str, Any] | None = None


def generate_merged(session: Session, requests: Sequence[Request | DcompileError]) -> list[Samples | DcompileError]:
    """For each request its samples [B, *sample shape], or what is wrong with it; a wrong one does not hinder others.

    All samples of sound requests are one batch, in order; fewer than the bundle takes are filled up with copies of the
    last, which nobody gets. A request that is an error already is its own answer.
    """
    contract = session.manifest.contract
    answers: list[Samples | DcompileError] = []
    sound: list[tuple[int, dict[str, Array], list[int]]] = []
    for index, request in enumerate(requests):
        if isinstance(request, DcompileError):
            answers.append(request)
            continue
        try:
            sound.append((index, *_checked(contract, request)))
            answers.append(np.empty(0, np.float32))  # until it is generated
        except DcompileError as error:
            answers.append(error)
    if not sound:
        return answers
    seeds = [seed for _, _, own in sound for seed in own]
    given = {name: np.concatenate([own[name] for _, own, _ in sound]) for name in sound[0][1]}
    missing = max(contract.batch.min - len(seeds), 0)
    try:
        samples = session.generate(
            conditions={name: np.concatenate([values, *[values[-1:]] * missing]) for name, values in given.items()},
            seed=seeds + seeds[-1:] * missing,
        )
    except DcompileError as error:  # an engine failed, or together they are more than the bundle takes
        for index, _, _ in sound:
            answers[index] = error
        return answers
    start = 0
    for index, _, own in sound:
        answers[index] = samples[start : start + len(own)]
        start += len(own)
    return answers


def _checked(contract: Contract, request: Request) -> tuple[dict[str, Array], list[int]]:
    """(conditions, seeds) of a request, whose batch alone may be less than the bundle's least."""
    conditions = read_conditions(contract, request.labels, request.conditions)
    alone = replace(contract, batch=Batch(1, contract.batch.max))
    return conditions, read_seeds(alone, list(request.seeds), conditions)
