"""What the Python backend of Triton Inference Server runs: one bundle, answering the requests of a batch at once.

`dcompile deploy triton` writes a model.py that does no more than import TritonPythonModel from here.
"""

import json
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .cuda import gpu_count
from .errors import DcompileError, EngineError, RequestError
from .manifest import Contract
from .merge import Request, Samples, generate_merged
from .request import as_labels
from .session import load

SEED, LABEL, STEPS = "seed", "label", "steps"  # inputs beside the conditions, which go by their own names
SAMPLES, IMAGES = "samples", "images"  # outputs
BUNDLE = "bundle"  # the folder in that of the model's version
THREADS = "threads"  # a parameter in config.pbtxt

_VISIBLE = "CUDA_VISIBLE_DEVICES"


class TritonPythonModel:
    """One instance of a model: the server makes it in a process of its own, and calls its methods one at a time."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the bundle; what is wrong with it is the server's error message for this model."""
        # Not imported above: the server has it, and no package does.
        self._backend: Any = import_module("triton_python_backend_utils")
        _check_arrays(self._backend)
        if args["model_instance_kind"] == "GPU":
            _see_one_gpu(args["model_instance_device_id"])
        parameters = json.loads(args["model_config"])["parameters"]
        threads = int(parameters[THREADS]["string_value"]) if THREADS in parameters else None
        folder = Path(args["model_repository"]) / args["model_version"]
        self._session = load(folder / BUNDLE, threads=threads)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response to each request, in order: tensors, or an error in one sentence."""
        contract = self._session.manifest.contract
        asked = [_asked(contract, {each.name(): each.as_numpy() for each in request.inputs()}) for request in requests]
        answers = generate_merged(self._session, asked)
        return [self._response(request, answer) for request, answer in zip(requests, answers, strict=True)]

    def finalize(self) -> None:
        self._session.close()

    def _response(self, request: Any, answer: Samples | DcompileError) -> Any:
        backend = self._backend
        if isinstance(answer, DcompileError):
            caller_can_mend = isinstance(answer, RequestError)
            code = backend.TritonError.INVALID_ARG if caller_can_mend else backend.TritonError.INTERNAL
            return backend.InferenceResponse(error=backend.TritonError(str(answer), code))
        tensors = []
        for name in request.requested_output_names():
            values = self._session.images(answer) if name == IMAGES else answer
            tensors.append(backend.Tensor(name, np.ascontiguousarray(values)))
        return backend.InferenceResponse(tensors)


def _asked(contract: Contract, inputs: Mapping[str, Any]) -> Request | DcompileError:
    """The request that tensors [B, ...] spell, or what is wrong with them.

    The server has checked names, dtypes and shapes, but not what is missing; a scalar comes as [B, 1].
    """
    for name in (SEED, *(each.name for each in contract.conditions if each.labels is None)):
        if name not in inputs:
            return RequestError(f"input {name!r} is missing; give one for each sample")
    classes = next((each.name for each in contract.conditions if each.labels is not None), None)
    if classes is not None and (LABEL in inputs) == (classes in inputs):
        found = "both are there" if LABEL in inputs else "neither is there"
        return RequestError(f"give {classes!r} as numbers or {LABEL!r} as names, one of the two; {found}")
    for steps in np.unique(inputs.get(STEPS, contract.steps)):
        if steps != contract.steps:
            only = f"this bundle takes {contract.steps}, for which it was compiled; leave {STEPS!r} out"
            return RequestError(f"steps {steps}: {only}")
    texts = [text.decode(errors="replace") for text in inputs[LABEL].reshape(-1)] if LABEL in inputs else None
    return Request(
        seeds=inputs[SEED].reshape(-1).tolist(),
        labels=as_labels(contract, texts) if texts else None,
        conditions={
            each.name: inputs[each.name].reshape(-1, *each.shape) for each in contract.conditions if each.name in inputs
        },
    )


def _check_arrays(backend: Any) -> None:
    """Raises EngineError where the server would garble arrays.

    A backend that was built before numpy 2 takes the size of its elements for zero, and says nothing: all elements of
    an array are then its first.
    """
    counted = np.arange(1, 4)
    given = backend.Tensor.from_dlpack("counted", backend.Tensor("counted", counted).to_dlpack()).as_numpy()
    if not np.array_equal(given, counted):
        found = f"this server's Python backend cannot exchange arrays with numpy {np.__version__}"
        raise EngineError(f"{found}; install 'numpy<2' for the Python that it runs")


def _see_one_gpu(number: str) -> None:
    """Hides all GPUs but one from this process. `number` counts those that the server sees."""
    visible = os.environ.get(_VISIBLE)
    os.environ[_VISIBLE] = visible.split(",")[int(number)] if visible else number
    if (count := gpu_count()) != 1:
        raise EngineError(
            f"this instance is to run on GPU {number} alone, and its process sees {count}; "
            f"start one server a GPU, each with {_VISIBLE} set"
        )
