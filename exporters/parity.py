"""Engine against program, step by step on the same inputs: does the artifact compute what the compiler measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from ..compiler import rewrite
from ..compiler.calibrate import calibration_requests
from ..compiler.errors import InternalError
from ..compiler.execute import run
from ..compiler.plan import Mask
from ..compiler.program import Program
from ..compiler.rewrite import aten
from ..runtime.engines import ENGINES
from .lower import Lowered, engine_names

# Largest relative error of an engine in fp32: sums are taken in another order. INT8 is chaotic beside that: a value by
# a rounding edge lands on its other side, and the next layers round differently from there. So an engine with INT8
# layers may be about as far from the program as the program is from the same weights without rounding.
FP32_TOLERANCE = 1e-4
ROUNDING_SHARE = 1.5

_REAL = "real_weights"


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
    twins = {name: without_rounding(engine.graph) for name, engine in lowered.engines.items()}
    totals = {name: _Totals() for name in engines}

    def compare(step: int, mask: Mask, inputs: list[Tensor]) -> None:
        name = names[mask]
        variant, twin = lowered.engines[name], twins[name]
        expected = variant.graph(*inputs)
        found = engines[name].run({port: value.numpy() for port, value in zip(variant.inputs, inputs, strict=True)})
        unrounded = expected if twin is None else twin(*inputs)
        for slot, value, real in zip(variant.outputs, expected, unrounded, strict=True):
            totals[name].add(found[f"next_{slot}"], value.numpy(), real.numpy())
        progress((step + 1) / program.steps)

    conditions, seeds = calibration_requests(program.contract, 2)
    run(program, conditions, seeds, on_inputs=compare)
    results = tuple(total.result(name) for name, total in totals.items())
    for parity in results:
        if not parity.relative_error <= parity.tolerance:
            raise InternalError(
                f"engine {parity.engine!r} is {parity.relative_error:.2e} from the program (relative), "
                f"{parity.tolerance:.1e} is allowed; please report this with the recipe"
            )
    return results


@dataclass
class _Totals:
    """Sums over steps, samples and outputs: squared error of the engine, of the program's rounding, squared outputs."""

    largest: float = 0.0
    error: float = 0.0
    rounding: float = 0.0
    energy: float = 1e-30

    def add(self, found: NDArray[Any], expected: NDArray[Any], unrounded: NDArray[Any]) -> None:
        difference = found - expected
        self.largest = max(self.largest, float(np.abs(difference).max()))
        self.error += float(np.square(difference).sum())
        self.rounding += float(np.square(expected - unrounded).sum())
        self.energy += float(np.square(expected).sum())

    def result(self, engine: str) -> Parity:
        tolerance = max(FP32_TOLERANCE, ROUNDING_SHARE * (self.rounding / self.energy) ** 0.5)
        return Parity(engine, self.largest, (self.error / self.energy) ** 0.5, tolerance)


def without_rounding(graph: fx.GraphModule) -> fx.GraphModule | None:
    """The graph with INT8 weights as real numbers and activations that are not rounded; None if nothing is INT8."""
    twin = rewrite.clone(graph)
    ops = torch.ops.dcompile
    changed = False
    for node in list(twin.graph.nodes):
        if rewrite.is_call(node, ops.linear_int8.default, ops.linear_int8_dynamic.default):
            x, weight, _, bias = node.args[:4]
            real = _real_weight(twin, node, weight, lambda w, s: (w * s).t())
            rewrite.change_call(node, aten.linear.default, x, real, bias)
        elif rewrite.is_call(node, ops.conv2d_int8.default):
            x, weight, _, bias = node.args[:4]
            real = _real_weight(twin, node, weight, lambda w, s: w * s[:, None, None, None])
            rewrite.change_call(node, aten.conv2d.default, x, real, bias, *node.args[8:])
        else:
            continue
        changed = True
    return rewrite.finish(twin) if changed else None


def _real_weight(
    graph: fx.GraphModule, node: fx.Node, weight: Any, scaled: Callable[[Tensor, Tensor], Tensor]
) -> fx.Node:
    path, scale = str(weight.target), rewrite.attribute(graph, str(node.args[2].target))  # type: ignore[union-attr]
    real = scaled(rewrite.attribute(graph, path).to(torch.float32), scale).contiguous()
    rewrite.assign(graph, f"{_REAL}.{path}", real)
    return rewrite.read_weight(graph, f"{_REAL}.{path}", node)
