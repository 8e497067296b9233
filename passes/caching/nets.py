"""Small networks that predict how far a reused value is off: what they read, and where in the graph they go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional

from ...compiler import rewrite
from ...compiler.errors import PassError
from ...compiler.inline import export_small, inline
from ...compiler.program import Program
from ...compiler.rewrite import aten
from .sites import Candidate

PATH = "predictors"  # of their weights in the graph
SHARE = 0.065  # of the network's parameters that all of them together may have
LEAST_CONDITION = 8  # numbers in a vector that is more than the bare time
STEP_FEATURES = 64  # of the table that tells a network the step where the graph has no vector that does


@dataclass(frozen=True)
class Form:
    """What a network is made for. shape: of the value, without batch. states: that it reads. condition: its width."""

    shape: tuple[int, ...]
    states: int
    condition: int

    @property
    def patch(self) -> int:
        """Side of the squares that become tokens, where the value is no sequence of tokens already."""
        if len(self.shape) < 3:
            return 1
        sides = [side for side in (4, 2) if all(size % side == 0 for size in self.shape[1:])]
        return next((side for side in sides if self.shape[0] * side ** (len(self.shape) - 1) <= 256), 1)

    @property
    def channels(self) -> int:
        """Of one token."""
        return self.shape[-1] if len(self.shape) < 3 else self.shape[0] * self.patch ** (len(self.shape) - 1)

    @property
    def tokens(self) -> int:
        return math.prod(self.shape) // self.channels


class Predictor(nn.Module):
    """What to add to a reused value: of the input that the computed value would have followed from, and the cache.

    forward(current [B, *shape], condition [B or 1, C], *states [B, *shape]) -> [B, *shape], zero before training.
    DisCa (2602.05449): current and cache side by side, Linear, SiLU, Linear, then one light transformer block. Where
    the value is an image, of its patches. Inputs are standardised by channel, and the result is in units of how much
    each channel changes, as a training measures.
    """

    mean: Tensor
    inverse_std: Tensor
    scale: Tensor

    def __init__(self, form: Form, width: int) -> None:
        super().__init__()
        self.form, self.heads = form, max(1, width // 32)
        inputs = (1 + form.states) * form.channels
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("inverse_std", torch.ones(inputs))
        self.register_buffer("scale", torch.ones(form.channels))
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, form.tokens, width))
        self.modulation = nn.Linear(form.condition, 4 * width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.mixed = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.last = nn.Linear(width, form.channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, current: Tensor, condition: Tensor, *states: Tensor) -> Tensor:
        tokens = torch.cat([to_tokens(each, self.form) for each in (current, *states)], -1)  # [B, N, inputs]
        x = self.second(functional.silu(self.first((tokens - self.mean) * self.inverse_std))) + self.position
        vector = functional.layer_norm(condition, [self.form.condition])
        parts = self.modulation(vector).unsqueeze(1).chunk(4, -1)
        x = x + self._attention(_normed(x) * (parts[0] + 1) + parts[1])
        x = x + self.down(functional.silu(self.up(_normed(x) * (parts[2] + 1) + parts[3])))
        return from_tokens(self.last(_normed(x)) * self.scale, self.form)

    def _attention(self, x: Tensor) -> Tensor:
        heads = [
            layer(x).reshape(-1, self.form.tokens, self.heads, x.shape[-1] // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        mixed = functional.scaled_dot_product_attention(*heads).transpose(1, 2)
        result: Tensor = self.mixed(mixed.reshape(-1, self.form.tokens, x.shape[-1]))
        return result


def _normed(x: Tensor) -> Tensor:
    return functional.layer_norm(x, [x.shape[-1]])


def to_tokens(value: Tensor, form: Form) -> Tensor:
    """[B, *shape] -> [B, N, channels]: tokens as they are, patches of anything that has more dimensions."""
    if len(form.shape) < 3:
        return value if len(form.shape) == 2 else value.unsqueeze(1)
    cut = [part for size in form.shape[1:] for part in (size // form.patch, form.patch)]
    axes = range(len(form.shape) - 1)
    order = [0, *(2 + 2 * axis for axis in axes), 1, *(3 + 2 * axis for axis in axes)]
    return value.reshape(-1, form.shape[0], *cut).permute(order).reshape(-1, form.tokens, form.channels)


def from_tokens(tokens: Tensor, form: Form) -> Tensor:
    """[B, N, channels] -> [B, *shape], the reverse."""
    if len(form.shape) < 3:
        return tokens if len(form.shape) == 2 else tokens.squeeze(1)
    axes = len(form.shape) - 1
    grid = [size // form.patch for size in form.shape[1:]]
    order = [0, 1 + axes, *(place for axis in range(axes) for place in (1 + axis, 2 + axes + axis))]
    return tokens.reshape(-1, *grid, form.shape[0], *[form.patch] * axes).permute(order).reshape(-1, *form.shape)


def make(form: Form, most: int) -> Predictor:
    """As wide as `most` parameters allow, no wider than what it works on, the same each time."""
    widths = range(16, max(form.channels, form.condition, 16) + 1, 16)
    with torch.device("meta"):
        sizes = {width: sum(each.numel() for each in Predictor(form, width).parameters()) for width in widths}
    width = max((width for width, size in sizes.items() if size <= most), default=16)
    width -= width % 32 if width > 32 else 0  # whole heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Predictor(form, width).eval()


# ---- in the graph ---------------------------------------------------------------------------------------------------


def add_networks(
    program: Program, sites: Sequence[Candidate], states: int, weights: Mapping[str, NDArray[Any]]
) -> tuple[Program, tuple[str, ...]]:
    """The program with a network for each site, and the names of their results: see `Site.network`.

    weights: of networks that are trained, by their paths in the graph; without them they are as made, and add zero.
    Raises PassError for a site that has no input to look at.
    """
    graph = rewrite.clone(program.graph)
    results: list[fx.Node] = []
    tables: dict[str, Tensor] = {}
    most = int(SHARE * program.parameters / len(sites))
    for site in sites:
        if site.base is None:
            raise PassError(
                f"cache_steps: {site.name} has no input of its own shape, which predictor 'net' looks at; "
                "take site range or output"
            )
        value = rewrite.node_named(graph, site.value)
        condition = _condition(graph, value, program)
        if condition is None:
            name = f"{site.name}_step"
            tables[name] = step_features(program.steps)
            condition = rewrite.add_input(graph, name, tables[name][0])
        results.append(_add_network(graph, site, value, condition, states, most, weights))
    rewrite.output_node(graph).args = ((*rewrite.output_values(graph), *results),)
    changed = program.with_graph(rewrite.finish(graph), tables={**program.tables, **tables})
    return changed, tuple(node.name for node in results)


def _add_network(
    graph: fx.GraphModule, site: Candidate, value: fx.Node, condition: fx.Node, states: int, most: int,
    weights: Mapping[str, NDArray[Any]],
) -> fx.Node:  # fmt: skip
    example = rewrite.tensor_of(value)
    assert example is not None
    assert site.base is not None
    old = [rewrite.add_input(graph, f"{site.name}_state{order}", example) for order in range(states)]
    shape = tuple(int(size) for size in example.shape[1:])
    form = Form(shape, states, int(rewrite.shape_of(condition)[-1]))
    network, path = make(form, most), f"{PATH}.{site.name}"
    own = {
        name.removeprefix(f"{path}."): torch.from_numpy(value)
        for name, value in weights.items() if name.startswith(f"{path}.")
    }  # fmt: skip
    if own:
        network.load_state_dict(own)
    rows = 4 if not isinstance(rewrite.shape_of(condition)[0], int) else 1
    sizes = [(4, *shape), (rows, form.condition), *[(4, *shape)] * states]
    examples = [torch.zeros(size) for size in sizes]  # one each: torch.export takes a tensor that comes twice for one
    inputs = [rewrite.node_named(graph, site.base), condition, *old]
    return inline(graph, export_small(network, examples), inputs, value, path)


def step_features(steps: int) -> Tensor:
    """[T, 1, STEP_FEATURES]: sines and cosines of the step's number."""
    rates = torch.exp(torch.linspace(0, -math.log(steps + 1), STEP_FEATURES // 2))
    angles = torch.arange(steps)[:, None] * rates * math.pi / 2
    return torch.cat([angles.sin(), angles.cos()], -1).unsqueeze(1)


def _condition(graph: fx.GraphModule, value: fx.Node, program: Program) -> fx.Node | None:
    """The vector that tells the network's layers the step, and most of the conditions: read by a linear layer.

    None where no vector before the site's value does, or it depends on the sample.
    """
    batch, by_step = rewrite.shape_of(value)[0], program.tables.keys() - {"row"}
    inputs: dict[fx.Node, frozenset[str]] = {}
    best: tuple[int, fx.Node] | None = None
    for node in graph.graph.nodes:
        if node is value:
            break
        if node.op == "placeholder":
            inputs[node] = frozenset({node.name})
        else:
            sources = [source for source in node.all_input_nodes if not rewrite.is_size(source)]
            inputs[node] = frozenset().union(*(inputs[source] for source in sources))
        shape = rewrite.shape_of(node)
        is_read = any(rewrite.is_call(user, aten.linear.default) and user.args[0] is node for user in node.users)
        if not is_read or len(shape) != 2 or not _same_size(shape[0], batch) or shape[1] < LEAST_CONDITION:
            continue
        tells_step = inputs[node] & by_step and not inputs[node] & {"sample", "history", "noise"}
        if tells_step and (best is None or len(inputs[node]) > best[0]):
            best = len(inputs[node]), node
    return best[1] if best else None


def _same_size(first: Any, second: Any) -> bool:
    if isinstance(first, int) or isinstance(second, int):
        return False
    return bool(first.node.expr == second.node.expr)
