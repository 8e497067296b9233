"""Trajectories of one program under any masks, many of them: what a mask leaves unread is skipped, nothing compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from ...compiler import rewrite
from ...compiler.calibrate import Calibration
from ...compiler.execute import initial_slots, refill, zero_state
from ...compiler.flops import node_flops
from ...compiler.plan import Mask
from ...compiler.program import Program
from .sites import Candidate

Masks = NDArray[np.bool_]  # [T, units], or [T, sites]: True where a step computes it

SAMPLES = 8  # of the calibration's that masks are judged by, at most
ROWS = 512  # of masks that are remembered: each lists hundreds of nodes

# The nodes that a step runs, each with those that nothing reads after it.
_Row = list[tuple[fx.Node, list[fx.Node]]]


class Rollout:
    """The program with these sites, each a copy of its last computed value (delta: of its value less its base; skips:
    its base alone)."""

    def __init__(
        self, program: Program, sites: Sequence[Candidate], *, delta: bool = False, skips: bool = False
    ) -> None:
        self.program = program
        named = {node.name: node for node in program.graph.graph.nodes}
        self.sites = tuple(sites)
        self._values = {named[site.value]: index for index, site in enumerate(sites)}
        self._bases = [named[site.base] if (delta or skips) and site.base is not None else None for site in sites]
        self._skips = skips
        self._weights = {
            node: rewrite.attribute(program.graph, str(node.target))
            for node in program.graph.graph.nodes
            if node.op == "get_attr"
        }
        self._rows: dict[Mask, tuple[_Row, float]] = {}

    def flops(self, masks: Masks) -> float:
        """Operations of all steps for one sample. masks: [T, sites], True where a step computes a site."""
        return sum(self._row(tuple(row))[1] for row in masks.tolist())

    @torch.no_grad()
    def samples(self, masks: Masks, conditions: Mapping[str, NDArray[Any]], seeds: Sequence[int]) -> Tensor:
        """As compiler.execute.run gives them for the plan of these masks, [T, sites]; the first row is all True, unless
        sites are skipped."""
        slots = initial_slots(self.program, conditions, seeds)
        states: list[Any] = [None] * len(self._bases)
        for step, row in enumerate(masks.tolist()):
            refill(self.program, slots, seeds, step)
            results = self._step(step, tuple(row), slots, states)
            slots.update(zip(("sample", "history"), results, strict=False))
        return slots["sample"]

    def _step(self, step: int, mask: Mask, slots: Mapping[str, Tensor], states: list[Any]) -> Sequence[Tensor]:
        """The results of one step; the states of the sites that it computes are replaced."""
        env: dict[fx.Node, Any] = dict(self._weights)
        results: Any = ()
        for node, unread in self._row(mask)[0]:
            index = self._values.get(node)
            base = None if index is None else self._bases[index]
            if index is not None and not mask[index]:
                env[node] = self._stand_in(states[index], None if base is None else env[base])
            elif node.op == "placeholder":
                env[node] = self._input(node, step, slots)
            elif node.op == "output":
                results = fx.node.map_arg(node.args[0], env.__getitem__)
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                if index is not None and not self._skips:
                    states[index] = env[node] if base is None else env[node] - env[base]
            for each in unread:
                del env[each]
        return results if isinstance(results, tuple | list) else (results,)

    def _stand_in(self, state: Any, base: Tensor | None) -> Tensor:
        if self._skips:
            assert base is not None
            return base
        found: Tensor = state if base is None else base + state
        return found

    def _input(self, node: fx.Node, step: int, slots: Mapping[str, Tensor]) -> Tensor:
        if node.name in self.program.tables:
            return self.program.tables[node.name][step]
        return slots[node.name] if node.name in slots else zero_state(node, len(slots["sample"]))

    def _row(self, mask: Mask) -> tuple[_Row, float]:
        if mask not in self._rows:
            if len(self._rows) >= ROWS:
                self._rows.clear()
            self._rows[mask] = self._planned(mask)
        return self._rows[mask]

    def _planned(self, mask: Mask) -> tuple[_Row, float]:
        """(what the step runs, its operations), from the back: results and computed sites, and what those read."""
        needed = {rewrite.output_node(self.program.graph)}
        needed |= {node for node, index in self._values.items() if mask[index]}
        row: _Row = []
        seen: set[fx.Node] = set()
        flops = 0.0
        for node in reversed(self.program.graph.graph.nodes):
            if node not in needed or node in self._weights:
                continue
            index = self._values.get(node)
            base = None if index is None else self._bases[index]
            reused = index is not None and not mask[index]
            reads = [*([] if reused else node.all_input_nodes), *([base] if base is not None else [])]
            needed.update(reads)
            last = [each for each in dict.fromkeys([*reads, node]) if each not in seen and each not in self._weights]
            seen.update(last)
            row.append((node, [each for each in last if each.op != "output"]))
            flops += 0.0 if reused else node_flops(node)
        return row[::-1], flops


class Judge:
    """What masks of units cost, and how far their samples are from the teacher's."""

    def __init__(self, rollout: Rollout, calibration: Calibration) -> None:
        self.rollout = rollout
        units = list(dict.fromkeys(site.unit for site in rollout.sites))
        self._unit_of = [units.index(site.unit) for site in rollout.sites]
        self._seeds = calibration.seeds[:SAMPLES]
        self._conditions = {name: values[:SAMPLES] for name, values in calibration.conditions.items()}
        self._teacher = calibration.teacher[:SAMPLES].flatten(1)
        everything = np.ones((rollout.program.steps, len(rollout.sites)), bool)
        self._most, self._least = rollout.flops(everything), rollout.flops(~everything)

    def cost(self, masks: Masks) -> float:
        """Share of the operations that all sites take at all steps."""
        return (self.rollout.flops(masks[:, self._unit_of]) - self._least) / max(self._most - self._least, 1e-9)

    def errors(self, masks: Masks) -> NDArray[np.float64]:
        """Of each sample, relative to the size of the teacher's; infinite where it is not finite."""
        found = self.rollout.samples(masks[:, self._unit_of], self._conditions, self._seeds).flatten(1)
        errors = ((found - self._teacher).norm(dim=1) / self._teacher.norm(dim=1)).double().numpy()
        return np.where(np.isfinite(errors), errors, np.inf)
