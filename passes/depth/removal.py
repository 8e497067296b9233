"""A network without some of its blocks."""

from __future__ import annotations

from collections.abc import Sequence

from ...compiler import rewrite
from ...compiler.program import Program
from ...compiler.regions import all_blocks


def remove_blocks(program: Program, paths: Sequence[str]) -> Program:
    """Each output of such a block becomes the residual stream that entered it."""
    graph = rewrite.clone(program.graph)
    blocks = {region.path: region for region in all_blocks(graph)}
    # From the last to the first: an entry that is an earlier block's exit must still be there when it is named.
    for path in sorted(paths, key=lambda path: -list(blocks).index(path)):
        for stream in blocks[path].streams:
            exit_node = rewrite.node_named(graph, stream.exit)
            exit_node.replace_all_uses_with(rewrite.node_named(graph, stream.entry))
    return program.with_graph(rewrite.finish(graph))
