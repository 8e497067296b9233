"""What a network takes and gives: the roles of its inputs, by table for diffusers classes, by YAML for any other."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from .errors import IngestError
from .recipe import what_failed

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]


class ConditionSpec(BaseModel):
    """One conditioning input, shape without the batch.

    classes: number of labels, when the input is a label. unconditional: the label that means "none" under guidance;
    where it is absent, guidance asks for a second input, `negative_<name>`. constant: a number that is always fed, and
    not asked for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: tuple[int, ...] = ()
    dtype: Literal["float32", "int64", "bool"] = "float32"
    classes: int | None = None
    unconditional: int | None = None
    labels: str | tuple[str, ...] | None = Field(
        default=None, description="class names, or a JSON file beside the model"
    )
    constant: float | None = None
    batched: bool = True


class NetworkSpec(BaseModel):
    """The roles of a network's inputs. As a file: YAML, `contract.yaml` in the model's folder or --contract FILE."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sample: str = Field(description="name of the argument that takes the noisy sample")
    sample_shape: tuple[int, ...] | None = Field(default=None, description="without the batch")
    timestep: str = "timestep"
    timestep_scale: float = 1.0
    conditions: dict[str, ConditionSpec] = Field(default_factory=dict)
    predicts: Prediction | None = None
    value_range: tuple[float, float] | None = None
    guidance: float | None = Field(default=None, description="default of --guidance")
    steps: int | None = Field(default=None, description="default of --steps")


# Arguments of diffusers networks, by name: the shape's entries are sizes, or the config keys that hold them (the first
# that is set); "tokens" is the number of text tokens. An argument that is not here must be optional.
SAMPLE_ARGUMENTS = ("hidden_states", "sample")
CONDITION_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "encoder_hidden_states": (
        "tokens",
        ("caption_channels", "joint_attention_dim", "text_dim", "text_embed_dim", "cross_attention_dim"),
    ),
    "pooled_projections": (("pooled_projection_dim",),),
    "encoder_attention_mask": ("tokens",),
}
# What the classes differ in beyond their signatures: default text tokens, prediction and unit of time.
FAMILIES: dict[str, dict[str, Any]] = {
    "PixArtTransformer2DModel": {"tokens": 120},
    "SD3Transformer2DModel": {"tokens": 333, "predicts": "flow"},
    "FluxTransformer2DModel": {"tokens": 512, "predicts": "flow", "timestep_scale": 1e-3, "packed": True},
    "WanTransformer3DModel": {"tokens": 512, "predicts": "flow", "video": True},
    "HunyuanVideoTransformer3DModel": {"tokens": 256, "predicts": "flow", "video": True},
}
DEFAULT_TOKENS = 77
FLUX_GUIDANCE = 3.5


def read_yaml(path: Path) -> dict[str, Any]:
    """Raises IngestError when the file is missing, is not YAML or is no mapping."""
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise IngestError(f"contract {path}: cannot be read ({what_failed(error)})") from error
    if not isinstance(data, dict):
        raise IngestError(
            f"contract {path}: needs a mapping with at least `sample: <argument name>`; found {type(data).__name__}"
        )
    return data


def parse_spec(data: Mapping[str, Any], where: str) -> NetworkSpec:
    """Raises IngestError naming the key that is wrong."""
    try:
        return NetworkSpec.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        hint = f"; known keys: {', '.join(NetworkSpec.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise IngestError(f"contract {where}: {key}: {first['msg']}{hint}") from error


def check_roles(spec: NetworkSpec, network: nn.Module) -> None:
    """Raises IngestError when the contract and the arguments of the network's forward do not fit each other."""
    parameters = inspect.signature(network.forward).parameters
    names = getattr(network, "argument_names", None) or tuple(parameters)
    class_name = type(network).__name__
    for role, name in [
        ("sample", spec.sample),
        ("timestep", spec.timestep),
        *(("condition", n) for n in spec.conditions),
    ]:
        if name not in names:
            raise IngestError(
                f"contract: {role} is {name!r}, but {class_name}.forward takes {', '.join(names)}; name one of these"
            )
    given = {spec.sample, spec.timestep, *spec.conditions}
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and parameter.kind not in optional and name not in given:
            raise IngestError(
                f"contract: {class_name}.forward needs {name!r}, which has no role; add it under `conditions`"
            )


