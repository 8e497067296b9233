"""Static schedules beside plan.every: which steps compute, as masks over the steps from noise (step 0) to sample."""

from __future__ import annotations

import cmath
import itertools
from collections.abc import Collection

from ...compiler.errors import PassError
from ...compiler.plan import Mask, every


def interval_to_the_end(steps: int, gap: int) -> Mask:
    """Counted from the last step, which is computed, as in FORA (2407.01425); step 0 is computed too."""
    return tuple(i == 0 or (steps - 1 - i) % gap == 0 for i in range(steps))


def intervals_within(fixed: Mask, most: int) -> list[Mask]:
    """The steps that are fixed, then beside them for each warm-up the smallest interval that `most` steps allow."""
    steps = len(fixed)
    found = [fixed]
    for warmup in range(1, steps):
        rows = (every(gap, steps, warmup) for gap in range(1, steps + 1))
        beside = (tuple(a or b for a, b in zip(fixed, row, strict=True)) for row in rows)
        found += itertools.islice((row for row in beside if sum(row) <= most), 1)
    return list(dict.fromkeys(found))


def at(steps: int, computed: Collection[int], source: str) -> Mask:
    """Exactly these steps. Raises PassError for one that the sampler has not, or without step 0."""
    if 0 not in computed:
        raise PassError(f"{source} leaves step 0 out, which has nothing to reuse; begin with 0")
    if beyond := sorted(step for step in computed if not 0 <= step < steps):
        raise PassError(f"{source} has step {beyond[0]}, the sampler has 0 to {steps - 1}; give others")
    return tuple(i in computed for i in range(steps))


def quadratic(steps: int, count: int, center: float, power: float) -> Mask:
    """`count` steps, denser around step `center`: DeepCache's non-uniform schedule (2312.00858, official pipelines).

    Points between -center and steps - center are spaced evenly on the scale of their `power`-th root. That of a
    negative number is complex, and the published schedules depend on it: only the real part of what comes back counts.
    The power is lowered until `count` different steps remain. Raises PassError where none does that.
    """
    while power > 1:
        low, high = complex(-center) ** (1 / power), complex(steps - center) ** (1 / power)
        points = [low + (high - low) * k / count for k in range(count + 1)]
        found = sorted({int((point**power).real) + int(center) for point in points})
        computed = {0, *found[1:-1]}
        if len(computed) == count and not cmath.isnan(low):
            return at(steps, computed, "the non-uniform schedule")
        power -= 0.02
    raise PassError(
        f"no non-uniform schedule has {count} of {steps} steps around step {center:g}; give fewer, or another center"
    )
