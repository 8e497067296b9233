"""A graph of ours as an OpenVINO model: through OpenVINO's own reader of torch.export, with our operators added.

Directly, and not by way of ONNX: on seven tiny architectures the direct model is 1 to 5 times nearer to PyTorch in fp32
(5e-7 to 5e-6 relative, against 6e-7 to 2e-5), converts a little faster (both spend their time in torch's
decompositions), runs as fast, and takes weights as they lie. The reader is called as a frontend:
`openvino.convert_model` reports to its makers over the network.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from openvino import opset14 as op
from openvino.frontend import FrontEndManager, OpConversionFailure
from openvino.frontend.pytorch import ConversionExtension
from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
from torch import fx

from ...compiler import rewrite
from ...compiler.step_graph import MAX_BATCH
from ...quant import ops as quantised_ops
from ...quant.formats import INT8_MAX, UINT8_MAX
from ...runtime.errors import EngineError
from ..lower import dynamic_shapes

QUANTIZE = torch.ops.dcompile.quantize_dequantize.default
QUANTIZE_DYNAMIC = torch.ops.dcompile.quantize_dequantize_dynamic.default
QUANTIZE_NVFP4 = torch.ops.dcompile.quantize_dequantize_nvfp4.default
DEQUANTIZE = torch.ops.dcompile.dequantize.default
_TYPES = {"int4": ov.Type.i4, "nvfp4": ov.Type.f4e2m1}
_BIAS = "bias"
assert quantised_ops  # the operators above are registered by its import


def constant(value: Any, dtype: Any = np.float32) -> Any:
    """A constant node that owns its values."""
    return op.constant(np.array(value, dtype=dtype, order="C"))


# --- our operators ---


def _quantize(context: Any) -> Any:
    """Both roundings as one FakeQuantize: what OpenVINO's low-precision transformations look for."""
    x, scale = context.get_input(0), float(_data(context, 1))
    if _text(context, 3) == "uint8":
        zero_point = int(_data(context, 2))
        low, high = -zero_point * scale, (UINT8_MAX - zero_point) * scale
    else:
        low, high = -(INT8_MAX + 1) * scale, INT8_MAX * scale
    ends = constant(low), constant(high)
    return op.fake_quantize(x, *ends, *ends, levels=UINT8_MAX + 1).outputs()


def _dequantize(context: Any) -> Any:
    """Convert and Multiply over numbers that stay as they are stored."""
    format = _text(context, 3)
    if format in _TYPES:
        return _dequantize_groups(context, format)
    q, scale = context.get_input(0), _data(context, 1)
    shape = [1] * len(q.get_partial_shape())
    shape[int(_data(context, 4))] = -1
    return op.multiply(op.convert(q, "f32"), constant(scale.reshape(shape))).outputs()


