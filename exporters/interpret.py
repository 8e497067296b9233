"""Run lowered engines in PyTorch, by their script: the oracle that every engine is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..compiler.execute import initial_slots, refill
from ..compiler.program import Program
from ..runtime.manifest import Call
from .lower import Lowered

# (row of the script, engine, its inputs in order, its outputs in order)
OnCall = Callable[[int, str, list[Tensor], list[Tensor]], None]


@torch.no_grad()
def run_lowered(
    program: Program, lowered: Lowered, conditions: Mapping[str, NDArray[Any]], seeds: Sequence[int], *,
    on_call: OnCall | None = None,
) -> Tensor:  # fmt: skip
    """Samples [B, *shape] float32 for these seeds, made as the runtime makes them: the same as `execute.run`.

    on_call is called after each call of an engine.
    """
    slots = initial_slots(program, conditions, seeds)
    for slot, spec in lowered.states.items():
        slots[slot] = torch.zeros(spec.at(len(seeds)), dtype=getattr(torch, spec.dtype))
    position = steps = 0
    begun = -1
    while position < len(lowered.script):
        row = lowered.script[position]
        if not isinstance(row, Call):
            below = np.float32(slots[row.slot].item()) < np.float32(row.below)
            position = row.jump if below else position + 1
            continue
        if begun != steps:
            refill(program, slots, seeds, steps)
            begun = steps
        engine = lowered.engines[row.call]
        inputs = [
            lowered.tables[source][row.row] if kind == "table" else slots[source]
            for kind, source in engine.inputs.values()
        ]
        outputs = list(engine.graph(*inputs))
        if on_call:
            on_call(position, row.call, inputs, outputs)
        slots.update(zip(engine.outputs, outputs, strict=True))
        steps += "sample" in engine.outputs
        position += 1
    return slots["sample"]
