"""What to train on where there is data: its samples with noise, as the sampler's steps meet them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...compiler.errors import PassError
from ...compiler.program import Program
from ...runtime.random import normal
from .examples import FIRST_SEED, SEEDS_APART, Example, pick_step
from .network import Network

# (number of the batch, samples) -> "sample" [samples, *shape] and each condition by its name
Loader = Callable[[int, int], Mapping[str, Any]]


class Noised:
    """Batches of a loader, each at a step of the sampler, with as much noise as the step meets.

    The loader gives the same batch for the same number, so that training that goes on after a stop sees the same.
    Raises PassError for a sampler that does not say how much noise that is.
    """

    def __init__(self, teacher: Program, loader: Loader, where: str, batch: int, seed: int = 0) -> None:
        if teacher.sampler.signal is None or teacher.sampler.noise_level is None:
            raise PassError(
                f"recover: sampler {teacher.sampler.name} does not say how much noise its steps meet, so data cannot "
                "be trained on; leave data out"
            )
        self.teacher, self.loader, self.where, self.batch = teacher, loader, where, batch
        self.first_seed = FIRST_SEED + seed * SEEDS_APART
        self.network = Network(teacher)

    @torch.no_grad()
    def example(self, number: int, among: int) -> Example:
        sampler, contract = self.teacher.sampler, self.teacher.contract
        assert sampler.signal is not None
        assert sampler.noise_level is not None
        random = np.random.default_rng([self.first_seed, number])
        step = pick_step(random, number % among, among, self.teacher.steps)
        given = self._batch(number)
        data = torch.from_numpy(given.pop("sample"))
        seeds = [self.first_seed + number * self.batch + i for i in range(self.batch)]
        noise = torch.from_numpy(normal(seeds, 0, tuple(contract.sample.shape)))
        signal, level = float(sampler.signal[step]), float(sampler.noise_level[step])
        slots = {
            "sample": signal * data + level * noise,
            **{name: torch.from_numpy(each) for name, each in given.items()},
        }
        expected = self.network(step, slots)[0]
        scale = float(sampler.s[step])  # the network is given samples of unit variance, whatever the sampler's own are
        truth = target(sampler.prediction, data, noise, scale * signal, scale * level)
        halves = len(expected) // len(truth)
        return Example(step, slots, expected, truth.repeat(halves, *[1] * (truth.dim() - 1)))

    def _batch(self, number: int) -> dict[str, NDArray[Any]]:
        """What the loader gives, checked. Raises PassError naming what is wrong with it."""
        try:
            found = self.loader(number, self.batch)
        except Exception as error:
            raise PassError(
                f"recover: {self.where}({number}, {self.batch}) raised {type(error).__name__}: {error}"
            ) from error
        contract = self.teacher.contract
        needed = {"sample": (contract.sample.dtype, tuple(contract.sample.shape))}
        needed |= {each.name: (each.dtype, tuple(each.shape)) for each in contract.conditions}
        if not isinstance(found, Mapping) or set(found) != set(needed):
            names = sorted(found) if isinstance(found, Mapping) else type(found).__name__
            raise PassError(f"recover: {self.where} gives {names}, needed a mapping of {sorted(needed)}")
        arrays = {name: np.asarray(value) for name, value in found.items()}
        for name, (dtype, shape) in needed.items():
            if arrays[name].shape != (self.batch, *shape):
                raise PassError(
                    f"recover: {self.where} gives {name!r} of shape {list(arrays[name].shape)}, needed "
                    f"{[self.batch, *shape]}"
                )
            if not np.isfinite(arrays[name]).all():
                raise PassError(f"recover: {self.where} gives a {name!r} that is not finite, in batch {number}")
            arrays[name] = np.ascontiguousarray(arrays[name], dtype)
        return arrays


def target(prediction: str, data: Tensor, noise: Tensor, signal: float, level: float) -> Tensor:
    """What a network of this kind of prediction should say when it is given signal * data + level * noise.

    Raises PassError for a kind that is not known.
    """
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return data
    if prediction == "flow":
        return noise - data
    if prediction == "v_prediction":
        return signal * noise - level * data
    raise PassError(
        f"recover: what a network that predicts {prediction!r} should say of data is not known; leave data out"
    )