def _dequantize_groups(context: Any, format: str) -> Any:
    """4-bit weights [N, K] as [N, K/group, group] with a scale for each group."""
    packed, scale = _data(context, 0), context.get_input(1)
    rows, columns, groups = packed.shape[0], 2 * packed.shape[1], scale.get_partial_shape()[1].get_length()
    # A single group must not look like one: OpenVINO then unpacks the weight to fp32 when it loads it.
    inner = [groups, columns // groups] if groups > 1 else [columns]
    scale_shape = [rows, *inner[:-1], 1]
    q = _typed(packed, _TYPES[format], [rows, *inner])
    q.output(0).get_tensor().set_names(context.get_input(0).get_names())
    if format == "nvfp4":
        in_fp8 = _typed(_data(context, 1).view(np.uint8), ov.Type.f8e4m3, scale_shape)
        scales = op.multiply(op.convert(in_fp8, "f32"), constant(_data(context, 2).reshape([1] * len(scale_shape))))
    else:
        scales = constant(_data(context, 1).reshape(scale_shape))
    real = op.multiply(op.convert(q, "f32"), scales)
    if groups > 1:
        real = op.reshape(real, constant([rows, columns], np.int64), special_zero=False)
    return real.outputs()


def _empty(context: Any) -> Any:
    """aten.empty_permuted: what is in it is never read, so zeros do."""
    return op.broadcast(constant(0.0), context.get_input(0)).outputs()


def _take_tokens(context: Any) -> Any:
    x, places = context.get_input(0), context.get_input(1)
    return op.gather(_flat(x), _rows(x, places), constant(0, np.int64)).outputs()


def _add_tokens(context: Any) -> Any:
    """A product with a matrix of zeros and ones, tokens by rows."""
    x, places, rows = (context.get_input(index) for index in range(3))
    (tokens, width), (experts, each) = (
        [size.get_length() for size in list(value.get_partial_shape())[1:]] for value in (x, places)
    )
    chosen = op.reshape(places, constant([-1, experts * each], np.int64), special_zero=False)
    matrix = op.one_hot(chosen, constant(tokens, np.int64), constant(1.0), constant(0.0), axis=1)
    by_expert = op.reshape(rows, constant([experts, -1, each, width], np.int64), special_zero=False)
    turned = op.transpose(by_expert, constant([1, 0, 2, 3], np.int64))
    added = op.reshape(turned, constant([-1, experts * each, width], np.int64), special_zero=False)
    return op.add(x, op.matmul(matrix, added, False, False)).outputs()


def _flat(x: Any) -> Any:
    """[B, N, D] -> [B * N, D]"""
    return op.reshape(x, constant([-1, x.get_partial_shape()[2].get_length()], np.int64), special_zero=False)


def _rows(x: Any, places: Any) -> Any:
    """int64 [E, B * C]: where tokens at `places` [B, E, C] lie in [B * N, D]."""
    tokens = x.get_partial_shape()[1].get_length()
    samples = op.gather(op.shape_of(x), constant(0, np.int64), constant(0, np.int64))
    first = op.multiply(
        op.range(constant(0, np.int64), samples, constant(1, np.int64), "i64"), constant(tokens, np.int64)
    )
    lines = op.add(places, op.reshape(first, constant([-1, 1, 1], np.int64), special_zero=False))
    experts = constant([places.get_partial_shape()[1].get_length(), -1], np.int64)
    return op.reshape(op.transpose(lines, constant([1, 0, 2], np.int64)), experts, special_zero=False)


_EXTENSIONS = {
    "dcompile.take_tokens.default": _take_tokens,
    "dcompile.add_tokens.default": _add_tokens,
    "dcompile.quantize_dequantize.default": _quantize,
    "dcompile.dequantize.default": _dequantize,
    "aten.empty_permuted.default": _empty,
}


def _typed(packed: NDArray[np.uint8], kind: Any, shape: list[int]) -> Any:
    """Bytes as a constant of a type that numpy does not have; copied, as a tensor over an array does not keep it."""
    return ov.op.Constant(ov.Tensor(np.ascontiguousarray(packed), ov.Shape(shape), kind), shared_memory=False)


def _data(context: Any, index: int) -> NDArray[Any]:
    value: NDArray[Any] = context.get_input(index).get_node().data
    return value


def _text(context: Any, index: int) -> str:
    return _data(context, index).tobytes().decode()


# --- whole graphs ---


def to_openvino(graph: fx.GraphModule, inputs: list[str], outputs: list[str]) -> ov.Model:
    """The graph with a dynamic batch; parameters and results bear the names of their ports.

    The model's weights are those of the graph, which must outlive it. Raises EngineError for what OpenVINO cannot take.
    """
    examples = tuple(_example(node) for node in rewrite.placeholders(graph).values())
    with torch.no_grad(), _quiet():
        exported = torch.export.export(_each_once(graph), examples, dynamic_shapes=dynamic_shapes(graph, MAX_BATCH))
        decoder = TorchFXPythonDecoder.from_exported_program(exported)
    frontend = FrontEndManager().load_by_framework("pytorch")
    for name, convert in _EXTENSIONS.items():
        frontend.add_extension(ConversionExtension(name, convert))
    try:
        model = frontend.convert(frontend.load(decoder))
    except OpConversionFailure as error:
        raise EngineError(_unknown_operator(str(error), decoder.pt_module)) from error
    _unmark_weights(model)
    _add_repeated(model, graph)
    _name_ports(model, inputs, outputs)
    _name_layers(model, rewrite.weight_names(graph))
    for parameter, node in zip(model.get_parameters(), rewrite.placeholders(graph).values(), strict=True):
        parameter.set_partial_shape(_partial_shape(node))
    model.validate_nodes_and_infer_types()
    return model


def _each_once(graph: fx.GraphModule) -> fx.GraphModule:
    """Without the results that it returns a second time, which the reader cannot take."""
    values = rewrite.output_values(graph)
    if len(set(values)) == len(values):
        return graph
    module = rewrite.clone(graph)
    rewrite.output_node(module).args = (tuple(dict.fromkeys(rewrite.output_values(module))),)
    return rewrite.finish(module)


def _add_repeated(model: ov.Model, graph: fx.GraphModule) -> None:
    """All results of the graph, in its order."""
    values = rewrite.output_values(graph)
    if len(set(values)) == len(values):
        return
    read = dict(zip(dict.fromkeys(values), model.get_results(), strict=True))
    results = [op.result(read[value].input_value(0)) for value in values]
    for result in read.values():
        model.remove_result(result)
    model.add_results(results)


def _unmark_weights(model: ov.Model) -> None:
    """The reader marks FP4 and FP8 as mere storage of fp32; OpenVINO would unpack such weights when it loads them."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convert" and "decompression_0" in node.get_rt_info():
            del node.get_rt_info()["decompression_0"]


def _example(node: fx.Node) -> torch.Tensor:
    value = rewrite.tensor_of(node)
    assert value is not None
    return torch.zeros([rewrite.hint(size) for size in value.shape], dtype=value.dtype)


def _partial_shape(node: fx.Node) -> Any:
    """Without it the reader takes every dimension for unknown."""
    return ov.PartialShape([size if isinstance(size, int) else -1 for size in rewrite.shape_of(node)])


def _name_ports(model: ov.Model, inputs: list[str], outputs: list[str]) -> None:
    for node, name in zip(model.get_parameters(), inputs, strict=True):
        node.set_friendly_name(name)
        node.output(0).get_tensor().set_names({name})
    for node, name in zip(model.get_results(), outputs, strict=True):
        node.set_friendly_name(name)
        source = node.input_value(0)
        if source.get_node().get_type_name() != "Parameter":  # that keeps its own; the result's friendly name counts
            source.get_tensor().add_names({name})


def _name_layers(model: ov.Model, weights: list[str]) -> None:
    """Multiplications by a weight get the path of its module, under which the compiled model reports them."""
    paths = {path.replace(".", "_"): path.rpartition(".")[0] for path in weights}
    for node in model.get_ordered_ops():
        if node.get_type_name() in ("MatMul", "Convolution", "GroupConvolution"):
            names = _tensor_names(node.input_value(1))
            path = next((paths[name] for name in names if name in paths), None)
            if path:
                node.set_friendly_name(path)
                for user in node.output(0).get_target_inputs():
                    if user.get_node().get_type_name() == "Add":  # of the bias: the compiled layer is called after it
                        user.get_node().set_friendly_name(f"{path}/{_BIAS}")


def _tensor_names(output: Any) -> list[str]:
    """Of the constant that a weight is made from."""
    node = output.get_node()
    while node.get_type_name() in ("Convert", "Multiply", "Reshape", "Transpose"):
        node = node.input_value(0).get_node()
    return [name.partition(":")[0] for name in node.output(0).get_names()]


def _unknown_operator(message: str, graph: fx.GraphModule) -> str:
    """One line for OpenVINO's report: the operator, where it is, and what to do."""
    found = re.search(r"No conversion rule found for operations: (.*)", message)
    names = [name.strip() for name in found.group(1).split(",")] if found else []
    if not names:
        last = [line.strip() for line in message.splitlines() if line.strip()][-1]
        return f"OpenVINO cannot convert the graph: {last}; take another --target, or report this with the model"
    where = {_module_path(node) for node in graph.graph.nodes if str(node.target) == names[0]} - {""}
    place = f" in {min(where)}" if where else ""
    more = f" (and {', '.join(names[1:])})" if names[1:] else ""
    return (
        f"OpenVINO has no operator for {names[0]}{more}{place}: take another --target, or write it with other operators"
    )


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither torch's warnings about its own internals, nor those that OpenVINO logs about torch's operators."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
