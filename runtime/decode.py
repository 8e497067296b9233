"""JSON values -> the types that a dataclass's annotations name, with errors that say where."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from .errors import BundleError, did_you_mean


def decode(kind: Any, value: Any, where: str = "") -> Any:
    """`value` as `kind`: a dataclass, Mapping, tuple, Literal, plain type, or a union of these.

    Objects become dataclasses whose fields are all there and no others; lists become tuples; an int may stand for a
    float. Of the dataclasses in a union, an object is the one whose first field it has.
    """
    if isinstance(kind, UnionType):
        kind = next((each for each in get_args(kind) if _fits(each, value) and _has_first_field(each, value)), kind)
    if isinstance(kind, UnionType) or not _fits(kind, value):
        raise BundleError(f"{where}: expected {_spelled(kind)}, found {_shortened(value)}")
    at = f"{where}." if where else ""
    arguments = get_args(kind)
    build: Any = kind
    if is_dataclass(kind):
        known = {each.name: each for each in fields(kind)}
        for name in value.keys() - known.keys():
            raise BundleError(f"{at}{name}: unknown field; {did_you_mean(name, known)}")
        for name, each in known.items():
            if name not in value and each.default is MISSING:
                raise BundleError(f"{at}{name}: missing")
        return build(**{name: decode(known[name].type, each, f"{at}{name}") for name, each in value.items()})
    if get_origin(kind) is Mapping:
        return {name: decode(arguments[1], each, f"{at}{name}") for name, each in value.items()}
    if get_origin(kind) is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(decode(kinds[i], each, f"{where}[{i}]") for i, each in enumerate(value))
    return float(value) if kind is float else value


def _fits(kind: Any, value: Any) -> bool:
    """Whether the outermost layer of `value` is what `kind` asks for."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, list) and (arguments[-1] is Ellipsis or len(arguments) == len(value))
    if origin is Mapping or is_dataclass(kind):
        return isinstance(value, dict)
    return type(value) in ((int, float) if kind is float else (kind,))


def _has_first_field(kind: Any, value: Any) -> bool:
    return not is_dataclass(kind) or fields(kind)[0].name in value


def _spelled(kind: Any) -> str:
    plain = isinstance(kind, type) and not get_args(kind)
    return kind.__name__ if plain else re.sub(r"\w+\.", "", str(kind))  # without the names of modules


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
