"""What the values of a graph do over the steps of a trajectory: the one measurement that cache methods decide by.

Each value is kept in the store, so that whoever watches it again runs nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from . import rewrite
from .calibrate import Requests, inputs_for
from .execute import run
from .program import Program
from .rewrite import aten
from .store import digest, fingerprint

VERSION = 1  # of what the store keeps: raise it when the same trajectory is recorded differently
KEPT = 4096  # elements of a value that are kept of each sample
Distance = Literal["l1", "mse", "cosine"]
Floats = NDArray[np.float32]
Take = Callable[[int, "Watched", Tensor], None]  # (step, what is watched, its value)


@dataclass(frozen=True)
class Watched:
    """A value to record: node names. With a base, what is recorded is the value minus the base, a residual."""

    name: str
    value: str
    base: str | None = None


@dataclass(frozen=True)
class Trace:
    """Each watched value at every step, for each sample; B counts both halves of guidance.

    kept: name -> float32 [T, B, K], the same K elements at every step. norms: name -> float32 [T, B], mean |x| over all
    elements. moves: name -> float32 [T, B], mean |x_i - x_{i-1}| over all elements; 0 at step 0.
    """

    kept: Mapping[str, Floats]
    norms: Mapping[str, Floats]
    moves: Mapping[str, Floats]

    def changes(self, name: str) -> NDArray[np.float64]:
        """[T]: mean |x_i - x_{i-1}| / mean |x_{i-1}| over all samples; 0 at step 0."""
        moves, norms = (each[name].mean(axis=1, dtype=np.float64) for each in (self.moves, self.norms))
        return np.concatenate([[0.0], moves[1:] / np.maximum(norms[:-1], 1e-12)])

    def distances(self, name: str, kind: Distance) -> NDArray[np.float64]:
        """[T, T]: entry (i, m) says how far the value at step m is from that at step i, mean over samples.

        "l1" and "mse" are relative to the trajectory's own mean size, "cosine" is 1 - cos.
        """
        values = self.kept[name].astype(np.float64)
        if kind == "cosine":
            unit = values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)
            result: NDArray[np.float64] = 1 - np.einsum("ibk,mbk->im", unit, unit) / values.shape[1]
            return result
        power = 1 if kind == "l1" else 2
        size = max(float((np.abs(values) ** power).mean()), 1e-12)
        rows = [(np.abs(values - values[step]) ** power).mean(axis=(1, 2)) / size for step in range(len(values))]
        return np.stack(rows)


def record(program: Program, watched: Sequence[Watched], requests: Requests) -> Trace:
    """Watch the requests run once, but for what the store holds. The program must have no cache sites yet.

    A value takes 4 T B K bytes of the store: 8 MB for 30 steps of 8 samples under guidance.
    """

    def see(missing: Sequence[Watched], take: Take) -> None:
        watch(program, missing, requests, take, "recording the trajectory")

    return _recorded(see, watched, requests, program)


def record_beside(program: Program, other: fx.GraphModule, watched: Sequence[Watched], requests: Requests) -> Trace:
    """What another graph with nodes of the same names has for the same inputs, along the program's own trajectory."""

    def see(missing: Sequence[Watched], take: Take) -> None:
        module = _shown(other, missing)
        given = inputs_for(program, module, len(requests.seeds))

        def look(step: int, mask: object, inputs: list[Tensor]) -> None:
            for each, value in zip(missing, module(*given(inputs)), strict=True):
                take(step, each, value)

        run(
            program, requests.conditions, requests.seeds, on_inputs=look,
            on_step=lambda step, _: requests.progress((step + 1) / program.steps, "recording beside the trajectory"),
        )  # fmt: skip

    return _recorded(see, watched, requests, program, program.with_graph(other))


def _recorded(
    see: Callable[[Sequence[Watched], Take], None], watched: Sequence[Watched], requests: Requests, *sources: Program
) -> Trace:
    """What the store holds of the watched values, and what `see` shows of the others.

    sources: the programs that the values follow from. An entry is of one value, under whatever name, and beside
    whichever others, it is watched.
    """
    store = requests.store
    whole = digest(VERSION, _fingerprint(requests), *map(fingerprint, sources)) if store.directory else ""
    keys = {each: f"{digest(whole, each.value, each.base)}-trace" for each in watched}
    entries = {each: store.get(key) for each, key in keys.items()}
    arrays = {each: entry[1] for each, entry in entries.items() if entry}
    if missing := [each for each in watched if each not in arrays]:
        recorder = _Recorder(missing)
        see(missing, recorder.take)
        for each in missing:
            arrays[each] = recorder.arrays(each)
            store.put(keys[each], asdict(each), arrays[each])
    kinds = ("kept", "norms", "moves")
    return Trace(**{kind: {each.name: arrays[each][kind] for each in watched} for kind in kinds})


def _fingerprint(requests: Requests) -> str:
    arrays = {name: np.ascontiguousarray(value) for name, value in requests.conditions.items()}
    given = {
        name: (str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest())
        for name, value in arrays.items()
    }
    return digest(given, [int(seed) for seed in requests.seeds])


def _shown(graph: fx.GraphModule, watched: Sequence[Watched]) -> fx.GraphModule:
    """The graph with the watched values, or residuals, for its results."""
    module = rewrite.clone(graph)
    end, results = rewrite.output_node(module), []
    for each in watched:
        value = rewrite.node_named(module, each.value)
        if each.base is not None:
            base = rewrite.node_named(module, each.base)
            value = rewrite.call(module, end, aten.sub.Tensor, value, base)
        results.append(value)
    end.args = (tuple(results),)
    return rewrite.finish(module)


def watch(program: Program, watched: Sequence[Watched], requests: Requests, take: Take, doing: str) -> None:
    """Run the requests once; take(step, watched, value) is told each value, or residual."""
    bases: dict[str, Tensor] = {}
    needed = {each.base for each in watched if each.base is not None}

    def tap(step: int, node: str, value: Tensor) -> None:
        for each in watched:  # before the base is replaced: a node may be one site's value and the next one's base
            if each.value == node:
                take(step, each, value if each.base is None else value - bases[each.base])
        if node in needed:
            bases[node] = value

    taps = dict.fromkeys(node for each in watched for node in (each.value, each.base) if node is not None)
    requests.observe(program, list(taps), tap, doing)


class _Recorder:
    """Streams: of each value it holds the last one whole, and K elements of the others."""

    def __init__(self, watched: Sequence[Watched]) -> None:
        self.before: dict[Watched, Tensor] = {}
        self.rows: dict[Watched, list[dict[str, Floats]]] = {each: [] for each in watched}

    def take(self, step: int, each: Watched, value: Tensor) -> None:
        flat = value.reshape(len(value), -1)
        chosen = torch.linspace(0, flat.shape[1] - 1, min(KEPT, flat.shape[1])).round().long()
        moves = (flat - self.before.get(each, flat)).abs().mean(1)
        row = {"kept": flat[:, chosen], "norms": flat.abs().mean(1), "moves": moves}
        self.rows[each].append({kind: values.float().numpy() for kind, values in row.items()})
        self.before[each] = flat

    def arrays(self, each: Watched) -> dict[str, Floats]:
        rows = self.rows[each]
        return {kind: np.stack([row[kind] for row in rows]) for kind in rows[0]}
