"""What may be asked of the cache pass: its options, their defaults by method, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from ...compiler.errors import RecipeError
from ...runtime.errors import did_you_mean
from .methods import COMMON, METHODS

DECIDED = ("compare", "accumulate", "history")  # by each step, at run time, unless frozen
# schedules that recorded runs decide
MEASURED = ("segments", "hold", "learned", "learned_pairs", "searched", "routed", *DECIDED)
_ORDERS = {"copy": 0, "delta": 0, "history": 0, "taylor1": 1, "taylor2": 2}
_LEAST = {
    "interval": 1,
    "warmup": 1,
    "last": 0,
    "front": 0,
    "back": 0,
    "budget": 1,
    "states": 1,
    "trials": 1,
    "span": 1,
}


@dataclass(frozen=True)
class CacheOptions:
    """The site, the schedule, the predictor and the corrector of a cache.

    method: sets the defaults of all that follows.
    site: "range" is the run of blocks between the first `front` and the last `back` of each block list; "block" each of
    them; "runs" runs of neighbours among `blocks`; "stages" all but the first `front` blocks before step `turn`, all
    but the last `back` from there on (a quarter each where they are None); "branch" each attention or feed-forward
    before its gate; "cut" the U-Net value that enters the `branch` + 1 last up layers; "encoder" all that a U-Net's
    decoder reads of its encoder, or what the last `back` blocks of another network are given; "output" what the network
    predicts; "auto" is the "cut" before the last stage for a network with stages, else "range".
    schedule: "interval" computes the first `warmup` and the `last` steps and one in `interval`; "to_the_end" one in
    `interval`, counted from the last step; "keys" the steps in `keys`; "quadratic" `budget` steps, denser around
    `center` (by `power`); "segments" the `budget` steps that dynamic programming finds on recorded runs, by `distance`
    (bounded: segments of half to twice the interval; each: every site for itself; union: so many of the worst sites add
    their steps to the feed-forwards after them); "hold" reuses while it is nearer than `threshold` on recorded runs;
    "compare", "accumulate" and "history" leave it to each step, after the first `warmup` and before the `last`, to
    decide at run time whether its score reaches `threshold`: how much the residual of the first `front` blocks changed
    since the last computed step, the sum of the changes of the first block's modulated input since then (counted by a
    polynomial that `fit` finds), or how much the sites themselves changed a step when they were last computed (freeze:
    decided ahead of time by what most recorded runs decide; longest: most steps in a row that reuse).
    "learned" the evaluations whose gates a training of `runs` trajectories leaves open, a `share` of all;
    "learned_pairs" so at every second step, the others computing everything. "searched" the best of `trials` masks that
    a genetic search tries, whose operations are at most a `share` of all that the sites cost. "routed" a `share` of all
    evaluations: the first half of the steps, then those that routers, trained on `runs` trajectories, value most.
    apart: each block list has its own front and back, and decides for itself; else they count as one.
    budget: number of computed steps; without it, one in `interval`.
    predictor: "copy" of the value; "delta" (value minus the region's input, added to the current input); "taylor1",
    "taylor2": extrapolation from the last computed steps (TaylorSeer, 2503.06923), of the delta for a range of blocks,
    else of the value; "history": a mix of the last `states` values, computed or predicted, by coefficients for each
    step that least squares on recorded runs has; "net": a copy (with two `states`, taylor1 of the value) plus what a
    small network makes of it and of the region's input, trained on `runs` runs of the program.
    correct: multiply and add to what is copied (of a delta: to the delta), by step and channel, as least squares on
    recorded runs has it.
    noise_aware: where a quantize pass follows and the predictor is taylor1 or taylor2, the order of each site is
    lowered by as many as quantisation moves the one that predicts best on recorded runs: of values that change little,
    differences are mostly noise.
    resize: a step that reuses the output goes less far the worse it is, and the others make up for it, so that all of
    them go as far as before (ERTACache; samplers with one output a step).
    compensate: each step's sample gets the variance that it has without the cache, and the quantize pass that follows
    (Q&C).
    prior: so many times the first noise are added to the sample before each step below timestep 500 (Faster Diffusion:
    0.003).
    span: most reusing steps in a row that run as one batch, where their network does not read the sample (site
    "encoder"): Faster Diffusion's parallel decoder. The samples are the same.
    """

    method: str = "interval"
    interval: int | None = None
    warmup: int | None = None
    last: int | None = None
    predictor: Literal["copy", "delta", "taylor1", "taylor2", "history", "net"] | None = None
    states: int | None = None
    site: Literal["auto", "range", "block", "runs", "stages", "branch", "cut", "encoder", "output"] | None = None
    front: int | None = None
    back: int | None = None
    schedule: (
        Literal[
            "interval",
            "to_the_end",
            "keys",
            "quadratic",
            "segments",
            "hold",
            "learned",
            "learned_pairs",
            "searched",
            "routed",
            "compare",
            "accumulate",
            "history",
        ]
        | None
    ) = None
    budget: int | None = None
    threshold: float | None = None
    distance: Literal["l1", "mse", "cosine"] | None = None
    keys: tuple[int, ...] | None = None
    blocks: tuple[str, ...] | None = None
    branch: int | None = None
    turn: int | None = None
    center: float | None = None
    power: float | None = None
    each: bool | None = None
    union: int | None = None
    bounded: bool | None = None
    correct: bool | None = None
    runs: int | None = None
    share: float | None = None
    freeze: bool | None = None
    longest: int | None = None
    apart: bool | None = None
    fit: bool | None = None
    noise_aware: bool | None = None
    resize: bool | None = None
    compensate: bool | None = None
    prior: float | None = None
    trials: int | None = None
    span: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(f"cache_steps: no method is called {self.method!r}; {did_you_mean(self.method, METHODS)}")
        defaults = {**COMMON, **METHODS[self.method].options}
        for each in fields(self):
            if getattr(self, each.name) is None and each.name in defaults:
                object.__setattr__(self, each.name, defaults[each.name])
        for option, least in _LEAST.items():
            if (value := getattr(self, option)) is not None and value < least:
                raise RecipeError(f"cache_steps: {option} is {value}, needed {least} or more")
        if self.site in ("branch", "cut", "encoder") and self.predictor == "delta":
            raise RecipeError(
                f"cache_steps: predictor 'delta' needs site 'range' (a {self.site} has no input of the same shape); "
                "use copy or taylor1"
            )
        if self.correct and self.predictor not in ("copy", "delta"):
            raise RecipeError(f"cache_steps: correct needs predictor 'copy' or 'delta', found {self.predictor!r}")
        if self.schedule == "searched" and self.predictor not in ("copy", "delta"):
            raise RecipeError(
                f"cache_steps: schedule 'searched' needs predictor 'copy' or 'delta', found {self.predictor!r}"
            )
        if self.resize and self.site != "output":
            raise RecipeError(f"cache_steps: resize needs site 'output', whose error it goes by; found {self.site!r}")
        if self.schedule in ("hold", *DECIDED) and self.threshold is None:
            raise RecipeError(f"cache_steps: schedule {self.schedule!r} needs a threshold, as in threshold=0.1")

    @property
    def weighs_noise(self) -> bool:
        """Whether the order may be lowered: not a network's, which has as many states for inputs."""
        return bool(self.noise_aware) and self.predictor in ("taylor1", "taylor2")

    @property
    def votes(self) -> bool:
        """Whether steps decide at run time, or would but for freeze: a history of many sites is replayed instead."""
        return self.schedule in DECIDED and not (self.schedule == "history" and self.freeze)

    @property
    def states_kept(self) -> int:
        """By the predictors that take `states`."""
        return self.states or (4 if self.predictor == "history" else 1)

    @property
    def order(self) -> int:
        """Of the Taylor expansion that predicts, or that a network adds to."""
        return self.states_kept - 1 if self.predictor == "net" else _ORDERS[self.predictor or "copy"]

    def count(self, steps: int) -> int:
        """How many of so many steps the budget lets compute; without one, one in `interval`."""
        return min(self.budget or -(-steps // (self.interval or 0)), steps)
