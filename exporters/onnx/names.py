"""Names of ONNX nodes that say where in the network they come from: "net.blocks.0.attn1/linear_3"."""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

_SCOPES = (
    "pkg.torch.onnx.name_scopes"  # torch.onnx: "['', 'net', 'net.blocks.0', 'linear_3']", modules and then the node
)
_NO_MODULE = "_empty_nn_module_stack"  # what torch.export calls the place of a node without one
_SEPARATOR = "/"


def name_by_module(model: ir.Model) -> None:
    """Rename every node that torch.onnx knows the module of, in place; a name is given once."""
    used: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        scopes = _scopes(node)
        if not scopes:
            continue
        path, call = (scopes[-2] if len(scopes) > 1 else ""), scopes[-1]
        name = f"{path}{_SEPARATOR}{call}" if path else call
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}.{used[name]}"


def module_of(name: str) -> str:
    """The module path in a node's name; "" for what no module made."""
    return name.rpartition(_SEPARATOR)[0]


def _scopes(node: ir.Node) -> list[str]:
    text = node.metadata_props.get(_SCOPES)
    if text is None:
        return []
    scopes: list[str] = ast.literal_eval(text)
    return [scope for scope in scopes if not scope.startswith(_NO_MODULE)]
