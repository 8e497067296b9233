"""What recorded runs decide about a cache: which blocks, at which steps, and how far to extrapolate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...compiler.calibrate import Calibration
from ...compiler.plan import Mask, Plan
from ...compiler.program import Decision, Program
from ...compiler.regions import block_lists, find_regions
from ...compiler.trace import Trace, Watched, record
from ..quantize import Quantize
from . import replay
from .decided import fit_polynomial, vote
from .edit import route_masks
from .noise import measure_noise
from .options import MEASURED, CacheOptions
from .router import learn_masks
from .search import search_masks
from .segmentation import bubbling_union, leader_first
from .sites import Candidate
from .writing import forced_mask, left_behind, write_predicates, write_site

Steps = dict[str, list[int]]  # unit of sites -> the steps that compute it


def watched(options: CacheOptions, site: Candidate) -> Watched:
    """What the predictor reuses of a site: its residual for deltas, else its value."""
    return Watched(site.name, site.value, site.base if options.predictor == "delta" else None)


def measure_background(program: Program, calibration: Calibration) -> list[str]:
    """Paths of the half of the blocks whose residual changes least from step to step."""
    blocks = [block for blocks in block_lists(find_regions(program.graph)).values() for block in blocks]
    residuals = [
        Watched(block.path, block.streams[0].exit, block.streams[0].entry) for block in blocks if block.streams
    ]
    trace = record(program, residuals, calibration)
    order = sorted((each.name for each in residuals), key=lambda path: float(trace.changes(path).mean()))
    calm = set(order[: len(order) // 2])
    return [block.path for block in blocks if block.path in calm]


def measure_orders(
    options: CacheOptions, program: Program, masks: Mapping[Candidate, Mask], quantize: Quantize,
    calibration: Calibration,
) -> dict[str, Any]:  # fmt: skip
    """Site -> the noise that quantising makes, and the order of its predictor that it leaves."""
    reusing = {site: left_behind(site, masks) for site, mask in masks.items() if not all(mask)}
    computed = {Watched(site.name, site.value, site.base): mask for site, mask in reusing.items()}
    found = measure_noise(program, computed, options.order, quantize, calibration) if computed else {}
    return {
        name: {"noise": noise.noise, "change": noise.change, "errors": list(noise.noisy),
               "exact_errors": list(noise.exact), "order": noise.order}
        for name, noise in found.items()
    }  # fmt: skip


# --- steps ---


def measure_steps(
    options: CacheOptions, program: Program, sites: Sequence[Candidate], calibration: Calibration
) -> dict[str, Any]:
    """The choices that the schedule leaves to recorded runs: the computed steps, and what they were decided by."""
    choices: dict[str, Any] = {}
    if options.fit:
        choices["polynomial"], choices["fitted_to"] = fit_polynomial(program, sites, calibration)
    if options.votes:
        choices["computed"] = _voted(options, program, sites, calibration, choices)
    elif options.schedule in MEASURED:
        choices["computed"] = _found(options, program, sites, calibration)
    return choices


def _voted(
    options: CacheOptions, program: Program, sites: Sequence[Candidate], calibration: Calibration,
    choices: Mapping[str, Any],
) -> Steps:  # fmt: skip
    """The steps that compute in most runs of a program whose steps decide."""
    masks = dict.fromkeys(sites, forced_mask(options, program.steps))
    written = tuple(write_site(options, site, masks, Decision()) for site in sites)
    plan = Plan(program.steps, written, write_predicates(options, program, sites, choices))
    rows = vote(replace(program, plan=plan), calibration)
    return {site.unit: [i for i, row in enumerate(rows) if row[index]] for index, site in enumerate(sites)}


def _found(options: CacheOptions, program: Program, sites: Sequence[Candidate], calibration: Calibration) -> Steps:
    """By search, by training, or from one recorded run."""
    share = options.share or options.count(program.steps) / program.steps
    runs = options.runs or 0
    if options.schedule == "searched":
        delta = options.predictor == "delta"
        return search_masks(program, sites, calibration, share=share, trials=options.trials or 0, delta=delta)
    if options.schedule == "routed":
        return route_masks(program, sites, calibration, share=share, runs=runs)
    if options.schedule in ("learned", "learned_pairs"):
        pairs = options.schedule == "learned_pairs"
        return learn_masks(program, sites, calibration, share=share, runs=runs, pairs=pairs)
    trace = record(program, [watched(options, site) for site in sites], calibration)
    units: dict[str, list[Candidate]] = defaultdict(list)
    for site in sites:
        units[site.unit if options.each else "all"].append(site)
    found = {unit: _planned(options, trace, members, program.steps) for unit, members in units.items()}
    computed = {site.unit: found[site.unit if options.each else "all"] for site in sites}
    return _united(computed, sites, trace, options.union) if options.union else computed


def _planned(options: CacheOptions, trace: Trace, members: Sequence[Candidate], steps: int) -> list[int]:
    """The steps that compute these sites, by how far their values are apart."""
    distance = np.mean([trace.distances(site.name, options.distance or "l1") for site in members], axis=0)
    if options.schedule == "segments":
        interval = options.interval or 0
        least, most = (-(-interval // 2), 2 * interval) if options.bounded else (1, None)
        return list(leader_first(distance, options.count(steps), least, most)[0])
    assert options.threshold is not None
    warmup, last = options.warmup or 0, options.last or 0
    if options.schedule == "hold":
        mask = replay.hold(distance, options.threshold, warmup=warmup, last=last)
    else:
        mask = replay.history(distance, options.threshold, warmup=warmup, last=last, longest=options.longest or 0)
    return [step for step, computes in enumerate(mask) if computes]


def _united(computed: Steps, sites: Sequence[Candidate], trace: Trace, count: int) -> Steps:
    """The same, with the steps of the `count` worst sites at the feed-forwards after them."""
    errors = [float(trace.distances(site.name, "l1").mean()) for site in sites]
    planned = [tuple(computed[site.unit]) for site in sites]
    found = bubbling_union(planned, [site.layer for site in sites], [site.feeds for site in sites], errors, count)
    return {site.unit: list(steps) for site, steps in zip(sites, found, strict=True)}
