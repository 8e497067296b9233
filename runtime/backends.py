"""Which engine runs the files of a target; its package is loaded with the first one."""

from collections.abc import Mapping
from pathlib import Path

from .engines import Engine
from .errors import EngineError, did_you_mean

TARGETS = ("onnx", "openvino", "trt", "aoti")


def open_engine(
    target: str, path: Path, *, threads: int | None = None, options: Mapping[str, str] | None = None
) -> Engine:
    """The engine in the file `path`. Raises EngineError for an unknown target, a missing package or a damaged file."""
    if target == "onnx":
        from .onnx_engine import OnnxEngine

        return OnnxEngine(path, threads=threads, options=options)
    if target == "openvino":
        from .openvino_engine import OpenVinoEngine

        return OpenVinoEngine(path, threads=threads, options=options)
    if target == "trt":
        from .tensorrt_engine import TensorRtEngine

        return TensorRtEngine(path, threads=threads, options=options)
    if target == "aoti":
        from .aoti_engine import AotiEngine

        return AotiEngine(path, threads=threads, options=options)
    raise EngineError(f"this runtime has no engine for target {target!r}; {did_you_mean(target, TARGETS)}")
