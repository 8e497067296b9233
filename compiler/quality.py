"""How close a compiled model's samples are to the original's, and whether that is close enough.

Paired figures compare samples of the same seed (PSNR, SSIM, feature distance); unpaired ones ask a judge, a small
classifier that came with the model, what it sees (accuracy) and how far from real data (Frechet distance). Gates are
limits on any figure. A figure that is not a number passes no gate.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..runtime.errors import EngineError, did_you_mean
from ..runtime.onnx_engine import OnnxEngine
from .errors import IngestError, RecipeError, ShapeError

Floats = NDArray[np.floating[Any]]
Doubles = NDArray[np.float64]

PSNR_CAP_DB = 100.0  # identical samples have no finite PSNR: they count as this, in means and in JSON
JUDGE_FILE, REFERENCE_FILE = "judge.onnx", "reference.safetensors"

PAIRED = ("psnr", "ssim", "relative_error")
LABELLED = ("accuracy", "accuracy_before", "accuracy_drop")  # need a judge, and classes to ask for
AGAINST_REAL = ("frechet", "frechet_before", "frechet_increase")  # need a judge, and its reference
JUDGED = (*LABELLED, *AGAINST_REAL, "feature_distance")
# Of the artifact, measured elsewhere. The speed-up is before / after, every ratio after / before.
MEASURED = ("speedup", "size_ratio", "flops_ratio")
METRICS = (*PAIRED, *JUDGED, *MEASURED)

_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03
_CHUNK_VALUES = 1 << 20  # of one float64 array that SSIM works on; it holds about twenty at once
_JUDGE_BATCH = 256


def psnr(a: Floats, b: Floats, data_range: float) -> Doubles:
    """Peak signal-to-noise ratio in dB of each pair of samples [N, ...] -> [N], at most PSNR_CAP_DB."""
    _check_pairs(a, b, "psnr")
    error = np.square(a.astype(np.float64) - b).reshape(len(a), -1).mean(axis=1)
    with np.errstate(divide="ignore"):
        values: Doubles = np.minimum(10 * np.log10(data_range**2 / error), PSNR_CAP_DB)
    return values


def ssim(a: Floats, b: Floats, data_range: float) -> Doubles:
    """Structural similarity of each pair of images [N, C, H, W] -> [N]: the mean over channels and window positions.

    Values lie in 0..data_range: SSIM is not the same with black elsewhere, and two opposite signs would cancel.
    The window is Gaussian, 11 x 11, sigma 1.5, and stays inside the image; on a side shorter than 11 it is as long as
    the side.   Source: Wang et al., "Image quality assessment", IEEE Trans. Image Processing 13(4), 2004, section III.B
    """
    _check_pairs(a, b, "ssim")
    if a.ndim != 4:
        raise ShapeError(f"ssim: samples have shape {list(a.shape)}, needed images [N, C, H, W]")
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    chunk = max(1, _CHUNK_VALUES // max(1, math.prod(a.shape[1:])))
    values = np.empty(len(a))
    for start in range(0, len(a), chunk):
        part = slice(start, start + chunk)
        x, y = a[part].astype(np.float64), b[part].astype(np.float64)
        mean_x, mean_y = _windowed(x), _windowed(y)
        variance_x = _windowed(x * x) - mean_x**2
        variance_y = _windowed(y * y) - mean_y**2
        covariance = _windowed(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
        values[part] = (luminance * structure).mean(axis=(1, 2, 3))
    return values


def relative_error(a: Floats, b: Floats) -> float:
    """||a - b|| / ||b|| over everything; 0 if both are zero."""
    _check_pairs(a, b, "relative_error")
    reference = b.astype(np.float64)
    error, size = np.linalg.norm(a - reference), np.linalg.norm(reference)
    return float(error / size) if size else math.inf if error else 0.0


def frechet_distance(mean_a: Doubles, covariance_a: Doubles, mean_b: Doubles, covariance_b: Doubles) -> float:
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) of Gaussians with means [D] and covariances [D, D].

    The trace of the root is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2): symmetric, so real, and sound
    for covariances without full rank. NaN if anything given is not finite.
    """
    if not all(np.isfinite(each).all() for each in (mean_a, covariance_a, mean_b, covariance_b)):
        return math.nan
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ covariance_b @ root)
    shift = mean_a - mean_b
    spread = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(inner.clip(min=0)).sum()
    return max(0.0, float(shift @ shift + spread))


class Statistics(NamedTuple):
    """Of features: mean [D] and covariance [D, D], float64."""

    mean: Doubles
    covariance: Doubles

    @classmethod
    def of(cls, features: Floats) -> Statistics:
        """Of features [N, D]; N of 2 or more."""
        if features.ndim != 2 or len(features) < 2:
            raise ShapeError(
                f"statistics: features have shape {list(features.shape)}, needed [N, D] with N of 2 or more"
            )
        wide = features.astype(np.float64)
        return cls(wide.mean(axis=0), np.atleast_2d(np.cov(wide, rowvar=False)))


