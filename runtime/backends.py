"""Which engine runs the files of a target; its package is loaded with the first one."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from .engines import Engine
from .errors import EngineError, did_you_mean

# Target -> the module beside this one, and the class in it, that opens its files.
ENGINES = {
    "onnx": ("onnx_engine", "OnnxEngine"),
    "openvino": ("openvino_engine", "OpenVinoEngine"),
    "trt": ("tensorrt_engine", "TensorRtEngine"),
    "aoti": ("aoti_engine", "AotiEngine"),
}


def open_engine(
    target: str, path: Path, *, threads: int | None = None, options: Mapping[str, str] | None = None
) -> Engine:
    """The engine in the file `path`. Raises EngineError for an unknown target, a missing package or a damaged file."""
    if target not in ENGINES:
        raise EngineError(f"this runtime has no engine for target {target!r}; {did_you_mean(target, ENGINES)}")
    module, name = ENGINES[target]
    engine: Engine = getattr(import_module(f".{module}", __package__), name)(path, threads=threads, options=options)
    return engine
