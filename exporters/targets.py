"""The targets, by the name that `--target` takes; and what a recipe asks of one."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from ..compiler.errors import RecipeError
from ..compiler.program import Pass
from ..compiler.recipe import Recipe
from ..passes.quantize import Quantize
from ..runtime.errors import did_you_mean
from .aoti import target as aoti
from .legality import check_capabilities, check_legal
from .onnx import target as onnx
from .openvino import target as openvino
from .target import Target, TargetOptions
from .tensorrt import target as tensorrt

TARGETS: dict[str, Target] = {
    target.name: target for target in (onnx.TARGET, openvino.TARGET, tensorrt.TARGET, aoti.TARGET)
}


def is_installed(target: Target) -> bool:
    return any(find_spec(package) for package in target.packages)


def find_target(name: str) -> Target:
    """Raises RecipeError for a target that is unknown, or whose package is missing here."""
    if name not in TARGETS:
        raise RecipeError(f"--target {name!r}: no such target; {did_you_mean(name, TARGETS)}")
    target = TARGETS[name]
    if not is_installed(target):
        needed = " or ".join(target.packages)
        raise RecipeError(f"target {name!r} needs {needed}, not installed here: pip install 'dcompile[{target.extra}]'")
    return target


def options_for(target: Target, recipe: Recipe, threads: int | None) -> TargetOptions:
    """What the recipe asks of the target. Raises RecipeError for what the target does not know."""
    known = target.precisions()
    precision = recipe.precision or known[0]
    if precision not in known:
        raise RecipeError(f"--precision {precision!r}: target {target.name!r} takes {', '.join(known)} on this machine")
    if recipe.compute_capability and not target.takes_capabilities:
        raise RecipeError(f"--compute-capability: target {target.name!r} compiles for no GPU; leave it out")
    if recipe.profiles and not target.takes_profiles:
        raise RecipeError(f"--profile: target {target.name!r} takes any batch; leave it out")
    return TargetOptions(precision, threads, tuple(recipe.compute_capability or ()), dict(recipe.profiles or {}))


def fill_in(passes: Sequence[Pass], target: Target) -> tuple[Pass, ...]:
    """The passes with what the recipe left open decided as the target does it best."""
    return tuple(step.resolved(target.quantize) if isinstance(step, Quantize) else step for step in passes)


def refuse_illegal(passes: Sequence[Pass], target: Target, options: TargetOptions) -> None:
    """Raises RecipeError for a number format that the target would not compute in as asked."""
    if target.takes_capabilities:
        check_capabilities(options.compute_capabilities, [options.precision])
    for step in passes:
        if isinstance(step, Quantize):
            check_legal(
                target.name, step.format, step.activations or "none", symmetric=step.symmetric, group=step.group,
                compute_capabilities=options.compute_capabilities, precision=options.precision,
            )  # fmt: skip
