"""What a step can be cut into: nodes that must stay in one engine, and who reads whose values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import fx

from . import rewrite
from .rewrite import aten
from .step_union import Kinds, StepUnion

TINY_BYTES = 1024  # a constant below this may be written into every engine that reads it

Sources = Mapping[fx.Node, frozenset[fx.Node]]


@dataclass(frozen=True, eq=False)
class Unit:
    """Nodes that stay together: an operator, the parts of its result, and the constants that only it reads.

    kinds: of steps that need it. reads: nodes of other units; a site's value stands for its stand-in too.
    is_heavy: holds weights. is_fixed: writes a slot that outlives the step.
    """

    nodes: tuple[fx.Node, ...]
    kinds: Kinds
    reads: frozenset[fx.Node]
    is_heavy: bool
    is_fixed: bool


@dataclass(frozen=True)
class Network:
    """The units of a union, in an order in which they can run. readers: node -> the units that may read it."""

    union: StepUnion
    units: tuple[Unit, ...]
    unit_of: Mapping[fx.Node, Unit]
    readers: Mapping[fx.Node, frozenset[Unit]]

    def meant(self, unit: Unit) -> set[fx.Node]:
        """Nodes of other units that the unit reads in some kind of step."""
        read = {self.union.meant(node, kind) for node in unit.reads for kind in unit.kinds}
        return {node for node in read if node in self.unit_of}  # the state of a copied site is an input, and no unit's


def is_carried(union: StepUnion, node: fx.Node) -> bool:
    """Whether every engine that reads the node works it out itself: sizes, tiny constants, the rounding of an input.

    Rounding must stand beside the layer whose input it rounds, or no target runs that layer in low precision.
    """
    if rewrite.is_size(node):
        return True
    if node in union.computed or node.op not in ("get_attr", "call_function"):
        return False
    if is_rounding(node):
        return not _rounds_output(union, node)
    is_tiny = rewrite.tensor_of(node) is not None and node_bytes(node) < TINY_BYTES
    return is_tiny and all(is_carried(union, source) for source in node.all_input_nodes)


def node_bytes(node: fx.Node) -> int:
    """Bytes of the node's value at the example batch."""
    value = rewrite.tensor_of(node)
    return 0 if value is None else prod(map(rewrite.hint, value.shape)) * value.element_size()


def is_rounding(node: fx.Node) -> bool:
    """Known by name: the operators belong to a layer above this one."""
    return node.op == "call_function" and str(node.target).startswith("dcompile.quantize_dequantize")


def _rounds_output(union: StepUnion, node: fx.Node) -> bool:
    """A convolution in low precision is one operator with the rounding of its result."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source in union.computed:
        return False
    return rewrite.is_call(source, aten.conv2d.default) and len(source.users) == 1


def find_units(union: StepUnion) -> Network:
    """The units of a union and how they hang together."""
    kinds = union.kinds()
    nodes = [
        node for node in union.module.graph.nodes
        if node in kinds and node.op in ("get_attr", "call_function") and not is_carried(union, node)
    ]  # fmt: skip
    sources = _sources(nodes)
    constants = _constants(union.module)
    roots = _roots(nodes, sources, constants)
    members: dict[fx.Node, list[fx.Node]] = {root: [] for root in nodes if roots[root] is root}
    for node in nodes:
        members[roots[node]].append(node)
    unit_kinds = _unit_kinds(members, sources, constants, kinds, union.every_kind)
    written = {node for _, node, _ in union.outputs}
    units = {}
    for root, group in members.items():
        inside = set(group)
        units[root] = Unit(
            nodes=tuple(group),
            kinds=unit_kinds[root],
            reads=frozenset(source for node in group for source in sources[node] if source not in inside),
            is_heavy=any(node in constants for node in group),
            is_fixed=bool(inside & written),
        )
    network = Network(union, tuple(units.values()), {node: units[roots[node]] for node in nodes}, {})
    readers: dict[fx.Node, set[Unit]] = defaultdict(set)
    for unit in network.units:
        for node in network.meant(unit):
            readers[node].add(unit)
    return Network(union, network.units, network.unit_of, {node: frozenset(found) for node, found in readers.items()})


def _sources(nodes: list[fx.Node]) -> Sources:
    """Per node, those of `nodes` that it reads, also through nodes that its engine works out itself."""
    known = set(nodes)

    def through(node: fx.Node) -> Iterator[fx.Node]:
        for source in node.all_input_nodes:
            if source in known:
                yield source
            elif not rewrite.is_size(source):  # an engine takes sizes from any of its inputs
                yield from through(source)

    return {node: frozenset(through(node)) for node in nodes}


def _constants(module: fx.GraphModule) -> set[fx.Node]:
    """Weights and what is worked out from nothing else: an exporter folds that into a weight."""
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and not rewrite.is_size(node) and found.issuperset(node.all_input_nodes)
        ):
            found.add(node)
    return found


def _roots(nodes: list[fx.Node], sources: Sources, constants: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Per node, the one that stands for its unit."""
    roots: dict[fx.Node, fx.Node] = {}
    has_parts: set[fx.Node] = set()
    for node in nodes:
        roots[node] = node
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and (isinstance(source.meta.get("val"), list | tuple) or is_rounding(node)):
            roots[node] = roots[source]
            has_parts.add(roots[source])
    readers: dict[fx.Node, set[fx.Node]] = defaultdict(set)
    for node in reversed(nodes):
        if node in constants and node not in has_parts and len(readers[node]) == 1:
            (roots[node],) = readers[node]
        for source in sources[node]:
            readers[source].add(roots[node])
    return roots


def _unit_kinds(
    members: Mapping[fx.Node, list[fx.Node]], sources: Sources, constants: set[fx.Node],
    needed: Mapping[fx.Node, Kinds], every: Kinds,
) -> dict[fx.Node, Kinds]:  # fmt: skip
    """Per root. A constant that different kinds of steps read differently belongs to all of them, as do its sources."""
    kinds: dict[fx.Node, Kinds] = {}
    read_by: dict[fx.Node, set[Kinds]] = defaultdict(set)
    for root, group in reversed(list(members.items())):
        kinds[root] = frozenset[int]().union(*(needed[node] for node in group))
        if constants.issuperset(group):
            found = {each for node in group for each in read_by[node]}
            kinds[root] = found.pop() if len(found) == 1 else every
        for node in group:
            for source in sources[node]:
                read_by[source].add(kinds[root])
    return kinds
