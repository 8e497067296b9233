"""Unroll the sampler's steps into those that compute the costly regions and those that reuse what came before."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray
from torch import fx

from ..compiler.calibrate import Calibration
from ..compiler.errors import PassError, RecipeError
from ..compiler.plan import Mask, Plan, Predicate, Rule, Site, copies, every, taylor
from ..compiler.program import Decision, PassResult, Program, Record
from ..compiler.regions import find_regions
from ..compiler.trace import Trace, Watched, record
from ..runtime.errors import did_you_mean
from .caching import replay, schedules, updates
from .caching.closed_loop import close_loop
from .caching.decided import fit_polynomial, predicates, vote
from .caching.edit import route_masks
from .caching.fits import fit_copies
from .caching.history import fit_histories
from .caching.methods import COMMON, METHODS
from .caching.nets import add_networks
from .caching.noise import measure_noise
from .caching.router import learn_masks
from .caching.search import search_masks
from .caching.segmentation import bubbling_union, leader_first
from .caching.sites import Candidate, Refused, block_lists, find_sites
from .caching.training import train_networks
from .quantize import Quantize

_ORDERS = {"copy": 0, "delta": 0, "history": 0, "taylor1": 1, "taylor2": 2}
_DECIDED = ("compare", "accumulate", "history")  # by each step, at run time, unless frozen
# schedules that recorded runs decide
_MEASURED = ("segments", "hold", "learned", "learned_pairs", "searched", "routed", *_DECIDED)
_LEAST = {"interval": 1, "warmup": 1, "last": 0, "front": 0, "back": 0, "budget": 1, "states": 1, "trials": 1}
_KEY_STEPS = {50: (0, 1, 2, 3, 5, 10, 15, 25, 35)}  # Faster Diffusion's published list, by the number of steps


@dataclass(frozen=True)
class CacheSteps:
    """Caching by one of the published methods (`dcompile methods cache` lists them), or by options of your own.

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

    Left alone: (1) lists of blocks that are no longer than front + back, (2) streams that do not run through the whole
    range, (3) everything, where the options compute every step.
    """

    name: ClassVar[str] = "cache_steps"

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
        if self.schedule in ("hold", *_DECIDED) and self.threshold is None:
            raise RecipeError(f"cache_steps: schedule {self.schedule!r} needs a threshold, as in threshold=0.1")

    # --- what is measured ---

    @property
    def looks_ahead(self) -> bool:
        return bool(self.compensate) or self._weighs_noise

    @property
    def _weighs_noise(self) -> bool:
        """Whether the order may be lowered: not a network's, which has as many states for inputs."""
        return bool(self.noise_aware) and self.predictor in ("taylor1", "taylor2")

    @property
    def _order(self) -> int:
        return self._states - 1 if self.predictor == "net" else _ORDERS[self.predictor or "copy"]

    def decide(self, program: Program, calibration: Calibration, /) -> Decision:
        """The computed steps of each unit of sites, where they follow from recorded runs; else nothing."""
        _refuse_second(program)
        choices: dict[str, Any] = {}
        step = self
        if self.site == "runs" and not self.blocks:
            choices["blocks"] = _background(program, calibration)
            step = replace(self, blocks=tuple(choices["blocks"]))
        following = calibration.following if self.looks_ahead else ()
        quantize = next((later for later in following if isinstance(later, Quantize)), None)
        fitted = self.correct or self.resize or self.compensate or self.predictor in ("history", "net")
        if not (self.schedule in _MEASURED or fitted or quantize):
            return Decision(choices)
        sites = step._candidates(program.graph, [])
        if self.fit:
            choices["polynomial"], choices["fitted_to"] = fit_polynomial(program, sites, calibration)
        if self._decides:
            choices["computed"] = step._voted(program, sites, calibration, choices)
        elif self.schedule in _MEASURED:
            choices["computed"] = step._measured(program, sites, calibration)
        masks = step._masks(program, sites, choices)
        if all(map(all, masks.values())):
            return Decision(choices)
        if quantize and self._weighs_noise:
            choices["noise"] = step._noise(program, masks, quantize, calibration)
        tensors: dict[str, NDArray[np.float32]] = {}
        if self.predictor == "net":
            reused = [site for site, mask in masks.items() if not all(mask)]
            draft = step.apply(program, Decision(choices)).program
            tensors |= train_networks(draft, reused, calibration, self.runs or 24)
        if self.predictor == "history":
            watched = {self._watched(site): mask for site, mask in masks.items()}
            fits = fit_histories(program, watched, self._states, calibration)
            tensors |= close_loop(step.apply(program, Decision(choices, fits)).program, calibration)
        if self.correct:
            leaders = {self._watched(site): _left_behind(site, masks) for site in masks}
            tensors |= fit_copies(program, leaders, calibration)
        if self.resize and sites and updates.why_not_resized(program.sampler) is None:
            (site,) = sites
            trust = updates.measure_trust(
                program, self._watched(site), masks[site], tensors.get(site.name), calibration
            )
            choices["lengths"] = updates.resized(updates.step_lengths(program.sampler), trust).tolist()
        if self.compensate:
            cached = step.apply(program, Decision(choices, tensors)).program
            if quantize:
                cached = quantize.apply(cached, quantize.decide(cached, calibration)).program
            tensors[updates.GAIN] = updates.measure_gains(cached, program, calibration)
        return Decision(choices, tensors)

    @property
    def _states(self) -> int:
        return self.states or (4 if self.predictor == "history" else 1)

    def _noise(
        self, program: Program, masks: Mapping[Candidate, Mask], quantize: Quantize, calibration: Calibration
    ) -> dict[str, Any]:
        """Site -> what was measured, and the order chosen."""
        reusing = {site: _left_behind(site, masks) for site, mask in masks.items() if not all(mask)}
        computed = {Watched(site.name, site.value, site.base): mask for site, mask in reusing.items()}
        found = measure_noise(program, computed, self._order, quantize, calibration) if computed else {}
        return {
            name: {"noise": noise.noise, "change": noise.change, "errors": list(noise.noisy),
                   "exact_errors": list(noise.exact), "order": noise.order}
            for name, noise in found.items()
        }  # fmt: skip

    def _measured(self, program: Program, sites: Sequence[Candidate], calibration: Calibration) -> dict[str, list[int]]:
        """Unit -> steps, from one recorded run."""
        share = self.share or self._count(program.steps) / program.steps
        if self.schedule == "searched":
            delta = self.predictor == "delta"
            return search_masks(program, sites, calibration, share=share, trials=_int(self.trials), delta=delta)
        if self.schedule == "routed":
            return route_masks(program, sites, calibration, share=share, runs=_int(self.runs))
        if self.schedule in ("learned", "learned_pairs"):
            pairs = self.schedule == "learned_pairs"
            return learn_masks(program, sites, calibration, share=share, runs=_int(self.runs), pairs=pairs)
        trace = record(program, [self._watched(site) for site in sites], calibration)
        units: dict[str, list[Candidate]] = defaultdict(list)
        for site in sites:
            units[site.unit if self.each else "all"].append(site)
        found = {unit: self._planned(trace, members, program.steps) for unit, members in units.items()}
        computed = {site.unit: found[site.unit if self.each else "all"] for site in sites}
        return self._united(computed, sites, trace) if self.union else computed

    @property
    def _decides(self) -> bool:
        """Whether steps decide at run time, or would but for freeze: a history of many sites is replayed instead."""
        return self.schedule in _DECIDED and not (self.schedule == "history" and self.freeze)

    def _voted(
        self, program: Program, sites: Sequence[Candidate], calibration: Calibration, choices: Mapping[str, Any]
    ) -> dict[str, list[int]]:
        """Unit -> the steps that compute it in most runs."""
        forced = self._forced(program.steps)
        masks = dict.fromkeys(sites, forced)
        written = tuple(self._site(site, masks, Decision()) for site in sites)
        plan = Plan(program.steps, written, self._predicates(program, sites, choices))
        rows = vote(replace(program, plan=plan), calibration)
        return {site.unit: [i for i, row in enumerate(rows) if row[index]] for index, site in enumerate(sites)}

    def _forced(self, steps: int) -> Mask:
        warmup = max(_int(self.warmup), 2 if self.schedule == "history" else 1)
        return tuple(i < warmup or i >= steps - _int(self.last) for i in range(steps))

    def _predicates(
        self, program: Program, sites: Sequence[Candidate], choices: Mapping[str, Any]
    ) -> tuple[Predicate, ...]:
        assert self.threshold is not None
        forced = self._forced(program.steps)
        return predicates(
            program.graph, sites, cast(Rule, self.schedule), self.threshold, tuple(not each for each in forced),
            front=_int(self.front), apart=bool(self.apart), polynomial=choices.get("polynomial", (1.0, 0.0)),
            fitted_to=choices.get("fitted_to", math.inf), longest=_int(self.longest),
        )  # fmt: skip

    def _watched(self, site: Candidate) -> Watched:
        return Watched(site.name, site.value, site.base if self.predictor == "delta" else None)

    def _planned(self, trace: Trace, members: Sequence[Candidate], steps: int) -> list[int]:
        kind = self.distance or "l1"
        distance = np.mean([trace.distances(site.name, kind) for site in members], axis=0)
        if self.schedule == "hold":
            assert self.threshold is not None
            return _steps(replay.hold(distance, self.threshold, warmup=_int(self.warmup), last=_int(self.last)))
        if self.schedule == "history":
            assert self.threshold is not None
            return _steps(
                replay.history(
                    distance, self.threshold, warmup=_int(self.warmup), last=_int(self.last), longest=_int(self.longest)
                )
            )
        count, interval = self._count(steps), _int(self.interval)
        least, most = (-(-interval // 2), 2 * interval) if self.bounded else (1, None)
        return list(leader_first(distance, count, least, most)[0])

    def _united(
        self, computed: Mapping[str, list[int]], sites: Sequence[Candidate], trace: Trace
    ) -> dict[str, list[int]]:
        errors = [float(trace.distances(site.name, "l1").mean()) for site in sites]
        found = bubbling_union(
            [tuple(computed[site.unit]) for site in sites],
            [site.layer for site in sites], [site.feeds for site in sites], errors, _int(self.union),
        )  # fmt: skip
        return {site.unit: list(steps) for site, steps in zip(sites, found, strict=True)}

    def _count(self, steps: int) -> int:
        return min(self.budget or -(-steps // _int(self.interval)), steps)

    # --- what is written ---

    def apply(self, program: Program, decision: Decision, /) -> PassResult:
        _refuse_second(program)
        refused: Refused = []
        step = replace(self, blocks=tuple(decision.choices["blocks"])) if "blocks" in decision.choices else self
        candidates = step._candidates(program.graph, refused)
        if not candidates:
            raise PassError(
                f"cache_steps: found no site of kind {self.site!r} in {program.name}; "
                "`dcompile inspect` shows its regions"
            )
        masks = step._masks(program, candidates, decision.choices)
        open_sites = candidates if self.schedule in _DECIDED and not self.freeze else ()
        masks = {site: mask for site, mask in masks.items() if not all(mask) or site in open_sites}
        sites = tuple(step._site(site, masks, decision) for site in masks)
        if not sites:
            given = f"interval {self.interval}, warmup {self.warmup} and last {self.last}"
            why = f"{given} compute all {program.steps} steps"
            return PassResult(program, Record(self.name, refused=(("every site", why),)))
        if self.predictor == "net":
            reused = [site for site, mask in masks.items() if not all(mask)]
            program, results = add_networks(program, reused, self._states, decision.tensors)
            sites = tuple(replace(site, network=name) for site, name in zip(sites, results, strict=True))
        found = step._predicates(program, candidates, decision.choices) if open_sites else ()
        plan = Plan(program.steps, sites, found)
        details = {
            "method": self.method,
            **({"decided_steps": [i for i in range(program.steps) if plan.open(i)]} if found else {}),
            "sites": [site.name for site in sites],
            "computed_steps": [i for i in range(program.steps) if all(plan.mask(i))],
            **({"noise": decision.choices["noise"]} if "noise" in decision.choices else {}),
        }
        if self.resize and (reason := updates.why_not_resized(program.sampler)):
            refused.append(("lengths of steps", reason))
        cached = replace(program, plan=plan)
        if self.prior:
            cached = updates.with_prior(cached, self.prior)
        if "lengths" in decision.choices:
            details["lengths"] = decision.choices["lengths"]
            cached = updates.with_lengths(cached, decision.choices["lengths"])
        if updates.GAIN in decision.tensors:
            details["variance_gains"] = decision.tensors[updates.GAIN][:, 0].tolist()
            cached = updates.with_gains(cached, decision.tensors[updates.GAIN])
        return PassResult(cached, Record(self.name, changed=len(sites), refused=tuple(refused), details=details))

    def _candidates(self, graph: fx.GraphModule, refused: Refused) -> tuple[Candidate, ...]:
        kind = self.site or "auto"
        if kind == "auto":
            kind = "cut" if any(region.children for region in find_regions(graph)) else "range"
        if kind == "stages":
            return _stages(graph, self.front, self.back, self.predictor == "copy", refused)
        return find_sites(
            graph, kind, front=_int(self.front), back=self.back, apart=bool(self.apart), branch_id=self.branch,
            blocks=self.blocks or (), refused=refused,
        )  # fmt: skip

    def _masks(self, program: Program, sites: Sequence[Candidate], choices: Mapping[str, Any]) -> dict[Candidate, Mask]:
        """The steps at which each site is computed: as decided, else by the schedule."""
        if "computed" in choices:
            found = choices["computed"]
            return {site: schedules.at(program.steps, found[site.unit], "the recorded plan") for site in sites}
        return {site: self._mask(program.steps, site.unit) for site in sites}

    def _mask(self, steps: int, unit: str) -> Mask:
        """Of a schedule that needs no measuring. Raises PassError for one that does."""
        if self.schedule in _MEASURED:
            raise PassError(f"cache_steps: the steps of schedule {self.schedule!r} follow from recorded runs")
        interval = _int(self.interval)
        if self.schedule == "to_the_end":
            return schedules.interval_to_the_end(steps, interval)
        if self.schedule == "keys":
            keys = self.keys or _KEY_STEPS.get(steps) or range(0, steps, interval)
            return schedules.at(steps, tuple(keys), "cache_steps: keys")
        if self.schedule == "quadratic":
            center = 0.3 * steps if self.center is None else self.center
            return schedules.quadratic(steps, self._count(steps), center, self.power or 1.4)
        mask = every(interval, steps, warmup=_int(self.warmup), last=_int(self.last))
        if self.site == "stages":
            turn = steps // 2 if self.turn is None else self.turn
            return tuple(full or (i >= turn if unit == "rear" else i < turn) for i, full in enumerate(mask))
        return mask

    def _site(self, site: Candidate, masks: Mapping[Candidate, Mask], decision: Decision) -> Site:
        computed = masks[site]
        if self.predictor == "history":
            unmeasured = copies(len(computed), self._states)  # a dry run has no coefficients
            table, unread = decision.tensors.get(site.name, unmeasured), unmeasured[:, 1:] * 0
            return Site(site.name, site.value, None, computed, table, unread, rolling=True)
        base = site.base if self.predictor not in ("copy", "net") else None
        if self.predictor == "delta" and base is None:
            raise PassError(
                f"cache_steps: {site.name} has no input of its own shape, which predictor 'delta' adds to; use copy"
            )
        order = decision.choices["noise"][site.name]["order"] if "noise" in decision.choices else self._order
        reuse, refresh = taylor(_left_behind(site, masks), order)
        overlaps = tuple(other.name for other in masks if other.name in site.overlaps)
        correction = decision.tensors.get(site.name)
        return Site(site.name, site.value, base, computed, reuse, refresh, correction, overlaps)


def _left_behind(site: Candidate, masks: Mapping[Candidate, Mask]) -> Mask:
    """The steps that leave the site's states behind, as `Plan.emits` has it."""
    others = [mask for other, mask in masks.items() if other.name in site.overlaps]
    return tuple(computed and all(mask[i] for mask in others) for i, computed in enumerate(masks[site]))


def _refuse_second(program: Program) -> None:
    if program.plan.sites:
        raise PassError("cache_steps: the program already has cache sites; one cache pass a recipe")


def _int(value: int | None) -> int:
    return value or 0


def _steps(mask: Mask) -> list[int]:
    return [step for step, computes in enumerate(mask) if computes]


def _stages(
    graph: fx.GraphModule, front: int | None, back: int | None, copies: bool, refused: Refused
) -> tuple[Candidate, ...]:
    """All but the last `back` of each block list as unit "front", all but the first `front` as "rear".

    copies: of what leaves a range. Then nothing reads what comes before it, the other range neither.
    """
    found: list[Candidate] = []
    for parent, blocks in block_lists(find_regions(graph)).items():
        count, quarter = len(blocks), max(1, round(len(blocks) / 4))
        first, end = quarter if front is None else front, count - (quarter if back is None else back)
        if not (first < count and end > 0 and (first, end) != (0, count)):
            refused.append((parent, f"has {count} blocks; front {first} and back {count - end} leave no two ranges"))
            continue
        of_front, of_rear = (
            find_sites(graph, "runs", blocks=[block.path for block in chosen], refused=refused)
            for chosen in (blocks[:end], blocks[first:])
        )
        for unit, own, others in (("front", of_front, of_rear), ("rear", of_rear, of_front)):
            overlaps = tuple(other.name for other in others) if first < end or copies else ()
            found += [replace(site, unit=unit, overlaps=overlaps) for site in own]
    return tuple(found)


def _background(program: Program, calibration: Calibration) -> list[str]:
    """Paths of the half of the blocks whose residual changes least from step to step."""
    blocks = [block for blocks in block_lists(find_regions(program.graph)).values() for block in blocks]
    watched = [Watched(block.path, block.streams[0].exit, block.streams[0].entry) for block in blocks if block.streams]
    changes = record(program, watched, calibration).changes
    order = sorted(changes, key=lambda path: float(changes[path].mean()))
    calm = set(order[: len(order) // 2])
    return [block.path for block in blocks if block.path in calm]
