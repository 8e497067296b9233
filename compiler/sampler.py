"""A sampler as data: one row of coefficients for every call of the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import ShapeError, UnsupportedError

Float64 = NDArray[np.float64]

ROW_COLUMNS = ("s", "p", "q", "a", "n")  # b_0..b_{K-1} follow
_PER_ROW = ("timesteps", "s", "p", "q", "a", "n")


@dataclass(frozen=True, eq=False)
class Sampler:
    """T rows that run any linear sampler. Row i, with x the sample and H the ring of the last K converted outputs:

        in = s*x;  m = network(in, t);  D = p*x + q*m;  push D on H;  x = a*x + sum_j b_j*H_j + n*noise

    timesteps [T]: the value the network is given; timestep_dtype: how the scheduler itself hands it out.
    s [T]: input scale. p, q [T]: output conversion. a [T], b [T, K] newest output first, n [T]: the update.
    initial_scale: the first sample is initial_scale * normal noise. prediction: epsilon, v_prediction, sample or flow.
    signal, noise_level [T]: row i meets samples like signal_i * data + noise_level_i * normal noise; None where the
    scheduler does not say. All arrays are float64 and read-only. H is zero before the first row.
    choose: (steps, rows) -> the sampler that goes through these rows of a schedule of so many steps; None where nothing
    is known of the scheduler.
    Raises: ShapeError where lengths disagree, UnsupportedError where a value is not finite.
    """

    name: str
    prediction: str
    timesteps: Float64
    s: Float64
    p: Float64
    q: Float64
    a: Float64
    b: Float64
    n: Float64
    initial_scale: float = 1.0
    timestep_dtype: Literal["int64", "float32"] = "float32"
    signal: Float64 | None = None
    noise_level: Float64 | None = None
    choose: Callable[[int, Sequence[int]], Sampler] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        optional = [name for name in ("signal", "noise_level") if getattr(self, name) is not None]
        for column in (*_PER_ROW, "b", *optional):
            array = np.array(getattr(self, column), dtype=np.float64)
            array.setflags(write=False)
            object.__setattr__(self, column, array)
            if not np.isfinite(array).all():
                row = int(np.argwhere(~np.isfinite(array))[0][0])
                raise UnsupportedError(
                    f"sampler {self.name}: {column} is {array[row]} in row {row}, needed a finite number; "
                    "choose other steps or another --sampler"
                )
        rows = self.timesteps.size
        for column in (*_PER_ROW, *optional):
            if getattr(self, column).shape != (rows,) or rows == 0:
                raise ShapeError(
                    f"sampler {self.name}: {column} has shape {list(getattr(self, column).shape)}, "
                    f"needed [{max(rows, 1)}], one value a row"
                )
        if self.b.ndim != 2 or self.b.shape[0] != rows or self.b.shape[1] < 1:
            raise ShapeError(f"sampler {self.name}: b has shape {list(self.b.shape)}, needed [{rows}, K] with K >= 1")
        if not np.isfinite(self.initial_scale):
            raise UnsupportedError(f"sampler {self.name}: initial_scale is {self.initial_scale}, needed a number")

    @property
    def steps(self) -> int:
        """T: rows, that is calls of the network; Heun makes almost twice as many as it was asked for steps."""
        return int(self.timesteps.size)

    @property
    def ring(self) -> int:
        """K: converted outputs a row reads, its own included. A step graph stores K - 1 of them."""
        return int(self.b.shape[1])

    @property
    def stochastic(self) -> bool:
        """True where some row draws noise."""
        return bool(np.any(self.n != 0))

    def row_table(self) -> NDArray[np.float32]:
        """float32 [T, 5+K], columns s, p, q, a, n, b_0..b_{K-1}: what a step graph reads, one row a call."""
        table = np.column_stack([*(getattr(self, column) for column in ROW_COLUMNS), self.b])
        return np.ascontiguousarray(table, dtype=np.float32)

    def trajectory(
        self, network: Callable[[Float64, float], Any], start: Float64, noise: Float64 | None = None
    ) -> Float64:
        """All samples [T+1, *shape] from `start` [*shape] on, in float64: the reference for step graphs.

        network: (scaled sample, timestep) -> output, guidance inside. start: already times initial_scale.
        noise [T, *shape]: row i adds n_i * noise[i]; may be left out if the sampler is not stochastic.
        """
        x = np.asarray(start, dtype=np.float64)
        if noise is None and self.stochastic:
            raise ShapeError(f"sampler {self.name} is stochastic: give noise of shape [{self.steps}, {list(x.shape)}]")
        if noise is not None and np.shape(noise) != (self.steps, *x.shape):
            needed = [self.steps, *x.shape]
            raise ShapeError(f"sampler {self.name}: noise has shape {list(np.shape(noise))}, needed {needed}")
        ring = [np.zeros_like(x) for _ in range(self.ring)]
        samples = [x]
        for i in range(self.steps):
            output = np.asarray(network(self.s[i] * x, float(self.timesteps[i])), dtype=np.float64)
            ring = [self.p[i] * x + self.q[i] * output, *ring[:-1]]
            x = self.a[i] * x + sum(weight * past for weight, past in zip(self.b[i], ring, strict=True))
            if noise is not None:
                x = x + self.n[i] * noise[i]
            samples.append(x)
        return np.stack(samples)

    def drift(self) -> float | None:
        """How far rows lead from where the next ones begin, of max |x|, with a network that knows data and noise.

        Any solver is exact there: its output is constant in whatever it is constant in. None where `signal` is, or the
        output is of no known kind. Of a stochastic sampler, whose noise is another at each row, the data alone counts.
        """
        if self.signal is None or self.noise_level is None:
            return None
        data, noise = 1.0, 0.0 if self.stochastic else 1.0
        signal, level = self.signal, self.noise_level
        outputs = {
            "epsilon": np.full(self.steps, noise),
            "sample": np.full(self.steps, data),
            "v_prediction": signal * noise - level * data,
            "flow": np.full(self.steps, noise - data),
        }
        if self.prediction not in outputs:
            return None
        rows = iter(outputs[self.prediction].tolist())
        found = self.trajectory(
            lambda x, timestep: next(rows),
            np.array(signal[0] * data + level[0] * noise),
            np.zeros(self.steps) if self.stochastic else None,
        )
        expected = np.array([*(signal * data + level * noise), data])
        return float(np.abs(found - expected).max() / np.abs(expected).max())

    def apply(self, network: Callable[[Float64, float], Any], start: Float64, noise: Float64 | None = None) -> Float64:
        """The finished sample [*shape]: the last of `trajectory`."""
        last: Float64 = self.trajectory(network, start, noise)[-1]
        return last

    def describe(self) -> dict[str, Any]:
        """Everything as JSON values; the float64 numbers survive the trip through text exactly."""
        return {
            "name": self.name,
            "prediction": self.prediction,
            "steps": self.steps,
            "ring": self.ring,
            "stochastic": self.stochastic,
            "initial_scale": self.initial_scale,
            "timestep_dtype": self.timestep_dtype,
            **{column: getattr(self, column).tolist() for column in (*_PER_ROW, "b")},
        }
