"""The training that recovers what a structural pass cost: AdamW on what the whole network says, resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...compiler.calibrate import Progress
from ...compiler.store import Store

CHECKPOINT_S = 60.0  # seconds between checkpoints
WARMUP = 0.02  # part of the steps over which the rate rises
DIVERGED = 10.0  # times the loss of the first steps
WINDOW = 50  # steps of which a loss is the mean; and between copies of weights that are still good
CURVE = 100  # points of the loss curve that are kept

# (number of the step of training, part of the training that is behind it) -> loss
Loss = Callable[[int, float], Tensor]


@dataclass(frozen=True)
class Settings:
    """steps: of the optimiser. rate: of AdamW at its highest, falling by a cosine to a hundredth. average: decay of
    the average of the weights, which is what training gives. clip: largest norm of the gradients. faster: weights whose
    rate is `times` as high.
    """

    steps: int
    rate: float = 2e-4
    average: float = 0.999
    clip: float = 1.0
    faster: Sequence[str] = ()
    times: float = 1.0


@dataclass(frozen=True)
class Trained:
    """weights: by path, averaged. curve: (step, mean loss of the steps since the point before). stopped: step at which
    the loss was seen to diverge, None if it did not; the weights are then those before."""

    weights: Mapping[str, NDArray[np.float32]]
    curve: Sequence[tuple[int, float]]
    stopped: int | None = None


@dataclass
class _State:
    step: int
    average: list[Tensor]
    optimiser: torch.optim.AdamW
    losses: list[float] = field(default_factory=list)


def train(
    weights: Mapping[str, Tensor], loss: Loss, settings: Settings, store: Store, key: str, progress: Progress
) -> Trained:
    """Train the weights in place. One that was stopped goes on from its last checkpoint, kept in the store under `key`,
    and ends with the same weights, if `loss` follows from the number of the step alone.

    Stops where the loss is no number or ten times what it began with.
    """
    names, leaves = list(weights), list(weights.values())
    state = _begun(names, leaves, settings, store, key)
    good = [each.clone() for each in state.average]
    saved = time.monotonic()
    while state.step < settings.steps:
        value = _learn(state, leaves, loss, settings)
        state.losses.append(value)
        state.step += 1
        recent = float(np.mean(state.losses[-WINDOW:]))
        progress(state.step / settings.steps, f"recovering, loss {recent:.4g}")
        if not math.isfinite(value) or recent > DIVERGED * float(np.mean(state.losses[:WINDOW])):
            return Trained(_arrays(names, good), _curve(state.losses), state.step)
        if state.step % WINDOW == 0:
            good = [each.clone() for each in state.average]
        if time.monotonic() - saved >= CHECKPOINT_S:
            _keep(state, names, leaves, store, key)
            saved = time.monotonic()
    return Trained(_arrays(names, state.average), _curve(state.losses))


def _learn(state: _State, leaves: Sequence[Tensor], loss: Loss, settings: Settings) -> float:
    done = state.step / settings.steps
    for group in state.optimiser.param_groups:
        group["lr"] = group["times"] * settings.rate * _rate(state.step, settings.steps)
    state.optimiser.zero_grad()
    found = loss(state.step, done)
    found.backward(inputs=leaves)
    torch.nn.utils.clip_grad_norm_(leaves, settings.clip)
    state.optimiser.step()
    with torch.no_grad():  # the average follows faster at first, when there is little to average
        keep = min(settings.average, (1 + state.step) / (10 + state.step))
        torch._foreach_lerp_(state.average, list(leaves), 1 - keep)
    return float(found.detach())


def _rate(step: int, steps: int) -> float:
    rise = max(1, round(WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def _begun(names: Sequence[str], leaves: Sequence[Tensor], settings: Settings, store: Store, key: str) -> _State:
    fast = [leaf for name, leaf in zip(names, leaves, strict=True) if name in settings.faster]
    slow = [leaf for name, leaf in zip(names, leaves, strict=True) if name not in settings.faster]
    groups = [{"params": own, "times": times} for own, times in ((slow, 1.0), (fast, settings.times)) if own]
    optimiser = torch.optim.AdamW(groups, lr=settings.rate, weight_decay=0.0)
    kept = store.get(key)
    if kept is None:
        return _State(0, [leaf.detach().clone() for leaf in leaves], optimiser)
    values, arrays = kept
    found = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with torch.no_grad():
        for name, leaf in zip(names, leaves, strict=True):
            leaf.copy_(found[f"weight {name}"])
    for name, leaf in zip(names, leaves, strict=True):
        optimiser.state[leaf] = {
            "step": torch.tensor(float(values["step"])),
            "exp_avg": found[f"mean {name}"],
            "exp_avg_sq": found[f"square {name}"],
        }
    return _State(values["step"], [found[f"average {name}"] for name in names], optimiser, values["losses"])


def _keep(state: _State, names: Sequence[str], leaves: Sequence[Tensor], store: Store, key: str) -> None:
    arrays: dict[str, NDArray[np.float32]] = {}
    for name, leaf, average in zip(names, leaves, state.average, strict=True):
        moments = state.optimiser.state[leaf]
        arrays |= {
            f"weight {name}": leaf.detach().numpy(),
            f"average {name}": average.numpy(),
            f"mean {name}": moments["exp_avg"].numpy(),
            f"square {name}": moments["exp_avg_sq"].numpy(),
        }
    store.put(key, {"step": state.step, "losses": state.losses}, arrays)


def _arrays(names: Sequence[str], values: Sequence[Tensor]) -> dict[str, NDArray[np.float32]]:
    return {name: value.detach().cpu().numpy().copy() for name, value in zip(names, values, strict=True)}


def _curve(losses: Sequence[float]) -> list[tuple[int, float]]:
    each = max(1, -(-len(losses) // CURVE))
    return [
        (min(start + each, len(losses)), float(np.mean(losses[start : start + each])))
        for start in range(0, len(losses), each)
    ]
