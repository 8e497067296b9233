"""How a quantised layer is written into a graph: Q/DQ of what it reads, a stored weight, and the layer as it was.

The layer stays the plain ATen call; around it come the operators of quant/ops.py. Its name stays with the value that
others read: that of a linear layer, and of a convolution its rounded output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler import rewrite
from ..compiler.regions import find_regions
from ..compiler.rewrite import aten
from ..quant import formats, ops

LINEAR, CONV = aten.linear.default, aten.conv2d.default
assert ops  # the operators below are registered by its import
_OPS = torch.ops.dcompile

GROUPS = (16, 32, 64, 128, 256)  # sizes of int4 groups
Span = tuple[float, float]  # smallest and largest value of a tensor


@dataclass(frozen=True)
class Scheme:
    """Numbers of one layer. weights: "int8", "fp8", "nvfp4" or "int4". activations: how they are rounded, or None.

    activations: "uint8", "int8", "fp8" with a range from calibration; "dynamic uint8", "dynamic int8" with one from the
    tensor itself; "nvfp4" with block scales from the tensor, a global scale from calibration. group: of int4 weights.
    """

    weights: str
    activations: str | None
    group: int

    @property
    def reads_ranges(self) -> bool:
        """Activations are rounded by what the trajectory has shown."""
        return self.activations is not None and not self.activations.startswith("dynamic")

    @property
    def takes_convolutions(self) -> bool:
        return self.activations in ("uint8", "int8")

    def why_unfit(self, columns: int) -> str | None:
        """Why a linear layer with this many inputs cannot have it; None if it can."""
        block = {"nvfp4": formats.NVFP4_BLOCK, "int4": self.group}.get(self.weights, 1)
        if not columns % block:
            return None
        fitting = [size for size in GROUPS if columns % size == 0 and self.weights == "int4"]
        hint = f"; group={fitting[-1]} fits it" if fitting else ""
        return f"it reads {columns} values, no multiple of {block}, the block of {self.weights}{hint}"


@dataclass
class Writer:
    """Writes layers into one graph; those of a region that read the same tensor share its Q/DQ node."""

    graph: fx.GraphModule
    scheme: Scheme
    regions: Mapping[str, str] = field(default_factory=dict)
    shared: dict[tuple[str, str], fx.Node] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: fx.GraphModule, scheme: Scheme) -> Writer:
        # Not beyond a region: its Q/DQ node would be one more tensor that goes from block to block.
        inside = {name: r.path for top in find_regions(graph) for r in top.walk() for name in r.nodes}
        return cls(graph, scheme, inside)

    def write(self, node: fx.Node, span: Span | None, out: Span | None = None) -> None:
        """Quantise the layer. span: of what it reads, out: of what a convolution gives, where ranges are read."""
        _, weight, *rest = node.args
        assert isinstance(weight, fx.Node)
        stored = self._stored_weight(node, weight)
        arguments = (self._rounded_input(node, span), stored, *rest)
        if node.target is LINEAR:
            node.args = arguments
            return
        # Runtimes fuse an INT8 convolution only when its output is quantised too, and nothing reads it before: so the
        # rounded output takes the name, which plans know, and the place of the convolution.
        convolution = rewrite.call(self.graph, node, CONV, *arguments, like=node)
        target, constants = self._rounding(node, node.name, out)
        rewrite.change_call(node, target, convolution, *constants)

    def _stored_weight(self, node: fx.Node, weight: fx.Node) -> fx.Node:
        path = str(weight.target)
        q, scale, global_scale = _quantize_weight(rewrite.attribute(self.graph, path), self.scheme)
        rewrite.assign(self.graph, path, q)
        weight.meta["val"] = q
        scales = [self._constant(node, f"{path}_scale", scale), None]
        if global_scale is not None:
            scales[1] = self._constant(node, f"{path}_global_scale", global_scale)
        axis = 1 if self.scheme.weights in ("int4", "nvfp4") else 0
        arguments = (weight, *scales, self.scheme.weights, axis)
        return rewrite.call(self.graph, node, _OPS.dequantize.default, *arguments, like=node)

    def _rounded_input(self, node: fx.Node, span: Span | None) -> fx.Node:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if self.scheme.activations is None:
            return source
        key = source.name, self.regions.get(node.name, "")
        if key not in self.shared:
            target, constants = self._rounding(node, source.name, span)
            self.shared[key] = rewrite.call(self.graph, node, target, source, *constants, like=node)
        return self.shared[key]

    def _rounding(self, before: fx.Node, tensor: str, span: Span | None) -> tuple[Any, list[Any]]:
        """The operator that rounds a tensor, and its arguments after the tensor."""
        kind = self.scheme.activations
        assert kind is not None
        if kind.startswith("dynamic "):
            return _OPS.quantize_dequantize_dynamic.default, [kind.removeprefix("dynamic ")]
        assert span is not None
        return self._static(kind, before, tensor, span)

    def _static(self, kind: str, before: fx.Node, tensor: str, span: Span) -> tuple[Any, list[Any]]:
        def constant(name: str, value: Tensor) -> fx.Node:
            return self._constant(before, f"ranges.{tensor}_{name}", value)

        if kind == "nvfp4":
            amax = max(abs(end) for end in span)
            return _OPS.quantize_dequantize_nvfp4.default, [constant("global_scale", formats.nvfp4_global_scale(amax))]
        if kind == "uint8":
            scale, zero_point = formats.affine_range(*span)
            zero: fx.Node | None = constant("zero_point", torch.tensor(zero_point, dtype=torch.uint8))
        else:
            scale, zero = formats.symmetric_range(*span, formats.FP8_MAX if kind == "fp8" else formats.INT8_MAX), None
        return _OPS.quantize_dequantize.default, [constant("scale", torch.tensor(scale)), zero, kind]

    def _constant(self, before: fx.Node, path: str, value: Tensor) -> fx.Node:
        rewrite.assign(self.graph, path, value)
        return rewrite.read_weight(self.graph, path, before)


def _quantize_weight(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    if scheme.weights == "nvfp4":
        return formats.quantize_nvfp4(weight)
    if scheme.weights == "int4":
        return *formats.quantize_int4(weight, scheme.group), None
    rounds: Callable[[Tensor], tuple[Tensor, Tensor]] = (
        formats.quantize_int8 if scheme.weights == "int8" else formats.quantize_fp8
    )
    return *rounds(weight), None
