"""Wrap a network into one whole sampler step, and export that as a flat fx graph."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import rewrite
from .errors import IngestError
from .network import NetworkSpec, extra_arguments
from .rewrite import aten, is_call
from .sampler import Sampler

EXAMPLE_BATCH = 2
MAX_BATCH = 64
_UNBATCHED = ("timestep", "row")
_DTYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}


class Step(nn.Module):
    """One sampler step: input scale, the network under guidance, output conversion, ring, update.

    forward(sample, [history], *conditions, timestep, row, [noise]) -> (next sample, [next history]).
    row = (s, p, q, a, n, b_0..b_{K-1}):
    x_in = s x; m = net(x_in); D = p x + q m; x' = a x + sum_j b_j H_j + n noise, H_0 = D.
    Under guidance both halves run as one batch, the conditional half first: m = u + g (c - u).
    """

    def __init__(self, network: nn.Module, spec: NetworkSpec, sampler: Sampler, guidance: float) -> None:
        super().__init__()
        self.net = network
        self.spec = spec
        self.ring, self.stochastic = sampler.ring, sampler.stochastic
        self.guidance = guidance
        self.guided = guidance != 1.0
        self.extras = {}
        for name, value in extra_arguments(network, spec).items():
            if isinstance(value, Tensor):
                self.register_buffer(f"extra_{name}", value)
                self.extras[name] = f"extra_{name}"
            else:
                self.extras[name] = value

    def input_names(self) -> list[str]:
        names = ["sample", *(["history"] if self.ring > 1 else [])]
        names += condition_inputs(self.spec, self.guided)
        return [*names, "timestep", "row", *(["noise"] if self.stochastic else [])]

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.input_names(), values, strict=True))
        sample, row = given["sample"], given["row"]
        s, p, q, a, n = (row[i] for i in range(5))
        output = self._network(sample * s, given)
        newest = sample * p + output * q
        following = sample * a + newest * row[5]
        if self.ring > 1:
            history = given["history"]
            for j in range(1, self.ring):
                following = following + history[:, j - 1] * row[5 + j]
        if self.stochastic:
            following = following + given["noise"] * n
        if self.ring > 1:
            return following, torch.cat([newest.unsqueeze(1), history[:, : self.ring - 2]], dim=1)
        return (following,)

    def _network(self, scaled: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        batch = scaled.shape[0]
        doubled = torch.cat([scaled, scaled]) if self.guided else scaled
        arguments: dict[str, Any] = {self.spec.sample: doubled}
        arguments[self.spec.timestep] = (given["timestep"] * self.spec.timestep_scale).expand(doubled.shape[0])
        for name, condition in self.spec.conditions.items():
            if condition.constant is not None:
                arguments[name] = torch.full((doubled.shape[0],), condition.constant)
                continue
            value = given[name]
            if self.guided:
                label = condition.unconditional
                value = torch.cat(
                    [value, torch.full_like(value, label) if label is not None else given[f"negative_{name}"]]
                )
            arguments[name] = value
        for name, extra in self.extras.items():
            arguments[name] = getattr(self, extra) if isinstance(extra, str) else extra
        output: Tensor = self.net(**arguments)
        if not isinstance(output, Tensor):
            output = output[0]
        if output.dim() > 2 and output.shape[1] == 2 * scaled.shape[1]:
            output = output[:, : scaled.shape[1]]  # the other half is the variance of a learned-sigma model
        if not self.guided:
            return output
        conditional, unconditional = output[:batch], output[batch:]
        return unconditional + (conditional - unconditional) * self.guidance


def condition_inputs(spec: NetworkSpec, guided: bool) -> list[str]:
    """Names of the conditions that a user gives, in order."""
    names = []
    for name, condition in spec.conditions.items():
        if condition.constant is None:
            names.append(name)
            if guided and condition.unconditional is None:
                names.append(f"negative_{name}")
    return names


def example_inputs(step: Step) -> dict[str, Tensor]:
    shape = step.spec.sample_shape
    assert shape is not None
    generator = torch.Generator().manual_seed(0)
    values: dict[str, Tensor] = {"sample": torch.randn(EXAMPLE_BATCH, *shape, generator=generator)}
    if step.ring > 1:
        values["history"] = torch.zeros(EXAMPLE_BATCH, step.ring - 1, *shape)
    for name in condition_inputs(step.spec, step.guided):
        condition = step.spec.conditions[name.removeprefix("negative_")]
        dtype = _DTYPES[condition.dtype]
        size = (EXAMPLE_BATCH, *condition.shape)
        values[name] = (
            torch.randn(size, generator=generator) if dtype.is_floating_point else torch.zeros(size, dtype=dtype)
        )
    values["timestep"] = torch.tensor([500.0])
    values["row"] = torch.ones(5 + step.ring)
    if step.stochastic:
        values["noise"] = torch.randn(EXAMPLE_BATCH, *shape, generator=generator)
    return values


def export_step(step: Step) -> fx.GraphModule:
    """The step as one flat ATen graph with a dynamic batch (1 to 64); inputs are named as in `Step.input_names`.

    Raises IngestError when the network refuses the shape or cannot be exported with a dynamic batch.
    """
    values = example_inputs(step)
    try:
        with torch.no_grad():
            step(*values.values())
    except Exception as error:
        shape = "x".join(str(size) for size in step.spec.sample_shape or ())
        raise IngestError(
            f"{type(step.net).__name__} refuses a sample of shape {shape}: {_first_line(error)}; "
            "give another with --shape"
        ) from error
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    # torch.export takes every batch for more than one, so what a network does for one sample alone is not in the graph.
    sizes = [1]
    try:
        graph = flatten(_export(step, values, batch), list(values))
    except Exception as error:
        if not (isinstance(error, torch._dynamo.exc.UserError) and "Constraints violated" in str(error)):
            raise IngestError(f"{type(step.net).__name__} cannot be exported: {_first_line(error)}") from error
        # The network asks how large the batch is (diffusers' upsampling makes large batches contiguous). Export the
        # branch that the example takes, and keep it only if it gives the same numbers where the other would run.
        graph = _export_branch(step, values)
        sizes.append(MAX_BATCH)
    for size in sizes:
        check_at_batch(step, graph, values, size)
    return graph


def _export_branch(step: Step, values: Mapping[str, Tensor]) -> fx.GraphModule:
    try:
        return flatten(_export(step, values, torch.export.Dim.DYNAMIC), list(values))
    except Exception as error:
        raise IngestError(
            f"{type(step.net).__name__} computes with its batch as a fixed number: {_first_line(error)}; "
            "take the size from x.shape[0] (len(x) fixes it)"
        ) from error


def _export(step: Step, values: Mapping[str, Tensor], batch: Any) -> fx.GraphModule:
    dynamic = (tuple(None if name in _UNBATCHED else {0: batch} for name in values),)
    with torch.no_grad(), _quiet_export():
        exported = torch.export.export(step, tuple(values.values()), dynamic_shapes=dynamic)
        # Writes into a tensor (Wan's rotary embedding fills an empty one) look dead to everything that follows uses.
        if any(writes_in_place(node) for node in exported.graph.nodes):
            exported = exported.run_decompositions({})
        return exported.module()


def writes_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


@contextmanager
def _quiet_export() -> Iterator[None]:
    """torch logs the traceback of a violated constraint before raising it; we handle it, or say it in one line."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._dynamo", "torch")
    ]
    levels = [logger.level for logger in loggers]
    stderr = io.StringIO()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(stderr):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def check_at_batch(step: Step, graph: fx.GraphModule, values: Mapping[str, Tensor], size: int) -> None:
    """Raises IngestError when graph and network differ at this batch."""
    resized = [v if n in _UNBATCHED else v[:1].expand(size, *v.shape[1:]).clone() for n, v in values.items()]
    with torch.no_grad():
        for expected, found in zip(step(*resized), graph(*resized), strict=True):
            if not (found - expected).abs().max() <= 1e-4 * expected.abs().max():
                raise IngestError(
                    f"{type(step.net).__name__} computes something else at batch {size} than at {EXAMPLE_BATCH}; "
                    "its batch cannot be dynamic"
                )


