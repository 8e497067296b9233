"""What must hold of a program's plan for its steps to run as it says; asked after every pass."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from . import rewrite
from .errors import PassError
from .plan import Mask, Plan, Site
from .program import Program
from .spans import check_span


def validate(program: Program) -> None:
    """Raises PassError naming the site, what is wrong with it, and what to do.

    (1) Tables have a row for each step of the sampler. (2) Sites have names and values of their own; value and base are
    nodes of one shape, and a base that is another site's value comes after that site. (3) What a step reuses, an
    earlier one has left behind. (4) A site that a step is to compute is not inside what the step reuses. (5) What a
    step decides by comes before the sites that it decides about. (6) Steps that run as one batch read no sample.
    """
    _check_tables(program)
    nodes = {node.name: node for node in program.graph.graph.nodes}
    _check_sites(program.plan, nodes)
    _check_reuse(program.plan)
    _check_nesting(program, nodes)
    _check_predicates(program.plan, nodes)
    if program.plan.span > 1 and program.plan.sites:
        check_span(program, (False,) * len(program.plan.sites))


def _check_tables(program: Program) -> None:
    plan, steps = program.plan, program.sampler.steps
    if plan.steps != steps:
        raise PassError(f"the plan has {plan.steps} steps, the sampler {steps}; plan it again")
    rows = {f"table {name!r}": len(table) for name, table in program.tables.items()}
    for site in plan.sites:
        tables = {"computed": site.computed, "reuse": site.reuse, "refresh": site.refresh}
        if site.correction is not None:
            tables["correction"] = site.correction
        rows |= {f"table {kind!r} of cache site {site.name!r}": len(table) for kind, table in tables.items()}
        if site.reuse.ndim != 2 or site.refresh.shape[1:] != (max(site.states - 1, 0),):
            shapes = f"reuse has shape {list(site.reuse.shape)} and refresh {list(site.refresh.shape)}"
            raise PassError(f"cache site {site.name!r}: {shapes}, needed [{steps}, states] and [{steps}, states - 1]")
    for table, found in rows.items():
        if found != steps:
            raise PassError(f"{table} has {found} rows, the sampler {steps} steps; make it for these steps")


def _check_sites(plan: Plan, nodes: Mapping[str, fx.Node]) -> None:
    names: set[str] = set()
    values: dict[str, str] = {}
    later = {site.value: site.name for site in plan.sites}
    for site in plan.sites:
        if site.name in names:
            raise PassError(f"two cache sites are called {site.name!r}; give one another name")
        if site.value in values:
            raise PassError(
                f"cache sites {values[site.value]!r} and {site.name!r} are the same value {site.value!r}; keep one"
            )
        for what, node in (("value", site.value), ("base", site.base)):
            if node is not None and node not in nodes:
                raise PassError(f"cache site {site.name!r}: the graph has no node {node!r}, its {what}; plan it again")
        names.add(site.name)
        values[site.value] = site.name
        del later[site.value]
        _check_shapes(site, nodes)
        if site.base in later:
            raise PassError(
                f"cache site {site.name!r} adds to the value of {later[site.base]!r}, which comes after it in the "
                "plan; put sites in the order of the graph"
            )
    for site in plan.sites:
        if unknown := [name for name in site.overlaps if name not in names]:
            raise PassError(f"cache site {site.name!r} overlaps {unknown[0]!r}, which is no site of the plan")


def _check_shapes(site: Site, nodes: Mapping[str, fx.Node]) -> None:
    shape = [*map(rewrite.hint, rewrite.shape_of(nodes[site.value]))]
    if site.base is not None:
        base = [*map(rewrite.hint, rewrite.shape_of(nodes[site.base]))]
        if base != shape:
            raise PassError(
                f"cache site {site.name!r}: its value has shape {shape}, its base {site.base!r} {base}; "
                "take a base of the same shape, or none"
            )
    if site.correction is not None:
        needed = [len(site.computed), 2, shape[rewrite.channel_axis(len(shape))]]
        if list(site.correction.shape) != needed:
            raise PassError(
                f"cache site {site.name!r}: correction has shape {list(site.correction.shape)}, needed {needed}"
            )


def _check_reuse(plan: Plan) -> None:
    emits = [plan.emits(plan.mask(step)) for step in range(plan.steps)]
    for index, site in enumerate(plan.sites):
        held = 0  # states that are more than the zeros they begin as
        for step in range(plan.steps):
            if emits[step][index]:
                held = _renewed(site, step, held)
            elif not site.computed[step] and (
                missing := [k for k in range(held, site.states) if site.reuse[step, k] or (k == 0 and not held)]
            ):
                raise PassError(
                    f"cache site {site.name!r}: step {step} reuses state {missing[0]}, which no step before it has "
                    "left behind; compute the site at an earlier step"
                )
            elif site.rolling:
                held = min(held + 1, site.states)


def _renewed(site: Site, step: int, held: int) -> int:
    """States in use after a step that computes the site: one, and each that the step works out from one in use."""
    if site.rolling:
        return min(held + 1, site.states)
    count = 1
    while count < site.states and count <= held and site.refresh[step, count - 1]:
        count += 1
    return count


def _check_nesting(program: Program, nodes: Mapping[str, fx.Node]) -> None:
    plan, inside = program.plan, _Inside(nodes)
    results = rewrite.output_values(program.graph)
    for mask in plan.masks:
        present = _present(plan, mask, results, nodes)
        reused = [site for site, computed in zip(plan.sites, mask, strict=True) if not computed]
        for site, emitted in zip(plan.sites, plan.emits(mask), strict=True):
            missing = {site.value, site.base or site.value} - present if emitted else ()
            around = [other.name for other in reused for node in missing if inside(node, other)]
            if around:
                step = next(step for step in range(plan.steps) if mask in plan.possible(step))
                raise PassError(
                    f"cache site {site.name!r}: step {step} is to compute it inside {around[0]!r}, which it reuses; "
                    f"reuse both, or name {around[0]!r} among the sites that it overlaps"
                )


class _Inside:
    """Whether a node lies between a site's base, or anything without one, and its value."""

    def __init__(self, nodes: Mapping[str, fx.Node]) -> None:
        self._nodes = nodes
        self._known: dict[str, set[str]] = {}

    def __call__(self, node: str, site: Site) -> bool:
        return node in self._before(site.value) and (site.base is None or site.base in self._before(node))

    def _before(self, name: str) -> set[str]:
        """All that the node is worked out from."""
        if name not in self._known:
            self._known[name] = rewrite.ancestors(self._nodes[name]) - {name}
        return self._known[name]


