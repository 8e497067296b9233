"""Errors a user can act on. Each message is one line: what, where, found, needed, what to do next."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class DcompileError(Exception):
    """The command line prints the message and exits with `exit_code`; anything else is a bug of ours."""

    exit_code: ClassVar[int] = 2


class BundleError(DcompileError):
    """The bundle is missing, damaged, inconsistent, or written by a newer dcompile."""


class RequestError(DcompileError):
    """The bundle is sound, but cannot serve what was asked of it."""


class EngineError(DcompileError):
    """An engine does not load, does not match the manifest, or failed while running."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the closest known one, else all of them."""
    known = list(known)
    close = get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(known[:40]) + (", ..." if len(known) > 40 else "")
    return f"known: {shown or 'none'}"
