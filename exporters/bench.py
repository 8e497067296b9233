"""Speed of bundles against each other: one process, interleaved requests, medians.

A drift of the machine (heat, other work) then meets every bundle alike. Loading and memory are measured first, in a
fresh process for each bundle, with its files in the page cache of the operating system.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from ..runtime import EngineError, RequestError, Session, load
from ..runtime.manifest import read
from ..runtime.measure import example_conditions
from ..runtime.request import Label

Progress = Callable[[int, int, str], None]  # (done, of how many, what comes next)


def bench(
    bundles: Mapping[str, str | Path],
    *,
    batch: int = 1,
    threads: int | None = None,
    repeats: int = 5,
    labels: Sequence[Label] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Figures by bundle name, ready for JSON; `speedup` is the first bundle's median latency over this one's.

    Args:
        threads: of one operator; None lets the engine decide.
        repeats: timed requests of each bundle, after one that is not timed.
        labels: one a sample; classes in turn if not given. Conditions without classes are zeros.
    """
    if not bundles or repeats < 1:
        raise RequestError(f"bench: {len(bundles)} bundles and {repeats} repeats; needed one or more of each")
    if labels is not None and len(labels) != batch:
        raise RequestError(f"bench: {len(labels)} labels for a batch of {batch}; give one a sample")
    paths = {name: Path(path) for name, path in bundles.items()}
    for path in paths.values():
        read(path)  # what is no bundle is refused before anything is timed
    tell = _counter(progress, total=len(paths) * (repeats + 2))
    fresh = {}
    for name, path in paths.items():
        tell(f"loading {name} in a fresh process")
        fresh[name] = measure_fresh(path, batch=batch, threads=threads)
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    with ExitStack() as stack:
        # measure_fresh has just compared every file with its checksum
        sessions = {n: stack.enter_context(load(path, verify=False, threads=threads)) for n, path in paths.items()}
        for turn in range(repeats + 1):  # turn 0 warms up
            for name, session in sessions.items():
                tell(f"{name}, request {turn} of {repeats}" if turn else f"{name}, warming up")
                spent = _timed(session, batch, labels)
                if turn:
                    seconds[name].append(spent)
        steps = {name: session.manifest.contract.steps for name, session in sessions.items()}
        targets = {name: session.manifest.target for name, session in sessions.items()}
    first = median(next(iter(seconds.values())))
    return {
        "batch": batch,
        "threads": threads,
        "repeats": repeats,
        "machine": machine(),
        "bundles": {
            name: {
                "path": str(paths[name]),
                "target": targets[name],
                "steps": steps[name],
                "latency_s": median(spent),
                "latency_min_s": min(spent),
                "latency_max_s": max(spent),
                "latencies_s": spent,
                "step_s": median(spent) / steps[name],
                "samples_per_s": batch / median(spent),
                "speedup": first / median(spent),
                **{key: fresh[name][key] for key in ("load_s", "peak_rss_bytes", "pss_bytes", "bundle_bytes")},
            }
            for name, spent in seconds.items()
        },
    }


def measure_fresh(
    bundle: Path, *, batch: int = 1, threads: int | None = None, repeats: int = 1, only: str | None = None
) -> dict[str, float | None]:
    """What `dcompile.runtime.measure` prints of the bundle, from a process that has held nothing else."""
    command = [sys.executable, "-P", "-m", "dcompile.runtime.measure", str(bundle.resolve()), "--json"]
    command += ["--batch", str(batch), "--repeats", str(repeats)]
    command += ["--threads", str(threads)] if threads else []
    command += ["--only", only] if only else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1].removeprefix("error: ")
        raise EngineError(f"measuring in a fresh process failed with exit code {done.returncode}: {said}")
    figures: dict[str, float | None] = json.loads(done.stdout)
    return figures


def machine() -> dict[str, Any]:
    """The processor's name, the cores this process may use, and the system, for beside a figure."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": cores, "system": f"{platform.system()} {platform.release()}"}


def _timed(session: Session, batch: int, labels: Sequence[Label] | None) -> float:
    conditions = example_conditions(session.manifest.contract, batch)
    if labels is not None:
        classes = [each.name for each in session.manifest.contract.conditions if each.classes is not None]
        conditions = {name: value for name, value in conditions.items() if name not in classes}
    session.generate(labels=labels, conditions=conditions, seed=range(batch))
    assert session.last_timing is not None
    return session.last_timing.total_s


def _counter(progress: Progress | None, total: int) -> Callable[[str], None]:
    done = iter(range(total))
    return lambda what: progress(next(done), total, what) if progress else None
