"""What every target offers to the build: one value of `Target` a file, collected by hand in targets.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.engines import Engine
from .lower import Lowered

Progress = Callable[[str], None]  # told the name of each engine as it is begun


@dataclass(frozen=True)
class TargetOptions:
    """How engines are made.

    precision: "fp32", "fp16" or "bf16", of what is not quantised; inputs and outputs of engines stay float32.
    compute_capabilities: of NVIDIA GPUs, as "8.9"; only for targets that compile for them.
    profiles: name -> (least, usual, largest) batch; only for targets with static shapes.
    """

    precision: str = "fp32"
    threads: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    profiles: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """What a target wrote.

    files: engine -> its file in the bundle (weights that engines share lie beside it).
    kernels: engine -> what the target really runs, kernel or operator with its dtype -> how often.
    open: engine -> a function that opens it for the parity check; where this machine cannot run the target, the closest
    thing that it can. open_precision: that of what is opened; the check allows for its rounding.
    checked: None if `open` gives the engines themselves, else what was checked in their place, in words for the report.
    regions: engine -> rows (region, kernel, dtypes), where the target tells.
    batch: (least, largest) that the engines take, where that is less than the program does.
    """

    files: Mapping[str, str]
    kernels: Mapping[str, Mapping[str, int]]
    open: Mapping[str, Callable[[], Engine]]
    checked: str | None = None
    regions: Mapping[str, tuple[tuple[str, str, str], ...]] = field(default_factory=dict)
    open_precision: str = "fp32"
    batch: tuple[int, int] | None = None


@dataclass(frozen=True)
class Target:
    """packages: any of them makes the target available; extra: what to pip install for it.

    precisions: the first is the default. shares_weights: engines of a bundle can read one weights file.
    quantize: options of the quantize pass where the recipe leaves them open. write(lowered, folder, options, progress).
    cannot_run: why engines cannot run on this machine, or None. devices: "cpu", "gpu": what engines run on.
    """

    name: str
    packages: tuple[str, ...]
    extra: str
    shares_weights: bool
    precisions: Callable[[], tuple[str, ...]]
    quantize: Mapping[str, Any]
    write: Callable[[Lowered, Path, TargetOptions, Progress], Written]
    cannot_run: Callable[[], str | None]
    takes_capabilities: bool = False
    takes_profiles: bool = False
    devices: tuple[str, ...] = ("cpu",)
