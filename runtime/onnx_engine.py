"""ONNX Runtime on the CPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .engines import Array, Port
from .errors import EngineError


class OnnxEngine:
    """A session over one .onnx file; weights beside it are memory-mapped, and shared where not repacked.

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


def _port(value: Any) -> Port:
    """From ONNX Runtime's `tensor(float)` and symbolic dims."""
    dtype = value.type.removeprefix("tensor(").removesuffix(")")
    dtype = {"float": "float32", "double": "float64"}.get(dtype, dtype)
    return Port(dtype, tuple(dim if isinstance(dim, int) else None for dim in value.shape))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
