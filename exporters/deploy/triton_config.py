"""config.pbtxt: what Triton Inference Server knows of a model before it loads it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...compiler.errors import UnsupportedError
from ...runtime.errors import BundleError, RequestError
from ...runtime.manifest import Manifest
from ...runtime.triton_model import IMAGES, LABEL, SAMPLES, SEED, STEPS, THREADS

FILE = "config.pbtxt"
USUAL_MAX_BATCH = 8

_DTYPES = {
    "float32": "TYPE_FP32", "float16": "TYPE_FP16", "float64": "TYPE_FP64", "int64": "TYPE_INT64",
    "int32": "TYPE_INT32", "int8": "TYPE_INT8", "uint8": "TYPE_UINT8", "bool": "TYPE_BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Serving:
    """How a server runs a model.

    instances: processes, on each of the gpus if there are any. max_batch: samples that are generated at once; None is
    8, or fewer if the bundle takes fewer. max_queue_delay_us: how long a request waits for others to be merged with.
    threads: of an engine; None lets it decide. gpus: numbers; none means the CPU.
    """

    instances: int = 1
    max_batch: int | None = None
    max_queue_delay_us: int = 5000
    threads: int | None = None
    gpus: tuple[int, ...] = ()


def model_config(name: str, manifest: Manifest, serving: Serving, merges: bool) -> Any:
    """The ModelConfig message. merges: whether the server may generate for several requests at once."""
    config = _messages().ModelConfig(name=name, backend="python", max_batch_size=max_batch(manifest, serving))
    config.version_policy.latest.num_versions = 1
    _add_inputs(config, manifest)
    _add_outputs(config, manifest)
    group = config.instance_group.add(count=serving.instances)
    group.kind = group.KIND_GPU if serving.gpus else group.KIND_CPU
    group.gpus.extend(serving.gpus)
    if merges:
        config.dynamic_batching.max_queue_delay_microseconds = serving.max_queue_delay_us
    if serving.threads is not None:
        config.parameters[THREADS].string_value = str(serving.threads)
    _add_warmup(config)
    return config


def max_batch(manifest: Manifest, serving: Serving) -> int:
    most = manifest.contract.batch.max
    if serving.max_batch is not None and not 1 <= serving.max_batch <= most:
        raise RequestError(
            f"--max-batch {serving.max_batch}: this bundle takes 1 to {most}; compile for a larger batch"
        )
    return serving.max_batch or min(most, USUAL_MAX_BATCH)


def write_config(config: Any, comment: str, path: Path) -> None:
    """Writes the text form, once it is known to be read back as the same message."""
    from google.protobuf import text_format

    text = f"# {comment}\n{text_format.MessageToString(config)}"
    if text_format.Parse(text, _messages().ModelConfig()) != config:
        raise BundleError(f"{path}: what was to be written does not read back as the same configuration")
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def _add_inputs(config: Any, manifest: Manifest) -> None:
    config.input.add(name=SEED, data_type="TYPE_INT64", dims=[1])
    named = [each.name for each in manifest.contract.conditions if each.labels is not None]
    if len(named) > 1:
        raise UnsupportedError(
            f"conditions {' and '.join(named)} both have label names; deploy takes one such condition"
        )
    for each in manifest.contract.conditions:
        if each.name in (SEED, LABEL, STEPS):
            raise UnsupportedError(
                f"a condition is called {each.name!r}, as an input of every deployed model; rename it"
            )
        config.input.add(
            name=each.name, data_type=_DTYPES[each.dtype], dims=each.shape or [1], optional=each.name in named
        )
    if named:
        config.input.add(name=LABEL, data_type="TYPE_STRING", dims=[1], optional=True)
    config.input.add(name=STEPS, data_type="TYPE_INT64", dims=[1], optional=True)


def _add_outputs(config: Any, manifest: Manifest) -> None:
    """Samples as numbers; also as pixels, unless they are latents or no pictures at all."""
    contract = manifest.contract
    config.output.add(name=SAMPLES, data_type="TYPE_FP32", dims=contract.sample.shape)
    if len(contract.sample.shape) == 3 and contract.value_range is not None:
        channels, height, width = contract.sample.shape
        config.output.add(name=IMAGES, data_type="TYPE_UINT8", dims=[height, width, channels])


def _add_warmup(config: Any) -> None:
    """One sample before the model is ready, so that the first caller does not pay for what engines do only once."""
    warmup = config.model_warmup.add(name="one sample", batch_size=1)
    for each in config.input:
        if each.name in (LABEL, STEPS):
            continue
        warmup.inputs[each.name].data_type = each.data_type
        warmup.inputs[each.name].dims.extend(each.dims)
        warmup.inputs[each.name].zero_data = True


def _messages() -> Any:
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        needs = "deploy triton checks what it writes with tritonclient"
        raise UnsupportedError(f"{needs}: pip install 'dcompile[triton]'") from error
    return model_config_pb2
