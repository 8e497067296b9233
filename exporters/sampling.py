"""Samples from a bundle into a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime import RequestError, Timing, load
from .report import save_grid


def generate_file(
    bundle: Path, output: Path, labels: Sequence[str] | None, count: int, seed: int, conditions: Path | None,
    columns: int | None, threads: int | None, progress: Callable[[float, str], None],
) -> Timing:  # fmt: skip
    """Write samples as a picture (.png) or as numbers (.npy, float32 [B, *shape]).

    Raises RequestError for another ending.
    """
    if output.suffix not in (".png", ".npy"):
        raise RequestError(
            f"-o {output}: ends in {output.suffix or 'nothing'!r}; needed .png for a picture or .npy for the numbers"
        )
    with load(bundle, threads=threads) as session:
        contract = session.manifest.contract
        given: dict[str, Any] = _read_conditions(conditions) if conditions else {}
        named = [condition for condition in contract.conditions if condition.classes is not None]
        size = len(labels) if labels else count
        if named and not labels and named[0].name not in given:
            given[named[0].name] = np.arange(size) % (named[0].classes or 1)
        samples = session.generate(
            labels=[int(label) if label.isdigit() and not _is_name(label, named) else label for label in labels]
            if labels
            else None,
            conditions=given or None,
            seed=[seed + i for i in range(size)],
            callback=lambda step, steps, _: progress(step / steps, f"step {step} of {steps}"),
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix == ".npy":
            np.save(output, samples)
        else:
            save_grid(output, session.images(samples), columns)
        assert session.last_timing is not None
        return session.last_timing


def _is_name(label: str, named: Sequence[Any]) -> bool:
    return bool(named and named[0].labels and label in named[0].labels)


def _read_conditions(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return dict(load_file(path))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
    except (OSError, ValueError) as error:
        raise RequestError(f"--conditions {path}: cannot be read ({error})") from error
    raise RequestError(f"--conditions {path}: needed an .npz or .safetensors file of arrays by input name")
