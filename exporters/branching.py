"""The rows of one step: calls of engines, and jumps where the step decides at run time which of them it needs."""

from __future__ import annotations

from collections.abc import Mapping

from ..compiler.decisions import decision_slot, limit_of
from ..compiler.errors import InternalError
from ..compiler.plan import Mask, Plan, Predicate
from ..compiler.variants import Variant
from ..runtime.manifest import Call, Jump

Rows = list[Call | Jump]


def step_rows(
    plan: Plan, engines: Mapping[str, Variant], paths: Mapping[Mask, tuple[str, ...]], step: int, first: int
) -> Rows:
    """The rows of a step that begin at row `first` of the script.

    paths: mask that the step may have -> engines that it calls then, in order. Paths agree up to the engine that
    decides between them.
    """
    return _rows(plan, engines, paths, step, first, plan.open(step))


def _rows(
    plan: Plan, engines: Mapping[str, Variant], paths: Mapping[Mask, tuple[str, ...]], step: int, first: int,
    waiting: tuple[Predicate, ...], called: int = 0,
) -> Rows:  # fmt: skip
    """From call `called` of the paths on; `waiting` has what is still to be decided."""
    rows: Rows = []
    done = {slot for path in paths.values() for name in path[:called] for slot in engines[name].outputs}
    while True:
        if waiting and decision_slot(waiting[0]) in done:
            return rows + _branch(plan, engines, paths, step, first + len(rows), waiting, called)
        following = {path[called : called + 1] for path in paths.values()}
        if len(following) > 1:
            raise InternalError(f"step {step}: engines {sorted(following)} differ before it is decided which to call")
        name = next(iter(following))
        if not name:
            return rows
        rows.append(Call(name[0], step))
        done |= set(engines[name[0]].outputs)
        called += 1


def _branch(
    plan: Plan, engines: Mapping[str, Variant], paths: Mapping[Mask, tuple[str, ...]], step: int, first: int,
    waiting: tuple[Predicate, ...], called: int,
) -> Rows:  # fmt: skip
    """A jump to the reusing rows, the computing rows, a jump past the reusing rows, and these."""
    predicate, *others = waiting
    computing = {mask: path for mask, path in paths.items() if plan.computes(mask, predicate)}
    reusing = {mask: path for mask, path in paths.items() if mask not in computing}
    compute = _rows(plan, engines, computing, step, first + 1, tuple(others), called)
    at = first + len(compute) + 2
    reuse = _rows(plan, engines, reusing, step, at, tuple(others), called)
    slot = decision_slot(predicate)
    past = Jump(at + len(reuse), slot, 2 * limit_of(predicate))  # every decision is less
    return [Jump(at, slot, predicate.below), *compute, past, *reuse]
