"""Engines as ONNX files over one shared, memory-mapped weights file, in the forms that ONNX Runtime runs fastest.

Opset 23, IR 10: the newest pair that ONNX Runtime, OpenVINO and TensorRT all load.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset23 as op
from torch import fx

from ..compiler import rewrite
from ..compiler.errors import InternalError
from ..compiler.rewrite import aten
from ..compiler.step_graph import MAX_BATCH
from ..runtime.errors import EngineError
from ..runtime.onnx_engine import OnnxEngine
from .lower import Lowered, dynamic_shapes
from .onnx_forms import (
    DEQUANTIZE,
    QUANTIZE,
    QUANTIZE_DYNAMIC,
    QUANTIZE_NVFP4,
    Translations,
    constant,
    dequantize,
    quantize_dequantize,
    transpose_linear_weights,
    type_weights,
)
from .onnx_names import name_by_module
from .onnx_refusal import refusal
from .onnx_runtime_forms import group_norm, rewrite_for_onnx_runtime
from .target import Progress, Target, TargetOptions, Written

OPSET, IR_VERSION = 23, 10
WEIGHTS_FILE = "engines/weights.bin"  # beside the engines: ONNX Runtime refuses a path that leaves their folder
ALIGNMENT = 4096  # a page: the runtime maps each weight, it does not copy it
_INLINE_BYTES = 1024  # smaller initialisers stay in the .onnx


def _quantize(x: Any, scale: Any, zero_point: Any, format: str) -> Any:
    # ONNX Runtime 1.31 turns INT8 activations into UINT8 itself, and then refuses what it made where a reshape follows.
    if format == "int8":
        zero_point = constant(onnx.TensorProto.UINT8, 128)
    return quantize_dequantize(x, scale, zero_point, "uint8")


def _quantize_dynamic(x: Any, format: str) -> Any:
    integers, scale, zero_point = op.DynamicQuantizeLinear(x)
    return op.DequantizeLinear(integers, scale, zero_point)


TRANSLATIONS: Translations = {
    QUANTIZE: _quantize,
    QUANTIZE_DYNAMIC: _quantize_dynamic,
    DEQUANTIZE: dequantize,
    aten.group_norm.default: group_norm,
}


def export_engines(lowered: Lowered, directory: Path, progress: Progress = lambda name: None) -> dict[str, str]:
    """Write engines/<name>.onnx for every engine and engines/weights.bin. -> engine name -> file in the bundle.

    progress(name) is called as each engine is begun. Weights that are equal byte for byte are written once.
    Raises EngineError, before anything is written, for a format that ONNX Runtime does not multiply in; InternalError
    when ONNX's own checker refuses what was written.
    """
    for name, variant in lowered.engines.items():
        _check_formats(name, variant.graph)
    (directory / "engines").mkdir(parents=True, exist_ok=True)
    files = {}
    with (directory / WEIGHTS_FILE).open("wb") as stream:
        shared = SharedWeights(stream, Path(WEIGHTS_FILE).name)
        for name, variant in lowered.engines.items():
            progress(name)
            model = to_onnx(variant.graph, list(variant.inputs), [f"next_{slot}" for slot in variant.outputs])
            rewrite_for_onnx_runtime(model)
            shared.move(model)
            files[name] = f"engines/{name}.onnx"
            ir.save(model, directory / files[name])
            check(directory / files[name])
    return files


def to_onnx(
    module: fx.GraphModule, inputs: Sequence[str], outputs: Sequence[str], *, translations: Translations = TRANSLATIONS,
    transpose_weights: bool = True,
) -> ir.Model:  # fmt: skip
    """One graph as an ONNX model with a dynamic batch.

    translations: of our operators into ONNX's. transpose_weights: linear weights lie [K, N], as runtimes multiply.
    Raises UnsupportedError for an operator that ONNX has not.
    """
    for logger in (
        "torch.onnx._internal.exporter._registration",  # "torchvision is not installed"
        "onnx_ir.passes.common.initializer_deduplication",  # that it left out a constant which an engine hands on
    ):
        logging.getLogger(logger).setLevel(logging.ERROR)
    if transpose_weights:
        module = transpose_linear_weights(module)
    examples = tuple(_example(node) for node in rewrite.placeholders(module).values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        exported = torch.export.export(module, examples, dynamic_shapes=dynamic_shapes(module, MAX_BATCH))
        try:
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=dict(translations),
                input_names=list(inputs),
                output_names=list(outputs),
                optimize=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise refusal(error, module) from error
    if program is None:
        raise InternalError("torch.onnx.export returned nothing; please report this with the recipe")
    model: ir.Model = program.model
    type_weights(model, transpose=transpose_weights)
    model.ir_version = IR_VERSION
    name_by_module(model)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces of the build machine: half of the file, and nobody's business
    return model


def _example(node: fx.Node) -> torch.Tensor:
    value = rewrite.tensor_of(node)
    assert value is not None
    return torch.zeros([rewrite.hint(size) for size in value.shape], dtype=value.dtype)


class SharedWeights:
    """Appends initialisers to one file and points the models at it; content that it holds is not written again.

    location: the file's path from the folder of the models.
    """

    def __init__(self, stream: BinaryIO, location: str) -> None:
        self.stream, self.location = stream, location
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
                self.location,
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
            )


def check(path: Path) -> None:
    """Raises InternalError when ONNX's own checker refuses the file."""
    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        raise InternalError(
            f"{path.name}: ONNX's checker refuses it ({str(error).splitlines()[0]}); please report this with the recipe"
        ) from error