def _check_predicates(plan: Plan, nodes: Mapping[str, fx.Node]) -> None:
    values = {site.name: site.value for site in plan.sites}
    for place, predicate in enumerate(plan.predicates):
        if unknown := [name for name in predicate.sites if name not in values]:
            raise PassError(f"decision {predicate.name!r} is about {unknown[0]!r}, which is no site of the plan")
        undecided = {values[name]: name for later in plan.predicates[place:] for name in later.sites}
        for node in (predicate.indicator, predicate.base):
            if node is not None and node not in nodes:
                raise PassError(f"decision {predicate.name!r}: the graph has no node {node!r}; plan it again")
            if node is not None and (after := rewrite.ancestors(nodes[node]) & undecided.keys()):
                raise PassError(
                    f"decision {predicate.name!r} goes by {node!r}, which follows from the site "
                    f"{undecided[min(after)]!r} that is not decided yet; go by a value before it"
                )


def _present(plan: Plan, mask: Mask, results: tuple[fx.Node, ...], nodes: Mapping[str, fx.Node]) -> set[str]:
    """Names of the nodes that a step with this mask has: computed for its results, or stood in for."""
    reused = {site.value: site.base for site, computed in zip(plan.sites, mask, strict=True) if not computed}
    found: set[str] = set()
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node.name in found:
            continue
        found.add(node.name)
        if node.name not in reused:
            waiting += node.all_input_nodes
        elif (base := reused[node.name]) is not None:
            waiting.append(nodes[base])
    return found
