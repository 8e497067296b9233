"""TensorRT engines on an NVIDIA GPU: TensorRT or TensorRT for RTX, and cuda-python for memory and stream; no PyTorch.

Beside each engine lies `<engine>.json`, which says how it was built: an engine tells neither the package and GPUs that
it is for, nor the names of its profiles, before it is loaded.
"""

import importlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .cuda import compute_capability, why_no_gpu
from .decode import decode
from .engines import Array, Port
from .errors import BundleError, EngineError, RequestError
from .manifest import StateSpec

_EXTRA = "pip install 'dcompile[trt]' cuda-bindings"

Profile = tuple[int, int, int]  # least, usual and largest batch


@dataclass(frozen=True)
class EngineFacts:
    """How an engine was built.

    package: "tensorrt" or "tensorrt_rtx", which also loads it. compute_capabilities: of the GPUs that it is for.
    precision: of what is not quantised. inputs, outputs: in order. profiles: by name, in the engine's order.
    """

    package: str
    version: str
    compute_capabilities: tuple[str, ...]
    precision: str
    inputs: Mapping[str, StateSpec]
    outputs: Mapping[str, StateSpec]
    profiles: Mapping[str, Profile]


def facts_file(engine: Path) -> Path:
    return engine.with_suffix(".json")


def write_facts(facts: EngineFacts, engine: Path) -> None:
    facts_file(engine).write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")


