"""What ONNX Runtime makes of an engine: its operators after fusion, and whether promised INT8 layers are among them."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx
from torch import fx

from ...compiler import rewrite
from ...compiler.rewrite import aten
from ...runtime.errors import EngineError
from .forms import DEQUANTIZE, QUANTIZE, QUANTIZE_DYNAMIC

# What a quantised layer must become in ONNX Runtime: any of these. Anything else is a layer that runs in fp32.
_FUSED_AS = {
    "int8 linear layers": ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "MatMulInteger"),
    "int8 convolutions": ("QLinearConv",),
    "linear layers with quantised weights": ("MatMulNBits",),
}


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