def fused_operators(path: Path) -> Mapping[str, int]:
    """Operators after ONNX Runtime's own optimisation, with how often each occurs: shows what really runs in int8."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        # It writes the weights too. Nobody reads them; nor need it lay them out for products that nobody computes.
        (Path(folder) / "weights").symlink_to(os.devnull)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            why = str(error).strip().partition("\n")[0]
            raise EngineError(f"{path.name}: ONNX Runtime cannot optimise it into {folder}: {why}") from error
        model = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


# What a quantised layer must become in ONNX Runtime: any of these. Anything else is a layer that runs in fp32.
_FUSED_AS = {
    "int8 linear layers": ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "MatMulInteger"),
    "int8 convolutions": ("QLinearConv",),
    "linear layers with quantised weights": ("MatMulNBits",),
}


def _check_formats(name: str, graph: fx.GraphModule) -> None:
    """Raises EngineError for a quantised layer that ONNX Runtime has no kernel for on the CPU."""
    for node in graph.graph.nodes:
        if rewrite.is_call(node, QUANTIZE, DEQUANTIZE, QUANTIZE_DYNAMIC, QUANTIZE_NVFP4):
            kind = "nvfp4" if node.target is QUANTIZE_NVFP4 else next(arg for arg in node.args if isinstance(arg, str))
            if kind in ("fp8", "nvfp4") or (node.target is QUANTIZE_DYNAMIC and kind == "int8"):
                grain = ", by token" if kind == "int8" else ""
                raise EngineError(
                    f"engine {name!r}: node {node.name!r} is {kind}{grain}, which ONNX Runtime does not multiply in on "
                    "the CPU; take format=int8 with symmetric=false, or format=int4"
                )


def check_fusion(name: str, graph: fx.GraphModule, operators: Mapping[str, int]) -> None:
    """Raises EngineError when ONNX Runtime runs a layer in fp32 that the program promises in fewer bits."""
    promised = Counter(kind for node in graph.graph.nodes if (kind := _promise(node)))
    for kind, count in promised.items():
        running = sum(operators.get(operator, 0) for operator in _FUSED_AS[kind])
        if running < count:
            raise EngineError(
                f"engine {name!r}: {count} {kind} are promised, ONNX Runtime runs {running} as "
                f"{' or '.join(_FUSED_AS[kind])}; the rest would run in fp32: leave quant out, or report this with the "
                "recipe"
            )


def _promise(node: fx.Node) -> str | None:
    """Which kind of quantised layer a node is, in the words of `_FUSED_AS`; None if it is none."""
    if not rewrite.is_call(node, aten.linear.default, aten.conv2d.default):
        return None
    x, weight = node.args[:2]
    if not isinstance(weight, fx.Node) or not rewrite.is_call(weight, DEQUANTIZE):
        return None
    if node.target is aten.conv2d.default:
        return "int8 convolutions"
    is_rounded = isinstance(x, fx.Node) and rewrite.is_call(x, QUANTIZE, QUANTIZE_DYNAMIC)
    return "int8 linear layers" if is_rounded else "linear layers with quantised weights"


def write(lowered: Lowered, folder: Path, options: TargetOptions, progress: Progress) -> Written:
    """engines/<name>.onnx over engines/weights.bin. Raises EngineError for a layer that would run in fp32 unasked."""
    files = export_engines(lowered, folder, progress)
    operators = {name: fused_operators(folder / file) for name, file in files.items()}
    for name, engine in lowered.engines.items():
        check_fusion(name, engine.graph, operators[name])
    opened = {name: partial(OnnxEngine, folder / file, threads=options.threads) for name, file in files.items()}
    return Written(files, operators, opened)


TARGET = Target(
    name="onnx",
    packages=("onnxruntime",),
    extra="",
    shares_weights=True,
    precisions=lambda: ("fp32",),
    quantize={"symmetric": False},
    write=write,
    cannot_run=lambda: None,
)
