"""Engine against program, call by call on the same inputs: does the artifact compute what the compiler measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..compiler.calibrate import calibration_requests
from ..compiler.errors import InternalError
from ..compiler.program import Program
from ..runtime.engines import Engine
from .interpret import run_lowered
from .lower import Lowered
from .twins import twin_of

# Largest relative error of an engine in fp32: sums are taken in another order.
FP32_TOLERANCE = 1e-4
TWIN_SHARE = 1.5  # how much further than its twin's an engine's results may be, where it has one


@dataclass(frozen=True)
class Parity:
    engine: str
    max_abs_error: float
    relative_error: float
    tolerance: float


def check_parity(
    program: Program, lowered: Lowered, open: Mapping[str, Callable[[], Engine]], progress: Callable[[float], None], *,
    tolerance: float = FP32_TOLERANCE,
) -> tuple[Parity, ...]:  # fmt: skip
    """Run the script once in PyTorch, and each engine on the inputs of each of its calls.

    open: engine -> a function that opens it. tolerance: what an engine without a twin may differ by.
    Raises InternalError when an engine is further from the program than its precision allows.
    """
    engines = {name: open[name]() for name in lowered.engines}
    twins = {name: twin_of(engine.graph, tolerance) for name, engine in lowered.engines.items()}
    totals = {name: _Totals() for name in engines}

    def compare(row: int, name: str, inputs: list[Tensor], expected: list[Tensor]) -> None:
        engine, twin = lowered.engines[name], twins[name]
        found = engines[name].run({port: value.numpy() for port, value in zip(engine.inputs, inputs, strict=True)})
        otherwise = expected if twin is None else twin(*inputs)
        for slot, value, real in zip(engine.outputs, expected, otherwise, strict=True):
            totals[name].add(found[f"next_{slot}"], value.numpy(), real.numpy())
        progress((row + 1) / len(lowered.script))

    conditions, seeds = calibration_requests(program.contract, 2)
    run_lowered(program, lowered, conditions, seeds, on_call=compare)
    results = tuple(total.result(name, tolerance) for name, total in totals.items())
    for parity in results:
        if not parity.relative_error <= parity.tolerance:
            raise InternalError(
                f"engine {parity.engine!r} is {parity.relative_error:.2e} from the program (relative), "
                f"{parity.tolerance:.1e} is allowed; please report this with the recipe"
            )
    return results


@dataclass
class _Totals:
    """Sums over calls, samples and outputs: squared error of the engine, of the twin, squared outputs."""

    largest: float = 0.0
    error: float = 0.0
    twin: float = 0.0
    energy: float = 1e-30

    def add(self, found: NDArray[Any], expected: NDArray[Any], otherwise: NDArray[Any]) -> None:
        difference = found - expected
        self.largest = max(self.largest, float(np.abs(difference).max()))
        self.error += float(np.square(difference).sum())
        self.twin += float(np.square(expected - otherwise).sum())
        self.energy += float(np.square(expected).sum())

    def result(self, engine: str, floor: float) -> Parity:
        tolerance = max(floor, TWIN_SHARE * (self.twin / self.energy) ** 0.5)
        return Parity(engine, self.largest, (self.error / self.energy) ** 0.5, tolerance)
