"""Predictors that mix the last few values of a site, by step: coefficients from least squares on recorded runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...compiler.calibrate import Calibration
from ...compiler.plan import Mask
from ...compiler.program import Program
from ...compiler.trace import Watched, watch

RIDGE = 1e-4  # of the states' mean energy: predictions among them are sums of the others, and factors would explode

Floats = NDArray[np.float64]


def fit_histories(
    program: Program, computed: Mapping[Watched, Mask], states: int, calibration: Calibration
) -> dict[str, NDArray[np.float32]]:
    """Name -> float32 [T, states], what each step that predicts multiplies the last values with; 0 where it computes.

    The two stages of LESA (2602.20497), each solved at once where it trains by gradient: a step's coefficients are
    those of least squares on what the last steps really were, then, drawn towards these, on what they will be when the
    program runs: predictions, for the steps that predict. The trajectory is that of the program without sites.
    """
    fits = {each.name: _History(states) for each in computed}
    watch(
        program, list(computed), calibration,
        lambda step, each, value: fits[each.name].take(value, computed[each][step]), "fitting the coefficients",
    )  # fmt: skip
    return {name: np.stack(fit.rows).astype(np.float32) for name, fit in fits.items()}


class _History:
    """One site along the trajectory: the last values as they were, and as the cached program has them."""

    def __init__(self, states: int) -> None:
        self.states = states
        self.real: deque[Tensor] = deque(maxlen=states)
        self.used: deque[Tensor] = deque(maxlen=states)
        self.rows: list[Floats] = []

    def take(self, value: Tensor, computed: bool) -> None:
        row, predicted = np.zeros(self.states), value
        if not computed:
            found = least_squares(self.used, value, least_squares(self.real, value, np.zeros(len(self.real))))
            row[: len(found)] = found
            predicted = torch.zeros_like(value)
            for factor, state in zip(found.tolist(), self.used, strict=True):
                predicted += factor * state
        self.rows.append(row)
        self.real.appendleft(value)
        self.used.appendleft(predicted)


def least_squares(states: Sequence[Tensor], value: Tensor, prior: Floats) -> Floats:
    """The coefficients w that minimise ||value - sum_k w_k states_k||² + r ||w - prior||², in float64.

    r is RIDGE of the states' mean energy. states: of the value's shape.
    """
    count = len(states)
    gram, target = np.zeros((count, count)), np.zeros(count)
    for sample in range(len(value)):  # one at a time: float64 of a whole batch may not fit
        rows = torch.stack([state[sample].flatten() for state in states]).double()
        gram += (rows @ rows.T).numpy()
        target += (rows @ value[sample].flatten().double()).numpy()
    ridge = RIDGE * max(float(np.trace(gram)) / count, 1e-30)
    return np.asarray(np.linalg.solve(gram + ridge * np.eye(count), target + ridge * prior), np.float64)
