"""What can go wrong while compiling, by whose move is next. The command line prints it and exits with `exit_code`."""

from __future__ import annotations

from typing import ClassVar

from ..runtime.errors import DcompileError


class IngestError(DcompileError):
    """The model, its contract or its weights cannot be read as given."""


class RecipeError(DcompileError):
    """A pass, option, target or gate is unknown or has a value out of range."""


class ShapeError(DcompileError):
    """A shape does not fit what the network or a format needs."""


class UnsupportedError(DcompileError):
    """What was asked for is sound, but this version or target cannot do it."""


class PassError(DcompileError):
    """A pass cannot do its work on this program, or what it made does not run."""


class StoreError(DcompileError):
    """Results of passes cannot be kept on disk."""


class GateError(DcompileError):
    """The artifact was built, measured, and found worse than the recipe allows."""

    exit_code: ClassVar[int] = 3


class InternalError(DcompileError):
    """A bug of ours: please report it with the recipe."""

    exit_code: ClassVar[int] = 1
