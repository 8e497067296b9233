"""Engines: one file of a bundle each, all called the same way."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from .errors import EngineError, did_you_mean
from .manifest import Manifest, Slot, Table

Array = NDArray[Any]


class Port(NamedTuple):
    dtype: str
    shape: tuple[int | None, ...]  # None: any size


class Engine(Protocol):
    @property
    def inputs(self) -> Mapping[str, Port]: ...
    @property
    def outputs(self) -> Mapping[str, Port]: ...
    def run(self, inputs: dict[str, Array], /) -> dict[str, Array]: ...


class OnnxEngine:
    """ONNX Runtime on the CPU; weights beside the .onnx file are memory-mapped, and shared where not repacked.

    Plain `session.run` is the quickest call here: inputs are not copied, and it takes 4 us against 6 with I/O binding.

    Args:
        threads: of one operator; None lets ONNX Runtime decide.
        options: session configuration entries; {"session.disable_prepacking": "1"} trades speed for memory.
    """

    def __init__(self, path: Path, *, threads: int | None = None, options: Mapping[str, str] | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise EngineError("target 'onnx' needs the package onnxruntime: pip install onnxruntime") from error
        self.path = path
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads or 0
        settings.log_severity_level = 4  # errors are raised; ONNX Runtime need not print them as well
        # Each engine has its own threads: without this the last engine's spin on while the next one works,
        # which made two alternating engines up to 2.5 times slower on two cores.
        defaults = {"session.force_spinning_stop": "1"}
        try:
            for name, value in (defaults | dict(options or {})).items():
                settings.add_session_config_entry(name, value)
            self._session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        except Exception as error:
            version = onnxruntime.__version__
            raise EngineError(f"{path}: ONNX Runtime {version} does not load it: {_first_line(error)}") from error
        self.inputs = {each.name: _port(each) for each in self._session.get_inputs()}
        self.outputs = {each.name: _port(each) for each in self._session.get_outputs()}

    def run(self, inputs: dict[str, Array], /) -> dict[str, Array]:
        try:
            return dict(zip(self.outputs, self._session.run(None, inputs), strict=True))
        except Exception as error:
            raise EngineError(f"{self.path}: ONNX Runtime failed: {_first_line(error)}") from error


ENGINES: dict[str, Callable[..., Engine]] = {"onnx": OnnxEngine}


def check_ports(name: str, engine: Engine, manifest: Manifest, tables: Mapping[str, Array]) -> None:
    """Raises EngineError unless the engine's inputs and outputs are those the manifest describes."""
    spec = manifest.engines[name]
    for role, said, found in (("input", spec.inputs, engine.inputs), ("output", spec.outputs, engine.outputs)):
        for port in said.keys() ^ found.keys():
            where = "in the manifest only" if port in said else "in the file only"
            raise EngineError(f"{spec.file}: {role} {port!r} is {where}; {did_you_mean(port, found)}; compile again")
        for port, (dtype, shape) in found.items():
            for needed_dtype, needed in _needed(said[port], manifest, tables):
                if dtype != needed_dtype or not _accepts(shape, needed):
                    says = f"the manifest says {needed_dtype} {_spelled(needed)}; compile again"
                    raise EngineError(f"{spec.file}: {role} {port!r} is {dtype} {_spelled(shape)}, {says}")


def _needed(source: Slot | Table, manifest: Manifest, tables: Mapping[str, Array]) -> list[tuple[str, tuple[int, ...]]]:
    """What the source holds at the least and the largest batch; nothing if only engines know its shape."""
    if isinstance(source, Table):
        table = tables[source.table]
        return [(str(table.dtype), table.shape[1:])]
    spec, batch = manifest.slots.get(source.slot), manifest.contract.batch
    return [(spec.dtype, spec.at(size)) for size in (batch.min, batch.max)] if spec else []


def _accepts(port: tuple[int | None, ...], shape: tuple[int, ...]) -> bool:
    return len(port) == len(shape) and all(have in (None, want) for have, want in zip(port, shape, strict=True))


def _spelled(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"


def _port(value: Any) -> Port:
    """From ONNX Runtime's `tensor(float)` and symbolic dims."""
    dtype = value.type.removeprefix("tensor(").removesuffix(")")
    dtype = {"float": "float32", "double": "float64"}.get(dtype, dtype)
    return Port(dtype, tuple(dim if isinstance(dim, int) else None for dim in value.shape))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
