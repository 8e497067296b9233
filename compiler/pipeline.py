"""Run passes one after another, hold each to its promise, and measure what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..runtime.errors import DcompileError
from .calibrate import Calibration, Progress, calibrate, calibration_requests, no_progress
from .errors import PassError
from .flops import sample_flops
from .program import Decision, Pass, PassResult, Program
from .recipe import options_of
from .rewrite import weights
from .store import Store, digest, fingerprint
from .validate import validate

VERSION = 2  # of what the store keeps: raise it when a pass decides differently from the same measurements


@dataclass(frozen=True)
class Stage:
    """One pass as it went: its record, and the program's size and error after it.

    seconds: of measuring and rewriting; 0 if the store held what was measured.
    """

    name: str
    options: Mapping[str, Any]
    seconds: float
    changed: int
    parameters: int
    flops: float
    error: Mapping[str, float]
    details: Mapping[str, Any]
    refused: tuple[tuple[str, str], ...]


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    samples: int,
    store: Store,
    progress: Progress = no_progress,
    on_pass: Callable[[int, str], None] = lambda index, name: None,
) -> tuple[Program, tuple[Stage, ...]]:
    """The compressed program and how each pass went. Decisions and errors that the store holds are not measured again.

    on_pass(index, name) is called as each pass begins.
    Raises PassError naming the step that failed or broke its promise.
    """
    key = digest(VERSION, fingerprint(program), samples)
    calibration = _teacher(program, samples, store, key, progress) if passes else None
    stages: list[Stage] = []
    for index, step in enumerate(passes):
        assert calibration is not None
        on_pass(index, step.name)
        following = tuple(passes[index + 1 :])
        ahead = [(later.name, options_of(later)) for later in following] if getattr(step, "looks_ahead", False) else []
        key = digest(key, step.name, options_of(step), *ahead)
        started = time.perf_counter()
        try:
            kept = store.get(key)
            decision = (
                Decision(kept[0]["choices"], kept[1])
                if kept
                else step.decide(program, replace(calibration, following=following))
            )
            result = apply_checked(step, program, decision)
            error = kept[0]["error"] if kept else calibration.error(result.program)
        except PassError as problem:
            after = f", after {', '.join(stage.name for stage in stages)}" if stages else ""
            why = str(problem).removeprefix(f"{step.name}: ")
            raise PassError(f"step {index + 1} ({step.name!r}{after}): {why}") from problem
        if not kept:
            store.put(key, {"choices": dict(decision.choices), "error": error}, dict(decision.tensors))
        program = replace(result.program, history=(*program.history, replace(result.record, options=options_of(step))))
        stages.append(
            Stage(
                name=step.name,
                options=options_of(step),
                seconds=0.0 if kept else time.perf_counter() - started,
                changed=result.record.changed,
                parameters=program.parameters,
                flops=sample_flops(program),
                error=error,
                details=result.record.details,
                refused=result.record.refused,
            )
        )
    return program, tuple(stages)


def apply_checked(step: Pass, program: Program, decision: Decision) -> PassResult:
    """Apply a pass. Raises PassError if it edited its input, says it changed nothing and did (or the reverse), or
    leaves a plan behind that does not hold."""
    before = _state(program)
    try:
        result = step.apply(program, decision)
        result.program.graph.graph.lint()
        validate(result.program)
    except DcompileError:
        raise
    except Exception as error:
        raise PassError(f"{type(error).__name__}: {error}; please report this with the recipe") from error
    if _state(program) != before:
        raise PassError("the pass edited the program it was given; a pass works on a copy")
    same = result.program.graph is program.graph and result.program.plan is program.plan
    if same != (result.record.changed == 0):
        raise PassError(
            f"the pass reports {result.record.changed} changes, but its program is {'the same' if same else 'another'}"
        )
    return result


def _state(program: Program) -> tuple[Any, ...]:
    tensors = [*weights(program.graph).items(), *program.tables.items()]
    versions = tuple((name, id(value), value._version) for name, value in tensors)
    return str(program.graph.graph), versions, repr(program.plan)


def _teacher(program: Program, samples: int, store: Store, key: str, progress: Progress) -> Calibration:
    kept = store.get(f"{key}-teacher")
    if kept:
        conditions, seeds = calibration_requests(program.contract, samples)
        teacher = torch.from_numpy(kept[1]["teacher"])
        return Calibration(conditions, seeds, program, teacher, progress=progress, store=store)
    calibration = calibrate(program, samples, progress, store)
    store.put(f"{key}-teacher", {"samples": samples}, {"teacher": calibration.teacher.numpy()})
    return calibration


def stage_json(stage: Stage) -> dict[str, Any]:
    return {**asdict(stage), "refused": [list(pair) for pair in stage.refused]}
