"""The pieces of a step, cut so that no two of them share a weight, and which of them each kind of step runs."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import fx

from . import rewrite
from .errors import InternalError
from .execute import batch_factor
from .partition import partition
from .plan import Mask
from .program import Program
from .rewrite import aten
from .step_union import Kinds, StepUnion, unite
from .units import Unit, is_carried, is_rounding
from .variants import Variant


@dataclass(frozen=True)
class Segments:
    """engines: by name, in order of first call. calls: row of the plan -> names of the engines that it calls."""

    engines: Mapping[str, Variant]
    calls: Mapping[Mask, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class _Piece:
    """An engine to be: what these kinds of steps run of the parts from `first` to `last`."""

    first: int
    last: int
    nodes: frozenset[fx.Node]
    is_heavy: bool
    kinds: Kinds


def build_segments(program: Program) -> Segments:
    """Called one after the other, the pieces of a step compute what its variant computes, operator for operator.

    Pieces hand values on in slots that bear the nodes' names. A weight that several pieces read is one of the first
    piece's, which hands it on; constants under 1 KiB, sizes and the rounding of inputs are in every piece that reads
    them.
    """
    union = unite(program)
    pieces = _pieces(union)
    names = _names(program, union, pieces)
    taken = {piece: _taken(union, piece) for piece in pieces}
    engines = {}
    for piece in pieces:
        wanted = {
            node for other in pieces if other is not piece and other.kinds & piece.kinds for node in taken[other]
        }  # fmt: skip
        engines[names[piece]] = _cut(union, piece, taken[piece], wanted)
    calls = {
        mask: tuple(names[piece] for piece in pieces if kind in piece.kinds) for kind, mask in enumerate(union.masks)
    }
    order = dict.fromkeys(name for mask in union.masks for name in calls[mask])
    return Segments({name: engines[name] for name in order}, calls)


def _pieces(union: StepUnion) -> list[_Piece]:
    """In an order that is every step's."""
    parts = partition(union)
    found: dict[frozenset[fx.Node], _Piece] = {}
    for kind in sorted(union.every_kind):
        for piece in _pieces_of(parts, kind, union.deciding.keys()):
            same = found.get(piece.nodes, piece)
            found[piece.nodes] = replace(piece, kinds=same.kinds | piece.kinds)
    return sorted(found.values(), key=lambda piece: piece.first)


def _pieces_of(parts: list[list[Unit]], kind: int, deciding: Collection[fx.Node]) -> list[_Piece]:
    """What a kind of steps runs: a piece for each part, but one for neighbours that have no weights.

    A piece ends with what decides, at run time, about the pieces after it.
    """
    pieces: list[_Piece] = []
    for number, part in enumerate(parts):
        units = [unit for unit in part if kind in unit.kinds]
        nodes = frozenset(node for unit in units for node in unit.nodes)
        piece = _Piece(number, number, nodes, any(unit.is_heavy for unit in units), frozenset({kind}))
        if pieces and not (piece.is_heavy or pieces[-1].is_heavy) and pieces[-1].nodes.isdisjoint(deciding):
            pieces[-1] = replace(piece, first=pieces[-1].first, nodes=pieces[-1].nodes | nodes)
        elif nodes:
            pieces.append(piece)
    return pieces


# ---- names --------------------------------------------------------------------------------------------------------


def _names(program: Program, union: StepUnion, pieces: list[_Piece]) -> dict[_Piece, str]:
    """ "head", then the sites that a piece computes or stands in for, then "finish"; "full" if it is the only one."""
    if len(pieces) == 1:
        return {pieces[0]: "full"}
    sites = dict(zip(union.computed, (site.name for site in program.plan.sites), strict=True))
    names: dict[_Piece, str] = {}
    for piece in pieces:
        beside = [other for other in pieces if other.first <= piece.last and piece.first <= other.last]
        replaced = [name for node, name in sites.items() if any(node in other.nodes for other in beside)]
        if own := [name for node, name in sites.items() if node in piece.nodes]:
            label = _label(own)
        elif replaced:
            label = f"{_label(replaced)}_reuse"
        else:
            label = {pieces[0].first: "head", pieces[-1].last: "finish"}.get(piece.first, "middle")
        names[piece] = _told_apart(label, names.values())
    return names


def _label(sites: list[str]) -> str:
    """One site by its name, several by the first and what is not the same in the last."""
    if len(sites) == 1:
        return sites[0]
    first, last = sites[0].split("_"), sites[-1].split("_")
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))))
    return f"{sites[0]}_to_{'_'.join(last[shared:]) or sites[-1]}"


def _told_apart(label: str, taken: Collection[str]) -> str:
    numbered = (label if number == 1 else f"{label}_{number}" for number in range(1, len(taken) + 2))
    return next(name for name in numbered if name not in taken)


# ---- what passes between pieces ------------------------------------------------------------------------------------


def _supplier(union: StepUnion, piece: _Piece, node: fx.Node) -> fx.Node:
    """What gives the piece the node's value: a node of its own, an input of the step, or a node of another piece."""
    if node in piece.nodes or node not in union.stand_ins:
        return node
    stand_in = union.stand_ins[node]
    return stand_in if stand_in in piece.nodes or stand_in.op == "placeholder" else node


