"""Samples from a bundle into a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from ..compiler.errors import UnsupportedError
from ..runtime import RequestError, Timing, load
from ..runtime.manifest import Contract
from ..runtime.request import as_labels, read_conditions
from .report import can_draw, save_grid


def generate_file(
    bundle: Path, output: Path, labels: Sequence[str] | None, count: int, seed: int, conditions: Path | None,
    columns: int | None, threads: int | None, progress: Callable[[float, str], None],
) -> Timing:  # fmt: skip
    """Write samples as a picture (.png) or as numbers (.npy, float32 [B, *shape]), in parts where they are many.

    labels: by name or number, taken in turn. count: how many samples, if neither labels nor conditions ask for more.
    Raises RequestError for another ending, for samples that are no pictures, and for what the bundle cannot serve.
    """
    if output.suffix not in (".png", ".npy"):
        raise RequestError(
            f"-o {output}: ends in {output.suffix or 'nothing'!r}; needed .png for a picture or .npy for the numbers"
        )
    given = _read_conditions(conditions) if conditions else {}
    with load(bundle, threads=threads) as session:
        contract = session.manifest.contract
        if output.suffix == ".png":
            _check_drawable(contract, output)
        size = max((len(each) for each in given.values() if each.ndim), default=max(count, len(labels or ())))
        labels = [labels[i % len(labels)] for i in range(max(size, len(labels)))] if labels else None
        known = as_labels(contract, labels) if labels else None
        given = read_conditions(contract, known, _completed(contract, given, labels, size))
        parts, timings = [], []
        for start in range(0, max(size, 1), contract.batch.max):
            stop = min(start + contract.batch.max, size)
            part = {name: values[start:stop] for name, values in given.items()}
            tell = _teller(progress, start, stop, size)
            parts.append(session.generate(conditions=part, seed=range(seed + start, seed + stop), callback=tell))
            assert session.last_timing is not None
            timings.append(session.last_timing)
        samples = np.concatenate(parts)
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix == ".npy":
            np.save(output, samples)
        else:
            save_grid(output, session.images(samples), columns)
    names = ("total_s", "engines_s", "calls", "copied_bytes")
    total, engines, calls, copied = (sum(getattr(each, name) for each in timings) for name in names)
    return Timing(total, engines, calls, timings[0].steps, copied)


def _teller(
    progress: Callable[[float, str], None], start: int, stop: int, size: int
) -> Callable[[int, int, object], None]:
    """Makes the progress of a part, samples `start` to `stop`, that of the whole."""
    part = "" if stop - start == size else f"samples {start + 1} to {stop} of {size}, "
    return lambda step, steps, _: progress(
        (start + (stop - start) * step / steps) / size, f"{part}step {step} of {steps}"
    )


def _check_drawable(contract: Contract, output: Path) -> None:
    """Raises, before anything is computed, what would keep the samples from becoming a picture."""
    if len(contract.sample.shape) != 3:
        shape = "x".join(map(str, contract.sample.shape))
        needed = "a picture needs channels x height x width"
        raise RequestError(f"-o {output}: samples of this bundle are {shape}, {needed}; write the numbers to an .npy")
    if why := can_draw():
        raise UnsupportedError(why)


def _completed(
    contract: Contract, given: Mapping[str, Any], labels: Sequence[str] | None, size: int
) -> dict[str, NDArray[Any]]:
    """Conditions with classes in turn, where neither labels nor the file say which."""
    found = dict(given)
    for condition in contract.conditions:
        if condition.name in given:
            continue
        if condition.classes is None:
            shape = ", ".join(["samples", *map(str, condition.shape)])
            raise RequestError(
                f"condition {condition.name!r} is missing: give --conditions FILE.npz with an array of that name, "
                f"{condition.dtype} [{shape}]"
            )
        if not labels:
            found[condition.name] = np.arange(size) % condition.classes
    return found


def _read_conditions(path: Path) -> dict[str, NDArray[Any]]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return dict(load_file(path))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
    except OSError as error:
        raise RequestError(f"--conditions {path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, BadZipFile, SafetensorError) as error:
        raise RequestError(f"--conditions {path}: no such file of arrays, or a damaged one ({error})") from error
    raise RequestError(f"--conditions {path}: needed an .npz or .safetensors file of arrays by input name")
