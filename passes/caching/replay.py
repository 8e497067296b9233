"""Threshold rules over steps: the same code decides ahead of time, from a recorded indicator, and in the tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...compiler.plan import Mask


def accumulate(
    changes: Sequence[float],
    threshold: float,
    *,
    polynomial: Sequence[float] = (1.0, 0.0),
    warmup: int = 1,
    last: int = 1,
) -> Mask:
    """TeaCache's rule (2411.19108): a step computes once the changes since the last computed one add up to `threshold`.

    changes: [T], of the indicator from the step before; polynomial: highest power first, of what each counts. The first
    `warmup` and the `last` steps compute, and set the sum to zero.
    """
    computed, total = [], 0.0
    for step, change in enumerate(changes):
        total += float(np.polyval(polynomial, change))
        computes = step < max(warmup, 1) or step >= len(changes) - last or total >= threshold
        if computes:
            total = 0.0
        computed.append(computes)
    return tuple(computed)


def hold(distance: NDArray[np.floating], threshold: float, *, warmup: int = 1, last: int = 0, longest: int = 0) -> Mask:
    """ERTACache's replay (2508.21091): a step reuses what the last computed step has while it is near enough.

    distance: [T, T], entry (i, m) of reusing in step m what step i computed, relative. longest: most steps in a row
    that reuse, 0 for any number.
    """
    computed: list[bool] = []
    leader = 0
    for step in range(len(distance)):
        computes = (
            step < max(warmup, 1)
            or step >= len(distance) - last
            or distance[leader, step] >= threshold
            or (longest > 0 and step - leader > longest)
        )
        leader = step if computes else leader
        computed.append(computes)
    return tuple(computed)
