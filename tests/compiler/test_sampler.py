"""Rows: validation, the reference loop against a loop written out, the float32 table, the description."""

import json
from typing import Any

import numpy as np
import pytest

from dcompile.compiler.errors import ShapeError, UnsupportedError
from dcompile.compiler.sampler import Sampler


def make(steps: int = 3, ring: int = 2, **changes: Any) -> Sampler:
    random = np.random.default_rng(0)
    columns: dict[str, Any] = {name: random.standard_normal(steps) for name in ("s", "p", "q", "a", "n")}
    columns.update(
        name="Made", prediction="epsilon", timesteps=np.arange(steps, 0, -1.0), b=random.standard_normal((steps, ring))
    )
    return Sampler(**{**columns, **changes})


def test_properties() -> None:
    sampler = make(steps=4, ring=3)
    assert (sampler.steps, sampler.ring, sampler.stochastic) == (4, 3, True)
    assert not make(n=np.zeros(3)).stochastic


def test_row_table_is_float32_in_documented_column_order() -> None:
    sampler = make(steps=3, ring=2)
    table = sampler.row_table()
    assert table.dtype == np.float32
    assert table.shape == (3, 7)
    assert table.flags["C_CONTIGUOUS"]
    row = [sampler.s[1], sampler.p[1], sampler.q[1], sampler.a[1], sampler.n[1], sampler.b[1, 0], sampler.b[1, 1]]
    assert table[1].tolist() == np.array(row, dtype=np.float32).tolist()


def test_apply_is_the_documented_row() -> None:
    sampler = make(steps=2, ring=2)
    x0, noise = np.array([1.0, -2.0]), np.array([[0.5, 0.25], [3.0, -1.0]])

    def network(x: Any, t: float) -> Any:
        return np.sin(x) * t

    s, p, q, a, b, n = sampler.s, sampler.p, sampler.q, sampler.a, sampler.b, sampler.n
    d0 = p[0] * x0 + q[0] * np.sin(s[0] * x0) * 2.0
    x1 = a[0] * x0 + b[0, 0] * d0 + n[0] * noise[0]  # b[0, 1] meets an empty ring
    d1 = p[1] * x1 + q[1] * np.sin(s[1] * x1) * 1.0
    x2 = a[1] * x1 + b[1, 0] * d1 + b[1, 1] * d0 + n[1] * noise[1]
    np.testing.assert_allclose(sampler.apply(network, x0, noise), x2, rtol=1e-15)
    np.testing.assert_allclose(sampler.trajectory(network, x0, noise), [x0, x1, x2], rtol=1e-15)


def test_arrays_are_float64_copies_and_read_only() -> None:
    given = np.ones(3, dtype=np.float32)
    sampler = make(a=given)
    given[0] = 7
    assert sampler.a.dtype == np.float64
    assert sampler.a[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        sampler.a[0] = 2


def test_describe_survives_json_exactly() -> None:
    sampler = make()
    back = json.loads(json.dumps(sampler.describe()))
    assert back["steps"] == 3
    assert back["ring"] == 2
    assert back["name"] == "Made"
    assert back["timestep_dtype"] == "float32"
    for column in ("timesteps", "s", "p", "q", "a", "b", "n"):
        assert np.array_equal(np.array(back[column]), getattr(sampler, column))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"a": np.ones(2)}, ShapeError, r"sampler Made: a has shape \[2\], needed \[3\]"),
        ({"b": np.ones(3)}, ShapeError, r"b has shape \[3\], needed \[3, K\] with K >= 1"),
        ({"b": np.ones((3, 0))}, ShapeError, r"b has shape \[3, 0\]"),
        ({"timesteps": np.ones(0)}, ShapeError, r"timesteps has shape \[0\], needed \[1\]"),
        ({"q": np.array([1, np.nan, 1])}, UnsupportedError, "q is nan in row 1"),
        ({"initial_scale": float("inf")}, UnsupportedError, "initial_scale is inf"),
    ],
)
def test_validation(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(**changes)


def test_noise_must_fit() -> None:
    sampler = make()
    with pytest.raises(ShapeError, match=r"is stochastic: give noise of shape \[3, \[2\]\]"):
        sampler.apply(lambda x, t: x, np.ones(2))
    with pytest.raises(ShapeError, match=r"noise has shape \[3\], needed \[3, 2\]"):
        sampler.apply(lambda x, t: x, np.ones(2), np.ones(3))
