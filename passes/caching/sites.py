"""Which values of a graph can be taken from earlier steps: one function a kind of site, found in its regions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx

from ...compiler import rewrite
from ...compiler.errors import PassError
from ...compiler.regions import Region, block_lists, find_prediction, find_regions, module_path
from ...compiler.rewrite import aten

Refused = list[tuple[str, str]]
DDT_SHARE = 6 / 28  # of its blocks are the decoder


@dataclass(frozen=True)
class Candidate:
    """A value that a step may reuse.

    value: node name. base: node of the same shape that a delta is taken from, or None where there is none. unit: sites
    of one unit are decided together, as the two streams of a block are. layer: number of its block, counted over all
    block lists. feeds: it is a feed-forward. overlaps: see plan.Site.
    """

    name: str
    value: str
    base: str | None
    unit: str
    layer: int = 0
    feeds: bool = False
    overlaps: tuple[str, ...] = ()


def find_sites(
    graph: fx.GraphModule, kind: str, *, front: int = 0, back: int | None = 0, apart: bool = True,
    branch_id: int | None = None, blocks: Sequence[str] = (), refused: Refused,
) -> tuple[Candidate, ...]:  # fmt: skip
    """Candidates of one kind, in graph order.

    kind: "range" is the run of blocks between the first `front` and the last `back` of each block list (not apart: of
    all lists together); "block" each block between them; "runs" the runs of neighbours among `blocks` (paths); "branch"
    each attention or feed-forward before its gate; "cut" the value that enters the `branch_id` + 1 last up layers of a
    U-Net, or its last stage where that is None; "encoder" all that its decoder reads of the encoder, or what the last
    `back` blocks of a network without up layers are given (None: as large a share as DDT's 6 of 28); "output" what the
    network predicts, with what it was given for its base. refused takes (what, why) of what is left out.
    """
    regions = find_regions(graph)
    if kind in ("range", "block", "runs"):
        inner = _inner(block_lists(regions), front, back or 0, apart, refused)
        found = _of_blocks(regions, kind, inner, blocks, refused)
    elif kind == "branch":
        found = _branches(regions)
    elif kind == "cut":
        found = _cut(graph, regions, branch_id)
    elif kind == "encoder":
        is_unet = any(region.children for region in regions)
        found = _encoder(graph) if is_unet else _condition(graph, regions, back, refused)
    else:
        found = _output(graph)
    return tuple(_told_apart(found))


def _told_apart(sites: Iterable[Candidate]) -> Iterator[Candidate]:
    """The sites, with a number at the end of a name that came before: a block may use one of its modules twice."""
    times: Counter[str] = Counter()
    for site in sites:
        times[site.name] += 1
        yield site if times[site.name] == 1 else replace(site, name=f"{site.name}_{times[site.name]}")


# --- blocks ---


def _inner(
    lists: dict[str, list[Region]], front: int, back: int, apart: bool, refused: Refused
) -> dict[str, list[Region]]:
    """The blocks of each list but the first `front` and the last `back`: of each, or of all lists together."""
    every = [block for blocks in lists.values() for block in blocks]
    kept = every[front : len(every) - back]
    inner = {}
    for parent, blocks in lists.items():
        inner[parent] = blocks[front : len(blocks) - back] if apart else [block for block in blocks if block in kept]
        if not inner[parent]:
            why = f"has {len(blocks)} blocks; front {front} and back {back} leave none to cache"
            refused.append((parent, why))
    return inner


def _of_blocks(
    regions: tuple[Region, ...], kind: str, inner: dict[str, list[Region]], named: Sequence[str], refused: Refused
) -> Iterator[Candidate]:
    lists = block_lists(regions)
    if unknown := [
        name for name in named if not any(_is(block, name) for blocks in lists.values() for block in blocks)
    ]:
        raise PassError(f"no block is called {unknown[0]!r}; `dcompile inspect` shows them")
    layer = 0
    for parent, blocks in lists.items():
        for run in _runs(blocks, inner[parent], kind, named):
            yield from _run(run, kind, layer + blocks.index(run[0]), refused)
        layer += len(blocks)


def _runs(blocks: list[Region], inner: list[Region], kind: str, named: Sequence[str]) -> Iterator[list[Region]]:
    if kind == "range":
        yield from [inner] if inner else []
    elif kind == "block":
        yield from ([block] for block in inner)
    else:
        run: list[Region] = []
        for block in blocks:
            if any(_is(block, name) for name in named):
                run.append(block)
            elif run:
                yield run
                run = []
        if run:
            yield run


def _is(block: Region, name: str) -> bool:
    return name in (block.path, block.path.removeprefix("net."))


def _run(blocks: list[Region], kind: str, layer: int, refused: Refused) -> Iterator[Candidate]:
    first, last = blocks[0], blocks[-1]
    label = _short(first.path) if kind == "block" else f"{_short(first.path)}_{_index(last)}"
    for number, stream in enumerate(last.streams):
        entry = _entry_of(blocks, stream.exit)
        if entry is None:
            refused.append((last.path, f"output {stream.exit} carries no stream through all of {label}"))
            continue
        name = label if len(last.streams) == 1 else f"{label}_stream{number}"
        yield Candidate(name, stream.exit, entry, label, layer)


def _entry_of(blocks: list[Region], output: str) -> str | None:
    """Follow a stream from the last block's exit back to the first block's entry."""
    for region in reversed(blocks):
        stream = region.stream_into(output)
        if stream is None:
            return None
        output = stream.entry
    return output


def _branches(regions: tuple[Region, ...]) -> Iterator[Candidate]:
    blocks = [region for top in regions for region in top.walk() if region.is_block]
    for layer, region in enumerate(blocks):
        for number, stream in enumerate(region.streams):
            for branch in stream.branches:
                suffix = f"_stream{number}" if len(region.streams) > 1 else ""
                name = f"{_short(f'{region.path}.{branch.name}')}{suffix}"
                yield Candidate(name, branch.value, None, name, layer, feeds=branch is stream.branches[-1])


def _condition(
    graph: fx.GraphModule, regions: tuple[Region, ...], back: int | None, refused: Refused
) -> Iterator[Candidate]:
    """The streams that leave the blocks before the last `back`: of DDT (2504.05741), the condition they make of it."""
    blocks = [block for blocks in block_lists(regions).values() for block in blocks]
    decoder = max(1, round(len(blocks) * DDT_SHARE)) if back is None else back
    if not blocks[: len(blocks) - decoder]:
        refused.append(("encoder", f"the network has {len(blocks)} blocks; back {decoder} leaves none to cache"))
        return
    last = blocks[len(blocks) - decoder - 1]
    after = {name for block in blocks[len(blocks) - decoder :] for name in block.nodes}
    for number, stream in enumerate(last.streams):
        value = _handed_on(rewrite.node_named(graph, stream.exit), after)
        yield Candidate(f"encoder{number}", value.name, None, "encoder")


def _handed_on(value: fx.Node, readers: set[str]) -> fx.Node:
    """What nodes outside the blocks make of a value before several readers get it; the value itself if they do not."""
    found = value
    while len(found.users) == 1:
        (user,) = found.users
        if user.name in readers or rewrite.shape_of(user) != rewrite.shape_of(value):
            break
        found = user
    return found if any(user.name in readers for user in found.users) else value


# --- U-Nets ---


def _joins(graph: fx.GraphModule) -> list[tuple[fx.Node, list[fx.Node]]]:
    """(hidden state, skips) of each up layer of a U-Net, in order: it begins by joining them along the channels."""
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    found = []
    for node in graph.graph.nodes:
        if not rewrite.is_call(node, aten.cat.default) or len(rewrite.shape_of(node)) < 4 or not module_path(node):
            continue
        parts, *axis = node.args
        if (axis[0] if axis else 0) == 1 and len(parts) > 1:
            hidden = max(parts, key=order.__getitem__)
            found.append((hidden, [part for part in parts if part is not hidden]))
    return found


def _cut(graph: fx.GraphModule, regions: tuple[Region, ...], branch_id: int | None) -> Iterator[Candidate]:
    joins = _joins(graph)
    if branch_id is None:
        stages = [region for region in regions if region.children]
        entering = [i for i, (hidden, _) in enumerate(joins) if stages and hidden.name in stages[-1].inputs]
        if not entering:
            return
        branch_id = len(joins) - 1 - entering[0]
    if branch_id < len(joins):
        value = joins[len(joins) - 1 - branch_id][0]
        yield Candidate(f"cut{branch_id}", value.name, None, "cut")
    elif joins:
        raise PassError(f"cut {branch_id}: the network has {len(joins)} up layers; give branch 0 to {len(joins) - 1}")


def _encoder(graph: fx.GraphModule) -> Iterator[Candidate]:
    joins = _joins(graph)
    if joins:
        values = dict.fromkeys([joins[0][0], *(skip for _, skips in joins for skip in skips)])
        for number, value in enumerate(values):
            yield Candidate(f"encoder{number}", value.name, None, "encoder")


# --- the network as a whole ---


def _output(graph: fx.GraphModule) -> Iterator[Candidate]:
    if found := find_prediction(graph):
        value, base = found
        yield Candidate("output", value.name, base.name if base else None, "output")


def _short(path: str) -> str:
    return path.removeprefix("net.").replace(".", "_").replace("@", "_")


def _index(region: Region) -> str:
    return region.path.rpartition(".")[2]
