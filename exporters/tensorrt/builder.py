"""One ONNX file -> one engine: by TensorRT where it and its GPU are, else by TensorRT for RTX, which needs none.

Everything that differs between the two packages is in this file.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from ...compiler.errors import InternalError, UnsupportedError
from ...runtime.cuda import compute_capability
from ...runtime.errors import EngineError
from ..onnx.names import module_of
from .layers import Layer, read_inspector, read_layers

FULL, FOR_RTX = "tensorrt", "tensorrt_rtx"
NAMES = {FULL: "TensorRT", FOR_RTX: "TensorRT for RTX"}
_LAYERS = "Layers:"  # how the list of compiled kernels begins, among the messages of a build
_NO_MEMORY = ("OutOfMemory", "bad_alloc", "could not be allocated", "constant != nullptr")
# What a failed CUDA call adds to every error on a machine without a driver; it is never the cause.
_NOISE = "catchCudaError"

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # least, usual and largest shape of an input


@dataclass(frozen=True)
class Built:
    """layers: what was compiled. package, version: by what."""

    layers: tuple[Layer, ...]
    package: str
    version: str


def choose_package() -> str:
    """`tensorrt` where it is installed and sees a GPU, otherwise `tensorrt_rtx`.

    Raises EngineError where neither can build.
    """
    if find_spec(FULL) and compute_capability() is not None:
        return FULL
    if find_spec(FOR_RTX):
        return FOR_RTX
    needed = "tensorrt needs a GPU to build, and there is none" if find_spec(FULL) else f"{FOR_RTX} is not installed"
    raise EngineError(f"target 'trt': {needed}; TensorRT for RTX builds without one: pip install 'dcompile[trt]'")


def known_capabilities(package: str) -> tuple[str, ...]:
    """Compute capabilities that engines can be built for: the one of this machine's GPU for TensorRT."""
    if package == FULL:
        own = compute_capability()
        return (own,) if own else ()
    names = _module(package).ComputeCapability.__members__
    return tuple(_dotted(name) for name in names if name.startswith("SM"))


def _dotted(name: str) -> str:
    """ "SM89" -> "8.9"."""
    digits = name.removeprefix("SM")
    return f"{digits[:-1]}.{digits[-1]}"


