"""What is being compiled: one sampler step as a graph, the rows that drive it, and the plan of what a step computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from ..runtime.manifest import Contract
from .errors import PassError
from .plan import Plan
from .regions import Region, find_regions
from .rewrite import attribute, hint, shape_of
from .sampler import Sampler


@dataclass(frozen=True)
class Record:
    """What one pass did; goes into the report and the manifest.

    changed: nodes, sites or regions rewritten; 0 means that there was nothing to do.
    refused: (what, why not) for each thing that the pass looked at and left alone.
    details: figures and choices of the pass, JSON-able.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    changed: int = 0
    refused: tuple[tuple[str, str], ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A diffusion model with its sampler, executable in PyTorch after every pass.

    graph: one whole step, (sample, [history], conditions, tables, [noise]) -> (next sample, [history]); the batch comes
    first and is dynamic. Where networks predict sites, their states come after the inputs, their results last.
    contract: what a user gives and gets. sampler: the rows of coefficients, one a network call.
    tables: graph inputs that change by step, name -> [steps, ...]; the runtime feeds row i at call i.
    plan: per step and site, compute or reuse. history: one record a pass.
    """

    name: str
    graph: fx.GraphModule
    contract: Contract
    sampler: Sampler
    tables: Mapping[str, Tensor]
    plan: Plan
    history: tuple[Record, ...] = ()

    @property
    def steps(self) -> int:
        return self.sampler.steps

    @property
    def regions(self) -> tuple[Region, ...]:
        return find_regions(self.graph)

    @property
    def parameters(self) -> int:
        """Elements of the weights that the graph still reads: two in a byte that packs two, none in a scale."""
        return sum(_elements(self.graph, node) for node in _first_reads(self.graph))

    def with_sampler(self, sampler: Sampler) -> Program:
        """The program driven by other rows, with a plan that computes everything. Raises PassError for rows that read
        more of the past than the graph keeps, or where other tables go by step too."""
        if others := self.tables.keys() - {"timestep", "row"}:
            raise PassError(f"table {min(others)!r} is for the steps that the program has; choose the steps before it")
        if sampler.ring > self.sampler.ring:
            raise PassError(f"{sampler.name} reads {sampler.ring} outputs back, the graph keeps {self.sampler.ring}")
        rows = torch.from_numpy(sampler.row_table())
        rows = torch.nn.functional.pad(rows, (0, self.sampler.ring - sampler.ring))
        timesteps = torch.from_numpy(sampler.timesteps.astype(np.float32)).reshape(-1, 1)
        contract = replace(self.contract, steps=sampler.steps, initial_scale=float(sampler.initial_scale))
        tables = {"timestep": timesteps.to(self.tables["timestep"].dtype), "row": rows}
        return replace(self, sampler=sampler, contract=contract, tables=tables, plan=Plan(sampler.steps))

    def with_graph(self, graph: fx.GraphModule, **changes: Any) -> Program:
        return replace(self, graph=graph, **changes)


# Operators of quantisation, which lies above this layer: the first argument is the model's, those after it are scales.
_SCALED = ("dequantize", "quantize_dequantize", "quantize_dequantize_nvfp4")


def _first_reads(graph: fx.GraphModule) -> Iterable[fx.Node]:
    """One `get_attr` node for each weight."""
    return {str(node.target): node for node in graph.graph.nodes if node.op == "get_attr"}.values()


def _elements(graph: fx.GraphModule, weight: fx.Node) -> int:
    for reader in weight.users:
        if getattr(reader.target, "_opname", "") in _SCALED:
            return prod(map(hint, shape_of(reader))) if reader.args[0] is weight else 0
    return attribute(graph, str(weight.target)).numel()


@dataclass(frozen=True)
class Decision:
    """What a pass found out by measuring: enough to apply the pass again without measuring. Kept on disk between runs.

    A pass is `decide` (slow, reads the trajectory) then `apply` (fast, pure).
    choices: JSON-able. tensors: name -> array.
    """

    choices: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class PassResult:
    program: Program
    record: Record


class Pass(Protocol):
    """`Program -> PassResult`, a frozen dataclass whose fields are its options. The input program is never edited.

    One whose `looks_ahead` is true decides by the passes that follow it too, and does so again when they change.
    """

    name: ClassVar[str]

    def decide(self, program: Program, calibration: Any, /) -> Decision: ...

    def apply(self, program: Program, decision: Decision, /) -> PassResult: ...
