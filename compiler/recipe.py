"""Recipes: which passes, with which options, in which order; from the command line's short form or from YAML."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from ..runtime.errors import did_you_mean
from .errors import RecipeError
from .program import Pass

Step = tuple[str, dict[str, Any]]

_OUTER_COMMA = re.compile(r",(?![^\[]*\])")


class Recipe(BaseModel):
    """Everything that decides what is built; the command line's options override it. Written whole into the bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(default=None, description="diffusers folder, .pt2, .pt, or package.module:factory")
    target: str = "onnx"
    precision: Literal["fp32", "fp16", "bf16"] | None = None
    layout: Literal["auto", "variants", "segments"] = "auto"
    compute_capability: tuple[str, ...] | None = None
    profiles: dict[str, tuple[int, int, int]] | None = None
    passes: tuple[str | dict[str, dict[str, Any] | None], ...] = ()
    shape: tuple[int, ...] | None = None
    contract: Path | None = None
    sampler: str | None = None
    steps: int | None = Field(default=None, ge=1, le=10_000)
    guidance: float | None = None
    calibration_samples: int = Field(default=8, ge=1, le=64)
    eval_samples: int = Field(default=72, ge=0)
    judge: Path | None = None
    gate: str | None = None

    @field_validator("compute_capability", mode="before")
    @classmethod
    def _capabilities(cls, value: Any) -> Any:
        """`compute_capability: 8.9` is a number in YAML; "8.9,12.0" a list on the command line."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(","))
        return tuple(map(str, value if isinstance(value, list | tuple) else (value,))) if value is not None else None

    @field_validator("profiles")
    @classmethod
    def _ordered(cls, value: dict[str, tuple[int, int, int]] | None) -> dict[str, tuple[int, int, int]] | None:
        for name, (least, usual, largest) in (value or {}).items():
            if not 1 <= least <= usual <= largest:
                raise ValueError(f"{name}: batches {least}, {usual}, {largest} are not in order, from 1 up")
        return value

    @field_validator("passes", mode="before")
    @classmethod
    def _one_line(cls, value: Any) -> Any:
        """`passes: prune,cache` is short for a list of one entry."""
        return (value,) if isinstance(value, str) else value

    def steps_of_passes(self) -> list[Step]:
        return [step for entry in self.passes for step in _entry(entry)]


def read_recipe(path: Path) -> Recipe:
    """Raises RecipeError naming the key that is wrong."""
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"recipe {path}: cannot be read ({what_failed(error)})") from error
    if not isinstance(data, dict):
        raise RecipeError(
            f"recipe {path}: needs a mapping such as `passes: [prune, cache, quant]`; found {type(data).__name__}"
        )
    return parse_recipe(data, str(path))


def what_failed(error: OSError | yaml.YAMLError) -> str:
    """Why a YAML file cannot be read, in one line, with the place if there is one."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return (error.strerror if isinstance(error, OSError) else None) or str(error).partition("\n")[0]


def parse_recipe(data: Mapping[str, Any], where: str) -> Recipe:
    for key in data:
        if key not in Recipe.model_fields:
            raise RecipeError(f"recipe {where}: unknown key {key!r}; {did_you_mean(str(key), Recipe.model_fields)}")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].replace("tuple", "list")
        raise RecipeError(f"recipe {where}: {'.'.join(map(str, first['loc']))}: {message}") from error


def parse_passes(text: str) -> list[Step]:
    """'prune:ratio=0.25,method=greedy,cache:interval=3' -> [('prune', {'ratio': 0.25, ...}), ('cache', {...})].

    A comma starts an option of the same pass if what follows is `name=value`, and the next pass otherwise; inside
    brackets it separates the values of a list: prune:blocks=[blocks.1,blocks.2].
    """
    steps: list[Step] = []
    for part in filter(None, (piece.strip() for piece in _OUTER_COMMA.split(text))):
        name, colon, option = part.partition(":")
        if "=" in name and not colon:
            if not steps:
                raise RecipeError(
                    f"--passes {text!r}: starts with the option {part!r}; name the pass first, as in prune:ratio=0.25"
                )
            steps[-1][1].update(_option(part, text))
            continue
        steps.append((name, _option(option, text) if colon else {}))
    return steps


def _option(text: str, whole: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--passes {whole!r}: {text!r} is no option; write name=value, as in prune:ratio=0.25")
    try:
        return {key.strip(): yaml.safe_load(value)}
    except yaml.YAMLError as error:
        raise RecipeError(f"--passes {whole!r}: {text!r} has a value that is no YAML") from error


def _entry(entry: str | Mapping[str, Mapping[str, Any] | None]) -> list[Step]:
    if isinstance(entry, str):
        return parse_passes(entry)
    if len(entry) != 1:
        raise RecipeError(f"recipe: a step names one pass, found {', '.join(entry)}; write one list item for each")
    ((name, options),) = entry.items()
    return [(name, dict(options or {}))]


def build_passes(steps: Sequence[Step], known: Mapping[str, type[Any]], short: Mapping[str, str]) -> tuple[Pass, ...]:
    """The pass objects. Raises RecipeError for an unknown pass or option, or a value out of range, naming the step."""
    return tuple(_build(number, name, options, known, short) for number, (name, options) in enumerate(steps, 1))


def _build(
    number: int, name: str, options: Mapping[str, Any], known: Mapping[str, type[Any]], short: Mapping[str, str]
) -> Pass:
    cls = known.get(short.get(name, name))
    if cls is None:
        raise RecipeError(f"step {number}: no pass is called {name!r}; {did_you_mean(name, [*short, *known])}")
    fields = {field.name for field in dataclasses.fields(cls)}
    for option in options:
        if option not in fields:
            raise RecipeError(f"step {number} ({name!r}): unknown option {option!r}; {did_you_mean(option, fields)}")
    try:
        made: Pass = TypeAdapter(cls).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].replace("tuple", "list, as in [a,b]")
        raise RecipeError(f"step {number} ({name!r}): {where} is {first['input']!r}: {message}") from error
    except RecipeError as error:
        raise RecipeError(f"step {number}: {error}") from error
    return made


def options_of(step: Pass) -> dict[str, Any]:
    """All options of a pass with their values, defaults too, JSON-able."""
    return {field.name: _plain(getattr(step, field.name)) for field in dataclasses.fields(step)}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