def flatten(module: fx.GraphModule, names: list[str]) -> fx.GraphModule:
    """Plain positional inputs called `names`, no guards, and none of the calls that compute nothing."""
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name in zip(inputs, names, strict=True):
        node.target = name
        node._rename(name)
    for node in list(graph.nodes):
        if node.op == "call_module" or is_call(node, aten._assert_tensor_metadata.default, aten._assert_scalar.default):
            graph.erase_node(node)
    (values,) = rewrite.output_node(module).args
    flat = tuple(torch.utils._pytree.tree_leaves(values)) if not isinstance(values, fx.Node) else (values,)
    rewrite.output_node(module).args = (flat,)
    return drop_no_ops(fx.GraphModule(module, graph))


def drop_no_ops(module: fx.GraphModule) -> fx.GraphModule:
    """Remove casts to the same type, dropout outside training, clones, products with 1 and sums with 0.

    A view becomes a reshape: it counts on strides that the clones and copies removed here, or a pass, may change.
    """
    for node in list(module.graph.nodes):
        if is_call(node, aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        if _is_no_op(node):
            node.replace_all_uses_with(node.args[0])
    return rewrite.finish(module)


def _is_no_op(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    source, value = rewrite.tensor_of(node.args[0]), rewrite.tensor_of(node)
    if source is None or value is None or source.dtype != value.dtype or source.shape != value.shape:
        return False
    if is_call(
        node,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten.type_as.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten.detach_.default,
        aten.squeeze.dim,  # of a dimension that is not 1: nothing in PyTorch, an error in ONNX
        aten.squeeze.dims,
    ):
        return True
    if is_call(node, aten.dropout.default):
        return True
    if is_call(node, aten.mul.Tensor, aten.div.Tensor):
        return bool(not isinstance(node.args[1], fx.Node) and node.args[1] == 1)
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        return bool(not isinstance(node.args[1], fx.Node) and node.args[1] == 0)
    return False


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
