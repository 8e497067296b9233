"""Fewer steps at chosen timesteps, and blocks left out at some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..compiler.calibrate import Calibration, spread
from ..compiler.errors import PassError, RecipeError
from ..compiler.ingest import load_callable
from ..compiler.plan import Plan, Site, left_out
from ..compiler.program import Decision, PassResult, Program, Record
from ..compiler.quality import relative_error
from ..compiler.sampler import Sampler
from .caching.rollout import Rollout
from .caching.sites import Candidate as Block
from .caching.sites import find_sites
from .order import refuse_late
from .stepping.candidates import Candidate
from .stepping.evolution import evolve

Fitness = Callable[[NDArray[np.float32], NDArray[np.float32]], float]


@dataclass(frozen=True)
class ChooseSteps:
    """Run `count` steps, at timesteps that an evolutionary search chooses (AutoDiffusion, 2309.10438).

    count: steps of the sampler from now on. of: steps of the schedule that they are chosen from; its first one stays.
    skip: part of all evaluations of blocks that is left out too, 0 to 1; which, the search chooses step by step.
    trials: schedules that are tried. fitness: what it minimises; "samples", how far the calibration's samples are from
    the uncompressed model's, or `package.module:function`, which is given samples [B, *shape] and those of the
    uncompressed model and returns a number. seed: of the search.

    The population starts from the uniform schedule, so without `skip` no result is worse than it on these samples.
    Needs a sampler that goes through timesteps of one's choice. Must run before cache_steps, quantize and
    fold_timestep, and after what changes weights.
    """

    name: ClassVar[str] = "choose_steps"

    count: int = 10
    of: int = 100
    skip: float = 0.0
    trials: int = 160
    fitness: str = "samples"
    seed: int = 0

    def __post_init__(self) -> None:
        for option, least in (("count", 2), ("of", self.count), ("trials", 1), ("seed", 0)):
            if getattr(self, option) < least:
                raise RecipeError(f"choose_steps: {option} is {getattr(self, option)}, needed {least} or more")
        if not 0.0 <= self.skip < 1.0:
            raise RecipeError(f"choose_steps: skip is {self.skip}, needed 0 or more and less than 1")
        if self.fitness != "samples" and ":" not in self.fitness:
            raise RecipeError(f"choose_steps: fitness is {self.fitness!r}, needed samples or package.module:function")

    def decide(self, program: Program, calibration: Calibration, /) -> Decision:
        """Rows of the long schedule, and for each step the blocks that it leaves out."""
        self._check(program)
        blocks = self._blocks(program)
        units = list(dict.fromkeys(block.unit for block in blocks))
        fitness = load_callable(self.fitness) if self.fitness != "samples" else relative_error
        teacher = calibration.teacher.numpy()

        def evaluate(candidate: Candidate) -> float:
            stepped = program.with_sampler(self._sampler(program, candidate.rows.tolist()))
            masks = candidate.computes[:, [units.index(block.unit) for block in blocks]]
            found = Rollout(stepped, blocks, skips=True).samples(masks, calibration.conditions, calibration.seeds)
            return _number(fitness, found.numpy(), teacher)

        skipped = round(self.skip * self.count * len(units))
        best, error = evolve(
            evaluate, self.count, self.of, len(units), skipped, self.trials, self.seed, calibration.progress
        )
        everything = np.ones((self.count, len(units)), bool)
        uniform = evaluate(Candidate(np.array(spread(self.of, self.count)), everything))
        left_out = {
            str(step): [units[unit] for unit in np.flatnonzero(~row)]
            for step, row in enumerate(best.computes) if not row.all()
        }  # fmt: skip
        choices = {
            "rows": best.rows.tolist(),
            "skipped": left_out,
            "fitness": error,
            "fitness_of_uniform_steps": uniform,
        }
        return Decision(choices)

    def apply(self, program: Program, decision: Decision, /) -> PassResult:
        self._check(program)
        rows = decision.choices.get("rows") or spread(self.of, self.count)  # a dry run has searched nothing
        skipped: dict[str, Sequence[str]] = decision.choices.get("skipped", {})
        if len(rows) == self.of == program.steps and not skipped:
            return PassResult(program, Record(self.name, refused=(("every step", f"count asks for all {self.of}"),)))
        sampler = self._sampler(program, rows)
        stepped = program.with_sampler(sampler)
        sites = _sites(self._blocks(program), skipped, sampler.steps)
        details = {
            "timesteps": [round(float(each), 3) for each in sampler.timesteps],
            **{name: each for name, each in decision.choices.items() if name != "rows"},
        }
        record = Record(self.name, changed=1 + len(sites), details=details)
        return PassResult(replace(stepped, plan=Plan(sampler.steps, sites)), record)

    def _check(self, program: Program) -> None:
        refuse_late(program, self.name, "put steps before it")
        if program.sampler.choose is None:
            raise PassError(f"choose_steps: the sampler {program.sampler.name} is not one of diffusers' schedulers")

    def _sampler(self, program: Program, rows: Sequence[int]) -> Sampler:
        assert program.sampler.choose is not None
        return program.sampler.choose(self.of, rows)

    def _blocks(self, program: Program) -> tuple[Block, ...]:
        if not self.skip:
            return ()
        found = tuple(block for block in find_sites(program.graph, "block", refused=[]) if block.base is not None)
        if not found:
            raise PassError(
                "choose_steps: skip needs blocks that carry a residual stream, and the network has none; `dcompile "
                "inspect` shows its regions"
            )
        return found


def _sites(blocks: Sequence[Block], skipped: dict[str, Sequence[str]], steps: int) -> tuple[Site, ...]:
    """Blocks that some step leaves out, as sites without states: the streams go past them."""
    masks = {block: tuple(block.unit not in skipped.get(str(step), ()) for step in range(steps)) for block in blocks}
    return tuple(
        left_out(block.name, block.value, str(block.base), mask) for block, mask in masks.items() if not all(mask)
    )


def _number(fitness: Fitness, found: NDArray[Any], teacher: NDArray[Any]) -> float:
    try:
        return float(fitness(found, teacher))
    except Exception as error:
        raise PassError(
            f"choose_steps: the fitness function failed on samples of shape {list(found.shape)}: "
            f"{type(error).__name__}: {error}; needed a number, less for better"
        ) from error
