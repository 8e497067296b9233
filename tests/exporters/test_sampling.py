"""Samples into files: pictures and numbers, labels by name and number, parts where there are many."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

from dcompile.compiler.errors import UnsupportedError
from dcompile.exporters import sampling
from dcompile.exporters.sampling import generate_file
from dcompile.runtime import RequestError, Timing, load

Told = list[tuple[float, str]]


def generate(
    bundle: Path, output: Path, labels: list[str] | None = None, count: int = 1, seed: int = 0,
    conditions: Path | None = None, columns: int | None = None, told: Told | None = None,
) -> Timing:  # fmt: skip
    tell = (lambda fraction, text: told.append((fraction, text))) if told is not None else lambda fraction, text: None
    return generate_file(bundle, output, labels, count, seed, conditions, columns, 1, tell)


def numbers(bundle: Path, folder: Path, **options: object) -> NDArray[np.float32]:
    generate(bundle, folder / "numbers.npy", **options)  # type: ignore[arg-type]
    samples: NDArray[np.float32] = np.load(folder / "numbers.npy")
    return samples


def direct(bundle: Path, labels: list[int], seeds: list[int]) -> NDArray[np.float32]:
    with load(bundle, threads=1) as session:
        return session.generate(labels=labels, seed=seeds)


def with_conditions(bundle: Path, copy: Path, edit: Callable[[list[dict[str, Any]]], None]) -> Path:
    """The same bundle, but for what its manifest says of its conditions."""
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    edit(manifest["contract"]["conditions"])
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_labels_are_names_or_numbers(built: Path, tmp_path: Path) -> None:
    samples = numbers(built, tmp_path, labels=["class 3", "7"], seed=5)
    np.testing.assert_array_equal(samples, direct(built, [3, 7], [5, 6]))


def test_a_number_that_is_a_name_is_the_name(built: Path, tmp_path: Path) -> None:
    def edit(conditions: list[dict[str, Any]]) -> None:
        conditions[0]["labels"] = [str(9 - number) for number in range(10)]

    bundle = with_conditions(built, tmp_path / "bundle", edit)
    np.testing.assert_array_equal(numbers(bundle, tmp_path, labels=["2"]), direct(built, [7], [0]))


def test_a_few_labels_for_many_samples_are_taken_in_turn(built: Path, tmp_path: Path) -> None:
    samples = numbers(built, tmp_path, labels=["3", "7"], count=5)
    np.testing.assert_array_equal(samples, direct(built, [3, 7, 3, 7, 3], [0, 1, 2, 3, 4]))
    np.savez(tmp_path / "two.npz", class_labels=np.array([1, 2]))
    with pytest.raises(RequestError, match="labels: 0 conditions that are not given otherwise take labels"):
        generate(built, tmp_path / "sample.npy", ["3"] * 3, conditions=tmp_path / "two.npz")


def test_without_labels_the_classes_come_in_turn(built: Path, tmp_path: Path) -> None:
    samples = numbers(built, tmp_path, count=12)
    np.testing.assert_array_equal(samples, direct(built, [*range(10), 0, 1], list(range(12))))


def test_more_than_the_largest_batch_is_made_in_parts(built: Path, tmp_path: Path) -> None:
    told: Told = []
    count = 70  # the bundle takes 64
    samples = numbers(built, tmp_path, count=count, told=told)
    assert samples.shape == (count, 4, 8, 8)
    np.testing.assert_allclose(samples[64:], direct(built, [4, 5, 6, 7, 8, 9], list(range(64, 70))), atol=1e-4)
    assert told[0] == (64 / 70 / 4, "samples 1 to 64 of 70, step 1 of 4")
    assert told[-1] == (1.0, "samples 65 to 70 of 70, step 4 of 4")
    assert told == sorted(told, key=lambda pair: pair[0])


def test_a_picture_has_a_tile_for_each_sample(built: Path, tmp_path: Path) -> None:
    timing = generate(built, tmp_path / "deep/sheet.png", count=5, columns=3)
    assert (timing.steps, timing.calls) == (4, 4)
    with Image.open(tmp_path / "deep/sheet.png") as picture:
        assert picture.size == (3 * 8 + 2 * 2, 2 * 8 + 2)


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_conditions_from_a_file_set_the_number_of_samples(ending: str, built: Path, tmp_path: Path) -> None:
    path, labels = tmp_path / f"conditions.{ending}", np.array([1, 8, 2])
    np.savez(path, class_labels=labels) if ending == "npz" else save_file({"class_labels": labels}, path)
    samples = numbers(built, tmp_path, conditions=path, seed=3)
    np.testing.assert_array_equal(samples, direct(built, [1, 8, 2], [3, 4, 5]))


def test_what_cannot_be_served_is_said(built: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"-o .*sample\.jpg: ends in '\.jpg'; needed \.png for a picture or \.npy"):
        generate(built, tmp_path / "sample.jpg")
    with pytest.raises(RequestError, match="ends in 'nothing'"):
        generate(built, tmp_path / "sample")
    with pytest.raises(RequestError, match="no label of 'class_labels' is called 'clas 3'; did you mean 'class 3'"):
        generate(built, tmp_path / "sample.npy", ["clas 3"])
    with pytest.raises(RequestError, match=r"label 12 of 'class_labels': this bundle knows 10, 0\.\.9"):
        generate(built, tmp_path / "sample.npy", ["12"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", None, r"a\.npz: cannot be read \(No such file or directory\)"),
        ("a.npz", b"PK", r"a\.npz: no such file of arrays, or a damaged one"),
        ("a.safetensors", b"12345678{", r"a\.safetensors: no such file of arrays, or a damaged one"),
        ("a.csv", b"1", r"a\.csv: needed an \.npz or \.safetensors file of arrays by input name"),
    ],
)
def test_a_file_of_conditions_that_cannot_be_read(
    name: str, content: bytes | None, message: str, built: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        generate(built, tmp_path / "sample.npy", conditions=tmp_path / name)


def test_a_condition_without_classes_has_to_be_given(built: Path, tmp_path: Path) -> None:
    words = {"name": "words", "dtype": "float32", "shape": [7, 24]}
    bundle = with_conditions(built, tmp_path / "bundle", lambda conditions: conditions.append(words))
    needed = r"condition 'words' is missing: give --conditions FILE\.npz .*, float32 \[samples, 7, 24\]"
    with pytest.raises(RequestError, match=needed):
        generate(bundle, tmp_path / "sample.npy")
    np.savez(tmp_path / "words.npz", words=np.zeros((2, 7, 24), np.float32))
    assert numbers(bundle, tmp_path, conditions=tmp_path / "words.npz").shape == (2, 4, 8, 8)


def test_what_cannot_become_a_picture_is_refused_before_it_is_made(
    built: Path, tokens_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: Told = []
    with pytest.raises(RequestError, match=r"are 6x4, a picture needs channels x height x width; write the numbers to"):
        generate(tokens_bundle, tmp_path / "sample.png", told=told)
    monkeypatch.setattr(sampling, "can_draw", lambda: "report.html and pictures need pillow")
    with pytest.raises(UnsupportedError, match="pictures need pillow"):
        generate(built, tmp_path / "sample.png", told=told)
    assert told == []
