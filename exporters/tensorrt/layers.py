"""The kernels that TensorRT compiled, read from what it tells of an engine; and whether they keep what was promised."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...runtime.errors import EngineError
from ..onnx.names import module_of

# TensorRT's names of types -> ours.
TYPES = {
    "Float": "fp32", "Half": "fp16", "BFloat16": "bf16", "FP8": "fp8", "FP4E2M1": "fp4", "Int8": "int8", "Int4": "int4",
    "Int32": "int32", "Int64": "int64", "Bool": "bool", "UInt8": "uint8",
}  # fmt: skip
_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*)(?:, Inputs: \[(?P<inputs>.*?)\])?"
    r"(?:, Constants: \[(?P<constants>.*?)\])?(?:, Outputs: \[(?P<outputs>.*?)\])?"
    r"(?:, TacticName: (?P<tactic>.*?))?, StreamId: .*?, Metadata: (?P<metadata>.*)$"
)
_TENSOR = re.compile(r"Name: (?P<name>.*?), Dimensions: \[(?P<dims>[^\]]*)\].*?Datatype: (?P<type>\w+)")
_SOURCE = re.compile(r"^\[ONNX Layer: (?P<node>.*?)(?: \[profile \d+\])?\]$")
_SOURCES_BETWEEN = "\x1f"
_GROUP = re.compile(r"_myl(\d+)_\d+$")  # kernels that were compiled together; each profile has groups of its own
_PROFILE = re.compile(r"\[profile (\d+)\]")  # in names of tensors and layers, from the second profile on
_JSON_PARTS = ("Inputs", "Constants", "Outputs")
_STORED = ("fp4", "int4", "int8", "fp8")  # FP4 before FP8, in which its scales are
_DYNAMIC_QUANTIZE = "_Dyna"
_NO_WORK = ("wait", "signal", "shape_call")


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]  # -1: any size
    type: str


@dataclass(frozen=True)
class Layer:
    """One kernel. sources: names of the ONNX nodes that it computes, or that it computes a part of."""

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    sources: tuple[str, ...]
    profile: int = 0

    @property
    def kernel(self) -> str:
        """What it does: "gemm", "conv", "attention", "quantize", "pointwise"; TensorRT's word for anything else."""
        if self.kind == "correlation" or (self.kind == "runtime_fusion" and "Corr" in self.name):
            return "conv"
        if "_gemm_mha" in self.name:
            return "attention"
        if self.kind == "gemm" or (self.kind == "runtime_fusion" and "Fc" in self.name):
            return "gemm"
        if self.kind != "kgen":
            return self.kind
        return "quantize" if _DYNAMIC_QUANTIZE in self.name else "pointwise"

    @property
    def types(self) -> str:
        """What it multiplies: "int8", or "fp16 x int4" where activations and weights differ; "" for other kernels."""
        if self.kernel not in ("gemm", "conv", "attention"):
            return ""
        activations, weights = self.operands
        return activations if weights == activations else f"{activations} x {weights}"

    @property
    def operands(self) -> tuple[str, str]:
        """(type of the activations, type of the weights, or of the other activation where both factors are).

        Beside the factors a fused kernel reads biases, scales and addends, in no fixed order: the weights are the
        constant of the fewest bits, or the largest where all are real numbers, and the activations have its type unless
        no input has. Attention reads q, k and v.
        """
        if self.kernel == "attention":
            types = [each.type for each in self.inputs]
            common = max(types, key=lambda kind: (types.count(kind), kind), default="none")
            return common, common
        matrices = [each for each in self.constants if _elements(each) > 1]
        stored = [each.type for each in matrices if each.type in _STORED]
        largest = max(matrices or self.inputs[-1:] or self.outputs, key=_elements).type
        weights = min(stored, key=_STORED.index) if stored else largest
        given = [each.type for each in self.inputs] or [weights]
        return (weights if weights in given else given[0]), weights


def _elements(tensor: Tensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= abs(size)
    return count


def read_layers(text: str) -> tuple[Layer, ...]:
    """Kernels from the message "Layers:" of a build with DETAILED profiling verbosity; waits and signals left out."""
    told = []
    for line in text.splitlines():
        if not line.startswith("Name: "):
            continue
        found = _LINE.match(line)
        if found is None:
            raise EngineError(
                f"TensorRT's list of layers has a line in a new form ({line[:80]!r}...): which layers run in low "
                "precision cannot be told; use the version of tensorrt-rtx in constraints.txt"
            )
        inputs, constants, outputs = (_tensors(found[part] or "") for part in ("inputs", "constants", "outputs"))
        sources = _sources(found["metadata"])
        told.append((Layer(found["name"], found["kind"], inputs, constants, outputs, sources), line))
    return _with_profiles(told)


def read_inspector(text: str) -> tuple[Layer, ...]:
    """Kernels from the JSON of an EngineInspector, as full TensorRT gives it for an engine on its GPU."""
    told = []
    for entry in json.loads(text)["Layers"]:
        if isinstance(entry, dict):  # a name alone where the engine was built without details
            inputs, constants, outputs = (_json_tensors(entry.get(part, ())) for part in _JSON_PARTS)
            sources = _sources(entry.get("Metadata", ""))
            layer = Layer(entry["Name"], entry.get("LayerType", ""), inputs, constants, outputs, sources)
            told.append((layer, json.dumps(entry)))
    return _with_profiles(told)


def _with_profiles(told: Sequence[tuple[Layer, str]]) -> tuple[Layer, ...]:
    """Only some names say which profile they belong to, but all that was compiled together belongs to the same."""
    profiles: dict[str, int] = {}
    for layer, text in told:
        marks = [int(mark) for mark in _PROFILE.findall(text)]
        group = _group(layer)
        profiles[group] = max([profiles.get(group, 0), *marks])
    return tuple(replace(layer, profile=profiles[_group(layer)]) for layer, _ in told if layer.kind not in _NO_WORK)


def _group(layer: Layer) -> str:
    found = _GROUP.search(layer.name)
    return found[1] if found else layer.name


def _sources(metadata: str) -> tuple[str, ...]:
    found = (_SOURCE.match(part) for part in metadata.split(_SOURCES_BETWEEN))
    return tuple(source["node"] for source in found if source)


def _tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(found["name"], tuple(int(size) for size in found["dims"].split(",") if size), _type(found["type"]))
        for found in _TENSOR.finditer(text)
    )


