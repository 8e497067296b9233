"""The whole way from a model to a bundle with its report; what the command line and `dcompile.compile` call."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..compiler import quality
from ..compiler.errors import GateError, RecipeError
from ..compiler.flops import sample_flops
from ..compiler.ingest import Source, ingest
from ..compiler.pipeline import Stage, run_passes, stage_json
from ..compiler.program import Pass, Program
from ..compiler.recipe import Recipe, build_passes, options_of
from ..compiler.store import Store, digest, fingerprint
from ..passes import PASSES, SHORT_NAMES
from ..runtime.errors import did_you_mean
from ..runtime.version import __version__
from . import onnx as onnx_target
from .bench import bench, machine, measure_fresh
from .bundle import RECIPE_FILE, check_output, is_whole, tool_versions, write_bundle, written_aside
from .evaluate import eval_labels, sample
from .lower import Lowered, lower
from .parity import Parity, check_parity
from .report import write_report

EngineWriter = Callable[[Lowered, Path, Callable[[str], None]], dict[str, str]]
TARGETS: dict[str, EngineWriter] = {"onnx": onnx_target.export_engines}
BENCH_BATCH, BENCH_REPEATS = 16, 3
_SHOWN = 36  # samples in the report's grids


class Listener(Protocol):
    """Told what the build is doing: a progress bar, or nothing."""

    def stage(self, title: str) -> None: ...

    def progress(self, fraction: float, text: str) -> None: ...


class Silent:
    def stage(self, title: str) -> None: ...

    def progress(self, fraction: float, text: str) -> None: ...


@dataclass(frozen=True)
class _Inside:
    """Shows the progress of parts of a stage, and their titles beside it."""

    listener: Listener

    def stage(self, title: str) -> None:
        self.listener.progress(0.0, title)

    def progress(self, fraction: float, text: str) -> None:
        self.listener.progress(fraction, text)


@dataclass(frozen=True)
class Built:
    """bundle: where the artifact is. report: what it cost, as in report.json."""

    bundle: Path
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to build, as opposed to what.

    cache: folder of kept results, or None to keep none. threads: None lets engines decide.
    """

    trust_pickle: bool = False
    force: bool = False
    cache: Path | None = None
    threads: int | None = None
    evaluate: bool = True
    listener: Listener = field(default_factory=Silent)


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dcompile"


def compile_model(
    model: str, output: str | Path, recipe: Recipe | None = None, settings: Settings | None = None
) -> Built:
    """Compile `model` by `recipe` into the bundle directory `output`.

    Everything that can be refused is refused before any work. The bundle appears whole, or not at all.
    Raises GateError, after writing the report to `<output>.report`, when a gate of the recipe is not met; other
    DcompileErrors for everything else.
    """
    recipe, settings, output = recipe or Recipe(), settings or Settings(), Path(output)
    passes, gates, judge = check_recipe(recipe, settings)
    check_output(output, settings.force, inputs_of(model, recipe))
    listener = settings.listener
    listener.stage(f"reading {model}")
    original = ingest(source_of(model, recipe, settings))
    store = Store(settings.cache)
    program, stages = run_passes(
        original, passes, recipe.calibration_samples, store, listener.progress,
        on_pass=lambda index, name: listener.stage(f"pass {index + 1} of {len(passes)}: {name}"),
    )  # fmt: skip
    effective = effective_recipe(model, recipe, passes, original)
    with written_aside(output) as folder:
        parity, operators = export(program, recipe.target, effective, folder, settings)
        report = describe(original, program, stages, effective, parity, operators)
        before, after = None, None
        if settings.evaluate:
            with baseline_bundle(original, recipe.target, output, settings) as baseline:
                before, after = measure(report, baseline, folder, recipe.eval_samples, judge, store, original, settings)
        outcomes = quality.check_gates(gates, figures_of(report))
        if gates:
            report["gates"] = [asdict(outcome) for outcome in outcomes]
            report["passed"] = all(outcome.passed for outcome in outcomes)
        if not report.get("passed", True):
            kept = output.parent / f"{output.name}.report"
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir(parents=True)
            write_report(report, kept, before, after)
            raise GateError(_gate_message(outcomes, kept))
        report["commands"] = {
            "build it again": shlex.join(["dcompile", "--recipe", str(output / RECIPE_FILE), "-o", str(output)]),
            "sample from it": shlex.join(["dcompile", "run", str(output), "--seed", "0", "-o", sample_file(original)]),
        }
        write_report(report, folder, before, after)
    return Built(output, report)


def sample_file(program: Program) -> str:
    """A name for samples of the program: of a picture, or of plain numbers where they are none."""
    return "sample.png" if len(program.contract.sample.shape) == 3 else "sample.npy"


