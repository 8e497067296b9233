"""Engine against program, step by step on the same inputs: does the artifact compute what the compiler measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ..compiler.calibrate import calibration_requests
from ..compiler.errors import InternalError
from ..compiler.execute import run
from ..compiler.plan import Mask
from ..compiler.program import Program
from ..runtime.engines import ENGINES
from .lower import Lowered, engine_names

# Largest relative error of an engine's output, by the widest rounding in it. fp32 differs in the order of sums; with
# INT8 a sum that lies near a rounding edge lands on the other side now and then, which moves one integer by one.
TOLERANCE = {"float32": 1e-4, "int8": 2e-2}


@dataclass(frozen=True)
class Parity:
    engine: str
    max_abs_error: float
    relative_error: float
    tolerance: float


def check_parity(
    program: Program, lowered: Lowered, folder: Path, files: dict[str, str], target: str, threads: int | None,
    progress: Callable[[float], None],
) -> tuple[Parity, ...]:  # fmt: skip
    """Run the program's trajectory once, and each engine on the inputs of each of its steps.

    Raises InternalError when an engine is further from the program than its precision allows.
    """
    names = engine_names(program.plan.masks)
    engines = {name: ENGINES[target](folder / file, threads=threads) for name, file in files.items()}
    largest = dict.fromkeys(engines, 0.0)
    error = dict.fromkeys(engines, 0.0)
    energy = dict.fromkeys(engines, 1e-30)

    def compare(step: int, mask: Mask, inputs: list[Tensor]) -> None:
        name = names[mask]
        variant = lowered.engines[name]
        expected = variant.graph(*inputs)
        found = engines[name].run({port: value.numpy() for port, value in zip(variant.inputs, inputs, strict=True)})
        for slot, value in zip(variant.outputs, expected, strict=True):
            difference = found[f"next_{slot}"] - value.numpy()
            largest[name] = max(largest[name], float(np.abs(difference).max()))
            error[name] += float(np.square(difference).sum())
            energy[name] += float(value.square().sum())
        progress((step + 1) / program.steps)

    conditions, seeds = calibration_requests(program.contract, 2)
    run(program, conditions, seeds, on_inputs=compare)
    tolerance = TOLERANCE["int8" if "int8" in str(program.graph.graph) else "float32"]
    results = tuple(Parity(name, largest[name], (error[name] / energy[name]) ** 0.5, tolerance) for name in engines)
    for parity in results:
        if not parity.relative_error <= parity.tolerance:
            raise InternalError(
                f"engine {parity.engine!r} is {parity.relative_error:.2e} from the program (relative), "
                f"{parity.tolerance:.0e} is allowed; please report this with the recipe"
            )
    return results
