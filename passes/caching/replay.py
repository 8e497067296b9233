"""Threshold rules over recorded steps: which of them compute, decided ahead of time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...compiler.plan import Mask


def hold(distance: NDArray[np.floating], threshold: float, *, warmup: int = 1, last: int = 0) -> Mask:
    """ERTACache's replay (2508.21091): a step reuses what the last computed step has while it is near enough.

    distance: [T, T], entry (i, m) of reusing in step m what step i computed, relative.
    """
    computed: list[bool] = []
    leader = 0
    for step in range(len(distance)):
        computes = step < max(warmup, 1) or step >= len(distance) - last or distance[leader, step] >= threshold
        leader = step if computes else leader
        computed.append(computes)
    return tuple(computed)


def history(
    distance: NDArray[np.floating], threshold: float, *, warmup: int = 2, last: int = 0, longest: int = 0
) -> Mask:
    """The rule "history" of plan.Predicate, of one site: how much it changed a step when it was last computed.

    distance as for `hold`. longest: most steps in a row that reuse, 0 for any number.
    """
    computed = [0]
    for step in range(1, len(distance)):
        rate = distance[computed[-2], computed[-1]] / (computed[-1] - computed[-2]) if len(computed) > 1 else np.inf
        since = step - computed[-1]
        if (
            step < max(warmup, 2)
            or step >= len(distance) - last
            or rate * since >= threshold
            or (longest > 0 and since > longest)
        ):
            computed.append(step)
    return tuple(step in computed for step in range(len(distance)))