def check_recipe(
    recipe: Recipe, settings: Settings
) -> tuple[tuple[Pass, ...], tuple[quality.Gate, ...], quality.Judge | None]:
    """Passes, gates and judge of a recipe. Raises RecipeError for what is unknown, before any work."""
    if recipe.target not in TARGETS:
        raise RecipeError(f"--target {recipe.target!r}: no such target; {did_you_mean(recipe.target, TARGETS)}")
    passes = build_passes(recipe.steps_of_passes(), PASSES, SHORT_NAMES)
    gates = quality.parse_gates(recipe.gate or "")
    if gates and not settings.evaluate:
        raise RecipeError("a gate needs the evaluation; leave --no-eval out")
    sampled = [gate.metric for gate in gates if gate.metric not in quality.MEASURED]
    if sampled and not recipe.eval_samples:
        raise RecipeError(f"gate on {sampled[0]!r} needs samples: give --eval-samples 1 or more, or drop the gate")
    judge = quality.load_judge(recipe.judge, settings.threads) if recipe.judge else None
    if judge is None and (judged := [gate.metric for gate in gates if gate.metric in quality.JUDGED]):
        raise RecipeError(f"gate on {judged[0]!r} needs a judge: give --judge DIRECTORY, or drop the gate")
    return passes, gates, judge


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


def effective_recipe(model: str, recipe: Recipe, passes: Sequence[Pass], program: Program) -> dict[str, Any]:
    """The recipe with every default filled in: `dcompile --recipe` of it builds the same again."""
    given = recipe.model_dump(mode="json", exclude_none=True)
    whole = {
        **given,
        "model": model,
        "passes": [{step.name: options_of(step)} for step in passes],
        "shape": list(program.contract.sample.shape),
        "steps": recipe.steps or program.contract.steps,
        "guidance": program.contract.guidance,
    }
    return {name: whole[name] for name in Recipe.model_fields if name in whole}  # in one order, however it was given


def export(
    program: Program, target: str, recipe: Mapping[str, Any], folder: Path, settings: Settings
) -> tuple[tuple[Parity, ...], dict[str, dict[str, int]]]:
    """Lower, write the engines, compare each with the program, write the bundle. -> parity, operators as they run."""
    listener = settings.listener
    listener.stage(f"exporting for {target}")
    lowered = lower(program)
    order = list(lowered.engines)
    files = TARGETS[target](
        lowered, folder, lambda name: listener.progress(order.index(name) / len(order), f"engine {name}")
    )
    listener.stage("comparing engines with the program")
    parity = check_parity(
        program, lowered, folder, files, target, settings.threads, lambda f: listener.progress(f, "parity")
    )
    operators = {name: dict(onnx_target.fused_operators(folder / file)) for name, file in files.items()}
    for name, engine in lowered.engines.items():
        onnx_target.check_fusion(name, engine.graph, operators[name])
    write_bundle(program, lowered, files, target, recipe, folder)
    return parity, operators


@contextmanager
def baseline_bundle(original: Program, target: str, output: Path, settings: Settings) -> Iterator[Path]:
    """The uncompressed model as a bundle for the same target: what the artifact is compared with. Kept in the cache."""
    passing = output.parent / f".{output.name}.baseline-{os.getpid()}"  # is removed with the leftovers if we are killed
    key = digest(__version__, tool_versions(), fingerprint(original))
    folder = settings.cache / f"baseline-{target}-{key}" if settings.cache else passing / "bundle"
    try:
        if not is_whole(folder):
            settings.listener.stage("exporting the uncompressed model, to compare with")
            inside = replace(settings, listener=_Inside(settings.listener))
            with written_aside(folder) as aside:
                export(original, target, {"passes": []}, aside, inside)
        yield folder
    finally:
        shutil.rmtree(passing, ignore_errors=True)


