"""Unroll the sampler's steps into those that compute the costly regions and those that reuse what came before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..compiler.calibrate import Calibration
from ..compiler.errors import PassError
from ..compiler.plan import Mask, Plan
from ..compiler.program import Decision, PassResult, Program, Record
from .caching import updates
from .caching.closed_loop import close_loop
from .caching.fits import fit_copies
from .caching.history import fit_histories
from .caching.measuring import measure_background, measure_orders, measure_steps, watched
from .caching.nets import add_networks
from .caching.options import DECIDED, MEASURED, CacheOptions
from .caching.sites import Candidate, Refused
from .caching.training import train_networks
from .caching.writing import find_candidates, find_masks, left_behind, write_predicates, write_site
from .quantize import Quantize


@dataclass(frozen=True)
class CacheSteps(CacheOptions):
    """Caching by one of the published methods (`dcompile methods cache` lists them), or by options of your own.

    The options are those of CacheOptions.

    Left alone: (1) lists of blocks that are no longer than front + back, (2) streams that do not run through the whole
    range, (3) everything, where the options compute every step.
    """

    name: ClassVar[str] = "cache_steps"

    @property
    def looks_ahead(self) -> bool:
        return bool(self.compensate) or self.weighs_noise

    def decide(self, program: Program, calibration: Calibration, /) -> Decision:
        """The computed steps of each unit of sites, where they follow from recorded runs; else nothing."""
        _refuse_second(program)
        choices: dict[str, Any] = {}
        if self.site == "runs" and not self.blocks:
            choices["blocks"] = measure_background(program, calibration)
        following = calibration.following if self.looks_ahead else ()
        quantize = next((later for later in following if isinstance(later, Quantize)), None)
        fitted = self.correct or self.resize or self.compensate or self.predictor in ("history", "net")
        if not (self.schedule in MEASURED or fitted or quantize):
            return Decision(choices)
        sites = find_candidates(self._with_blocks(choices), program.graph, [])
        choices |= measure_steps(self, program, sites, calibration)
        masks = find_masks(self, program.steps, sites, choices)
        if all(map(all, masks.values())):
            return Decision(choices)
        if quantize and self.weighs_noise:
            choices["noise"] = measure_orders(self, program, masks, quantize, calibration)
        tensors = self._fit(program, masks, choices, calibration)
        if self.resize and sites and updates.why_not_resized(program.sampler) is None:
            (site,) = sites
            given = (watched(self, site), masks[site], tensors.get(site.name))
            trust = updates.measure_trust(program, *given, calibration)
            choices["lengths"] = updates.resized(updates.step_lengths(program.sampler), trust).tolist()
        if self.compensate:
            cached = self.apply(program, Decision(choices, tensors)).program
            if quantize:
                cached = quantize.apply(cached, quantize.decide(cached, calibration)).program
            tensors[updates.GAIN] = updates.measure_gains(cached, program, calibration)
        return Decision(choices, tensors)

    def _fit(
        self, program: Program, masks: Mapping[Candidate, Mask], choices: Mapping[str, Any], calibration: Calibration
    ) -> dict[str, NDArray[np.float32]]:
        """What predictors and correctors multiply with, where it is trained or fitted."""
        tensors: dict[str, NDArray[np.float32]] = {}
        if self.predictor == "net":
            draft = self.apply(program, Decision(choices)).program
            tensors |= train_networks(draft, _reused(masks), calibration, self.runs or 24)
        if self.predictor == "history":
            fits = fit_histories(
                program, {watched(self, site): mask for site, mask in masks.items()}, self.states_kept, calibration
            )
            tensors |= close_loop(self.apply(program, Decision(choices, fits)).program, calibration)
        if self.correct:
            leaders = {watched(self, site): left_behind(site, masks) for site in masks}
            tensors |= fit_copies(program, leaders, calibration)
        return tensors

    def apply(self, program: Program, decision: Decision, /) -> PassResult:
        _refuse_second(program)
        refused: Refused = []
        candidates = find_candidates(self._with_blocks(decision.choices), program.graph, refused)
        if not candidates:
            raise PassError(
                f"cache_steps: found no site of kind {self.site!r} in {program.name}; "
                "`dcompile inspect` shows its regions"
            )
        masks = find_masks(self, program.steps, candidates, decision.choices)
        open_sites = candidates if self.schedule in DECIDED and not self.freeze else ()
        masks = {site: mask for site, mask in masks.items() if not all(mask) or site in open_sites}
        sites = tuple(write_site(self, site, masks, decision) for site in masks)
        if not sites:
            given = f"interval {self.interval}, warmup {self.warmup} and last {self.last}"
            why = f"{given} compute all {program.steps} steps"
            return PassResult(program, Record(self.name, refused=(("every site", why),)))
        if self.predictor == "net":
            program, results = add_networks(program, _reused(masks), self.states_kept, decision.tensors)
            sites = tuple(replace(site, network=name) for site, name in zip(sites, results, strict=True))
        found = write_predicates(self, program, candidates, decision.choices) if open_sites else ()
        plan = Plan(program.steps, sites, found, self.span or 1)
        details = {
            "method": self.method,
            **({"decided_steps": [i for i in range(program.steps) if plan.open(i)]} if found else {}),
            "sites": [site.name for site in sites],
            "computed_steps": [i for i in range(program.steps) if all(plan.mask(i))],
            **({"noise": decision.choices["noise"]} if "noise" in decision.choices else {}),
        }
        if self.resize and (reason := updates.why_not_resized(program.sampler)):
            refused.append(("lengths of steps", reason))
        cached, measured = self._with_updates(replace(program, plan=plan), decision)
        record = Record(self.name, changed=len(sites), refused=tuple(refused), details={**details, **measured})
        return PassResult(cached, record)

    def _with_updates(self, program: Program, decision: Decision) -> tuple[Program, dict[str, Any]]:
        """The program with correctors of its updates, and what was measured of them."""
        measured: dict[str, Any] = {}
        if self.prior:
            program = updates.with_prior(program, self.prior)
        if "lengths" in decision.choices:
            measured["lengths"] = decision.choices["lengths"]
            program = updates.with_lengths(program, decision.choices["lengths"])
        if updates.GAIN in decision.tensors:
            measured["variance_gains"] = decision.tensors[updates.GAIN][:, 0].tolist()
            program = updates.with_gains(program, decision.tensors[updates.GAIN])
        return program, measured

    def _with_blocks(self, choices: Mapping[str, Any]) -> CacheOptions:
        """These options with the blocks that recorded runs chose, if they did."""
        return replace(self, blocks=tuple(choices["blocks"])) if "blocks" in choices else self


def _refuse_second(program: Program) -> None:
    if program.plan.sites:
        raise PassError("cache_steps: the program already has cache sites; one cache pass a recipe")


def _reused(masks: Mapping[Candidate, Mask]) -> list[Candidate]:
    return [site for site, mask in masks.items() if not all(mask)]
