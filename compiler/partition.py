"""Cut a union of steps into consecutive parts such that every weight ends up in exactly one engine.

A part becomes one engine for each set of its units that some kind of step needs. So a step runs what it needs and no
more, and a weight has one engine if all kinds of steps that need it need the same units of its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .step_union import Kinds, StepUnion
from .units import Network, Unit, find_units, node_bytes

_Class = tuple[Kinds, int]  # units of the same kinds at the same stage


def partition(union: StepUnion) -> list[list[Unit]]:
    """The parts in the order in which a step runs them, each with its units in graph order."""
    network = find_units(union)
    position = {unit: index for index, unit in enumerate(network.units)}
    parts = _joined(network, _sunk(network, _gathered(network)))
    return [sorted(part, key=position.__getitem__) for part in parts]


def _is_sound(kinds: Iterable[Kinds], heavy: Iterable[Kinds]) -> bool:
    """Whether a part of such units has one engine for each of its heavy ones."""
    every = tuple(kinds)
    return all(needed <= other or not needed & other for needed in heavy for other in every)


def _gathered(network: Network) -> list[list[Unit]]:
    """Parts as large as they can be: units of the same kinds as early as possible, glue between them with them."""
    classes = _classes(network)
    decided = _decided(network, classes)
    before = _before(network, classes, decided)
    heavy = {key for key, group in classes.items() if any(unit.is_heavy for unit in group)}
    waiting = list(classes)
    parts = []
    while waiting:
        ready = [key for key in waiting if before[key].isdisjoint(waiting)]
        taken = [next((key for key in ready if key in heavy), ready[0])]
        while True:
            waiting = [key for key in waiting if key not in taken]
            fitting = (
                key for key in waiting
                if before[key].isdisjoint(waiting) and decided[key].isdisjoint(taken) and _fits([*taken, key], heavy)
            )  # fmt: skip
            following = next(fitting, None)
            if following is None:
                break
            taken.append(following)
        parts.append([unit for key in taken for unit in classes[key]])
    return parts


def _classes(network: Network) -> dict[_Class, list[Unit]]:
    """Units by their kinds and by how often the kinds change on the longest way to them."""
    stages: dict[Unit, int] = {}
    for unit in network.units:
        sources = {network.unit_of[node] for node in network.meant(unit)}
        stages[unit] = max((stages[source] + (source.kinds != unit.kinds) for source in sources), default=0)
    every = network.union.every_kind
    last = max(stage + (unit.kinds != every) for unit, stage in stages.items())
    stages |= dict.fromkeys(_finishing(network), last)
    classes: dict[_Class, list[Unit]] = {}
    for unit in network.units:
        classes.setdefault((unit.kinds, stages[unit]), []).append(unit)
    return classes


def _before(
    network: Network, classes: Mapping[_Class, list[Unit]], decided: Mapping[_Class, set[_Class]]
) -> dict[_Class, set[_Class]]:
    """Per class, those that must run before it. The step's results come after everything: they end the step."""
    class_of = {unit: key for key, group in classes.items() for unit in group}
    before = {
        key: {class_of[network.unit_of[node]] for unit in group for node in network.meant(unit)} - {key} | decided[key]
        for key, group in classes.items()
    }  # fmt: skip
    for key in {class_of[unit] for unit in _finishing(network)}:
        before[key] = set(classes) - {key}
    return before


def _decided(network: Network, classes: Mapping[_Class, list[Unit]]) -> dict[_Class, set[_Class]]:
    """Per class, those with the decisions that tell whether the step runs it: they end an engine before it."""
    class_of = {unit: key for key, group in classes.items() for unit in group}
    union = network.union
    return {key: {class_of[network.unit_of[node]] for node in union.waits(key[0])} for key in classes}


def _finishing(network: Network) -> list[Unit]:
    """The units that write the step's results, over what the step started from."""
    return [network.unit_of[node] for _, node, _ in network.union.outputs if node in network.union.closing]


def _fits(keys: list[_Class], heavy: set[_Class]) -> bool:
    return _is_sound((kinds for kinds, _ in keys), (key[0] for key in keys if key in heavy))


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


def _joined(network: Network, parts: list[list[Unit]]) -> list[list[Unit]]:
    """Without empty parts, and with neighbours that may be one made one."""
    joined: list[list[Unit]] = []
    for part in parts:
        together = [*(joined[-1] if joined else []), *part]
        kinds = {unit.kinds for unit in together}
        waits = {network.unit_of[node] for each in kinds for node in network.union.waits(each)}
        is_decided = waits.isdisjoint(together)
        if joined and is_decided and _is_sound(kinds, {unit.kinds for unit in together if unit.is_heavy}):
            joined[-1] = together
        elif part:
            joined.append(part)
    return joined
