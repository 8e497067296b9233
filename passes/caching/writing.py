"""What options and decisions come to in a program: its sites, the steps that compute each, and the rows between."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import fx

from ...compiler.errors import PassError
from ...compiler.plan import Mask, Predicate, Rule, Site, copies, every, taylor
from ...compiler.program import Decision, Program
from ...compiler.regions import block_lists, find_regions
from . import schedules
from .decided import predicates
from .options import MEASURED, CacheOptions
from .sites import Candidate, Refused, find_sites

_KEY_STEPS = {50: (0, 1, 2, 3, 5, 10, 15, 25, 35)}  # Faster Diffusion's published list, by the number of steps


# --- sites ---


def find_candidates(options: CacheOptions, graph: fx.GraphModule, refused: Refused) -> tuple[Candidate, ...]:
    kind = options.site or "auto"
    if kind == "auto":
        kind = "cut" if any(region.children for region in find_regions(graph)) else "range"
    if kind == "stages":
        return _stages(graph, options.front, options.back, options.predictor == "copy", refused)
    return find_sites(
        graph, kind, front=options.front or 0, back=options.back, apart=bool(options.apart), branch_id=options.branch,
        blocks=options.blocks or (), refused=refused,
    )  # fmt: skip


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


# --- steps ---


def find_masks(
    options: CacheOptions, steps: int, sites: Sequence[Candidate], choices: Mapping[str, Any]
) -> dict[Candidate, Mask]:
    """The steps at which each site is computed: as decided, else by the schedule."""
    if "computed" in choices:
        found = choices["computed"]
        return {site: schedules.at(steps, found[site.unit], "the recorded plan") for site in sites}
    return {site: _scheduled(options, steps, site.unit) for site in sites}


def _scheduled(options: CacheOptions, steps: int, unit: str) -> Mask:
    """Of a schedule that needs no measuring. Raises PassError for one that does."""
    if options.schedule in MEASURED:
        raise PassError(f"cache_steps: the steps of schedule {options.schedule!r} follow from recorded runs")
    interval = options.interval or 0
    if options.schedule == "to_the_end":
        return schedules.interval_to_the_end(steps, interval)
    if options.schedule == "keys":
        keys = options.keys or _KEY_STEPS.get(steps) or range(0, steps, interval)
        return schedules.at(steps, tuple(keys), "cache_steps: keys")
    if options.schedule == "quadratic":
        center = 0.3 * steps if options.center is None else options.center
        return schedules.quadratic(steps, options.count(steps), center, options.power or 1.4)
    mask = every(interval, steps, warmup=options.warmup or 0, last=options.last or 0)
    if options.site == "stages":
        turn = steps // 2 if options.turn is None else options.turn
        return tuple(full or (i >= turn if unit == "rear" else i < turn) for i, full in enumerate(mask))
    return mask


def forced_mask(options: CacheOptions, steps: int) -> Mask:
    """The steps that compute everything, whatever the others decide."""
    warmup = max(options.warmup or 0, 2 if options.schedule == "history" else 1)
    return tuple(i < warmup or i >= steps - (options.last or 0) for i in range(steps))


# --- the plan ---


def write_predicates(
    options: CacheOptions, program: Program, sites: Sequence[Candidate], choices: Mapping[str, Any]
) -> tuple[Predicate, ...]:
    assert options.threshold is not None
    forced = forced_mask(options, program.steps)
    return predicates(
        program.graph, sites, cast(Rule, options.schedule), options.threshold, tuple(not each for each in forced),
        front=options.front or 0, apart=bool(options.apart), polynomial=choices.get("polynomial", (1.0, 0.0)),
        fitted_to=choices.get("fitted_to", math.inf), longest=options.longest or 0,
    )  # fmt: skip


def write_site(options: CacheOptions, site: Candidate, masks: Mapping[Candidate, Mask], decision: Decision) -> Site:
    """The site with the coefficients of its predictor, by step. masks: of all sites."""
    computed = masks[site]
    if options.predictor == "history":
        unmeasured = copies(len(computed), options.states_kept)  # a dry run has no coefficients
        table, unread = decision.tensors.get(site.name, unmeasured), unmeasured[:, 1:] * 0
        return Site(site.name, site.value, None, computed, table, unread, rolling=True)
    base = site.base if options.predictor not in ("copy", "net") else None
    if options.predictor == "delta" and base is None:
        raise PassError(
            f"cache_steps: {site.name} has no input of its own shape, which predictor 'delta' adds to; use copy"
        )
    order = decision.choices["noise"][site.name]["order"] if "noise" in decision.choices else options.order
    reuse, refresh = taylor(left_behind(site, masks), order)
    overlaps = tuple(other.name for other in masks if other.name in site.overlaps)
    correction = decision.tensors.get(site.name)
    return Site(site.name, site.value, base, computed, reuse, refresh, correction, overlaps)


def left_behind(site: Candidate, masks: Mapping[Candidate, Mask]) -> Mask:
    """The steps that leave the site's states behind, as `Plan.emits` has it."""
    others = [mask for other, mask in masks.items() if other.name in site.overlaps]
    return tuple(computed and all(mask[i] for mask in others) for i, computed in enumerate(masks[site]))
