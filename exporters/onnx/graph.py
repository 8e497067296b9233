"""A graph as an ONNX model with a dynamic batch.

Opset 23, IR 10: the newest pair that ONNX Runtime, OpenVINO and TensorRT all load.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import fx

from ...compiler import rewrite
from ...compiler.errors import InternalError
from ...compiler.step_graph import MAX_BATCH
from ..lower import dynamic_shapes
from .forms import Translations, transpose_linear_weights, type_weights
from .names import name_by_module
from .refusal import refusal

OPSET, IR_VERSION = 23, 10


def to_onnx(
    module: fx.GraphModule,
    inputs: Sequence[str],
    outputs: Sequence[str],
    translations: Translations,
    *,
    transpose_weights: bool = True,
) -> ir.Model:
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


def check(path: Path) -> None:
    """Raises InternalError when ONNX's own checker refuses the file."""
    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        raise InternalError(
            f"{path.name}: ONNX's checker refuses it ({str(error).splitlines()[0]}); please report this with the recipe"
        ) from error