def _type(word: str) -> str:
    return TYPES.get(word, word.lower())


def _json_tensors(entries: Iterable[Mapping[str, Any]]) -> tuple[Tensor, ...]:
    return tuple(Tensor(each["Name"], tuple(each.get("Dimensions", ())), _json_type(each)) for each in entries)


def _json_type(entry: Mapping[str, Any]) -> str:
    """The type stands alone ("Datatype") or among words on the layout ("Format/Datatype"), by version."""
    text = str(entry.get("Datatype") or entry.get("Format/Datatype") or "")
    words = [TYPES[word] for word in re.findall(r"\w+", text) if word in TYPES]
    return words[-1] if words else text.lower()


# --- what was promised ---


@dataclass(frozen=True)
class Promise:
    """A product that the ONNX asks for in low precision.

    node: its name. activations: type of the quantised activations, None where weights alone are. weights: type of the
    stored weights, or of the other activation where stored is False, as in attention. readers: names of the nodes that
    read the stored weights: where those are multiplied as real numbers, a kernel of theirs reads them in few bits.
    """

    node: str
    activations: str | None
    weights: str
    readers: tuple[str, ...] = ()
    stored: bool = True

    @property
    def spelled(self) -> str:
        return self.weights if self.activations else f"{self.weights} weights"


def check_promises(engine: str, layers: Sequence[Layer], promises: Iterable[Promise]) -> None:
    """Raises EngineError for the first product that runs in another type than the program promises."""
    by_source: dict[str, list[Layer]] = {}
    for layer in layers:
        for source in layer.sources:
            by_source.setdefault(source, []).append(layer)
    for promise in promises:
        makers = by_source.get(promise.node, [])
        for profile in sorted({layer.profile for layer in layers}):
            mine = [layer for layer in makers if layer.profile == profile]
            if not _kept(
                promise, mine, [n for r in promise.readers for n in by_source.get(r, []) if n.profile == profile]
            ):
                raise EngineError(_broken(engine, promise, mine))


def _kept(promise: Promise, makers: Sequence[Layer], readers: Sequence[Layer]) -> bool:
    if promise.activations is None:
        return any(each.type == promise.weights for layer in (*makers, *readers) for each in layer.constants)
    products = [layer for layer in makers if layer.kernel in ("gemm", "conv", "attention")]
    return bool(products) and all(layer.operands == (promise.activations, promise.weights) for layer in products)


def _broken(engine: str, promise: Promise, makers: Sequence[Layer]) -> str:
    found = ", ".join(sorted({f"{layer.kernel} in {layer.types}" for layer in makers if layer.types})) or "no kernel"
    where = module_of(promise.node) or promise.node
    return (
        f"engine {engine!r}: {where} is promised in {promise.spelled}, TensorRT compiled {found} for it; leave the "
        "layer out with a smaller max_error of quant, choose another format, or report this with the recipe"
    )


# --- for the report ---


def count_kernels(layers: Iterable[Layer], profiles: Sequence[str]) -> dict[str, int]:
    """ "gemm int8" -> how often; with more than one profile, each by its name: "single: gemm int8"."""
    counts = Counter(_in_profile(layer, f"{layer.kernel} {layer.types}".strip(), profiles) for layer in layers)
    return dict(sorted(counts.items()))


def rows_by_region(layers: Iterable[Layer], profiles: Sequence[str]) -> tuple[tuple[str, str, str], ...]:
    """(module path, kernel, types) of every product, in the order in which they run."""
    return tuple(
        (_region(layer), _in_profile(layer, layer.kernel, profiles), layer.types) for layer in layers if layer.types
    )


def _in_profile(layer: Layer, text: str, profiles: Sequence[str]) -> str:
    return f"{profiles[layer.profile]}: {text}" if len(profiles) > 1 else text


def _region(layer: Layer) -> str:
    """The module that all nodes of a kernel lie in: a product of q, k and v at once lies in the attention."""
    paths = [module_of(source).split(".") for source in layer.sources if module_of(source)]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or "step"
