"""How much each part of a network changes from step to step: a table and a heat map (the analysis of 2411.13588)."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Column, Table

from ..compiler.calibrate import Progress, Requests, calibration_requests, no_progress
from ..compiler.errors import PassError, UnsupportedError
from ..compiler.program import Program
from ..compiler.store import NOWHERE, Store
from ..compiler.trace import Watched, record
from ..passes.caching.sites import Refused, find_sites

SITES = ("block", "branch", "cut", "encoder", "output")


@dataclass(frozen=True)
class Profile:
    """changes: float32 [sites, T], mean |x_i - x_{i-1}| / mean |x_{i-1}|; 0 at step 0. norms: [sites, T], mean |x|."""

    kind: str
    names: tuple[str, ...]
    changes: NDArray[np.float32]
    norms: NDArray[np.float32]


def profile_program(
    program: Program, kind: str, samples: int, progress: Progress = no_progress, store: Store = NOWHERE
) -> Profile:
    """Run the samples that passes calibrate on, unless the store has what a build or profile before recorded of them.

    Blocks are measured as residuals: what they add to their stream.

    Raises PassError where the network has no such sites.
    """
    refused: Refused = []
    sites = find_sites(program.graph, kind, refused=refused)
    if not sites:
        raise PassError(f"found no site of kind {kind!r} in {program.name}; `dcompile inspect` shows its regions")
    watched = [Watched(site.name, site.value, site.base) for site in sites]
    requests = Requests(*calibration_requests(program.contract, samples), progress=progress, store=store)
    trace = record(program, watched, requests)
    names = tuple(site.name for site in sites)
    changes = np.stack([trace.changes(name) for name in names])
    norms = np.stack([trace.norms[name].mean(axis=1) for name in names])
    return Profile(kind, names, changes.astype(np.float32), norms)


def profile_table(profile: Profile, most: int = 40) -> Table:
    """One row a site: its mean change, and when it changes least and most."""
    table = Table(
        Column(profile.kind, no_wrap=True), "mean change a step", "least, at step", "most, at step", "mean size"
    )
    order: Sequence[int] = range(len(profile.names))
    if len(profile.names) > most:
        order = sorted(order, key=lambda site: float(profile.changes[site].mean()))[:most]
        table.caption = f"the {most} of {len(profile.names)} that change least; the CSV has all"
    for site in order:
        later = profile.changes[site][1:]
        least, largest = int(later.argmin()), int(later.argmax())
        table.add_row(
            profile.names[site], f"{100 * later.mean():.1f} %", f"{100 * later[least]:.1f} %, {least + 1}",
            f"{100 * later[largest]:.1f} %, {largest + 1}", f"{profile.norms[site].mean():.3g}",
        )  # fmt: skip
    return table


def write_csv(profile: Profile, path: Path) -> None:
    """A row for each site and step: site, step, change, norm."""
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with aside.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(("site", "step", "change", "norm"))
        for name, changes, norms in zip(profile.names, profile.changes, profile.norms, strict=True):
            rows.writerows(
                (name, step, f"{c:.6g}", f"{n:.6g}") for step, (c, n) in enumerate(zip(changes, norms, strict=True))
            )
    os.replace(aside, path)


def write_heat_map(profile: Profile, path: Path) -> None:
    """Sites by steps, dark where little changes. Raises UnsupportedError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("a heat map needs matplotlib: pip install 'dcompile[report]'") from error
    sites, steps = profile.changes.shape
    figure = Figure(figsize=(3.5 + 0.22 * steps, 1.6 + 0.22 * sites), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = 100 * profile.changes[:, 1:]
    image = axes.imshow(shown, aspect="auto", cmap="viridis", vmin=0, vmax=float(np.percentile(shown, 98)) or 1.0)
    axes.set_yticks(range(sites), profile.names, fontsize=7)
    axes.set_xticks(range(0, steps - 1, max((steps - 1) // 12, 1)))
    axes.set_xticklabels([str(int(tick) + 1) for tick in axes.get_xticks()])
    axes.set_xlabel("step")
    axes.set_title(f"change of each {profile.kind} from the step before", fontsize=10)
    figure.colorbar(image, label="%", shrink=0.8)
    figure.savefig(path)
