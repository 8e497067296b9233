"""The cache plan: which sites each step computes and which it takes from earlier steps.

A site's reuse value is `base + sum_k reuse[step, k] * state_k`. A step that computes the site refreshes the states:
state_0 = value - base, state_k = (state_{k-1} - its old value) * refresh[step, k-1]. This one form covers copies (one
state, no base), residual deltas (one state, base = the region's input), Taylor predictors of any order (backward
differences), and blocks that a step leaves out (no state, base = the region's input). A rolling site refreshes at every
step and keeps what the last steps used, computed or predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .errors import PassError

Mask = tuple[bool, ...]


@dataclass(frozen=True)
class Site:
    """A value of the graph that may be taken from earlier steps.

    value: node name. base: node name that the reuse value is added to (residual delta), or None (copy).
    computed: [steps], True where the step computes the value.
    reuse: float32 [steps, states]. refresh: float32 [steps, states - 1], which a rolling site does not read.
    correction: float32 [steps, 2, channels], or None: what is reused is multiplied by the first row and has the second
    added. Channels are the value's second dimension where it has four or more, else its last.
    overlaps: names of sites without whose insides this one has no value, or no base. A step that reuses one of them and
    not this one leaves this one alone: it runs what it needs of the network, and the states stay what they were.
    rolling: every step leaves state_0 = what it used for the value, less the base, and state_k = the old state_{k-1};
    they are one tensor [B, states, ...], since not every engine gives an input back under another name.
    network: node of the graph that is added to the reuse value, or None: a small network's result. The graph returns it
    after its own results and has the states it reads for inputs; a step that computes the site runs none of it.
    """

    name: str
    value: str
    base: str | None
    computed: Mask
    reuse: NDArray[np.float32]
    refresh: NDArray[np.float32]
    correction: NDArray[np.float32] | None = None
    overlaps: tuple[str, ...] = ()
    rolling: bool = False
    network: str | None = None

    def __post_init__(self) -> None:
        if self.states == 0 and self.base is None:
            raise PassError(f"cache site {self.name!r} has neither states nor a base; give it one of them")
        if not self.computed or (self.states and not self.computed[0]):
            raise PassError(
                f"cache site {self.name!r}: step 0 reuses a value that no step has computed; step 0 must compute it"
            )

    @property
    def states(self) -> int:
        return int(self.reuse.shape[1])


Rule = Literal["compare", "accumulate", "history"]


@dataclass(frozen=True)
class Predicate:
    """Sites that some steps decide about while they run, all alike, by a score that the graph emits.

    A step reuses them if the score of every sample is `below`: a batch goes by its largest, so no sample is reused
    against its own score. With rel(a, b) = mean |a - b| / mean |b| of each sample, in float32, the score is

    compare: rel(indicator now, indicator at the last computed step), as in FBCache and DBCache;
    accumulate: the sum of polynomial(rel(indicator now, indicator a step before)) since the last computed step, as in
    TeaCache (2411.19108);
    history: of a site's own states, rel(last computed, computed before that) for each step between the two, times the
    steps since the last computed one; the largest of its sites.

    name: of the decision. sites: names. open: [steps], True where the step decides; elsewhere the sites' rows hold, and
    where it decides they say what is to be expected. indicator: node name, whose value less that of `base` (where
    given) is compared; None for a history. polynomial: highest power first, fitted to changes of at most `fitted_to`:
    a larger one is computed. longest: most steps in a row that may reuse, 0 for any number.
    """

    name: str
    sites: tuple[str, ...]
    rule: Rule
    below: float
    open: Mask
    indicator: str | None = None
    base: str | None = None
    polynomial: tuple[float, ...] = (1.0, 0.0)
    fitted_to: float = math.inf
    longest: int = 0


@dataclass(frozen=True)
class Plan:
    """Sites in graph order, and in the order of their sites what decides about some of them at run time.

    Without sites every step runs the whole graph. span: most reusing steps in a row whose network runs as one batch,
    ahead of them; above 1 only where it reads nothing that changes from one to the next. The samples are the same.
    """

    steps: int
    sites: tuple[Site, ...] = ()
    predicates: tuple[Predicate, ...] = ()
    span: int = 1

    def __post_init__(self) -> None:
        for site in self.sites:
            if len(site.computed) != self.steps:
                raise PassError(
                    f"cache site {site.name!r} plans {len(site.computed)} steps, the sampler has {self.steps}; "
                    "plan it again"
                )
        for predicate in self.predicates:
            self._check(predicate)

    def _check(self, predicate: Predicate) -> None:
        if len(predicate.open) != self.steps or predicate.open[0]:
            raise PassError(
                f"decision {predicate.name!r}: needed one entry for each of {self.steps} steps, and step 0 decided"
            )
        for site in self.sites_of(predicate):
            if site.states != 1 or site.correction is not None:
                raise PassError(
                    f"cache site {site.name!r} has {site.states} states or a correction, and decision "
                    f"{predicate.name!r} leaves open which steps compute it; needed one state and no coefficients by "
                    "step: use predictor copy or delta without correction, or freeze=true"
                )

    def sites_of(self, predicate: Predicate) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.name in predicate.sites)

    def mask(self, step: int) -> Mask:
        """Per site: does this step compute it; of what the step decides itself, what is to be expected."""
        return tuple(site.computed[step] for site in self.sites)

    def decided(self, mask: Mask, predicate: Predicate, computes: bool) -> Mask:
        """The mask with the predicate's sites computed or reused."""
        return tuple(
            computes if site.name in predicate.sites else bit for site, bit in zip(self.sites, mask, strict=True)
        )

    def computes(self, mask: Mask, predicate: Predicate) -> bool:
        return all(bit for site, bit in zip(self.sites, mask, strict=True) if site.name in predicate.sites)

    def open(self, step: int) -> tuple[Predicate, ...]:
        """What this step decides itself."""
        return tuple(predicate for predicate in self.predicates if predicate.open[step])

    def possible(self, step: int) -> tuple[Mask, ...]:
        """The masks that the step may run with; that which computes most comes first."""
        found = []
        for bits in product((True, False), repeat=len(self.open(step))):
            mask = self.mask(step)
            for predicate, bit in zip(self.open(step), bits, strict=True):
                mask = self.decided(mask, predicate, bit)
            found.append(mask)
        return tuple(found)

    def emits(self, mask: Mask) -> Mask:
        """Per site: does a step with this mask leave its states behind. One that computes it does, but for overlaps."""
        reused = {site.name for site, computed in zip(self.sites, mask, strict=True) if not computed}
        return tuple(
            computed and reused.isdisjoint(site.overlaps) for site, computed in zip(self.sites, mask, strict=True)
        )

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(first step, count) of two or more steps that run as one batch: alike, in a row, none decided at run time."""
        found: list[tuple[int, int]] = []
        for mask, steps in groupby(range(self.steps), lambda i: None if self.open(i) else self.mask(i)):
            own = list(steps)
            if mask is not None and not any(mask):
                found += [(own[at], len(own[at : at + self.span])) for at in range(0, len(own), self.span)]
        return tuple((first, count) for first, count in found if count > 1)

    @property
    def masks(self) -> tuple[Mask, ...]:
        """The distinct rows that may occur, in order of first use: one graph variant each."""
        return tuple(dict.fromkeys(mask for step in range(self.steps) for mask in self.possible(step)))


def left_out(name: str, value: str, base: str, computed: Mask) -> Site:
    """A site without states: where a step does not compute it, its value is its base."""
    none = np.zeros((len(computed), 0), np.float32)
    return Site(name, value, base, computed, none, none)


def every(interval: int, steps: int, warmup: int = 0, last: int = 0) -> Mask:
    """True for the first `warmup` steps (at least one), then for one step in `interval`, and for the `last` steps.

    The first step after the warm-up that counts as computed is the last warm-up step, as in TaylorSeer (2503.06923).
    """
    warmup = max(warmup, 1)
    return tuple(i < warmup or (i - warmup + 1) % interval == 0 or i >= steps - last for i in range(steps))


def copies(steps: int, states: int) -> NDArray[np.float32]:
    """[steps, states], the coefficients by which every step reuses state 0 as it is."""
    reuse = np.zeros((steps, states), np.float32)
    reuse[:, 0] = 1.0
    return reuse


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
