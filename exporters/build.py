"""The whole way from a model to a bundle with its report; what the command line and `dcompile.compile` call."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..compiler import quality
from ..compiler.errors import GateError, RecipeError
from ..compiler.ingest import Source, ingest
from ..compiler.pipeline import run_passes
from ..compiler.program import Pass, Program
from ..compiler.recipe import Recipe, build_passes, options_of
from ..compiler.store import Store
from ..passes import PASSES, SHORT_NAMES
from .bundle import RECIPE_FILE, check_output, written_aside
from .export import baseline_bundle, export
from .figures import Images, describe, figures_of, measure, measure_program
from .report import write_report
from .settings import Settings
from .target import Target, TargetOptions
from .targets import fill_in, find_target, options_for, refuse_illegal


@dataclass(frozen=True)
class Built:
    """bundle: where the artifact is. report: what it cost, as in report.json."""

    bundle: Path
    report: Mapping[str, Any]


def compile_model(
    model: str, output: str | Path, recipe: Recipe | None = None, settings: Settings | None = None
) -> Built:
    """Compile `model` by `recipe` into the bundle directory `output`.

    Everything that can be refused is refused before any work. The bundle appears whole, or not at all.
    Raises GateError, after writing the report to `<output>.report`, when a gate of the recipe is not met; other
    DcompileErrors for everything else.
    """
    recipe, settings, output = recipe or Recipe(), settings or Settings(), Path(output)
    checked = check_recipe(recipe, settings)
    target, options, passes = checked.target, checked.options, checked.passes
    check_output(output, settings.force, inputs_of(model, recipe))
    listener = settings.listener
    listener.stage(f"reading {model}")
    original = ingest(source_of(model, recipe, settings))
    store = Store(settings.cache)
    program, stages = run_passes(
        original, passes, recipe.calibration_samples, store, listener.progress,
        on_pass=lambda index, name: listener.stage(f"pass {index + 1} of {len(passes)}: {name}"),
    )  # fmt: skip
    effective = effective_recipe(model, recipe, passes, original, options)
    with written_aside(output) as folder:
        exported = export(program, target, options, recipe.layout, effective, folder, settings)
        report = describe(original, program, stages, effective, exported)
        images: Images = (None, None)
        if settings.evaluate:
            with baseline_bundle(original, target, options, output, settings) as baseline:
                given = (report, baseline, folder, recipe.eval_samples, checked.judge, store)
                if target.cannot_run():
                    images = measure_program(*given, original, program, settings)
                else:
                    images = measure(*given, settings)
        outcomes = quality.check_gates(checked.gates, figures_of(report))
        if checked.gates:
            report["gates"] = [asdict(outcome) for outcome in outcomes]
            report["passed"] = all(outcome.passed for outcome in outcomes)
        kept = output.parent / f"{output.name}.report"
        shutil.rmtree(kept, ignore_errors=True)  # of an earlier build that failed its gate
        if not report.get("passed", True):
            kept.mkdir(parents=True)
            write_report(report, kept, *images)
            raise GateError(_gate_message(outcomes, kept))
        report["commands"] = {
            "build it again": shlex.join(["dcompile", "--recipe", str(output / RECIPE_FILE), "-o", str(output)]),
            "sample from it": shlex.join(["dcompile", "run", str(output), "--seed", "0", "-o", sample_file(original)]),
        }
        write_report(report, folder, *images)
    return Built(output, report)


def sample_file(program: Program) -> str:
    """A name for samples of the program: of a picture, or of plain numbers where they are none."""
    return "sample.png" if len(program.contract.sample.shape) == 3 else "sample.npy"


@dataclass(frozen=True)
class Checked:
    """A recipe whose every part is known to be possible here."""

    target: Target
    options: TargetOptions
    passes: tuple[Pass, ...]
    gates: tuple[quality.Gate, ...]
    judge: quality.Judge | None


def check_recipe(recipe: Recipe, settings: Settings) -> Checked:
    """Raises RecipeError for what is unknown, missing here, or cannot go together, before any work."""
    passes = build_passes(recipe.steps_of_passes(), PASSES, SHORT_NAMES)
    gates = quality.parse_gates(recipe.gate or "")
    if gates and not settings.evaluate:
        raise RecipeError("a gate needs the evaluation; leave --no-eval out")
    sampled = [gate.metric for gate in gates if gate.metric not in quality.MEASURED]
    if sampled and not recipe.eval_samples:
        raise RecipeError(f"gate on {sampled[0]!r} needs samples: give --eval-samples 1 or more, or drop the gate")
    target = find_target(recipe.target)
    options = options_for(target, recipe, settings.threads)
    if any(gate.metric == "speedup" for gate in gates) and (why := target.cannot_run()):
        raise RecipeError(f"gate on 'speedup' needs to run the engines, but {why}; drop the gate, or build elsewhere")
    passes = fill_in(passes, target)
    refuse_illegal(passes, target, options)
    judge = quality.load_judge(recipe.judge, settings.threads) if recipe.judge else None
    if judge is None and (judged := [gate.metric for gate in gates if gate.metric in quality.JUDGED]):
        raise RecipeError(f"gate on {judged[0]!r} needs a judge: give --judge DIRECTORY, or drop the gate")
    real = [gate.metric for gate in gates if gate.metric in quality.AGAINST_REAL]
    if real and judge and judge.reference is None:
        raise RecipeError(
            f"gate on {real[0]!r} needs {recipe.judge}/{quality.REFERENCE_FILE}, features of real data; it is missing: "
            "add it, or drop the gate"
        )
    return Checked(target, options, passes, gates, judge)


def inputs_of(model: str, recipe: Recipe) -> list[Path]:
    """The files and folders that a build reads."""
    return [Path(model), *filter(None, (recipe.contract, recipe.judge))]


def source_of(model: str, recipe: Recipe, settings: Settings) -> Source:
    return Source(
        model=model,
        shape=recipe.shape,
        contract=recipe.contract,
        sampler=recipe.sampler,
        steps=recipe.steps,
        guidance=recipe.guidance,
        trust_pickle=settings.trust_pickle,
    )


def effective_recipe(
    model: str, recipe: Recipe, passes: Sequence[Pass], program: Program, options: TargetOptions
) -> dict[str, Any]:
    """The recipe with every default filled in: `dcompile --recipe` of it builds the same again."""
    given = recipe.model_dump(mode="json", exclude_none=True)
    whole = {
        **given,
        "model": model,
        "precision": options.precision,
        "passes": [{step.name: options_of(step)} for step in passes],
        "shape": list(program.contract.sample.shape),
        "steps": recipe.steps or program.contract.steps,
        "guidance": program.contract.guidance,
    }
    return {name: whole[name] for name in Recipe.model_fields if name in whole}  # in one order, however it was given


def _gate_message(outcomes: Sequence[quality.GateOutcome], kept: Path) -> str:
    failed = "; ".join(f"{o.metric} is {o.value:.4g}, needed {o.op} {o.limit:g}" for o in outcomes if not o.passed)
    return f"gate not met: {failed}; no bundle was written, the report is in {kept}"
