"""The figures of a report: what was done, and what the artifact is worth beside the uncompressed model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..compiler import quality
from ..compiler.flops import sample_flops
from ..compiler.pipeline import Stage, stage_json
from ..compiler.program import Program
from ..compiler.store import Store, digest, fingerprint
from ..runtime.images import to_pixels
from ..runtime.manifest import read
from ..runtime.version import __version__
from .bench import bench, machine, measure_fresh
from .bundle import tool_versions
from .evaluate import eval_labels, sample, sample_program
from .export import Exported
from .settings import Settings

BENCH_BATCH, BENCH_REPEATS = 16, 3
_SHOWN = 36  # samples in the report's grids

Images = tuple[NDArray[np.uint8] | None, NDArray[np.uint8] | None]  # of both, same seeds, where they can be shown


def describe(
    original: Program, program: Program, stages: Sequence[Stage], recipe: Mapping[str, Any], exported: Exported
) -> dict[str, Any]:
    """The report as far as it is known without running anything."""
    plan = program.plan
    written, choice = exported.written, exported.layout
    return {
        "dcompile": __version__,
        "tools": tool_versions(),
        "name": program.name,
        "model": recipe["model"],
        "target": recipe["target"],
        "precision": exported.options.precision,
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
            "decided_steps": [step for step in range(plan.steps) if plan.open(step)],
        },
        "layout": {"name": choice.layout, "reason": choice.reason, **choice.figures},
        "parity": [asdict(result) for result in exported.parity],
        "operators": {name: dict(counts) for name, counts in written.kernels.items()},
        "regions": {name: [list(row) for row in rows] for name, rows in written.regions.items()},
        "not_executed": written.checked,
        "machine": machine(),
    }


def measure(
    report: dict[str, Any], baseline: Path, folder: Path, count: int, judge: quality.Judge | None, store: Store,
    settings: Settings,
) -> Images:  # fmt: skip
    """Add quality, speed and memory to the report, from both bundles as they run."""
    listener = settings.listener
    images: Images = (None, None)
    figures: dict[str, float] = {}
    if count:
        listener.stage("sampling, to compare quality")
        key = digest("baseline samples", baseline.name, count)
        before = _kept(store, key, lambda: sample(
            baseline, count, settings.threads, lambda f: listener.progress(f, "the uncompressed model")
        ))  # fmt: skip
        after = sample(folder, count, settings.threads, lambda f: listener.progress(f, "the compiled model"))
        figures, images = _compare(report, folder, before, after, judge)
    listener.stage("timing, interleaved with the uncompressed model")
    timed = bench(
        {"before": baseline, "after": folder}, batch=BENCH_BATCH, threads=settings.threads, repeats=BENCH_REPEATS,
        progress=lambda done, total, what: listener.progress(done / total, what),
    )  # fmt: skip
    report["machine"] = {**timed["machine"], "threads": settings.threads, "batch": BENCH_BATCH}
    report["memory"] = _memory(folder, settings.threads)
    report["table"] += [*_size_row(baseline, folder), *_speed_rows(**timed["bundles"]), *_quality_rows(figures)]
    report["summary"] = _summary(report)
    return images


def measure_program(
    report: dict[str, Any], baseline: Path, folder: Path, count: int, judge: quality.Judge | None, store: Store,
    original: Program, program: Program, settings: Settings,
) -> Images:  # fmt: skip
    """Add what is known where engines cannot run: sizes, and the quality of the program as PyTorch runs it."""
    listener = settings.listener
    images: Images = (None, None)
    figures: dict[str, float] = {}
    if count:
        listener.stage("sampling the program in PyTorch, to compare quality")
        before = _kept(store, digest("program samples", fingerprint(original), count), lambda: sample_program(
            original, count, lambda f: listener.progress(f, "the uncompressed model")
        ))  # fmt: skip
        after = sample_program(program, count, lambda f: listener.progress(f, "the compiled model"))
        figures, images = _compare(report, folder, before, after, judge)
    report["table"] += [*_size_row(baseline, folder), *_quality_rows(figures)]
    report["summary"] = _summary(report)
    return images


def figures_of(report: Mapping[str, Any]) -> dict[str, float]:
    """Every figure that a gate can name."""
    return {**report.get("summary", {}), **report.get("quality", {})}


def _kept(store: Store, key: str, make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
    kept = store.get(key)
    if kept:
        return kept[1]["samples"]
    samples = make()
    store.put(key, {}, {"samples": samples})
    return samples


def _compare(
    report: dict[str, Any], folder: Path, before: NDArray[np.float32], after: NDArray[np.float32],
    judge: quality.Judge | None,
) -> tuple[dict[str, float], Images]:  # fmt: skip
    contract = read(folder).contract
    labels = eval_labels(contract, len(before))
    figures = quality.measure_quality(before, after, labels=labels, judge=judge, value_range=contract.value_range)
    names = next((c.labels for c in contract.conditions if c.classes is not None), None)
    if labels is not None:
        report["labels"] = [names[label] if names else str(label) for label in labels[:_SHOWN]]
    report["quality"] = {**figures, "samples": len(before)}
    if before.ndim != 4:
        return figures, (None, None)
    shown = (to_pixels(before[:_SHOWN], contract.value_range), to_pixels(after[:_SHOWN], contract.value_range))
    return figures, shown


def _memory(folder: Path, threads: int | None) -> dict[str, float]:
    """Resident memory (PSS) of a fresh process with every engine loaded and run, and with the largest engine alone."""
    manifest = read(folder)
    everything = measure_fresh(folder, batch=1, threads=threads)["pss_bytes"] or 0.0
    if len(manifest.engines) == 1:
        return {"pss_all_bytes": everything, "pss_one_bytes": everything, "ratio": 1.0}
    first = next(iter(manifest.engines))
    alone = measure_fresh(folder, batch=1, threads=threads, only=first)["pss_bytes"] or 1.0
    return {"pss_all_bytes": everything, "pss_one_bytes": alone, "ratio": everything / alone}


def _size_row(before: Path, after: Path) -> list[dict[str, Any]]:
    return [_row("bytes", "Size on disk", "bytes", _bytes_of(before), _bytes_of(after))]


def _bytes_of(bundle: Path) -> float:
    return float(sum(file.bytes for file in read(bundle).files.values()))


def _speed_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        _row("latency_s", f"Latency, batch {BENCH_BATCH}", "s", before["latency_s"], after["latency_s"]),
        _row("load_s", "Cold load", "s", before["load_s"], after["load_s"]),
        _row("peak_rss_bytes", "Peak memory", "bytes", before["peak_rss_bytes"], after["peak_rss_bytes"]),
    ]


def _quality_rows(figures: Mapping[str, float]) -> list[dict[str, Any]]:
    rows = []
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
    ratios = {"size_ratio": "bytes", "flops_ratio": "flops"}
    summary = {name: rows[metric]["after"] / rows[metric]["before"] for name, metric in ratios.items()}
    if "latency_s" in rows:
        summary = {"speedup": rows["latency_s"]["before"] / rows["latency_s"]["after"], **summary}
    shown = ("accuracy", "accuracy_drop", "frechet_increase", "psnr")
    return summary | {name: value for name, value in report.get("quality", {}).items() if name in shown}
