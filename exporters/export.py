"""A program as a bundle: lowered, written by its target, compared with the program."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from ..compiler.program import Program
from ..compiler.store import digest, fingerprint
from ..runtime.version import __version__
from .bundle import is_whole, tool_versions, write_bundle, written_aside
from .lower import Choice, choose_layout, lower
from .parity import Parity, check_parity
from .settings import Inside, Settings
from .target import Target, TargetOptions, Written

# Largest relative error of an engine's outputs by its precision. fp32: sums are taken in another order. Half precision
# has 11 (fp16) or 8 (bf16) significant bits, and a step rounds some hundred times one after the other.
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 6e-2}


@dataclass(frozen=True)
class Exported:
    written: Written
    layout: Choice
    parity: tuple[Parity, ...]
    options: TargetOptions


def export(
    program: Program, target: Target, options: TargetOptions, layout: str, recipe: Mapping[str, Any], folder: Path,
    settings: Settings,
) -> Exported:  # fmt: skip
    """Lower, write the engines, compare each with the program, write the bundle."""
    listener = settings.listener
    choice = choose_layout(program, target.shares_weights, layout)
    listener.stage(f"exporting for {target.name}, layout {choice.layout}")
    lowered = lower(program, choice.layout)
    order = list(lowered.engines)
    written = target.write(
        lowered, folder, options, lambda name: listener.progress(order.index(name) / len(order), f"engine {name}")
    )
    listener.stage("comparing engines with the program")
    parity = check_parity(
        program, lowered, written.open, lambda f: listener.progress(f, "parity"),
        tolerance=TOLERANCE[written.open_precision],
    )  # fmt: skip
    write_bundle(program, lowered, written, target.name, recipe, folder)
    return Exported(written, choice, parity, options)


@contextmanager
def baseline_bundle(
    original: Program, target: Target, options: TargetOptions, output: Path, settings: Settings
) -> Iterator[Path]:
    """The uncompressed model as a bundle for the same target: what the artifact is compared with. Kept in the cache."""
    passing = output.parent / f".{output.name}.baseline-{os.getpid()}"  # is removed with the leftovers if we are killed
    key = digest(__version__, tool_versions(), fingerprint(original), repr(astuple(options)))
    folder = settings.cache / f"baseline-{target.name}-{key}" if settings.cache else passing / "bundle"
    try:
        if not is_whole(folder):
            settings.listener.stage("exporting the uncompressed model, to compare with")
            inside = replace(settings, listener=Inside(settings.listener))
            with written_aside(folder) as aside:
                export(original, target, options, "variants", {"passes": []}, aside, inside)
        yield folder
    finally:
        shutil.rmtree(passing, ignore_errors=True)
