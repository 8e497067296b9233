"""A graph whose network computes in half precision, as engines for GPUs run it; inputs and outputs stay float32.

In half precision: matrix products, convolutions, attention, normalisation, and the residual streams between them.
In float32, because a few bits there move the whole sample, and because they cost next to nothing:
- the sampler's arithmetic, that is every node outside the module `net`;
- what the timestep alone decides, and what no input decides (frequencies, position tables);
- statistics that a network writes out itself (x², its mean, 1/√): their squares leave the range of fp16;
- what the network asks to have in float32, and constants beyond the range of fp16.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from ..compiler import rewrite
from ..compiler.regions import module_path
from ..compiler.rewrite import aten
from ..quant import ops as quantised_ops

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
NETWORK = "net"  # where the step keeps the network; see compiler/step_graph.py
assert quantised_ops  # the operators below are registered by its import

_OPS = torch.ops.dcompile
# Their first argument is a value of the network; the others are scales, which stay float32.
_ROUNDING = (
    _OPS.quantize_dequantize.default,
    _OPS.quantize_dequantize_dynamic.default,
    _OPS.quantize_dequantize_nvfp4.default,
)
_STATISTICS = (
    aten.pow.Tensor_Scalar, aten.square.default, aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default,
    aten.mean.default, aten.mean.dim, aten.var.correction, aten.var.dim, aten.var_mean.correction, aten.sum.default,
    aten.sum.dim_IntList, aten.exp.default, aten.log.default, aten.cumsum.default, aten.prod.default,
    aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim,
)  # fmt: skip
# They start a tensor in half precision whatever their inputs were; all others follow inputs that are float32.
_HALF_ALWAYS = (
    aten.linear.default, aten.matmul.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default,
    aten.einsum.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.scaled_dot_product_attention.default, aten.layer_norm.default, aten.group_norm.default,
    aten.rms_norm.default, aten.embedding.default, *_ROUNDING,
)  # fmt: skip


def to_precision(
    graph: fx.GraphModule, precision: str, *, tables: Collection[str] | None = None, convert_weights: bool = True
) -> fx.GraphModule:
    """A copy of the graph with its network in `precision`, "fp16" or "bf16"; it runs in PyTorch as before.

    tables: inputs that change by step and not by sample; None takes those whose shape does not follow the batch.
    convert_weights: keep weights in half precision. False leaves them as they are and shared with `graph`, each behind
    a cast, for an exporter that converts them while it writes.
    """
    half = HALF[precision]
    module = rewrite.clone(graph)
    exact = _float32_nodes(module, _tables_of(module) if tables is None else tables, torch.finfo(half).max)
    caster = _Caster(module, half)
    for node in list(module.graph.nodes):
        if node.op in ("call_function", "output"):
            caster.retype(node, torch.float32 if node in exact or node.op == "output" else half)
    if convert_weights:
        _convert_weights(module, precision)
    return rewrite.finish(module)


def _tables_of(module: fx.GraphModule) -> list[str]:
    inputs = rewrite.placeholders(module)
    return [name for name, node in inputs.items() if all(isinstance(size, int) for size in rewrite.shape_of(node))]


class _Caster:
    """Casts the float tensors that a node reads, once for all nodes that want the same."""

    def __init__(self, module: fx.GraphModule, half: torch.dtype) -> None:
        self.module, self.floats = module, (torch.float32, half)
        self.made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def retype(self, node: fx.Node, wanted: torch.dtype) -> None:
        """Feed the node `wanted` for every float tensor, and note that it gives the same."""

        def cast(value: fx.Node) -> fx.Node:
            return self.cast(value, wanted, node)

        if node.target in _ROUNDING:
            node.args = (fx.node.map_arg(node.args[0], cast), *node.args[1:])
        else:
            node.args, node.kwargs = fx.node.map_arg(node.args, cast), fx.node.map_arg(node.kwargs, cast)
        # Not by running the operator on fake values again: some of them then fix the batch to the example's.
        if wanted != torch.float32 and "val" in node.meta:
            node.meta["val"] = tree_map_only(Tensor, lambda leaf: self._in(leaf, wanted), node.meta["val"])

    def _in(self, leaf: Tensor, wanted: torch.dtype) -> Tensor:
        return leaf.to(wanted) if leaf.dtype == torch.float32 else leaf

    def cast(self, value: fx.Node, wanted: torch.dtype, reader: fx.Node) -> fx.Node:
        tensor = rewrite.tensor_of(value)
        if tensor is None or tensor.dtype not in self.floats or tensor.dtype == wanted:
            return value
        if (value, wanted) not in self.made:
            like = reader if reader.op == "call_function" else value
            self.made[value, wanted] = rewrite.call(self.module, reader, aten.to.dtype, value, wanted, like=like)
        return self.made[value, wanted]


def _float32_nodes(module: fx.GraphModule, tables: Collection[str], largest: float) -> set[fx.Node]:
    by_step = rewrite.decided_by_step(module, tables)
    constant: set[fx.Node] = set()  # decided by no input
    exact: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            constant.add(node)
        if node.op != "call_function":
            continue
        sources = [source for source in node.all_input_nodes if not rewrite.is_size(source)]
        if all(source in constant for source in sources):
            constant.add(node)
        if node in constant or node in by_step or not _in_network(node) or _asks_for_float32(node, largest):
            exact.add(node)
        elif node.target not in _HALF_ALWAYS:
            floats = [source for source in sources if source.op != "get_attr" and _is_float(source)]
            if floats and all(source in exact for source in floats):
                exact.add(node)
    return exact


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    leaves = value if isinstance(value, list | tuple) else (value,)
    return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)


def _in_network(node: fx.Node) -> bool:
    paths = [path.partition("@")[0] for path, _ in module_path(node)]
    return any(path == NETWORK or path.startswith(f"{NETWORK}.") for path in paths)


def _asks_for_float32(node: fx.Node, largest: float) -> bool:
    arguments = (*node.args, *node.kwargs.values())
    beyond = any(isinstance(value, float) and abs(value) > largest for value in arguments)
    return node.target in _STATISTICS or torch.float32 in arguments or beyond


def _convert_weights(module: fx.GraphModule, precision: str) -> None:
    """Weights that only casts read are kept in half precision; one that float32 reads too gets a second copy."""
    half = HALF[precision]
    for node in list(module.graph.nodes):
        if not rewrite.is_call(node, aten.to.dtype) or node.args[1] != half or node.args[0].op != "get_attr":
            continue
        path = str(node.args[0].target)
        elsewhere = [n for n in module.graph.nodes if n.op == "get_attr" and n.target == path and n is not node.args[0]]
        if elsewhere or len(node.args[0].users) > 1:
            path = f"{path}_{precision}"
        rewrite.assign(module, path, rewrite.attribute(module, str(node.args[0].target)).detach().to(half))
        node.replace_all_uses_with(rewrite.read_weight(module, path, node))
