"""Two example requests of a program: the samples that it gives, and what its graph reads at a step of them."""

from __future__ import annotations

from torch import Tensor

from dcompile.compiler.calibrate import example_conditions
from dcompile.compiler.execute import initial_slots, run, step_values
from dcompile.compiler.program import Program


def samples_of(program: Program) -> Tensor:
    return run(program, example_conditions(program.contract, 2), [0, 1])


def values_of(program: Program, step: int = 1) -> list[Tensor]:
    """The inputs of the graph, in its order, from noise at any step."""
    return step_values(program, step, initial_slots(program, example_conditions(program.contract, 2), [0, 1]))
