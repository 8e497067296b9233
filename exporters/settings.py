"""How to build, as opposed to what; and who is told how far it is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class Listener(Protocol):
    """Told what the build is doing: a progress bar, or nothing."""

    def stage(self, title: str) -> None: ...

    def progress(self, fraction: float, text: str) -> None: ...


class Silent:
    def stage(self, title: str) -> None: ...

    def progress(self, fraction: float, text: str) -> None: ...


@dataclass(frozen=True)
class Inside:
    """Shows the progress of parts of a stage, and their titles beside it."""

    listener: Listener

    def stage(self, title: str) -> None:
        self.listener.progress(0.0, title)

    def progress(self, fraction: float, text: str) -> None:
        self.listener.progress(fraction, text)


@dataclass(frozen=True)
class Settings:
    """How to build, as opposed to what.

    cache: folder of kept results, or None to keep none. threads: None lets engines decide.
    """

    trust_pickle: bool = False
    force: bool = False
    cache: Path | None = None
    threads: int | None = None
    evaluate: bool = True
    listener: Listener = field(default_factory=Silent)


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dcompile"
