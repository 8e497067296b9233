"""How far to extrapolate what a later pass will quantise: orders that noise spoils are lowered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...compiler.calibrate import Calibration
from ...compiler.plan import Mask, taylor
from ...compiler.program import Program
from ...compiler.trace import Watched, record, record_beside
from ..quantize import Quantize

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Noise:
    """Of one site, root mean squares relative to that of its value on the trajectory.

    noise: of its quantised value less the exact one, given the same inputs. change: of its value from one computed step
    to the next. exact, noisy: error of what orders 0, 1, ... up to the one asked for predict at the reused steps, from
    exact and from quantised values.
    """

    noise: float
    change: float
    exact: tuple[float, ...]
    noisy: tuple[float, ...]

    @property
    def order(self) -> int:
        """The order asked for, lowered by as many as noise moves the best one.

        Not the best one itself: a copy lags the same way at every step, which adds up, where what is predicted errs to
        both sides. benchmarks/noise_aware.py has both.
        """
        best = [min(range(len(errors)), key=errors.__getitem__) for errors in (self.exact, self.noisy)]
        return len(self.exact) - 1 - max(0, best[0] - best[1])


def measure_noise(
    program: Program, computed: Mapping[Watched, Mask], order: int, quantize: Quantize, calibration: Calibration
) -> dict[str, Noise]:
    """Name -> what quantising will do to the predictions of a site with these computed steps, up to this order.

    The program is quantised as it stands, and its values are compared with the exact ones at the same inputs: what
    earlier steps would have made of the sample is no noise of this one.
    """
    watched = list(computed)
    quantized = quantize.apply(program, quantize.decide(program, calibration)).program
    exact = record(program, watched, calibration).kept
    noisy = record_beside(program, quantized.graph, watched, calibration).kept
    return {each.name: compare(exact[each.name], noisy[each.name], mask, order) for each, mask in computed.items()}


def compare(exact: Floats, noisy: Floats, computed: Mask, order: int) -> Noise:
    """exact, noisy: [T, ...], the values of one site at every step."""
    size = max(_size(exact), 1e-12)
    known = [step for step, computes in enumerate(computed) if computes]
    reused = [not computes for computes in computed]

    def errors(values: Floats) -> tuple[float, ...]:
        predicted = (predict(values, computed, k) for k in range(order + 1))
        return tuple(_size(each[reused] - exact[reused]) / size for each in predicted)

    change = _size(exact[known][1:] - exact[known][:-1]) / size if len(known) > 1 else 0.0
    return Noise(_size(noisy - exact) / size, change, errors(exact), errors(noisy))


def _size(values: Floats) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))


def predict(values: Floats, computed: Mask, order: int) -> Floats:
    """What the Taylor predictor of this order makes of values [T, ...]: themselves where they are computed."""
    reuse, refresh = taylor(computed, order)
    states = np.zeros((order + 1, *values.shape[1:]))
    found = np.empty(values.shape)
    for step, computes in enumerate(computed):
        if computes:
            new = [values[step].astype(np.float64)]
            for k in range(order):
                new.append((new[k] - states[k]) * refresh[step, k])
            states = np.stack(new)
        found[step] = values[step] if computes else np.tensordot(reuse[step], states, 1)
    return found