def describe(
    original: Program, program: Program, stages: Sequence[Stage], recipe: Mapping[str, Any], parity: Sequence[Parity],
    operators: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:  # fmt: skip
    """The report as far as it is known without running anything."""
    plan = program.plan
    return {
        "dcompile": __version__,
        "tools": tool_versions(),
        "name": program.name,
        "model": recipe["model"],
        "target": recipe["target"],
        "recipe": dict(recipe),
        "summary": {},
        "table": [
            _row("parameters", "Parameters", "", original.parameters, program.parameters),
            _row("flops", "Operations a sample", "flops", sample_flops(original), sample_flops(program)),
        ],
        "passes": [stage_json(stage) for stage in stages],
        "plan": {
            "steps": plan.steps,
            "sites": [site.name for site in plan.sites],
            "computed": [list(site.computed) for site in plan.sites],
        },
        "parity": [asdict(result) for result in parity],
        "operators": {name: dict(counts) for name, counts in operators.items()},
        "machine": machine(),
    }


def measure(
    report: dict[str, Any], baseline: Path, folder: Path, count: int, judge: quality.Judge | None, store: Store,
    original: Program, settings: Settings,
) -> tuple[NDArray[np.uint8] | None, NDArray[np.uint8] | None]:  # fmt: skip
    """Add quality, speed and memory to the report. -> images of both bundles, same seeds, where they can be shown."""
    listener = settings.listener
    images: tuple[NDArray[np.uint8] | None, NDArray[np.uint8] | None] = (None, None)
    figures: dict[str, float] = {}
    if count:
        listener.stage("sampling, to compare quality")
        before = _kept_samples(baseline, count, store, settings)
        after = sample(folder, count, settings.threads, lambda f: listener.progress(f, "the compiled model"))
        contract = original.contract
        labels = eval_labels(folder, count)
        figures = quality.measure_quality(before, after, labels=labels, judge=judge, value_range=contract.value_range)
        images = (_images(folder, before[:_SHOWN]), _images(folder, after[:_SHOWN]))
        names = next((c.labels for c in contract.conditions if c.classes is not None), None)
        if labels is not None:
            report["labels"] = [names[label] if names else str(label) for label in labels[:_SHOWN]]
        report["quality"] = {**figures, "samples": count}
    listener.stage("timing, interleaved with the uncompressed model")
    timed = bench(
        {"before": baseline, "after": folder}, batch=BENCH_BATCH, threads=settings.threads, repeats=BENCH_REPEATS,
        progress=lambda done, total, what: listener.progress(done / total, what),
    )  # fmt: skip
    report["machine"] = {**timed["machine"], "threads": settings.threads, "batch": BENCH_BATCH}
    report["memory"] = _memory(folder, settings.threads)
    report["table"] += _measured_rows(timed["bundles"]["before"], timed["bundles"]["after"], figures)
    report["summary"] = _summary(report)
    return images


def _kept_samples(baseline: Path, count: int, store: Store, settings: Settings) -> NDArray[np.float32]:
    key = digest("baseline samples", baseline.name, count)
    kept = store.get(key)
    if kept:
        return kept[1]["samples"]
    samples = sample(
        baseline, count, settings.threads, lambda f: settings.listener.progress(f, "the uncompressed model")
    )
    store.put(key, {"count": count}, {"samples": samples})
    return samples


def _images(bundle: Path, samples: NDArray[np.float32]) -> NDArray[np.uint8] | None:
    if samples.ndim != 4:
        return None
    from ..runtime.images import to_pixels
    from ..runtime.manifest import read

    return to_pixels(samples, read(bundle).contract.value_range)


def _memory(folder: Path, threads: int | None) -> dict[str, float]:
    """Resident memory (PSS) of a fresh process with every engine loaded and run, and with the largest engine alone."""
    from ..runtime.manifest import read

    names = list(read(folder).engines)
    everything = measure_fresh(folder, batch=1, threads=threads)["pss_bytes"] or 0.0
    alone = measure_fresh(folder, batch=1, threads=threads, only=names[0])["pss_bytes"] or 1.0
    return {"pss_all_bytes": everything, "pss_one_bytes": alone, "ratio": everything / alone}


def _measured_rows(
    before: Mapping[str, Any], after: Mapping[str, Any], figures: Mapping[str, float]
) -> list[dict[str, Any]]:
    rows = [
        _row("bytes", "Size on disk", "bytes", before["bundle_bytes"], after["bundle_bytes"]),
        _row("latency_s", f"Latency, batch {BENCH_BATCH}", "s", before["latency_s"], after["latency_s"]),
        _row("load_s", "Cold load", "s", before["load_s"], after["load_s"]),
        _row("peak_rss_bytes", "Peak memory", "bytes", before["peak_rss_bytes"], after["peak_rss_bytes"]),
    ]
    if "accuracy" in figures:
        rows.append(
            _row("accuracy", "Class accuracy", "fraction", figures["accuracy_before"], figures["accuracy"], "higher")
        )
    if "frechet" in figures:
        rows.append(_row("frechet", "Fréchet distance to real data", "", figures["frechet_before"], figures["frechet"]))
    for metric, label, unit in (("psnr", "PSNR, same seeds", "dB"), ("ssim", "SSIM, same seeds", "")):
        if metric in figures:
            rows.append(_row(metric, label, unit, None, figures[metric], "higher"))
    return rows


def _row(
    metric: str, label: str, unit: str, before: float | None, after: float | None, better: str = "lower"
) -> dict[str, Any]:
    return {"metric": metric, "label": label, "unit": unit, "before": before, "after": after, "better": better}


def _summary(report: Mapping[str, Any]) -> dict[str, float]:
    rows = {row["metric"]: row for row in report["table"]}
    return {
        "speedup": rows["latency_s"]["before"] / rows["latency_s"]["after"],
        "size_ratio": rows["bytes"]["after"] / rows["bytes"]["before"],
        "flops_ratio": rows["flops"]["after"] / rows["flops"]["before"],
        **{
            k: v
            for k, v in report.get("quality", {}).items()
            if k in ("accuracy", "accuracy_drop", "frechet_increase", "psnr")
        },
    }


def figures_of(report: Mapping[str, Any]) -> dict[str, float]:
    """Every figure that a gate can name."""
    return {**report.get("summary", {}), **report.get("quality", {})}


def _gate_message(outcomes: Sequence[quality.GateOutcome], kept: Path) -> str:
    failed = "; ".join(f"{o.metric} is {o.value:.4g}, needed {o.op} {o.limit:g}" for o in outcomes if not o.passed)
    return f"gate not met: {failed}; no bundle was written, the report is in {kept}"
