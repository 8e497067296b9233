"""The interpreter on engines that are plain arithmetic: what is run, in which order, and when it refuses."""

from collections.abc import Mapping

import numpy as np
import pytest

from dcompile.runtime.engines import Array, Port
from dcompile.runtime.errors import EngineError
from dcompile.runtime.manifest import Call, EngineSpec, Jump, Slot, Table
from dcompile.runtime.script import Stage, dead_after, run


class Arithmetic:
    """x -> x + step, half."""

    inputs: Mapping[str, Port] = {}
    outputs: Mapping[str, Port] = {}

    def run(self, inputs: dict[str, Array], /) -> dict[str, Array]:
        x = inputs["x"] + inputs["step"]
        return {"y": x, "half": (x / 2).reshape(())}


TABLES = {"steps": np.array([1, 10, 100], dtype=np.float32)}
ADD = EngineSpec("add", {"x": Slot("sample"), "step": Table("steps")}, {"y": Slot("sample"), "half": Slot("half")})
PEEK = EngineSpec("peek", {"x": Slot("sample"), "step": Table("steps")}, {"half": Slot("half")})
STAGES = {"add": Stage(ADD, Arithmetic()), "peek": Stage(PEEK, Arithmetic())}


def start() -> dict[str, Array]:
    return {"sample": np.zeros(1, dtype=np.float32)}


def test_calls_take_their_rows() -> None:
    slots = start()
    spent = run([Call("add", 0), Call("add", 2), Call("add", 1)], STAGES, TABLES, slots)
    assert slots["sample"] == 111
    assert (spent.calls, spent.steps) == (3, 3)
    assert spent.engines_s > 0


@pytest.mark.parametrize(("below", "expected"), [(0.4, 101), (0.5, 101), (0.6, 1)])
def test_a_jump_is_taken_only_if_strictly_less(below: float, expected: float) -> None:
    slots = start()
    run([Call("add", 0), Jump(3, "half", below), Call("add", 2)], STAGES, TABLES, slots)
    assert slots["sample"] == expected


def test_jumps_compare_in_float32_and_never_on_nan() -> None:
    script: list[Call | Jump] = [Jump(2, "sample", 0.1), Call("add", 0)]
    slots: dict[str, Array] = {"sample": np.array([0.1], dtype=np.float32)}  # above 0.1 as float64, equal as float32
    assert run(script, STAGES, TABLES, slots).calls == 1
    slots = {"sample": np.array([np.nan], dtype=np.float32)}
    assert run(script, STAGES, TABLES, slots).calls == 1


def test_a_jump_back_repeats_until_the_slot_grows() -> None:
    slots = start()
    run([Call("add", 0), Jump(0, "half", 2.0)], STAGES, TABLES, slots)
    assert slots["sample"] == 4


def test_an_endless_loop_ends() -> None:
    scripts: list[list[Call | Jump]] = [[Call("peek", 0), Jump(0, "half", 9.0)], [Jump(0, "sample", 9.0)]]
    for script in scripts:
        with pytest.raises(EngineError, match="its jumps loop"):
            run(script, STAGES, TABLES, start())


def test_steps_end_where_the_sample_is_written() -> None:
    begun: list[int] = []
    steps: list[tuple[int, float]] = []
    slots = start()
    script = [Call("peek", 0), Call("add", 0), Call("peek", 0), Call("add", 1)]
    spent = run(
        script,
        STAGES,
        TABLES,
        slots,
        before_step=begun.append,
        after_step=lambda step: steps.append((step, float(slots["sample"][0]))),
    )
    assert begun == [0, 1]
    assert steps == [(1, 1.0), (2, 11.0)]
    assert (spent.calls, spent.steps) == (4, 2)


def test_unwritten_and_unfit_slots_are_named() -> None:
    with pytest.raises(EngineError, match="slot 'half' is read before any engine has written it"):
        run([Jump(1, "half", 0.0)], STAGES, TABLES, start())
    with pytest.raises(EngineError, match=r"one float in slot 'sample', found shape \[2\]"):
        run([Jump(1, "sample", 0.0)], STAGES, TABLES, {"sample": np.zeros(2, dtype=np.float32)})


