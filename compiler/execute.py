"""Run a program in PyTorch: the oracle that every artifact is compared with, and the source of calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from ..runtime.random import normal
from . import rewrite
from .errors import PassError
from .plan import Mask
from .program import Program
from .variants import Variant, build_probe, build_variant, cache_tables, graph_inputs

# (step, node name, value): called for each tapped node as the step computes it. A step that reuses a site shows what it
# works out in the site's place (nothing for a copy, which is an earlier step's value), and none of the nodes before.
Tap = Callable[[int, str, Tensor], None]


def zero_state(node: fx.Node, batch: int) -> Tensor:
    """Zeros for a state input; its first dimension is the example's, scaled to this batch."""
    example = rewrite.tensor_of(node)
    assert example is not None
    shape = [batch_size(size, batch) for size in example.shape]
    return torch.zeros(shape, dtype=example.dtype)


def batch_size(size: Any, batch: int) -> int:
    """A size of the graph at this batch: k * batch where it is symbolic, itself where it is fixed."""
    return batch_factor(size) * batch if not isinstance(size, int) else size


def batch_factor(size: Any) -> int:
    """k of a symbolic size k * batch (2 where guidance doubles it), whichever symbols stand for the batch."""
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def initial_slots(program: Program, conditions: Mapping[str, NDArray[Any]], seeds: Sequence[int]) -> dict[str, Tensor]:
    contract = program.contract
    noise = normal(seeds, 0, tuple(contract.sample.shape)) * np.float32(contract.initial_scale)
    slots = {"sample": torch.from_numpy(noise)}
    slots |= {name: torch.from_numpy(np.asarray(value)) for name, value in conditions.items()}
    return slots


def refill(program: Program, slots: dict[str, Tensor], seeds: Sequence[int], step: int) -> None:
    """Put the step's fresh noise into its slot, where the sampler draws any."""
    if program.contract.stochastic:
        slots["noise"] = torch.from_numpy(normal(seeds, step + 1, tuple(program.contract.sample.shape)))


@torch.no_grad()
def run(
    program: Program,
    conditions: Mapping[str, NDArray[Any]],
    seeds: Sequence[int],
    *,
    tap: Tap | None = None,
    taps: Iterable[str] = (),
    on_step: Callable[[int, Tensor], None] | None = None,
    on_inputs: Callable[[int, Mask, list[Tensor]], None] | None = None,
) -> Tensor:
    """Samples [B, *shape] float32 for these seeds, by the program's own plan.

    tap is called for each node named in `taps`. on_step(step, sample) is called after each step
    and may write to the sample, on_inputs(step, mask, values) before it, with the inputs of the variant that it runs.
    Raises PassError when a value stops being finite, naming the step.
    """
    tables = {**program.tables, **cache_tables(program)}
    variants = {mask: build_variant(program, mask) for mask in program.plan.masks}
    probes = _Probes(program)
    slots = initial_slots(program, conditions, seeds)
    watched = frozenset(taps)
    for step in range(program.steps):
        refill(program, slots, seeds, step)
        mask = probes.mask(step, slots, tables, len(seeds))
        variant = variants[mask]
        values = variant_inputs(variant, slots, tables, step, len(seeds))
        if on_inputs:
            on_inputs(step, mask, values)
        results = _call(variant, values, step, tap, watched)
        slots.update(zip(variant.outputs, results, strict=True))
        if not torch.isfinite(slots["sample"]).all():
            raise PassError(
                f"the sample is not finite after step {step + 1} of {program.steps}; "
                "a weight or a pass before it overflows"
            )
        if on_step:
            on_step(step, slots["sample"])
    return slots["sample"]


class _Probes:
    """What a program's predicates decide, from the graphs that hold what each decision needs."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._built: dict[tuple[Mask, int], Variant] = {}

    def mask(self, step: int, slots: Mapping[str, Tensor], tables: Mapping[str, Tensor], batch: int) -> Mask:
        """The mask that the step runs with."""
        plan = self.program.plan
        mask = plan.possible(step)[0]
        for predicate in plan.open(step):
            key = mask, plan.predicates.index(predicate)
            if key not in self._built:
                self._built[key] = build_probe(self.program, mask, predicate)
            probe = self._built[key]
            (decision,) = probe.graph(*variant_inputs(probe, slots, tables, step, batch))
            if np.float32(decision.item()) < np.float32(predicate.below):
                mask = plan.decided(mask, predicate, computes=False)
        return mask


def variant_inputs(
    variant: Variant, slots: Mapping[str, Tensor], tables: Mapping[str, Tensor], step: int, batch: int
) -> list[Tensor]:
    """What the variant takes at this step, in its order; zeros for a state that no step has left yet."""
    values = []
    for name, node in rewrite.placeholders(variant.graph).items():
        kind, source = variant.inputs[name]
        if kind == "table":
            values.append(tables[source][step])
        else:
            values.append(slots[source] if source in slots else zero_state(node, batch))
    return values


def step_values(program: Program, step: int, slots: Mapping[str, Tensor]) -> list[Tensor]:
    """The inputs of the program's graph at this step, in its order."""
    whole = Variant(program.graph, graph_inputs(program, program.graph), ())
    return variant_inputs(whole, slots, program.tables, step, len(slots["sample"]))


def _call(
    variant: Variant, values: list[Tensor], step: int, tap: Tap | None, watched: frozenset[str]
) -> Sequence[Tensor]:
    results = _Tapped(variant.graph, step, tap, watched).run(*values) if tap else variant.graph(*values)
    return results if isinstance(results, tuple | list) else (results,)


class _Tapped(fx.Interpreter):
    """Runs a graph node by node and shows the watched values."""

    def __init__(self, module: fx.GraphModule, step: int, tap: Tap, watched: frozenset[str]) -> None:
        super().__init__(module)
        self._show: tuple[int, Tap, frozenset[str]] = (step, tap, watched)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        step, tap, watched = self._show
        if n.name in watched:
            tap(step, n.name, value)
        return value
