"""Every cache method with what it needs on six steps of a tiny network, and the kind of network that it is for."""

from __future__ import annotations

from typing import Any

from dcompile.passes.caching.methods import METHODS

# What six steps of a tiny network need in place of the defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "deepcache_nonuniform": {"budget": 3, "center": 2, "power": 1.6},
    "faster_diffusion": {"interval": 3, "span": 2},
    "profilingdit": {"warmup": 2, "interval": 2},
    "taylorseer": {"interval": 3},
    "ertacache": {"threshold": 0.5},
    "teacache": {"threshold": 0.9},
    "fbcache": {"threshold": 1.5},
    "dbcache": {"threshold": 1.5, "front": 1, "warmup": 2},
    "tdc": {"threshold": 2.0},
    "learning_to_cache": {"runs": 2},
    "harmonica": {"runs": 2},
    "ecad": {"trials": 20},
    "edit": {"runs": 2},
    "disca": {"runs": 2},
    "flowturbo": {"runs": 2},
}
ON_UNETS = ("deepcache", "deepcache_nonuniform", "faster_diffusion", "cachequant")
ON_BOTH = ("interval", "segments", "taylorseer", "fora", "ertacache", "flowturbo")
CASES = [
    (network, method)
    for network in ("dit", "unet")
    for method in METHODS
    if method in ON_BOTH or (method in ON_UNETS) == (network == "unet")
]
