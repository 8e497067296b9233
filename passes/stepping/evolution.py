"""The search: populations in which the candidates with the least error live on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...compiler.errors import UnsupportedError
from .candidates import Breeder, Candidate

POPULATION, PARENTS, TRIES = 16, 6, 20
LEVELS = 4  # how skipping grows: none, then a third of what is to be skipped, two thirds, all

Evaluate = Callable[[Candidate], float]


def evolve(
    evaluate: Evaluate, count: int, of: int, units: int, skipped: int, trials: int, seed: int = 0,
    progress: Callable[[float, str], None] = lambda fraction, text: None,
) -> tuple[Candidate, float]:  # fmt: skip
    """The candidate with the least error of `trials`, and its error.

    First timesteps alone, then blocks too, more and more of them, as in AutoDiffusion (2309.10438). The uniform
    schedule is always among the first. Raises UnsupportedError without Optuna.
    """
    random = np.random.default_rng(seed)
    levels = [round(skipped * level / (LEVELS - 1)) for level in range(LEVELS)] if skipped else [0]
    told = 0
    errors: dict[bytes, float] = {}

    def judged(candidate: Candidate) -> float:
        nonlocal told
        if candidate.key not in errors:
            found = evaluate(candidate)
            errors[candidate.key] = found if math.isfinite(found) else math.inf
        told += 1
        progress(min(told / trials, 1.0), f"searching timesteps, error {min(errors.values()):.4f}")
        return errors[candidate.key]

    ranked: list[Candidate] = []
    for place, level in enumerate(levels):
        breeder = Breeder(count, of, units, level, random)
        begin = [breeder.uniform(), *(breeder.mutant(each) for each in ranked[:PARENTS])]
        begin += [breeder.mutant(begin[0]) for _ in range(POPULATION // 2)]
        own = (place + 1) * trials // len(levels) - place * trials // len(levels)
        ranked = _population(breeder, begin, judged, max(own, 1), seed)
    return ranked[0], errors[ranked[0].key]


def _population(
    breeder: Breeder, begin: Sequence[Candidate], judged: Evaluate, trials: int, seed: int
) -> list[Candidate]:
    """All that were tried, best first."""
    try:
        import optuna
    except ImportError as missing:
        raise UnsupportedError("choose_steps needs optuna: pip install 'dcompile[search]'") from missing
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, Any] = {f"t{i}": optuna.distributions.IntDistribution(0, breeder.of) for i in range(breeder.count)}
    for step in range(breeder.count):
        for unit in range(breeder.units):
            space[f"s{step}_{unit}"] = optuna.distributions.IntDistribution(0, 1)
    tried: dict[bytes, tuple[float, Candidate]] = {}

    def child(study: Any, space: Any, parents: Sequence[Any]) -> dict[str, int]:
        ranked = [each for _, each in sorted(tried.values(), key=lambda pair: pair[0])]
        for _ in range(TRIES):
            born = breeder.child(ranked[:PARENTS])
            if born.key not in tried:
                break
        return _named(born)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of a strategy of one's own
        sampler = optuna.samplers.NSGAIISampler(
            population_size=min(POPULATION, len(begin)), seed=seed, child_generation_strategy=child
        )
    study = optuna.create_study(sampler=sampler)
    for candidate in begin[:trials]:
        study.enqueue_trial(_named(candidate))
    for _ in range(trials):
        trial = study.ask(space)
        assert trial.relative_params is not None  # optuna 5.0: unread, a trial given whole is of no generation
        candidate = _read(breeder, trial.params)
        error = judged(candidate)
        tried[candidate.key] = error, candidate
        study.tell(trial, min(error, 1e30))
    return [each for _, each in sorted(tried.values(), key=lambda pair: pair[0])]


def _named(candidate: Candidate) -> dict[str, int]:
    named = {f"t{i}": int(row) for i, row in enumerate(candidate.rows)}
    for (step, unit), computed in np.ndenumerate(candidate.computes):
        named[f"s{step}_{unit}"] = int(computed)
    return named


def _read(breeder: Breeder, named: dict[str, int]) -> Candidate:
    rows = np.array([named[f"t{i}"] for i in range(breeder.count)], np.int64)
    computes = [[bool(named[f"s{step}_{unit}"]) for unit in range(breeder.units)] for step in range(breeder.count)]
    return Candidate(rows, np.array(computes, bool).reshape(breeder.count, breeder.units))
