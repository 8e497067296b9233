"""Which number formats each target multiplies in: data, and the two questions asked of it before any work.

Found by building and running each pair: ONNX Runtime 1.31 and OpenVINO 2026.4 on a CPU, TensorRT for RTX 1.7.1 by the
layers that it compiled. Where a target would take a format and then compute in another one, it is refused here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..compiler.errors import RecipeError

Runs = Literal["native", "weights", "refused"]
Pair = tuple[str, str]  # weights, activations: "static", "dynamic" or "none", as the options of quantize

# --- the data ---


@dataclass(frozen=True)
class Rule:
    """What a target makes of a pair of formats.

    runs: "native", multiplied in the format; "weights", stored in it and multiplied as real numbers; "refused".
    note: how it runs, or why it is refused. instead: the nearest legal choice, as the user would write it.
    symmetric: the only value of that option that is legal, or None where it does not matter.
    groups: (least, largest) int4 group, a power of two.
    """

    runs: Runs
    note: str = ""
    instead: str = ""
    symmetric: bool | None = None
    groups: tuple[int, int] | None = None


_NO_FP8_CPU = Rule("refused", "there is no FP8 kernel for CPUs", "format=int8")
_NO_FP4_CPU = Rule("refused", "there is no FP4 kernel for CPUs", "format=int4")

RULES: Mapping[str, Mapping[Pair, Rule]] = {
    "onnx": {
        ("int8", "static"): Rule("native"),
        ("int8", "dynamic"): Rule("native", "one grid for the tensor", symmetric=False),
        ("int8", "none"): Rule("weights"),
        ("int4", "none"): Rule("weights", groups=(16, 256)),
        ("fp8", "static"): _NO_FP8_CPU,
        ("fp8", "none"): replace(_NO_FP8_CPU, instead="format=int8,activations=none"),
        ("nvfp4", "dynamic"): _NO_FP4_CPU,
        ("nvfp4", "none"): replace(_NO_FP4_CPU, instead="format=int4, or --target openvino"),
    },
    "openvino": {
        ("int8", "static"): Rule("native"),
        ("int8", "dynamic"): Rule("refused", "it takes the ranges apart and multiplies in fp32", "activations=static"),
        ("int8", "none"): Rule("weights"),
        ("int4", "none"): Rule("weights", groups=(32, 256)),
        ("fp8", "static"): Rule("refused", "it multiplies FP8 as fp32, slower than fp32 itself", "format=int8"),
        ("fp8", "none"): Rule("refused", "it multiplies FP8 as fp32", "format=int8,activations=none"),
        ("nvfp4", "dynamic"): Rule("refused", "it has no FP4 activations", "activations=none"),
        ("nvfp4", "none"): Rule("weights"),
    },
    "trt": {
        ("int8", "static"): Rule("native", symmetric=True),
        ("int8", "dynamic"): Rule("native", "one grid a token", symmetric=True),
        ("int8", "none"): Rule("weights"),
        ("int4", "none"): Rule("weights", groups=(16, 128)),
        ("fp8", "static"): Rule("native"),
        ("fp8", "none"): Rule("weights"),
        ("nvfp4", "dynamic"): Rule("native"),
        ("nvfp4", "none"): Rule("weights", "dequantised by a kernel of its own"),
    },
    "aoti": {
        ("int8", "static"): Rule("native"),
        ("int8", "dynamic"): Rule("native"),
        ("int8", "none"): Rule("weights"),
        ("int4", "none"): Rule("weights", groups=(2, 4096)),
        ("fp8", "static"): Rule("refused", "it would round to FP8 and multiply in full precision", "format=int8"),
        ("fp8", "none"): Rule("weights"),
        ("nvfp4", "dynamic"): Rule(
            "refused", "it would round to FP4 and multiply in full precision", "activations=none"
        ),
        ("nvfp4", "none"): Rule("weights"),
    },
}

# NVIDIA's GPUs by compute capability. TensorRT for RTX builds for these; PORTABLE are those of the engine that is built
# when nothing is said: it grows by no byte for more than one.
KNOWN = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
PORTABLE = ("8.0", "8.6", "8.9", "12.0")
# The least that can compute in a format; TensorRT refuses a whole build for one capability that cannot.
LEAST = {"fp16": "7.5", "int8": "7.5", "bf16": "8.0", "fp32": "8.0", "int4": "8.0", "fp8": "8.9", "nvfp4": "10.0"}
# What to take where the capability cannot: the next format down, with about the same memory or speed.
_BELOW = {"nvfp4": "fp8", "fp8": "int8", "int4": "int8", "bf16": "fp16", "fp32": "fp16"}

# --- the questions ---


def check_legal(
    target: str, weights: str, activations: str, *, symmetric: bool | None = None, group: int | None = None,
    compute_capabilities: Sequence[str] = (), precision: str | None = None,
) -> None:  # fmt: skip
    """Raises RecipeError for what the target would not compute as asked, with the reason and the nearest legal choice.

    weights, activations, symmetric, group: the options of the quantize pass, all filled in. compute_capabilities, for
    "trt": those asked for, or () for the default.
    """
    rule = RULES[target][weights, activations]
    asked = f"quantize: format={weights},activations={activations}"
    if rule.runs == "refused":
        raise RecipeError(f"{asked}: target {target!r}: {rule.note}; take {rule.instead}")
    if activations != "none" and weights == "int8" and rule.symmetric is not None and bool(symmetric) != rule.symmetric:
        kind = {True: "uint8 with a zero point", False: "one int8 grid a token"}[rule.symmetric]
        wanted = str(rule.symmetric).lower()
        raise RecipeError(f"{asked}: target {target!r} does not multiply {kind}; take symmetric={wanted}")
    if weights == "int4" and rule.groups is not None and group is not None:
        least, largest = rule.groups
        if not least <= group <= largest or group & (group - 1):
            raise RecipeError(
                f"{asked}: group is {group}; target {target!r} takes a power of two from {least} to {largest}: take "
                f"group={_nearest_power(group, least, largest)}"
            )
    if target == "trt":
        check_capabilities(compute_capabilities, [weights, *([precision] if precision else [])])


def check_capabilities(wanted: Sequence[str], formats: Iterable[str], known: Sequence[str] = KNOWN) -> None:
    """Raises RecipeError for a compute capability that TensorRT does not build for, or that lacks a format."""
    for capability in wanted:
        if capability not in known:
            full = (
                ""
                if known != KNOWN
                else "; other GPUs need full TensorRT, installed where the GPU is: pip install tensorrt"
            )
            raise RecipeError(f"--compute-capability {capability}: TensorRT builds for {', '.join(known)} here{full}")
        for name in formats:
            if not _has(capability, name):
                others = [each for each in wanted if _has(each, name)] or [each for each in known if _has(each, name)]
                leave = f"--compute-capability {','.join(others)}" if others else "a newer GPU"
                option = "--precision" if name in ("bf16", "fp32") else "format"
                raise RecipeError(
                    f"--compute-capability {capability}: such GPUs do not compute in {name}, which needs "
                    f"{LEAST[name]} or above; take {option}={_BELOW[name]}, or {leave}"
                )


def default_capabilities(formats: Iterable[str]) -> tuple[str, ...]:
    """The portable set, without those that lack one of the formats."""
    needed = list(formats)
    return tuple(capability for capability in PORTABLE if all(_has(capability, name) for name in needed))


def formats_by_target() -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """(weights, activations, target -> what becomes of them in words), for every pair that quantize knows."""
    for weights, activations in RULES["onnx"]:
        yield weights, activations, {target: _spelled(target, weights, activations) for target in RULES}


def _spelled(target: str, weights: str, activations: str) -> str:
    rule = RULES[target][weights, activations]
    if rule.runs == "refused":
        return f"no: {rule.note}"
    parts = ["native" if rule.runs == "native" else "weights only"]
    if rule.note:
        parts.append(rule.note)
    if rule.groups is not None:
        parts.append(f"group {rule.groups[0]} to {rule.groups[1]}")
    if target == "trt":
        parts.append(f"GPU {LEAST[weights]} and above")
    return ", ".join(parts)


def _has(capability: str, name: str) -> bool:
    return _number(capability) >= _number(LEAST[name])


def _number(capability: str) -> tuple[int, int]:
    major, minor = capability.split(".")
    return int(major), int(minor)


def _nearest_power(group: int, least: int, largest: int) -> int:
    powers = [1 << n for n in range(13) if least <= 1 << n <= largest]
    return min(powers, key=lambda power: abs(power - group))
