"""Why a graph does not become ONNX, in one line: which operator, where in the network, what to do."""

from __future__ import annotations

import re

import torch
from torch import fx

from ...compiler.errors import UnsupportedError
from ...compiler.regions import module_path

_OPERATOR = re.compile(r"<OpOverload\(op='(?P<name>[\w.]+)'")


def refusal(error: BaseException, module: fx.GraphModule) -> UnsupportedError:
    """What to raise for an error of torch.onnx; the operator is found along the chain of its causes."""
    texts, cause = [], error
    while cause is not None and str(cause) not in texts:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    found = next((match["name"] for text in reversed(texts) if (match := _OPERATOR.search(text))), None)
    if found is None:
        line = next((line for line in texts[-1].splitlines() if line.strip()), type(error).__name__)
        return UnsupportedError(f"torch.onnx cannot write the network: {line.strip()}; try --target aoti")
    return UnsupportedError(
        f"{_where(module, found)}: ONNX has no operator for {found}; rewrite that part of the model, or build for "
        "--target aoti, which compiles PyTorch itself"
    )


def _where(module: fx.GraphModule, operator: str) -> str:
    """Module of the first call of the operator, whose name torch.onnx may spell otherwise."""
    for node in module.graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and _plain(target._schema.name) == _plain(operator):
            paths = [path for path, _ in module_path(node) if path]
            return paths[-1] if paths else f"node {node.name!r}"
    return "the network"


def _plain(name: str) -> str:
    """ "aten::erfinv" and "prims.erf_inv" -> "erfinv"."""
    return re.split(r"::|\.", name)[-1].replace("_", "").lower()