class Judgement(NamedTuple):
    labels: NDArray[np.int64]  # [N]
    features: NDArray[np.float32]  # [N, D]


@dataclass(frozen=True)
class Judge:
    """A classifier's opinion of samples. `reference`: its features of real data, if the folder has them."""

    path: Path
    engine: OnnxEngine
    reference: Statistics | None

    def judge(self, images: Floats) -> Judgement:
        """Labels and features of images [N, ...], finished samples in the range the model makes."""
        needed = self.engine.inputs["image"].shape
        fits = images.ndim == len(needed) and all(
            want in (None, have) for want, have in zip(needed[1:], images.shape[1:], strict=True)
        )
        if not fits or not len(images):
            spelled = ", ".join("N" if size is None else str(size) for size in needed)
            raise ShapeError(f"{self.path}: the judge takes images [{spelled}], found {list(images.shape)}")
        parts = [
            self.engine.run({"image": np.ascontiguousarray(images[start : start + _JUDGE_BATCH], dtype=np.float32)})
            for start in range(0, len(images), _JUDGE_BATCH)
        ]
        labels = np.concatenate([part["logits"].argmax(axis=1) for part in parts])
        return Judgement(labels.astype(np.int64), np.concatenate([part["features"] for part in parts]))


def load_judge(path: str | Path, threads: int | None = None) -> Judge:
    """The judge in the folder `path`: judge.onnx (image -> logits, features) and perhaps reference.safetensors.

    Raises: IngestError if a file is missing, damaged, or not of that form.
    """
    path = Path(path)
    if not (path / JUDGE_FILE).is_file():
        needed = f"a judge is a folder with {JUDGE_FILE} (image -> logits, features)"
        raise IngestError(f"{path}: no {JUDGE_FILE} found; {needed} and, for the Frechet distance, {REFERENCE_FILE}")
    try:
        engine = OnnxEngine(path / JUDGE_FILE, threads=threads)
    except EngineError as error:
        raise IngestError(f"{error}; export the judge again") from error
    for role, ports, needed_ports in (
        ("inputs", engine.inputs, {"image": None}),
        ("outputs", engine.outputs, {"logits": 2, "features": 2}),
    ):
        for name, rank in needed_ports.items():
            found = ", ".join(f"{each} {port.dtype} {list(port.shape)}" for each, port in ports.items())
            port = ports.get(name)
            if (
                len(ports) != len(needed_ports)
                or not port
                or port.dtype != "float32"
                or rank not in (None, len(port.shape))
            ):
                says = "needed image float32 [N, ...] -> logits float32 [N, classes], features float32 [N, D]"
                raise IngestError(f"{path / JUDGE_FILE}: {role} are {found}; {says}")
    return Judge(path, engine, _read_reference(path / REFERENCE_FILE, engine.outputs["features"].shape[1]))


def measure_quality(
    reference: Floats,
    candidate: Floats,
    *,
    labels: Sequence[int] | NDArray[np.integer[Any]] | None = None,
    judge: Judge | None = None,
    value_range: tuple[float, float] | None = None,
) -> dict[str, float]:
    """Figures of samples [N, ...] against the original's of the same seeds; what needs more than is given is left out.

    All but relative_error see samples as they are shown, clipped to value_range; a latent has none: its data range is
    that of the reference. accuracy_drop is before - after, frechet_increase (after - before) / before, both fractions.
    """
    _check_pairs(candidate, reference, "quality")
    figures = {"relative_error": relative_error(candidate, reference)}
    low, high = value_range or (float(reference.min()), float(reference.max()))
    if value_range:
        reference, candidate = np.clip(reference, low, high), np.clip(candidate, low, high)
    data_range = high - low if high > low else 1.0
    figures["psnr"] = float(psnr(candidate, reference, data_range).mean())
    if reference.ndim == 4:
        figures["ssim"] = float(ssim(candidate - low, reference - low, data_range).mean())
    if judge is None:
        return figures
    before, after = judge.judge(reference), judge.judge(candidate)
    figures["feature_distance"] = float(np.linalg.norm(after.features - before.features, axis=1).mean())
    if labels is not None:
        wanted = np.asarray(labels)
        if wanted.shape != before.labels.shape:
            raise ShapeError(f"quality: {list(wanted.shape)} labels for {len(reference)} samples; give one a sample")
        figures["accuracy_before"] = float((before.labels == wanted).mean())
        figures["accuracy"] = float((after.labels == wanted).mean())
        figures["accuracy_drop"] = figures["accuracy_before"] - figures["accuracy"]
    if judge.reference is not None and len(reference) > 1:
        figures["frechet_before"] = frechet_distance(*Statistics.of(before.features), *judge.reference)
        figures["frechet"] = frechet_distance(*Statistics.of(after.features), *judge.reference)
        increase = figures["frechet"] - figures["frechet_before"]
        figures["frechet_increase"] = increase / max(figures["frechet_before"], np.finfo(np.float64).tiny)
    return figures


