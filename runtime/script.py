"""The script: calls of engines, and jumps on one float. The whole instruction set of a bundle."""

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np

from .engines import Array, Engine
from .errors import EngineError
from .manifest import Call, EngineSpec, Jump, Slot, Table

ROWS_BOUND = 10  # times the script's length: more than that is an endless loop


class Stage(NamedTuple):
    """An engine and how its inputs and outputs are wired."""

    spec: EngineSpec
    engine: Engine


class Spent(NamedTuple):
    """copied_bytes: what engines copied between their own memory and arrays; 0 for those that copy nothing."""

    calls: int
    steps: int
    engines_s: float
    copied_bytes: int


def run(
    script: Sequence[Call | Jump],
    stages: Mapping[str, Stage],
    tables: Mapping[str, Array],
    slots: dict[str, Array],
    *,
    before_step: Callable[[int], None] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> Spent:
    """Runs the rows on `slots`, in place; a slot goes when no row that can follow reads it, but for "sample".

    What an engine returned is what the next one gets: no array is copied here.

    Args:
        before_step: told the number of steps so far, before the first call of each; may refill slots.
        after_step: told the number of steps so far; a step ends with the call that writes slot "sample".
    """
    dead = dead_after(script, {name: stage.spec for name, stage in stages.items()})
    copied = _copied_bytes(stages)
    position = rows = calls = steps = 0
    begun = -1
    engines_s = 0.0
    while position < len(script):
        row, rows = script[position], rows + 1
        if rows > ROWS_BOUND * len(script):
            raise EngineError(f"script: {rows} rows run of a script of {len(script)}: its jumps loop; compile again")
        if isinstance(row, Jump):
            position = row.jump if _scalar(slots, row.slot) < np.float32(row.below) else position + 1
            continue
        if before_step and begun != steps:
            before_step(steps)
            begun = steps
        spec, engine = stages[row.call]
        inputs = {name: _value(source, row, tables, slots) for name, source in spec.inputs.items()}
        started = perf_counter()
        outputs = engine.run(inputs)
        engines_s += perf_counter() - started
        slots.update({target.slot: outputs[name] for name, target in spec.outputs.items()})
        del inputs, outputs  # or they would keep what is dropped here until the next call returns
        for slot in dead[position]:
            slots.pop(slot, None)
        position, calls = position + 1, calls + 1
        if Slot("sample") in spec.outputs.values():
            steps += 1
            if after_step:
                after_step(steps)
    return Spent(calls, steps, engines_s, _copied_bytes(stages) - copied)


def dead_after(script: Sequence[Call | Jump], specs: Mapping[str, EngineSpec]) -> list[frozenset[str]]:
    """Per row, the slots that it reads or writes and that no row after it reads, whichever way its jumps go."""
    needed: list[frozenset[str]] = [frozenset()] * len(script) + [frozenset({"sample"})]  # by that row and those after
    dead: list[frozenset[str]] = [frozenset()] * len(script)
    changed = True
    while changed:  # once, and once more for each jump back
        changed = False
        for index in reversed(range(len(script))):
            row = script[index]
            if isinstance(row, Jump):
                before = needed[index + 1] | needed[row.jump] | {row.slot}
            else:
                after, spec = needed[index + 1] | {"sample"}, specs[row.call]
                written = {target.slot for target in spec.outputs.values()}
                read = {source.slot for source in spec.inputs.values() if isinstance(source, Slot)}
                dead[index] = frozenset((written | read) - after)
                before = (after - written) | read
            changed = changed or before != needed[index]
            needed[index] = frozenset(before)
    return dead


def _copied_bytes(stages: Mapping[str, Stage]) -> int:
    return sum(getattr(stage.engine, "copied_bytes", 0) for stage in stages.values())


def _value(source: Slot | Table, row: Call, tables: Mapping[str, Array], slots: Mapping[str, Array]) -> Array:
    if isinstance(source, Table):
        return tables[source.table][row.row, ...]  # the ellipsis keeps a scalar an array
    return _slot(slots, source.slot)


def _scalar(slots: Mapping[str, Array], name: str) -> np.float32:
    value = _slot(slots, name)
    if value.size != 1:
        raise EngineError(f"script: a jump needs one float in slot {name!r}, found shape {list(value.shape)}")
    return np.float32(value.item())


def _slot(slots: Mapping[str, Array], name: str) -> Array:
    if name not in slots:
        raise EngineError(f"script: slot {name!r} is read before any engine has written it; compile again")
    return slots[name]
