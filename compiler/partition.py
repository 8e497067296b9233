"""Cut a union of steps into consecutive parts such that every weight ends up in exactly one engine.

A part becomes one engine for each set of its units that some kind of step needs. So a step runs what it needs and no
more, and a weight has one engine if all kinds of steps that need it need the same units of its part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
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


def partition(union: StepUnion) -> list[list[Unit]]:
    """The parts in the order in which a step runs them, each with its units in graph order."""
    network = _network(union)
    position = {unit: index for index, unit in enumerate(network.units)}
    parts = _joined(_sunk(network, _gathered(network)))
    return [sorted(part, key=position.__getitem__) for part in parts]


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


# ---- units --------------------------------------------------------------------------------------------------------


def _network(union: StepUnion) -> Network:
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


# ---- parts --------------------------------------------------------------------------------------------------------


def _is_sound(kinds: Iterable[Kinds], heavy: Iterable[Kinds]) -> bool:
    """Whether a part of such units has one engine for each of its heavy ones."""
    every = tuple(kinds)
    return all(needed <= other or not needed & other for needed in heavy for other in every)


def _gathered(network: Network) -> list[list[Unit]]:
    """Parts as large as they can be: units of the same kinds as early as possible, glue between them with them."""
    stages = _stages(network)
    classes: dict[tuple[Kinds, int], list[Unit]] = {}
    for unit in network.units:
        classes.setdefault((unit.kinds, stages[unit]), []).append(unit)
    class_of = {unit: key for key, group in classes.items() for unit in group}
    before = {key: {class_of[network.unit_of[n]] for u in group for n in network.meant(u)} - {key}
              for key, group in classes.items()}  # fmt: skip
    heavy = {key for key, group in classes.items() if any(unit.is_heavy for unit in group)}
    waiting = list(classes)
    parts = []
    while waiting:
        ready = [key for key in waiting if before[key].isdisjoint(waiting)]
        taken = [next((key for key in ready if key in heavy), ready[0])]
        while True:
            waiting = [key for key in waiting if key not in taken]
            fitting = (key for key in waiting if before[key].isdisjoint(waiting) and _fits(taken, key, heavy))
            following = next(fitting, None)
            if following is None:
                break
            taken.append(following)
        parts.append([unit for key in taken for unit in classes[key]])
    return parts


def _fits(taken: list[tuple[Kinds, int]], key: tuple[Kinds, int], heavy: set[tuple[Kinds, int]]) -> bool:
    together = [*taken, key]
    return _is_sound((kinds for kinds, _ in together), (each[0] for each in together if each in heavy))


def _stages(network: Network) -> dict[Unit, int]:
    """Per unit, how often the kinds change on the longest way to it; the step's results come after everything."""
    stages: dict[Unit, int] = {}
    for unit in network.units:
        sources = {network.unit_of[node] for node in network.meant(unit)}
        stages[unit] = max((stages[source] + (source.kinds != unit.kinds) for source in sources), default=0)
    every = network.union.every_kind
    last = max(stage + (unit.kinds != every) for unit, stage in stages.items())
    for slot, node, _ in network.union.outputs:
        if slot in ("sample", "history"):
            stages[network.unit_of[node]] = last
    return stages


def _sunk(network: Network, parts: list[list[Unit]]) -> list[list[Unit]]:
    """Move units to the part that reads them where no more bytes pass between engines then."""
    home = {unit: index for index, part in enumerate(parts) for unit in part}
    kinds = [{unit.kinds for unit in part} for part in parts]
    heavy = [{unit.kinds for unit in part if unit.is_heavy} for part in parts]
    for unit in reversed(network.units):
        readers = {reader for node in unit.nodes for reader in network.readers.get(node, ())}
        target = min((home[reader] for reader in readers), default=0)
        if unit.is_fixed or target <= home[unit]:
            continue
        joined = heavy[target] | ({unit.kinds} if unit.is_heavy else set())
        if _is_sound({*kinds[target], unit.kinds}, joined) and _passed_less(network, unit, home, target):
            home[unit] = target
            kinds[target].add(unit.kinds)
            heavy[target] = joined
    moved: list[list[Unit]] = [[] for _ in parts]
    for unit in network.units:
        moved[home[unit]].append(unit)
    return moved


def _passed_less(network: Network, unit: Unit, home: Mapping[Unit, int], target: int) -> bool:
    """Whether the unit's results weigh as much as what it would take with it to the part `target`."""
    saved = sum(
        node_bytes(node) for node in unit.nodes
        if node in network.readers and all(home[reader] == target for reader in network.readers[node])
    )  # fmt: skip
    added = 0
    for node in network.meant(unit):
        source = network.unit_of[node]
        passes = any(home[reader] != home[source] for reader in network.readers[node] if reader is not unit)
        if home[source] != target and not passes:
            added += node_bytes(node)
    return added <= saved


def _joined(parts: list[list[Unit]]) -> list[list[Unit]]:
    """Without empty parts, and with neighbours that may be one made one."""
    joined: list[list[Unit]] = []
    for part in parts:
        together = [*(joined[-1] if joined else []), *part]
        if joined and _is_sound({u.kinds for u in together}, {u.kinds for u in together if u.is_heavy}):
            joined[-1] = together
        elif part:
            joined.append(part)
    return joined