@dataclass(frozen=True)
class Gate:
    """A limit on one figure, written like `accuracy_drop<=0.02`."""

    metric: str
    op: str
    limit: float


@dataclass(frozen=True)
class GateOutcome:
    metric: str
    op: str
    limit: float
    value: float
    passed: bool


_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


def parse_gates(text: str, known: Collection[str] = METRICS) -> tuple[Gate, ...]:
    """`accuracy_drop<=0.02,psnr>=20` -> gates; `2%` is 0.02. Raises RecipeError for any other form or metric."""
    gates = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        match = re.fullmatch(r"(\w+)\s*(<=|>=|<|>)\s*(\S+)", part)
        limit = _limit(match[3]) if match else None
        if match is None or limit is None:
            raise RecipeError(f"gate {part!r}: needed METRIC<=NUMBER (or >=, <, >), for example accuracy_drop<=0.02")
        if match[1] not in known:
            hint = did_you_mean(match[1], known)
            listed = "" if hint.startswith("known") else f" (known: {', '.join(known)})"
            raise RecipeError(f"gate {part!r}: no metric is called {match[1]!r}; {hint}{listed}")
        gates.append(Gate(match[1], match[2], limit))
    return tuple(gates)


def check_gates(gates: Sequence[Gate], figures: Mapping[str, float]) -> list[GateOutcome]:
    """Each gate with the figure it met. Raises RecipeError for a figure that was not measured."""
    outcomes = []
    for gate in gates:
        spelled = f"gate '{gate.metric}{gate.op}{gate.limit:g}'"
        if gate.metric not in figures:
            raise RecipeError(f"{spelled}: {gate.metric} was not measured; {_how_to_measure(gate.metric, figures)}")
        value = float(figures[gate.metric])
        outcomes.append(GateOutcome(gate.metric, gate.op, gate.limit, value, _OPERATORS[gate.op](value, gate.limit)))
    return outcomes


def _how_to_measure(metric: str, figures: Mapping[str, float]) -> str:
    """What to do to get a figure that is missing, given those that are there."""
    judged = "feature_distance" in figures
    if metric in AGAINST_REAL and judged:
        return f"the judge's folder needs {REFERENCE_FILE} (mean [D] and covariance [D, D] of real data's features)"
    if metric in LABELLED and judged:
        return "it needs a model with classes to ask for: drop the gate"
    if metric in JUDGED:
        return f"give --judge DIRECTORY (a folder with {JUDGE_FILE}), or drop the gate"
    return f"measured: {', '.join(figures) or 'nothing'}; drop the gate"


def _limit(text: str) -> float | None:
    """`0.02` or `2%` as a finite number, else None."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _check_pairs(a: Floats, b: Floats, name: str) -> None:
    if a.shape != b.shape or not a.size:
        raise ShapeError(f"{name}: samples of shape {list(a.shape)} and {list(b.shape)}; needed pairs of one shape")


def _windowed(images: Doubles) -> Doubles:
    """The Gaussian-weighted mean of every window that lies inside the image; [..., H, W] -> [..., H - 10, W - 10]."""
    for axis in (-2, -1):
        size = min(_WINDOW, images.shape[axis])
        weights = np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / _SIGMA) ** 2)
        positions = np.arange(images.shape[axis] - size + 1)
        images = np.sum([w * images.take(positions + i, axis) for i, w in enumerate(weights / weights.sum())], axis=0)
    return images


def _read_reference(path: Path, width: int | None) -> Statistics | None:
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise IngestError(f"{path}: cannot be read ({error}); write the judge's reference again") from error
    needed = "needed mean [D] and covariance [D, D] of real data's features"
    for name in ("mean", "covariance"):
        if name not in tensors:
            raise IngestError(f"{path}: no tensor {name!r}, found {', '.join(tensors) or 'none'}; {needed}")
    mean, covariance = (tensors[name].astype(np.float64) for name in ("mean", "covariance"))
    size = mean.shape[0] if mean.ndim == 1 else None
    if size is None or covariance.shape != (size, size) or width not in (None, size):
        found = f"mean {list(mean.shape)} and covariance {list(covariance.shape)}, the judge has {width} features"
        raise IngestError(f"{path}: {found}; {needed}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise IngestError(f"{path}: holds values that are not finite; write the judge's reference again")
    return Statistics(mean, covariance)