# ---- several calls a step ------------------------------------------------------------------------------------------


class Adder:
    """a, [b] -> their sum; keeps what it was given and what it gave."""

    inputs: Mapping[str, Port] = {}
    outputs: Mapping[str, Port] = {}

    def __init__(self) -> None:
        self.given: list[dict[str, Array]] = []
        self.made: list[Array] = []
        self.copied_bytes = 0

    def run(self, inputs: dict[str, Array], /) -> dict[str, Array]:
        self.given.append(dict(inputs))
        self.made.append(np.asarray(sum(inputs.values())))
        self.copied_bytes += 8
        return {"y": self.made[-1]}


HEAD = EngineSpec("head", {"a": Slot("sample"), "b": Table("steps")}, {"y": Slot("hidden")})
INNER = EngineSpec("inner", {"a": Slot("hidden"), "b": Slot("kept")}, {"y": Slot("kept")})
FINISH = EngineSpec("finish", {"a": Slot("hidden"), "b": Slot("kept")}, {"y": Slot("sample")})
SPECS = {"head": HEAD, "inner": INNER, "finish": FINISH}
THREE = [Call(name, row) for row in range(3) for name in ("head", "inner", "finish") if name != "inner" or row != 1]


def adders() -> tuple[dict[str, Stage], dict[str, Adder]]:
    engines = {name: Adder() for name in SPECS}
    return {name: Stage(SPECS[name], engines[name]) for name in SPECS}, engines


def test_pieces_of_a_step_hand_on_the_very_arrays() -> None:
    stages, engines = adders()
    slots = {**start(), "kept": np.zeros(1, dtype=np.float32)}
    begun: list[int] = []
    ended: list[int] = []
    spent = run(THREE, stages, TABLES, slots, before_step=begun.append, after_step=ended.append)
    # hidden 1, kept 1, sample 2; hidden 12, sample 13; hidden 113, kept 114, sample 227
    assert slots["sample"] == 227
    assert (spent.calls, spent.steps) == (8, 3)
    assert (begun, ended) == ([0, 1, 2], [1, 2, 3])
    head, inner, finish = (engines[name] for name in SPECS)
    assert all(finish.given[step]["a"] is head.made[step] for step in range(3))
    assert finish.given[0]["b"] is finish.given[1]["b"] is inner.made[0]
    assert inner.given[1]["b"] is inner.made[0]
    assert head.given[1]["a"] is finish.made[0]


def test_what_engines_copied_is_counted_from_this_run_on() -> None:
    stages, engines = adders()
    engines["head"].copied_bytes = 1000  # of runs before
    slots = {**start(), "kept": np.zeros(1, dtype=np.float32)}
    assert run(THREE, stages, TABLES, slots).copied_bytes == 8 * 8
    assert (
        run([Call("add", 0)], STAGES, TABLES, start()).copied_bytes == 0
    )  # an engine that does not say copies nothing


def test_slots_go_after_their_last_reader() -> None:
    stages, _ = adders()
    slots = {**start(), "kept": np.zeros(1, dtype=np.float32), "unread": np.ones(1)}
    run(THREE, stages, TABLES, slots)
    assert set(slots) == {"sample", "unread"}  # nothing that the script names is left but the result
    assert dead_after(THREE, SPECS) == [
        frozenset(),
        frozenset(),
        {"hidden"},
        frozenset(),
        {"hidden"},  # and kept is read again at step 2
        frozenset(),
        frozenset(),
        {"hidden", "kept"},
    ]


def test_a_slot_that_some_way_of_a_jump_reads_stays() -> None:
    forward: list[Call | Jump] = [Call("head", 0), Jump(3, "sample", 1.0), Call("inner", 0), Call("finish", 0)]
    assert dead_after(forward, SPECS) == [frozenset(), frozenset(), frozenset(), {"hidden", "kept"}]
    back = [*forward, Jump(1, "kept", 1.0)]
    assert dead_after(back, SPECS)[3] == frozenset()  # the rows after the jump's aim read both
    leaving: list[Call | Jump] = [Call("head", 0), Jump(3, "sample", 1.0), Call("finish", 0)]
    assert dead_after(leaving, SPECS)[0] == frozenset()
