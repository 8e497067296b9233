"""Compute at build time what depends on the timestep alone: one table row a step replaces layers and their weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..compiler import rewrite
from ..compiler.calibrate import Calibration
from ..compiler.program import Decision, PassResult, Program, Record
from ..compiler.rewrite import aten

# Elementwise calls that broadcast, so that a row [1, ...] needs no copy for each sample.
_BROADCASTING = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
_TABLE = "folded_"


@dataclass(frozen=True)
class FoldTimestep:
    """Replace every value that only the step decides by a graph input, fed from a table of one row a step.

    Looks for tensors that depend on per-step inputs and weights, not on the sample or a condition, and whose rows are
    the same for every sample. Writes tables 'folded_<node>' [steps, 1, ...]. Exact: the rows are the very values that
    the layers gave.

    Left alone: (1) values whose rows differ within a batch, (2) the whole fold, when its tables would be larger than
    the weights that leave. May run anywhere; after quantize it also removes layers that quantize has changed.
    """

    name: ClassVar[str] = "fold_timestep"

    def decide(self, program: Program, calibration: Calibration, /) -> Decision:
        return Decision()

    def apply(self, program: Program, decision: Decision, /) -> PassResult:
        graph = rewrite.clone(program.graph)
        frontier = _frontier(graph, program.tables)
        if not frontier:
            return PassResult(program, Record(self.name))
        rows, refused = _rows(graph, frontier, program)
        if not rows:
            return PassResult(program, Record(self.name, refused=tuple(refused)))
        for node in frontier:
            if node.name in rows:
                _replace(graph, node, rows[node.name])
        folded = rewrite.finish(graph)
        tables = {f"{_TABLE}{name}": table for name, table in rows.items()}
        before, after = _bytes(rewrite.weights(program.graph)), _bytes(rewrite.weights(folded))
        if _bytes(tables) > before - after:
            why = f"its tables would take {_bytes(tables)} bytes, the weights that leave {before - after}"
            return PassResult(program, Record(self.name, refused=(*refused, ("all", why))))
        kept = {name: table for name, table in program.tables.items() if rewrite.placeholders(folded)[name].users}
        for name in set(program.tables) - set(kept):
            folded.graph.erase_node(rewrite.placeholders(folded)[name])
        details = {"tables": len(tables), "table_bytes": _bytes(tables), "weight_bytes_removed": before - after}
        record = Record(self.name, changed=len(rows), refused=tuple(refused), details=details)
        return PassResult(replace(program, graph=rewrite.finish(folded), tables={**kept, **tables}), record)


def _frontier(graph: fx.GraphModule, tables: Iterable[str]) -> list[fx.Node]:
    """Tensors that only per-step inputs decide, and that something else reads; in graph order."""
    by_step = rewrite.decided_by_step(graph, tables)
    return [
        node
        for node in graph.graph.nodes
        if node in by_step and rewrite.tensor_of(node) is not None and any(user not in by_step for user in node.users)
    ]


@torch.no_grad()
def _rows(
    graph: fx.GraphModule, frontier: list[fx.Node], program: Program
) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """name -> [steps, ...] with sizes that follow the batch reduced to 1, and what had to be refused."""
    part = rewrite.clone(graph)
    named = {node.name: node for node in part.graph.nodes}
    rewrite.output_node(part).args = (tuple(named[node.name] for node in frontier),)
    part = rewrite.finish(part)
    inputs = rewrite.placeholders(part)
    found: dict[str, list[Tensor]] = {node.name: [] for node in frontier}
    refused: dict[str, str] = {}
    for step in range(program.steps):
        values = [program.tables[n][step] if n in program.tables else _any_value(node) for n, node in inputs.items()]
        for node, value in zip(frontier, part(*values), strict=True):
            row = value
            for dim, size in enumerate(rewrite.shape_of(node)):
                if not isinstance(size, int):
                    row = row.narrow(dim, 0, 1)
            if not torch.equal(row.expand_as(value), value):
                refused[node.name] = "its rows differ within a batch"
            found[node.name].append(row.clone())
    return {name: torch.stack(rows) for name, rows in found.items() if name not in refused}, list(refused.items())


def _any_value(node: fx.Node) -> Tensor:
    """An input that only lends its batch size."""
    example = rewrite.tensor_of(node)
    assert example is not None
    return torch.zeros([rewrite.hint(size) for size in example.shape], dtype=example.dtype)


def _replace(graph: fx.GraphModule, node: fx.Node, rows: Tensor) -> None:
    value = rewrite.add_input(graph, f"{_TABLE}{node.name}", rows[0])
    wide: fx.Node | None = None
    for user in list(node.users):
        if _broadcasts(user, node):
            user.replace_input_with(node, value)
            continue
        if wide is None:
            sizes = [_size_node(graph, node, size) for size in rewrite.shape_of(node)]
            wide = rewrite.call(graph, node, aten.expand.default, value, sizes, like=node)
        user.replace_input_with(node, wide)


def _broadcasts(user: fx.Node, node: fx.Node) -> bool:
    others = [other for other in user.all_input_nodes if other is not node]
    return rewrite.is_call(user, *_BROADCASTING) and any(rewrite.shape_of(o) == rewrite.shape_of(user) for o in others)


def _size_node(graph: fx.GraphModule, before: fx.Node, size: Any) -> Any:
    """A node that holds this size, or the size itself where it is fixed."""
    if isinstance(size, int):
        return size
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr == size.node.expr and node < before:
            return node
    for source in rewrite.placeholders(graph).values():
        for dim, have in enumerate(rewrite.shape_of(source)):
            if not isinstance(have, int) and have.node.expr == size.node.expr:
                return rewrite.call(graph, before, aten.sym_size.int, source, dim)
    raise AssertionError(f"no node of the graph holds the size {size}")


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())
