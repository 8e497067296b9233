"""Find repeated structure in a graph that carries no module paths, and lend its nodes paths: repeat.0, repeat.1, ..."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import fx

from .rewrite import shape_of, tensor_of

_LEAST_CALLS = 5  # a shorter period is no block
CLASS = "Repeat"


def lend_paths(calls: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """node -> path, for the calls that lie in the longest run of equal stretches; empty where nothing repeats.

    Stretches are equal when operators and shapes are. A run may be cut anywhere in its period; it is cut where the
    fewest tensors cross, which is between two blocks, where only the residual streams do.
    """
    found = _longest_run([_token(node) for node in calls])
    if found is None:
        return {}
    start, period, length = found
    crossing = _crossing(calls)

    def rank(offset: int) -> tuple[int, int]:
        blocks = (length - offset) // period
        return -blocks, sum(crossing[start + offset + block * period] for block in range(blocks))

    offset = min(range(min(period, length - period + 1)), key=rank)
    first, count = start + offset, (length - offset) // period
    return {calls[first + block * period + i]: f"repeat.{block}" for block in range(count) for i in range(period)}


def _token(node: fx.Node) -> tuple[Any, ...]:
    return (str(node.target), str(shape_of(node)))


def _longest_run(tokens: Sequence[Any]) -> tuple[int, int, int] | None:
    """(start, period, length) of the longest stretch that repeats with a period; of equal ones the smallest period."""
    best: tuple[int, int, int] | None = None
    for period in range(_LEAST_CALLS, len(tokens) // 2 + 1):
        run = 0
        for i in range(len(tokens) - period):
            run = run + 1 if tokens[i] == tokens[i + period] else 0
            length = run + period
            if run >= period and (best is None or length > best[2]):
                best = (i + 1 - run, period, length)
    return best


def _crossing(calls: Sequence[fx.Node]) -> list[int]:
    """For each position, how many tensors that earlier calls made are read there or later."""
    position = {node: i for i, node in enumerate(calls)}
    change = [0] * (len(calls) + 1)
    for node, made in position.items():
        readers = [position[user] for user in node.users if user in position]
        if readers and tensor_of(node) is not None:
            change[made + 1] += 1
            change[max(readers) + 1] -= 1
    return list(accumulate(change[:-1]))
