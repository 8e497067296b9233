"""Sites that steps decide about at run time: the predicates of a graph, and what they decide on recorded runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import fx

from ...compiler import rewrite
from ...compiler.calibrate import Calibration
from ...compiler.errors import PassError
from ...compiler.execute import run
from ...compiler.plan import Mask, Predicate, Rule
from ...compiler.program import Program
from ...compiler.regions import Region, block_lists, find_regions
from ...compiler.rewrite import aten
from ...compiler.trace import Trace, Watched, record
from .sites import Candidate

MOST_APART = 3  # decisions of one step: each doubles the kinds of steps, and so the graphs


def predicates(
    graph: fx.GraphModule, sites: Sequence[Candidate], rule: Rule, below: float, open_steps: Mask, *,
    front: int, apart: bool, polynomial: Sequence[float], fitted_to: float, longest: int,
) -> tuple[Predicate, ...]:  # fmt: skip
    """One decision for all sites, or apart: one for each unit.

    What is compared: the residual of the first `front` blocks (of the unit's own list where apart), as in FBCache and
    DBCache; what is accumulated: the first block's modulated input, as in TeaCache. Raises PassError where the graph
    has no such value, or too many units.
    """
    units = list(dict.fromkeys(site.unit for site in sites)) if apart else ["cache"]
    if len(units) > MOST_APART:
        raise PassError(
            f"cache_steps: {len(units)} decisions a step would take {2 ** len(units)} kinds of steps, at most "
            f"{MOST_APART} decide apart; give apart=false, or freeze=true to decide ahead of time"
        )
    found = []
    for unit in units:
        members = [site for site in sites if not apart or site.unit == unit]
        indicator, base = None, None
        if rule == "compare":
            indicator, base = _front_residual(graph, members[0], front)
        elif rule == "accumulate":
            indicator = modulated_input(graph)
        names = tuple(site.name for site in members)
        found.append(
            Predicate(unit, names, rule, below, open_steps, indicator, base, tuple(polynomial), fitted_to, longest)
        )
    return tuple(found)


def _front_residual(graph: fx.GraphModule, site: Candidate, front: int) -> tuple[str, str]:
    """(output, input) of the first `front` blocks of the site's list, of the stream that has the sample."""
    lists = block_lists(find_regions(graph))
    every = [block for blocks in lists.values() for block in blocks]
    for blocks in lists.values():
        if front and len(blocks) > front and any(site.base == stream.entry for stream in blocks[front].streams):
            first = every.index(blocks[0])
            for stream in blocks[front - 1].streams:
                entry = _back(blocks[:front], stream.exit)
                origin = _back(every[:first], entry)
                if "sample" in rewrite.ancestors(rewrite.node_named(graph, origin)):
                    return stream.exit, entry
    raise PassError(
        "cache_steps: a decision by the first blocks needs sites that begin after them; give site=range and front=1 or "
        "more"
    )


def _back(blocks: Sequence[Region], value: str) -> str:
    """What a stream was before these blocks."""
    for block in reversed(blocks):
        stream = block.stream_into(value)
        value = stream.entry if stream is not None else value
    return value


def modulated_input(graph: fx.GraphModule) -> str:
    """What the first block's first linear layer reads: TeaCache measures how much it changes."""
    for blocks in block_lists(find_regions(graph)).values():
        entry = rewrite.shape_of(rewrite.node_named(graph, blocks[0].streams[0].entry))
        for name in blocks[0].nodes:
            node = rewrite.node_named(graph, name)
            source = node.args[0] if rewrite.is_call(node, aten.linear.default) else None
            if isinstance(source, fx.Node) and rewrite.shape_of(source) == entry:
                return source.name
    raise PassError("cache_steps: no block reads its input through a linear layer; use another schedule")


def fit_polynomial(program: Program, sites: Sequence[Candidate], calibration: Calibration) -> tuple[list[float], float]:
    """(coefficients, highest power first; largest change of the indicator that they were fitted to).

    Degree 4: the change of the last site's value as least squares has it of the indicator's, both between neighbouring
    steps and relative, of each sample (TeaCache, 2411.19108).
    """
    names = ("indicator", "output")
    watched = [Watched(names[0], modulated_input(program.graph)), Watched(names[1], sites[-1].value)]
    trace = record(program, watched, calibration)
    x, y = (_changes(trace, name) for name in names)
    degree = min(4, len(np.unique(x)) - 1)
    return [float(value) for value in np.polyfit(x, y, degree)], float(x.max())


def _changes(trace: Trace, name: str) -> NDArray[np.float64]:
    values = trace.kept[name].astype(np.float64)
    moved = np.abs(np.diff(values, axis=0)).mean(-1) / np.maximum(np.abs(values[:-1]).mean(-1), 1e-12)
    found: NDArray[np.float64] = moved.ravel()
    return found


def vote(program: Program, calibration: Calibration) -> list[Mask]:
    """[steps] masks over the sites: what most of the calibration's requests decide, each run alone."""
    computed = np.zeros((program.steps, len(program.plan.sites)), int)
    for index, seed in enumerate(calibration.seeds):
        given = {name: value[index : index + 1] for name, value in calibration.conditions.items()}

        def count(step: int, mask: Mask, inputs: object, done: float = index / len(calibration.seeds)) -> None:
            computed[step] += np.array(mask, int)
            calibration.progress(done + step / program.steps / len(calibration.seeds), "asking what steps decide")

        run(program, given, [seed], on_inputs=count)
    return [tuple(bool(2 * votes >= len(calibration.seeds)) for votes in row) for row in computed]