def infer_spec(network: nn.Module, shape: Sequence[int] | None, predicts: str | None) -> NetworkSpec:
    """The contract of a diffusers network, from its forward's signature and its config.

    shape: sample without batch, where the user gave one. predicts: from the scheduler's config, where there is one.
    Raises IngestError when the class has no sample argument that is known, or when a size must be given.
    """
    class_name = type(network).__name__
    config: Mapping[str, Any] = getattr(network, "config", {})
    family = FAMILIES.get(class_name, {})
    parameters = inspect.signature(network.forward).parameters
    sample = next((name for name in SAMPLE_ARGUMENTS if name in parameters), None)
    if sample is None or not config:
        raise IngestError(
            f"{class_name}: cannot tell what its arguments ({', '.join(parameters)}) mean; "
            "give a contract with --contract FILE.yaml"
        )
    conditions = _label_conditions(class_name, config, parameters)
    for name, entries in CONDITION_ARGUMENTS.items():
        if name in parameters and (sizes := _sizes(entries, config, family)) is not None:
            if name == "encoder_attention_mask" and parameters[name].default is None:
                continue
            conditions[name] = ConditionSpec(shape=sizes)
    if config.get("guidance_embeds"):
        conditions["guidance"] = ConditionSpec(constant=FLUX_GUIDANCE)
    found = {
        "sample": sample,
        "sample_shape": tuple(shape) if shape else _sample_shape(class_name, config, family),
        "timestep_scale": family.get("timestep_scale", 1.0),
        "conditions": conditions,
        "predicts": predicts or family.get("predicts") or "epsilon",
        "value_range": (-1.0, 1.0) if config.get("in_channels") in (1, 3) else None,
    }
    return parse_spec(found, f"of {class_name}")


def _label_conditions(
    class_name: str, config: Mapping[str, Any], parameters: Mapping[str, Any]
) -> dict[str, ConditionSpec]:
    if "class_labels" not in parameters:
        return {}
    if config.get("norm_type") in ("ada_norm_zero", "ada_norm") and (count := config.get("num_embeds_ada_norm")):
        return {"class_labels": ConditionSpec(dtype="int64", classes=count, unconditional=count)}
    if count := config.get("num_class_embeds"):
        return {"class_labels": ConditionSpec(dtype="int64", classes=count)}
    return {}


def _sizes(entries: tuple[Any, ...], config: Mapping[str, Any], family: Mapping[str, Any]) -> tuple[int, ...] | None:
    sizes = []
    for entry in entries:
        if entry == "tokens":
            sizes.append(family.get("tokens", DEFAULT_TOKENS))
            continue
        value = next((config[key] for key in entry if config.get(key) is not None), None)
        if value is None:
            return None
        sizes.append(value[0] if isinstance(value, tuple | list) else value)
    return tuple(int(size) for size in sizes)


def _sample_shape(class_name: str, config: Mapping[str, Any], family: Mapping[str, Any]) -> tuple[int, ...]:
    channels, size = config.get("in_channels"), config.get("sample_size")
    if family.get("video") or family.get("packed") or channels is None or size is None:
        example = (
            "16x5x32x32 (channels, frames, height, width)"
            if family.get("video")
            else "4x64x64 (channels, height, width)"
        )
        if family.get("packed"):
            example = "1024x64 (tokens, channels)"
        raise IngestError(
            f"{class_name}: its config does not tell the size of a sample; "
            f"give it as --shape, for example --shape {example}"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return (int(channels), int(height), int(width))


def extra_arguments(network: nn.Module, spec: NetworkSpec) -> dict[str, Tensor | Any]:
    """Arguments that are the same at every step and for every sample: position ids of packed latents, empty extras."""
    import torch

    parameters = inspect.signature(network.forward).parameters
    extras: dict[str, Any] = {}
    if "return_dict" in parameters:
        extras["return_dict"] = False
    if "img_ids" in parameters and spec.sample_shape is not None:
        tokens = spec.sample_shape[0]
        side = int(tokens**0.5)
        grid = torch.zeros(tokens, 3)
        grid[:, 1] = torch.arange(tokens) // side
        grid[:, 2] = torch.arange(tokens) % side
        extras["img_ids"] = grid
        extras["txt_ids"] = torch.zeros(spec.conditions["encoder_hidden_states"].shape[0], 3)
    if "added_cond_kwargs" in parameters and getattr(network, "config", {}).get("norm_type") == "ada_norm_single":
        extras["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return extras
