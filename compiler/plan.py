"""The cache plan: which sites each step computes and which it takes from earlier steps.

A site's reuse value is `base + sum_k reuse[step, k] * state_k`. A step that computes the site refreshes the states:
state_0 = value - base, state_k = (state_{k-1} - its old value) * refresh[step, k-1]. This one form covers copies (one
state, no base), residual deltas (one state, base = the region's input) and Taylor predictors of any order (backward
differences).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import PassError

Mask = tuple[bool, ...]


@dataclass(frozen=True)
class Site:
    """A value of the graph that may be taken from earlier steps.

    value: node name. base: node name that the reuse value is added to (residual delta), or None (copy).
    computed: [steps], True where the step computes the value.
    reuse: float32 [steps, states]. refresh: float32 [steps, states - 1].
    correction: float32 [steps, 2, channels], or None: what is reused is multiplied by the first row and has the second
    added. Channels are the value's second dimension where it has four or more, else its last.
    """

    name: str
    value: str
    base: str | None
    computed: Mask
    reuse: NDArray[np.float32]
    refresh: NDArray[np.float32]
    correction: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if not self.computed or not self.computed[0]:
            raise PassError(
                f"cache site {self.name!r}: step 0 reuses a value that no step has computed; step 0 must compute it"
            )

    @property
    def states(self) -> int:
        return int(self.reuse.shape[1])


@dataclass(frozen=True)
class Plan:
    """Sites in graph order. Without sites every step runs the whole graph."""

    steps: int
    sites: tuple[Site, ...] = ()

    def __post_init__(self) -> None:
        for site in self.sites:
            if len(site.computed) != self.steps:
                raise PassError(
                    f"cache site {site.name!r} plans {len(site.computed)} steps, the sampler has {self.steps}; "
                    "plan it again"
                )

    def mask(self, step: int) -> Mask:
        """Per site: does this step compute it."""
        return tuple(site.computed[step] for site in self.sites)

    @property
    def masks(self) -> tuple[Mask, ...]:
        """The distinct rows, in order of first use: one graph variant each."""
        return tuple(dict.fromkeys(self.mask(step) for step in range(self.steps)))


def every(interval: int, steps: int, warmup: int = 0, last: int = 0) -> Mask:
    """True for the first `warmup` steps (at least one), then for one step in `interval`, and for the `last` steps.

    The first step after the warm-up that counts as computed is the last warm-up step, as in TaylorSeer (2503.06923).
    """
    warmup = max(warmup, 1)
    return tuple(i < warmup or (i - warmup + 1) % interval == 0 or i >= steps - last for i in range(steps))


def taylor(computed: Sequence[bool], order: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(reuse [T, order+1], refresh [T, order]) of the Taylor predictor of that order on backward differences.

    With s steps since the last computed one, value = sum_k state_k * s^k / k!; state_k is divided by the gap between
    the last two computed steps, for every k (TaylorSeer, 2503.06923). Orders that have not enough computed steps behind
    them count 0.
    """
    steps = len(computed)
    reuse = np.zeros((steps, order + 1), np.float32)
    refresh = np.zeros((steps, order), np.float32)
    seen: list[int] = []
    for step, full in enumerate(computed):
        if full:
            for k in range(1, order + 1):
                refresh[step, k - 1] = 1.0 / (step - seen[-1]) if len(seen) >= k else 0.0
            seen.append(step)
            continue
        since = step - seen[-1]
        for k in range(min(order, len(seen) - 1) + 1):
            reuse[step, k] = since**k / math.factorial(k)
    return reuse, refresh
