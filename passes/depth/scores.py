"""Scores of single blocks: how little the output, the stream or the weights would miss each."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from ...compiler import rewrite
from ...compiler.calibrate import Calibration, output_error, snapshots
from ...compiler.program import Program
from ...compiler.regions import Region
from .removal import remove_blocks

_SNAPSHOTS = 5

# (paths of the blocks that leave, path -> score of each)
Chosen = tuple[list[str], dict[str, float]]


def by_greedy_error(program: Program, calibration: Calibration, blocks: tuple[Region, ...], wanted: int) -> Chosen:
    at = snapshots(program, calibration, _SNAPSHOTS)
    with torch.no_grad():
        expected = [program.graph(*inputs)[0] for _, inputs in at]
    removed: list[str] = []
    scores: dict[str, float] = {}
    left = [region.path for region in blocks]
    trials = sum(len(left) - i for i in range(wanted))
    done = 0
    for _ in range(wanted):
        errors = {}
        for path in left:
            errors[path] = output_error(remove_blocks(program, [*removed, path]), at, expected)
            done += 1
            calibration.progress(done / trials, f"pruning: trying without {path}")
        best = min(errors, key=lambda path: errors[path])
        removed.append(best)
        left.remove(best)
        scores[best] = errors[best]
    return removed, scores


def by_influence(program: Program, calibration: Calibration, blocks: tuple[Region, ...], wanted: int) -> Chosen:
    ends = {name for region in blocks for stream in region.streams for name in (stream.entry, stream.exit)}
    by_entry = defaultdict(list)
    for region in blocks:
        for stream in region.streams:
            by_entry[stream.exit].append((stream.entry, region.path))
    values: dict[str, Tensor] = {}
    totals: dict[str, list[float]] = defaultdict(list)

    def tap(step: int, name: str, value: Tensor) -> None:
        values[name] = value
        for entry, path in by_entry.get(name, ()):
            cosine = torch.nn.functional.cosine_similarity(values[entry].flatten(2), value.flatten(2), dim=-1)
            totals[path].append(1.0 - float(cosine.mean()))

    calibration.observe(program, sorted(ends), tap, "pruning: block influence")
    scores = {path: sum(found) / len(found) for path, found in totals.items()}
    removed = sorted(scores, key=lambda path: scores[path])[:wanted]
    return removed, {path: scores[path] for path in removed}


def by_magnitude(program: Program, blocks: tuple[Region, ...], wanted: int) -> Chosen:
    """Mean absolute weight of each block's layers, least first: the baseline that looks at no data."""
    scores = {region.path: _magnitude(program, region) for region in blocks}
    removed = sorted(scores, key=lambda path: scores[path])[:wanted]
    return removed, {path: scores[path] for path in removed}


def _magnitude(program: Program, region: Region) -> float:
    nodes = {node.name: node for node in program.graph.graph.nodes}
    read = {source for name in region.nodes for source in nodes[name].all_input_nodes if source.op == "get_attr"}
    weights = [rewrite.attribute(program.graph, str(node.target)) for node in read]
    matrices = [weight.detach().float() for weight in weights if weight.is_floating_point() and weight.dim() > 1]
    total = sum(weight.numel() for weight in matrices)
    return float(sum(weight.abs().sum() for weight in matrices)) / max(total, 1)