def _is_own(union: StepUnion, piece: _Piece, node: fx.Node) -> bool:
    return node in piece.nodes or is_carried(union, node)


def _taken(union: StepUnion, piece: _Piece) -> list[fx.Node]:
    """Inputs of the step and nodes of other pieces that the piece reads, in graph order."""
    found: set[fx.Node] = set()
    waiting = list(piece.nodes)
    while waiting:
        for read in waiting.pop().all_input_nodes:
            source = _supplier(union, piece, read)
            if not _is_own(union, piece, source):
                found.add(source)
            elif source not in piece.nodes and not rewrite.is_size(source):
                waiting.append(source)
    return [node for node in union.module.graph.nodes if node in found]


def _given(union: StepUnion, piece: _Piece, wanted: Collection[fx.Node]) -> list[tuple[str, fx.Node]]:
    """(slot, node) of what the piece hands on: the step's results and states, then what other pieces read."""
    results = [(slot, node) for slot, node, _ in union.outputs if node in piece.nodes]
    for node in union.module.graph.nodes:
        if node in wanted and _supplier(union, piece, node) in piece.nodes:
            results.append((node.name, _supplier(union, piece, node)))
    return results


# ---- graphs -------------------------------------------------------------------------------------------------------


def _cut(union: StepUnion, piece: _Piece, taken: list[fx.Node], wanted: Collection[fx.Node]) -> Variant:
    """The piece as a graph of its own."""
    given = _given(union, piece, wanted)
    copy = _Copy(union, piece)
    for node in taken:
        copy.add_input(node)
    if not any(_is_symbolic(size) for node in taken for size in rewrite.shape_of(node)):
        copy.add_input(rewrite.node_named(union.module, "sample"))  # dropped again if the piece asks for no size
    for node in union.module.graph.nodes:
        if node in piece.nodes:
            copy.value_of(node)
    copy.graph.output(tuple(copy.value_of(node) for _, node in given))
    module = fx.GraphModule(union.module, copy.graph)
    rewrite.drop_dead(module)
    for node in rewrite.placeholders(module).values():
        if not node.users:
            module.graph.erase_node(node)
    inputs = {name: union.inputs.get(name, ("slot", name)) for name in rewrite.placeholders(module)}
    return Variant(rewrite.finish(module), inputs, tuple(slot for slot, _ in given))


class _Copy:
    """A graph that is filled with copies of nodes of a union."""

    def __init__(self, union: StepUnion, piece: _Piece) -> None:
        self.graph = fx.Graph()
        self._union, self._piece = union, piece
        self._inputs: dict[fx.Node, fx.Node] = {}
        self._made: dict[fx.Node, Any] = {}

    def add_input(self, node: fx.Node) -> None:
        self._inputs[node] = self.graph.placeholder(node.name)
        self._inputs[node].meta["val"] = node.meta["val"]

    def value_of(self, node: fx.Node) -> Any:
        """The copy of what gives the piece this node's value, made if need be; a plain number for a fixed size."""
        source = _supplier(self._union, self._piece, node)
        if source not in self._made:
            self._made[source] = self._make(source)
        return self._made[source]

    def _make(self, node: fx.Node) -> Any:
        if rewrite.is_size(node):
            return self._size(node)
        if node not in self._inputs:
            return self.graph.node_copy(node, self.value_of)
        if not is_rounding(node) or node in self._union.computed:  # what stands in for a site's value is not rounded
            return self._inputs[node]
        # It is rounded where it comes from; again changes nothing, and layers in low precision need it beside them.
        first = node.args[0]
        return self.graph.node_copy(node, lambda each: self._inputs[node] if each is first else self.value_of(each))

    def _size(self, node: fx.Node) -> Any:
        """A size from the shape of any input: the nodes that it came from may be in another piece."""
        value = node.meta["val"]
        if not _is_symbolic(value):
            return int(value)
        if not _is_multiple(value):
            if not all(map(rewrite.is_size, node.all_input_nodes)):
                raise InternalError(f"size {node.name!r} is {value}, no multiple of the batch; use --layout variants")
            return self.graph.node_copy(node, self.value_of)
        wanted = batch_factor(value)
        dims = [
            (each, index, batch_factor(size)) for each in self._inputs.values()
            for index, size in enumerate(rewrite.shape_of(each)) if _is_symbolic(size)
        ]  # fmt: skip
        source, index, factor = min(dims, key=lambda dim: (dim[2] != wanted, wanted % dim[2]))
        size = self._call(aten.sym_size.int, source, index, value=source.meta["val"].shape[index])
        if factor != wanted:
            one = self._call(operator.floordiv, size, factor, value=value // wanted) if factor > 1 else size
            size = self._call(operator.mul, one, wanted, value=value) if wanted > 1 else one
        return size

    def _call(self, target: Any, *args: Any, value: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = value
        return node


def _is_symbolic(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and not isinstance(size.node.maybe_as_int(), int)


def _is_multiple(size: torch.SymInt) -> bool:
    """Whether the size is k times the batch, whatever symbols stand for the batch."""
    expression = size.node.expr
    at = [int(expression.subs(dict.fromkeys(expression.free_symbols, batch))) for batch in (1, 3)]
    return at[1] == 3 * at[0] > 0
