"""The passes, by the names that recipes use. A new pass is a file here and a line in each of these two tables."""

from __future__ import annotations

from typing import Any

from .cache_steps import CacheSteps
from .choose_steps import ChooseSteps
from .elastic_blocks import ElasticBlocks
from .fold_timestep import FoldTimestep
from .mixture_of_experts import MixtureOfExperts
from .prune_layers import PruneLayers
from .quantize import Quantize
from .recover import Recover

PASSES: dict[str, type[Any]] = {
    cls.name: cls
    for cls in (PruneLayers, MixtureOfExperts, Recover, ElasticBlocks, ChooseSteps, CacheSteps, Quantize, FoldTimestep)
}
SHORT_NAMES = {
    "prune": "prune_layers",
    "moe": "mixture_of_experts",
    "recover": "recover",
    "elastic": "elastic_blocks",
    "steps": "choose_steps",
    "cache": "cache_steps",
    "quant": "quantize",
    "fold": "fold_timestep",
}