def read_facts(engine: Path) -> EngineFacts:
    """Raises BundleError when the file beside the engine is missing or damaged."""
    path = facts_file(engine)
    try:
        facts: EngineFacts = decode(EngineFacts, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read ({error}); copy the bundle again") from error
    except BundleError as error:
        raise BundleError(f"{path}: {error}; copy the bundle again") from None
    return facts


def pick_profile(profiles: Mapping[str, Profile], batch: int) -> int:
    """Number of the profile for a batch: of those that take it the narrowest, as its kernels are the most specific.

    Raises RequestError, naming the profiles, when none takes it.
    """
    fitting = [
        (most - least, index) for index, (least, _, most) in enumerate(profiles.values()) if least <= batch <= most
    ]
    if not fitting:
        known = ", ".join(f"{name} ({least} to {most})" for name, (least, _, most) in profiles.items())
        raise RequestError(
            f"a batch of {batch} is outside the profiles of this bundle: {known}; split the request, or compile again "
            "with another --profile"
        )
    return min(fitting)[1]


def batch_of(inputs: Mapping[str, StateSpec], given: Mapping[str, Array]) -> int:
    """The batch that the given arrays have; 1 where no input has one. Raises RequestError for a wrong input."""
    if missing := inputs.keys() - given.keys():
        raise RequestError(f"input {min(missing)!r} is missing; give {', '.join(inputs)}")
    batch = next((found for name, spec in inputs.items() if (found := _batch(spec, given[name].shape))), 1)
    for name, spec in inputs.items():
        dtype, shape = str(given[name].dtype), given[name].shape
        if (dtype, shape) != (spec.dtype, spec.at(batch)):
            needed = f"{spec.dtype} {list(spec.at(batch))} at a batch of {batch}"
            raise RequestError(f"input {name!r} is {dtype} {list(shape)}, needed {needed}")
    return batch


def _batch(spec: StateSpec, shape: tuple[int, ...]) -> int | None:
    """What the first size that follows the batch says; None where none does."""
    sizes = zip(shape, spec.shape, strict=False)
    return next((size // dim[1] for size, dim in sizes if not isinstance(dim, int)), None)


def why_nothing_runs() -> str | None:
    """Why no TensorRT engine can run on this machine, in words; None if those for its GPU can."""
    if why := why_no_gpu():
        return why
    if not (find_spec("cuda") and find_spec("cuda.bindings")):
        return "the package cuda-bindings is not installed (pip install cuda-bindings)"
    return None


class TensorRtEngine:
    """One engine on the first GPU. Inputs are copied to it and outputs back; its buffers are kept between calls.

    copied_bytes: both ways, since the engine was loaded. threads, options: none apply.
    """

    def __init__(self, path: Path, *, threads: int | None = None, options: Mapping[str, str] | None = None) -> None:
        self.path, self.copied_bytes = path, 0
        self._stream: Any = None
        self.facts = read_facts(path)
        self._check_machine()
        self._cuda, trt = _import("cuda.bindings.runtime"), _import(self.facts.package)
        self._log = _logger(self.facts.package)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            why = self._log.last or "it gives no reason"
            raise EngineError(f"{path}: {self.facts.package} {trt.__version__} does not load it: {why}; compile again")
        self._stream = self._did(self._cuda.cudaStreamCreate(), "make a stream")
        self._contexts: dict[int, Any] = {}
        self._buffers: dict[str, tuple[int, int]] = {}  # port -> (address, bytes)
        self.inputs = _ports(self.facts.inputs)
        self.outputs = _ports(self.facts.outputs)

    def run(self, inputs: dict[str, Array], /) -> dict[str, Array]:
        facts = self.facts
        batch = batch_of(facts.inputs, inputs)
        context = self._context(pick_profile(facts.profiles, batch) if facts.profiles else 0)
        for name, spec in facts.inputs.items():
            array = np.ascontiguousarray(inputs[name])
            address = self._buffer(name, array.nbytes)
            self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")
            context.set_input_shape(name, spec.at(batch))
            context.set_tensor_address(name, address)
        results = {name: np.empty(spec.at(batch), spec.dtype) for name, spec in facts.outputs.items()}
        for name, array in results.items():
            context.set_tensor_address(name, self._buffer(name, array.nbytes))
        if not context.execute_async_v3(int(self._stream)):
            raise EngineError(f"{self.path}: {facts.package} failed: {self._log.last or 'it gives no reason'}")
        for name, array in results.items():
            self._copy(array.ctypes.data, self._buffers[name][0], array.nbytes, "cudaMemcpyDeviceToHost")
        self._did(self._cuda.cudaStreamSynchronize(self._stream), "finish the step")
        return results

    def close(self) -> None:
        """Give the GPU's memory back."""
        self._contexts.clear()
        for address, _ in self._buffers.values():
            self._cuda.cudaFree(address)
        self._buffers.clear()
        self._engine = None
        if self._stream is not None:
            self._cuda.cudaStreamDestroy(self._stream)
            self._stream = None

    def __del__(self) -> None:
        with suppress(AttributeError, TypeError):  # not wholly made, or the interpreter is shutting down
            self.close()

    def _check_machine(self) -> None:
        if why := why_nothing_runs():
            raise EngineError(
                f"{self.path}: {why}, and a TensorRT engine runs on an NVIDIA GPU; run it where one is, or compile for "
                "--target onnx"
            )
        own, wanted = compute_capability(), self.facts.compute_capabilities
        if own not in wanted:
            raise EngineError(
                f"{self.path}: built for compute capability {', '.join(wanted)}, the GPU here is {own}; compile again "
                f"with --compute-capability {own}"
            )

    def _context(self, profile: int) -> Any:
        """The execution context of a profile, made when it is first asked for."""
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(profile, int(self._stream)):
                why = self._log.last or "it gives no reason"
                raise EngineError(f"{self.path}: no execution context for profile {profile}: {why}; free GPU memory")
            self._did(self._cuda.cudaStreamSynchronize(self._stream), "set the profile")
            self._contexts[profile] = context
        return self._contexts[profile]

    def _buffer(self, name: str, size: int) -> int:
        """Address of at least `size` bytes on the GPU, kept for the port."""
        address, have = self._buffers.get(name, (0, 0))
        if have < size:
            if address:
                self._did(self._cuda.cudaFree(address), "free memory")
            self._buffers.pop(name, None)
            address = int(self._did(self._cuda.cudaMalloc(size), f"allocate {size} bytes"))
            self._buffers[name] = address, size
        return address

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        how = getattr(self._cuda.cudaMemcpyKind, kind)
        self._did(self._cuda.cudaMemcpyAsync(target, source, size, how, self._stream), "copy")
        self.copied_bytes += size

    def _did(self, result: tuple[Any, ...], what: str) -> Any:
        """What a CUDA call gave. Raises EngineError when it failed."""
        code, *values = result
        if int(code):
            _, text = self._cuda.cudaGetErrorString(code)
            reason = text.decode() if isinstance(text, bytes) else str(text)
            raise EngineError(f"{self.path}: the GPU could not {what}: {reason}")
        return values[0] if values else None


def _ports(specs: Mapping[str, StateSpec]) -> dict[str, Port]:
    return {
        name: Port(spec.dtype, tuple(dim if isinstance(dim, int) else None for dim in spec.shape))
        for name, spec in specs.items()
    }


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise EngineError(f"target 'trt' needs {package.partition('.')[0]} to run: {_EXTRA}") from error


@cache
def _logger(package: str) -> Any:
    """One that prints nothing and keeps the last error; TensorRT takes one a process, the first."""
    trt = _import(package)
    base: Any = trt.ILogger

    class Logger(base):  # type: ignore[misc]  # the package has no types
        def __init__(self) -> None:
            base.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last = message.strip().partition("\n")[0]

    return Logger()
