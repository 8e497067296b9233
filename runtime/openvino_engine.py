"""OpenVINO on the CPU."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .engines import Array, Port
from .errors import EngineError

WEIGHTS_FILE = "weights.bin"  # beside the .xml of every engine that reads it
PRECISION_INFO = ("dcompile", "precision")  # where the .xml says which precision its engine was compiled for
_HINTS = {"fp32": "f32", "bf16": "bf16"}
_DTYPES = {"boolean": "bool", "f64": "float64", "f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32"}
_DTYPES |= {"i16": "int16", "i8": "int8", "u8": "uint8"}

Shapes = tuple[tuple[int, ...], ...]  # of every input, in order


class OpenVinoEngine:
    """A compiled model over one .xml file; weights lie beside it, memory-mapped.

    The shapes of the first run are compiled as constants: that is 12 % faster on the glyph DiT than any shape (38 ms a
    step against 43), and takes as long to compile (0.3 s). A run with other shapes compiles the model once more, for
    any shape; there are never more than these two.

    Inputs are read where they lie, and outputs are written into the arrays that `run` returns; with any shape they are
    copied. `copied_bytes` counts what was copied. One engine runs one call at a time.

    Args:
        threads: of one operator; None lets OpenVINO decide.
        options: properties of OpenVINO's CPU plugin; {"INFERENCE_PRECISION_HINT": "f32"} overrules the file.
    """

    def __init__(self, path: Path, *, threads: int | None = None, options: Mapping[str, str] | None = None) -> None:
        try:
            import openvino
        except ImportError as error:
            raise EngineError("target 'openvino' needs openvino: pip install \"dcompile[openvino]\"") from error
        self.path = path
        self.copied_bytes = 0
        self._openvino = openvino
        self._core = openvino.Core()
        try:
            self._model = self._core.read_model(path, path.parent / WEIGHTS_FILE)
        except Exception as error:
            version = openvino.__version__.partition("-")[0]
            raise EngineError(f"{path}: OpenVINO {version} does not load it: {_reason(error)}") from error
        self._settings = _settings(self._model, threads) | dict(options or {})
        self.inputs = {node.friendly_name: _port(node.output(0)) for node in self._model.get_parameters()}
        self.outputs = {node.friendly_name: _port(node.output(0)) for node in self._model.get_results()}
        self._fixed_shapes: Shapes | None = None
        self._fixed: Any = None  # a request for the shapes above, and one for any
        self._any: Any = None

    def run(self, inputs: dict[str, Array], /) -> dict[str, Array]:
        given = [self._checked(name, port, inputs) for name, port in self.inputs.items()]
        shapes = tuple(value.shape for value in given)
        request = self._request(shapes)
        for index, value in enumerate(given):
            request.set_input_tensor(index, self._openvino.Tensor(value, shared_memory=True))
        written = self._outputs(request) if shapes == self._fixed_shapes else None
        try:
            request.start_async()
            request.wait()
        except Exception as error:
            raise EngineError(f"{self.path}: OpenVINO failed: {_reason(error)}") from error
        return written if written is not None else self._copies(request)

    def _checked(self, name: str, port: Port, inputs: Mapping[str, Array]) -> Array:
        if name not in inputs:
            raise EngineError(f"{self.path}: input {name!r} is missing")
        value = np.asarray(inputs[name])
        fits = len(port.shape) == value.ndim and all(
            want in (None, have) for want, have in zip(port.shape, value.shape, strict=True)
        )
        if value.dtype != port.dtype or not fits:
            needed = ", ".join("?" if dim is None else str(dim) for dim in port.shape)
            found = f"{value.dtype} {list(value.shape)}"
            raise EngineError(f"{self.path}: input {name!r} is {found}, needed {port.dtype} [{needed}]")
        if value.flags.c_contiguous and value.flags.writeable:  # OpenVINO takes no other, though it only reads
            return value
        self.copied_bytes += value.nbytes
        return np.array(value, order="C")

    def _request(self, shapes: Shapes) -> Any:
        """The request that runs these shapes; the first time, its model is compiled."""
        if shapes == self._fixed_shapes:
            return self._fixed
        if self._fixed_shapes is None:
            self._fixed = self.compiled(shapes).create_infer_request()
            self._fixed_shapes = shapes
            return self._fixed
        if self._any is None:
            self._any = self.compiled(None).create_infer_request()
        return self._any

    def compiled(self, shapes: Shapes | None) -> Any:
        """OpenVINO's compiled model for inputs of these shapes, or of any."""
        model = self._model
        try:
            if shapes is not None:
                model = model.clone()  # its weights are those of the original
                # Not model.reshape(): it ties the shape of 4-bit weights to the layer's input, and so unpacks them.
                for parameter, shape in zip(model.get_parameters(), shapes, strict=True):
                    parameter.set_partial_shape(self._openvino.PartialShape(list(shape)))
                model.validate_nodes_and_infer_types()
            return self._core.compile_model(model, "CPU", self._settings)
        except Exception as error:
            version = self._openvino.__version__.partition("-")[0]
            given = "" if shapes is None else f" for {_spelled(self.inputs, shapes)}"
            raise EngineError(
                f"{self.path}: OpenVINO {version} does not compile it{given}: {_reason(error)}"
            ) from error

    def _outputs(self, request: Any) -> dict[str, Array]:
        """Fresh arrays that the request will write to: those of the last run may live on as states."""
        arrays = {}
        for index, (name, port) in enumerate(self.outputs.items()):
            shape = request.model_outputs[index].shape
            arrays[name] = np.empty(shape, port.dtype)
            request.set_output_tensor(index, self._openvino.Tensor(arrays[name], shared_memory=True))
        return arrays

    def _copies(self, request: Any) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        for index, name in enumerate(self.outputs):
            arrays[name] = np.array(request.get_output_tensor(index).data)
            self.copied_bytes += arrays[name].nbytes
        return arrays


def _settings(model: Any, threads: int | None) -> dict[str, Any]:
    precision = model.get_rt_info(list(PRECISION_INFO)).astype(str) if model.has_rt_info(list(PRECISION_INFO)) else ""
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        # Said, not left to OpenVINO, which takes bf16 wherever the CPU has it.
        "INFERENCE_PRECISION_HINT": _HINTS.get(precision, "f32"),
        # Weights of fewer bits alone: OpenVINO would round the activations beside them to INT8 as well.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        # Engines of one bundle run in turn: bound to cores, their threads would wait for whatever else runs there.
        "ENABLE_CPU_PINNING": "NO",
    }
    return settings | ({"INFERENCE_NUM_THREADS": str(threads)} if threads else {})


def _port(output: Any) -> Port:
    dtype = output.element_type.get_type_name()
    shape = tuple(dim.get_length() if dim.is_static else None for dim in output.partial_shape)
    return Port(_DTYPES.get(dtype, dtype), shape)


def _spelled(names: Iterable[str], shapes: Shapes) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes, strict=True))


def _reason(error: Exception) -> str:
    """OpenVINO names source files first and says what is wrong in the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
