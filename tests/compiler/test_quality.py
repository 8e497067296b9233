"""Figures against closed forms and naive sums; a judge of two matrices; every message of a gate."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from dcompile.compiler.errors import IngestError, RecipeError, ShapeError
from dcompile.compiler.quality import (
    Gate,
    Statistics,
    check_gates,
    frechet_distance,
    load_judge,
    measure_quality,
    parse_gates,
    psnr,
    relative_error,
    ssim,
)

Array = NDArray[Any]
RNG = np.random.default_rng(3)
IMAGES = RNG.uniform(-1, 1, size=(3, 2, 16, 20)).astype(np.float32)


def covariance(size: int, rank: int | None = None) -> Array:
    factor = RNG.normal(size=(size, rank or 2 * size))
    return np.asarray(factor @ factor.T)


def test_psnr_of_a_known_error() -> None:
    off = IMAGES.astype(np.float64) + np.array([0.2, 0.02, 0.0])[:, None, None, None]
    np.testing.assert_allclose(psnr(off, IMAGES, 2.0), [20.0, 40.0, 100.0])  # identical: capped, not infinite


def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    a, b, data_range = np.full((1, 1, 12, 12), 0.5), np.full((1, 1, 12, 12), -0.25), 2.0
    c1 = (0.01 * data_range) ** 2
    np.testing.assert_allclose(ssim(a, b, data_range), (2 * -0.125 + c1) / (0.25 + 0.0625 + c1))


def test_ssim_is_one_for_itself_and_symmetric() -> None:
    noisy = IMAGES + RNG.normal(size=IMAGES.shape).astype(np.float32) * 0.2
    np.testing.assert_allclose(ssim(IMAGES, IMAGES, 2.0), 1.0)
    np.testing.assert_allclose(ssim(IMAGES, noisy, 2.0), ssim(noisy, IMAGES, 2.0))
    np.testing.assert_allclose(ssim(IMAGES, noisy, 2.0), ssim(IMAGES * 127.5, noisy * 127.5, 255.0))
    assert ((ssim(IMAGES, noisy, 2.0) > 0.2) & (ssim(IMAGES, noisy, 2.0) < 0.999)).all()


def test_ssim_window_by_window() -> None:
    x, y = (RNG.uniform(0, 1, size=(1, 1, 13, 12)) for _ in range(2))
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights = np.outer(line, line) / line.sum() ** 2
    found = []
    for row in range(3):
        for column in range(2):
            p, q = (each[0, 0, row : row + 11, column : column + 11] for each in (x, y))
            mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
            var_p, var_q = (weights * (p - mean_p) ** 2).sum(), (weights * (q - mean_q) ** 2).sum()
            cov = (weights * (p - mean_p) * (q - mean_q)).sum()
            top = (2 * mean_p * mean_q + 1e-4) * (2 * cov + 9e-4)
            found.append(top / ((mean_p**2 + mean_q**2 + 1e-4) * (var_p + var_q + 9e-4)))
    np.testing.assert_allclose(ssim(x, y, 1.0), np.mean(found))


def test_ssim_takes_images_smaller_than_its_window() -> None:
    tiny = IMAGES[:, :, :4, :4] + 1
    np.testing.assert_allclose(ssim(tiny, tiny, 2.0), 1.0)
    assert (ssim(tiny, 2 - tiny, 2.0) < 0.1).all()


def test_ssim_in_chunks_is_ssim(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ssim(IMAGES, -IMAGES, 2.0)
    monkeypatch.setattr("dcompile.compiler.quality._CHUNK_VALUES", 1)
    np.testing.assert_array_equal(ssim(IMAGES, -IMAGES, 2.0), whole)


def test_relative_error() -> None:
    assert relative_error(np.array([3.0, 4.5]), np.array([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(np.zeros(2), np.zeros(2)) == 0.0
    assert relative_error(np.ones(2), np.zeros(2)) == math.inf


def test_only_pairs_are_compared() -> None:
    for figure in (psnr, ssim):
        with pytest.raises(ShapeError, match=r"samples of shape \[3, 2, 16, 20\] and \[2, 2, 16, 20\]"):
            figure(IMAGES, IMAGES[:2], 2.0)
    with pytest.raises(ShapeError, match="needed images"):
        ssim(IMAGES[:, 0], IMAGES[:, 0], 2.0)


def test_frechet_of_diagonal_covariances() -> None:
    mean_a, mean_b, a, b = (RNG.uniform(0.1, 2, size=5) for _ in range(4))
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(mean_a, np.diag(a), mean_b, np.diag(b)) == pytest.approx(expected)


def test_frechet_is_that_of_the_matrix_root() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    mean, a, b = RNG.normal(size=6), covariance(6), covariance(6)
    expected = mean @ mean + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert frechet_distance(mean, a, np.zeros(6), b) == pytest.approx(expected)
    assert frechet_distance(np.zeros(6), b, mean, a) == pytest.approx(expected)


def test_frechet_without_full_rank() -> None:
    thin, zero = covariance(8, rank=2), np.zeros(8)
    assert frechet_distance(zero, thin, zero, thin) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(zero, thin, zero, np.zeros((8, 8))) == pytest.approx(np.trace(thin))
    assert math.isnan(frechet_distance(zero * np.nan, thin, zero, thin))


JUDGE = """judge (float[N,1,4,4] image) => (float[N,2] logits, float[N,3] features) {
    flat = Flatten (image)
    features = MatMul (flat, look)
    logits = MatMul (features, decide)
}"""
LOOK = RNG.normal(size=(16, 3)).astype(np.float32)
DECIDE = RNG.normal(size=(3, 2)).astype(np.float32)


def save_judge(directory: Path, graph: str = JUDGE, reference: dict[str, Array] | None = None) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{graph}')
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(each, n) for n, each in (("look", LOOK), ("decide", DECIDE))
    )
    directory.mkdir()
    (directory / "judge.onnx").write_bytes(model.SerializeToString())
    if reference:
        save_file(reference, directory / "reference.safetensors")
    return directory


def test_a_judge_labels_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcompile.compiler.quality._JUDGE_BATCH", 3)
    judge = load_judge(save_judge(tmp_path / "judge"))
    assert judge.reference is None
    images = RNG.normal(size=(7, 1, 4, 4))
    labels, features = judge.judge(images)
    np.testing.assert_allclose(features, images.reshape(7, 16) @ LOOK, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(labels, (images.reshape(7, 16) @ LOOK @ DECIDE).argmax(axis=1))
    with pytest.raises(ShapeError, match=r"takes images \[N, 1, 4, 4\], found \[7, 1, 4, 5\]"):
        judge.judge(np.zeros((7, 1, 4, 5)))


def test_quality_with_a_judge(tmp_path: Path) -> None:
    real = Statistics.of(RNG.normal(size=(50, 3)))
    statistics = {"mean": real.mean, "covariance": real.covariance, "count": np.array([50])}
    judge = load_judge(save_judge(tmp_path / "judge", reference=statistics))
    reference = RNG.uniform(-1, 1, size=(8, 1, 4, 4)).astype(np.float32)
    labels = judge.judge(reference).labels.copy()
    labels[0] = 1 - labels[0]
    figures = measure_quality(reference, reference, labels=labels, judge=judge, value_range=(-1.0, 1.0))
    assert figures["accuracy"] == figures["accuracy_before"] == 7 / 8
    assert figures["accuracy_drop"] == figures["frechet_increase"] == figures["feature_distance"] == 0
    assert (figures["psnr"], figures["relative_error"]) == (100.0, 0.0)
    worse = measure_quality(reference, -reference, labels=labels, judge=judge, value_range=(-1.0, 1.0))
    assert worse["accuracy_drop"] == pytest.approx(6 / 8)  # logits change sign: only the wrong one is right now
    assert worse["frechet"] == pytest.approx(worse["frechet_before"] * (1 + worse["frechet_increase"]))
    assert worse["feature_distance"] == pytest.approx(
        2 * np.linalg.norm(reference.reshape(8, 16) @ LOOK, axis=1).mean(), rel=1e-5
    )
    with pytest.raises(ShapeError, match="give one a sample"):
        measure_quality(reference, reference, labels=[0], judge=judge)


def test_quality_sees_samples_as_they_are_shown() -> None:
    beyond = np.where(IMAGES > 0, 1.0, -1.0)
    figures = measure_quality(beyond, beyond * 1.5, value_range=(-1.0, 1.0))
    assert figures["psnr"] == 100
    assert figures["relative_error"] == pytest.approx(0.5)
    assert set(figures) == {"psnr", "ssim", "relative_error"}
    shifted = measure_quality(IMAGES + 1, np.square(IMAGES) + 1, value_range=(0.0, 2.0))  # black is the low end
    assert measure_quality(IMAGES, np.square(IMAGES), value_range=(-1.0, 1.0))["ssim"] == pytest.approx(shifted["ssim"])


def test_quality_of_latents_and_of_samples_that_are_no_images() -> None:
    latent = IMAGES * 7
    figures = measure_quality(latent, latent + 0.01 * float(latent.max() - latent.min()))
    assert figures["psnr"] == pytest.approx(40, abs=1e-3)
    assert set(measure_quality(latent[:, 0], latent[:, 0])) == {"psnr", "relative_error"}


def test_samples_that_are_not_numbers_pass_no_gate() -> None:
    figures = measure_quality(IMAGES, IMAGES * np.float32(np.nan), value_range=(-1.0, 1.0))
    gates = parse_gates("psnr>=0,psnr<=100,ssim>-2,relative_error<1e9")
    assert [each.passed for each in check_gates(gates, figures)] == [False] * 4


def test_judges_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(IngestError, match=r"no judge\.onnx found; a judge is a folder with judge\.onnx"):
        load_judge(tmp_path)
    (tmp_path / "judge.onnx").write_bytes(b"no model")
    with pytest.raises(IngestError, match=r"does not load it.*export the judge again"):
        load_judge(tmp_path)
    renamed = save_judge(tmp_path / "renamed", JUDGE.replace("logits", "scores"))
    with pytest.raises(IngestError, match=r"outputs are scores float32 .*needed image float32 \[N, ...\] -> logits"):
        load_judge(renamed)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"mean": np.zeros(3)}, "no tensor 'covariance', found mean; needed mean"),
        (
            {"mean": np.zeros(4), "covariance": np.eye(4)},
            r"mean \[4\] and covariance \[4, 4\], the judge has 3 features",
        ),
        ({"mean": np.zeros(3), "covariance": np.eye(2)}, r"covariance \[2, 2\]"),
        ({"mean": np.full(3, np.nan), "covariance": np.eye(3)}, "not finite"),
    ],
)
def test_references_that_do_not_fit(tmp_path: Path, reference: dict[str, Array], message: str) -> None:
    with pytest.raises(IngestError, match=message):
        load_judge(save_judge(tmp_path / "judge", reference=reference))


def test_gates_are_parsed() -> None:
    gates = parse_gates(" accuracy_drop <= 0.02, psnr>=20,speedup>3 ,frechet_increase<10%,")
    assert gates == (
        Gate("accuracy_drop", "<=", 0.02),
        Gate("psnr", ">=", 20.0),
        Gate("speedup", ">", 3.0),
        Gate("frechet_increase", "<", 0.1),
    )
    assert parse_gates("") == ()
    assert parse_gates("watts<1", known=("watts",)) == (Gate("watts", "<", 1.0),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "acuracy_drop<=1",
            r"no metric is called 'acuracy_drop'; did you mean 'accuracy_drop'\? \(known: psnr, ssim, ",
        ),
        ("zzz<=1", r"no metric is called 'zzz'; known: psnr, ssim, "),
        ("psnr", "gate 'psnr': needed METRIC<=NUMBER"),
        ("psnr=>20", "needed METRIC<=NUMBER"),
        ("psnr>=high", "needed METRIC<=NUMBER"),
        ("psnr>=nan", "needed METRIC<=NUMBER"),
    ],
)
def test_gates_that_are_not_understood(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_gates(text)


def test_gates_are_checked() -> None:
    outcomes = check_gates(parse_gates("psnr>=20,psnr>20,ssim<0.5,ssim<=0.9"), {"psnr": 20.0, "ssim": 0.9})
    assert [each.passed for each in outcomes] == [True, False, False, True]
    assert outcomes[2].value == 0.9


@pytest.mark.parametrize(
    ("gate", "figures", "message"),
    [
        (
            "accuracy_drop<=0.02",
            {"psnr": 1.0},
            "gate 'accuracy_drop<=0.02': accuracy_drop was not measured; give --judge",
        ),
        ("frechet<9", {"feature_distance": 1.0}, "the judge's folder needs reference.safetensors"),
        ("accuracy>0.9", {"feature_distance": 1.0}, "a model with classes"),
        ("size_ratio<1", {"psnr": 1.0}, "measured: psnr; drop the gate"),
    ],
)
def test_a_gate_on_what_was_not_measured(gate: str, figures: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_gates(parse_gates(gate), figures)