def build_engine(
    name: str, onnx_file: Path, engine_file: Path, capabilities: Sequence[str], profiles: Sequence[Mapping[str, Range]],
    package: str | None = None,
) -> Built:  # fmt: skip
    """Write `engine_file` from `onnx_file`; weights beside the ONNX file are mapped, the engine is written as it comes.

    name: of the engine, for messages. profiles: input -> its shapes, one mapping a profile; empty where all is static.
    Raises UnsupportedError for an operator that TensorRT does not take, EngineError when it cannot build.
    """
    package = package or choose_package()
    trt, messages = _module(package), _logger(package)
    messages.clear()
    builder = trt.Builder(messages.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(name, trt.OnnxParser(network, messages.logger), onnx_file, package)
    _let_attention_decompose(trt, network)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if package == FOR_RTX:
        _set_capabilities(trt, config, capabilities)
    for ranges in profiles:
        config.add_optimization_profile(_profile(builder, ranges))
    with engine_file.open("wb") as stream:
        try:
            written = write_engine(builder, network, config, stream, package)
        except MemoryError as error:
            raise EngineError(_out_of_memory(name, onnx_file)) from error
    if not written:
        raise EngineError(_why_not(name, messages, onnx_file, package))
    layers = _compiled(trt, messages, engine_file, package)
    return Built(layers, package, trt.__version__)


def write_engine(builder: Any, network: Any, config: Any, stream: BinaryIO, package: str) -> bool:
    """Build and write to the stream, as it comes where the version can do that. -> whether it was built"""
    if hasattr(builder, "build_serialized_network_to_stream"):
        return bool(builder.build_serialized_network_to_stream(network, config, _writer(package)(stream)))
    whole = builder.build_serialized_network(network, config)
    if whole is not None:
        stream.write(whole)
    return whole is not None


def _parse(name: str, parser: Any, file: Path, package: str) -> None:
    if parser.parse_from_file(str(file)):
        return
    error = parser.get_error(0)
    operator, node = error.node_operator(), error.node_name()
    if any(sign in error.desc() for sign in _NO_MEMORY):
        raise EngineError(_out_of_memory(name, file))
    if not node:
        raise InternalError(
            f"engine {name!r}: TensorRT cannot read {file.name}: {_cause(error.desc())}; please report this"
        )
    where = module_of(node) or "the sampler's step"
    why = "" if error.desc() == "false" else f" ({_cause(error.desc())})"
    raise UnsupportedError(
        f"engine {name!r}: {NAMES[package]} does not take operator {operator} of {where}{why}; "
        "rewrite that part of the model, or build for another target (onnx, openvino, aoti)"
    )


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Attention that no fused kernel takes (fp32, heads above 256 channels) becomes products, and not an error."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for index in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(index)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # what get_layer returns has no more than a layer's attributes
            layer.attention.decomposable = True


def _set_capabilities(trt: Any, config: Any, capabilities: Sequence[str]) -> None:
    config.num_compute_capabilities = len(capabilities)
    for index, dotted in enumerate(capabilities):
        member = trt.ComputeCapability.__members__["SM" + dotted.replace(".", "")]
        if not config.set_compute_capability(member, index):
            raise EngineError(f"TensorRT for RTX refuses compute capability {dotted}; leave it out")


def _profile(builder: Any, ranges: Mapping[str, Range]) -> Any:
    profile = builder.create_optimization_profile()
    for port, (least, usual, largest) in ranges.items():
        profile.set_shape(port, least, usual, largest)
    return profile


def _compiled(trt: Any, messages: _Messages, engine_file: Path, package: str) -> tuple[Layer, ...]:
    if package == FULL:
        engine = trt.Runtime(messages.logger).deserialize_cuda_engine(engine_file.read_bytes())
        inspector = engine.create_engine_inspector()
        return read_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    if messages.layers is None:
        raise EngineError(
            "TensorRT for RTX did not list the layers that it compiled, so which run in low precision cannot be told; "
            "use the version in constraints.txt, and build in a process of its own"
        )
    return read_layers(messages.layers)


# --- messages ---


class _Messages:
    """Collects what a build says and prints nothing. One for the process: TensorRT warns of every further logger."""

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        self.layers: str | None = None
        severities = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR, trt.ILogger.WARNING)
        messages = self
        base: Any = trt.ILogger

        class Logger(base):  # type: ignore[misc]  # the package has no types
            def __init__(self) -> None:
                base.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in severities:
                    messages.errors.append(message)
                elif message.startswith(_LAYERS):
                    messages.layers = message

        self.logger = Logger()

    def clear(self) -> None:
        self.errors.clear()
        self.layers = None


@functools.cache
def _logger(package: str) -> _Messages:
    return _Messages(_module(package))


@functools.cache
def _writer(package: str) -> Any:
    base: Any = _module(package).IStreamWriter

    class Writer(base):  # type: ignore[misc]  # the package has no types
        """Appends to an open file, so that the engine is never in memory as a whole."""

        def __init__(self, stream: Any) -> None:
            base.__init__(self)
            self.stream = stream

        def write(self, data: bytes) -> int:
            return int(self.stream.write(data))

    return Writer


def _module(package: str) -> Any:
    return importlib.import_module(package)


def _why_not(name: str, messages: _Messages, onnx_file: Path, package: str) -> str:
    said = [message for message in messages.errors if _NOISE not in message]
    if any(sign in message for message in said for sign in _NO_MEMORY):
        return _out_of_memory(name, onnx_file)
    cause = _cause(said[-1]) if said else "it gives no reason"
    return (
        f"engine {name!r}: {NAMES[package]} cannot build it: {cause}; try another --precision or layout, leave out the "
        "quantisation, or report this with the recipe"
    )


def _out_of_memory(name: str, onnx_file: Path) -> str:
    weights = sum(path.stat().st_size for path in onnx_file.parent.iterdir() if path.is_file())
    return (
        f"engine {name!r}: out of memory while TensorRT built it; a build takes about twice the {weights / 2**30:.1f} "
        "GiB of its weights: free some, or use --layout segments, whose engines are smaller; nothing was written"
    )


def _cause(message: str) -> str:
    """The sentence of an error that says what is wrong, without TensorRT's own source positions."""
    lines = [line.strip() for line in message.splitlines() if line.strip() and _NOISE not in line] or [message]
    line = next((line for line in lines if "Error Code" in line), lines[0])
    inner = line.partition("Error Code")[2].partition("(")[2].rpartition(" In ")[0] or line
    return inner.partition("] ")[2] if inner.startswith("[") and "] " in inner else inner
