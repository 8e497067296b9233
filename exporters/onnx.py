"""Engines as ONNX files over one shared, memory-mapped weights file, in the forms that ONNX Runtime runs fastest.

Opset 23, IR 10: the newest pair that ONNX Runtime, OpenVINO and TensorRT all load.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset23 as op
from torch import fx

from ..compiler import rewrite
from ..compiler.errors import InternalError
from ..compiler.step_graph import MAX_BATCH
from ..quant import int8
from ..runtime.errors import EngineError
from .lower import Lowered, dynamic_shapes, transpose_linear_weights

OPSET, IR_VERSION = 23, 10
WEIGHTS_FILE = "engines/weights.bin"  # beside the engines: ONNX Runtime refuses a path that leaves their folder
ALIGNMENT = 4096  # a page: the runtime maps each weight, it does not copy it
_INLINE_BYTES = 1024  # smaller initialisers stay in the .onnx


def _linear_int8(x: Any, weight: Any, weight_scale: Any, bias: Any, scale: Any, zero_point: Any) -> Any:
    """Q/DQ around MatMul -> MatMulIntegerToFloat in ONNX Runtime."""
    real_x: Any = op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)
    y = op.MatMul(real_x, op.DequantizeLinear(weight, weight_scale, axis=1))
    return y if bias is None else _plus_bias(x, y, bias)


def _plus_bias(x: Any, y: Any, bias: Any) -> Any:
    # ONNX Runtime makes a two-dimensional MatMul and Add one Gemm before it looks for Q/DQ, and then runs it in fp32;
    # Sum it leaves.
    return op.Sum(y, bias) if len(x.shape) == 2 else op.Add(y, bias)


def _linear_int8_dynamic(x: Any, weight: Any, weight_scale: Any, bias: Any) -> Any:
    """DynamicQuantizeLinear, MatMulInteger, scale -> DynamicQuantizeMatMul in ONNX Runtime."""
    integers, scale, zero_point = op.DynamicQuantizeLinear(x)
    product = op.Cast(op.MatMulInteger(integers, weight, zero_point), to=onnx.TensorProto.FLOAT)
    y = op.Mul(product, op.Mul(scale, weight_scale))
    return y if bias is None else op.Add(y, bias)


def _conv2d_int8(
    x: Any, weight: Any, weight_scale: Any, bias: Any, scale: Any, zero_point: Any, out_scale: Any, out_zero_point: Any,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Any:  # fmt: skip
    """Q/DQ on input, weight and output -> QLinearConv in ONNX Runtime."""
    real_x = op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)
    real_weight = op.DequantizeLinear(weight, weight_scale, axis=0)
    attributes: dict[str, Any] = {"strides": list(stride), "dilations": list(dilation), "group": groups}
    attributes["pads"] = [*padding, *padding]
    y = op.Conv(real_x, real_weight, *([] if bias is None else [bias]), **attributes)
    return op.DequantizeLinear(op.QuantizeLinear(y, out_scale, out_zero_point), out_scale, out_zero_point)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.dcompile.linear_int8.default: _linear_int8,
    torch.ops.dcompile.linear_int8_dynamic.default: _linear_int8_dynamic,
    torch.ops.dcompile.conv2d_int8.default: _conv2d_int8,
}
assert int8  # the operators above are registered by its import


def export_engines(
    lowered: Lowered, directory: Path, progress: Callable[[str], None] = lambda name: None
) -> dict[str, str]:
    """write engines/<name>.onnx for every engine and engines/weights.bin. -> engine name -> file in the bundle.

    progress(name) is called as each engine is begun. Weights that are equal byte for byte are written once.
    Raises InternalError when ONNX's own checker refuses what was written.
    """
    (directory / "engines").mkdir(parents=True, exist_ok=True)
    files = {}
    with (directory / WEIGHTS_FILE).open("wb") as stream:
        shared = _SharedWeights(stream)
        for name, variant in lowered.engines.items():
            progress(name)
            model = to_onnx(variant.graph, list(variant.inputs), [f"next_{slot}" for slot in variant.outputs])
            shared.move(model)
            files[name] = f"engines/{name}.onnx"
            ir.save(model, directory / files[name])
            _check(directory / files[name])
    return files


def to_onnx(module: fx.GraphModule, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """One graph as an ONNX model with a dynamic batch."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    registration.setLevel(logging.ERROR)  # "torchvision is not installed"
    module = transpose_linear_weights(module)
    examples = tuple(_example(node) for node in rewrite.placeholders(module).values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        exported = torch.export.export(module, examples, dynamic_shapes=dynamic_shapes(module, MAX_BATCH))
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=TRANSLATIONS,
            input_names=list(inputs),
            output_names=list(outputs),
            optimize=True,
            verbose=False,
        )
    if program is None:
        raise InternalError("torch.onnx.export returned nothing; please report this with the recipe")
    model: ir.Model = program.model
    model.ir_version = IR_VERSION
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces of the build machine: half of the file, and nobody's business
    return model


def _example(node: fx.Node) -> torch.Tensor:
    value = rewrite.tensor_of(node)
    assert value is not None
    return torch.zeros([rewrite.hint(size) for size in value.shape], dtype=value.dtype)


class _SharedWeights:
    """Appends initialisers to one file and points the models at it; content that it holds is not written again."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.known: dict[bytes, tuple[int, int]] = {}  # digest -> (offset, length)

    def move(self, model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _INLINE_BYTES:
                continue
            data = tensor.tobytes()
            digest = hashlib.sha256(data).digest()
            if digest not in self.known:
                self.stream.write(b"\0" * (-self.stream.tell() % ALIGNMENT))
                self.known[digest] = (self.stream.tell(), len(data))
                self.stream.write(data)
            offset, length = self.known[digest]
            value.const_value = ir.ExternalTensor(
                Path(WEIGHTS_FILE).name,
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
            )


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        raise InternalError(
            f"{path.name}: ONNX's checker refuses it ({str(error).splitlines()[0]}); please report this with the recipe"
        ) from error


def fused_operators(path: Path) -> Mapping[str, int]:
    """Operators after ONNX Runtime's own optimisation, with how often each occurs: shows what really runs in int8."""
    import collections
    import tempfile

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        try:
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            why = str(error).strip().partition("\n")[0]
            raise EngineError(f"{path.name}: ONNX Runtime cannot optimise it into {folder}: {why}") from error
        model = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return collections.Counter(node.op_type for node in model.graph.node)


# What each operator of ours must become in ONNX Runtime: any of these. Anything else is a layer that runs in fp32.
_FUSED_AS = {
    torch.ops.dcompile.linear_int8.default: ("MatMulIntegerToFloat", "QLinearMatMul"),
    torch.ops.dcompile.linear_int8_dynamic.default: ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger"),
    torch.ops.dcompile.conv2d_int8.default: ("QLinearConv",),
}


def check_fusion(name: str, graph: fx.GraphModule, operators: Mapping[str, int]) -> None:
    """Raises EngineError when ONNX Runtime runs a layer in fp32 that the program promises in INT8."""
    for target, fused in _FUSED_AS.items():
        promised = sum(rewrite.is_call(node, target) for node in graph.graph.nodes)
        running = sum(operators.get(operator, 0) for operator in fused)
        if running < promised:
            raise EngineError(
                f"engine {name!r}: {promised} {target} layers are promised, ONNX Runtime runs {running} as "
                f"{' or '.join(fused)}; the rest would run in fp32: leave quant out, or report this with the recipe"
            )
