"""The targets as tables for a terminal: what is installed, what runs here, which number formats each takes."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from rich.table import Table

from .legality import formats_by_target
from .target import Target
from .targets import TARGETS, is_installed


def targets_table() -> Table:
    table = Table("target", "installed", "on this machine", "precision", "layout", title="Targets")
    for name, target in TARGETS.items():
        if not is_installed(target):
            table.add_row(name, f"[dim]pip install 'dcompile\\[{target.extra}]'[/dim]", "", "", "", style="dim")
            continue
        why_not = target.cannot_run()
        runs = f"builds only: {why_not}" if why_not else "builds and runs"
        layout = "variants" if target.shares_weights else "segments"
        table.add_row(name, _version(target), runs, ", ".join(target.precisions()), layout)
    return table


def formats_table() -> Table:
    """One row a pair of weight and activation format; one column a target."""
    table = Table("weights", "activations", *TARGETS, title="Number formats", show_lines=True)
    for weights, activations, verdicts in formats_by_target():
        table.add_row(weights, activations, *(verdicts[name] for name in TARGETS))
    return table


def _version(target: Target) -> str:
    for package in target.packages:
        with suppress(PackageNotFoundError):
            return f"{package} {version(package)}"
    return "yes"
