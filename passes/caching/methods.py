"""The published cache methods, each as options of the one pass: what it caches, when, and how it predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """source: arXiv number, or what it stands for. checked: what our form of it is verified against, in the tests.

    reconstructed: parts that no public code or text gives, and that are ours. options: its defaults, over COMMON.
    """

    title: str
    source: str
    does: str
    checked: str
    options: Mapping[str, Any] = field(default_factory=dict)
    reconstructed: str = ""


# What every method starts from.
COMMON: Mapping[str, Any] = {
    "site": "auto",
    "schedule": "interval",
    "predictor": "copy",
    "interval": 3,
    "warmup": 1,
    "last": 0,
    "front": 0,
    "back": 0,
    "apart": True,
    "noise_aware": True,
}

METHODS: Mapping[str, Method] = {
    "interval": Method(
        "Interval",
        "ours",
        "a range of blocks (a U-Net: its cut) extrapolated between every few steps",
        "refresh at every step changes nothing; TaylorSeer's factors; diffusers' FirstBlockCache",
        {"predictor": "taylor1", "warmup": 2, "front": 1},
    ),
    "fora": Method(
        "FORA",
        "2407.01425",
        "attention and feed-forward before their gates, copied; counted from the last step",
        "closed form of its schedule; branch sites against diffusers' hooks",
        {"site": "branch", "schedule": "to_the_end"},
    ),
    "deepcache": Method(
        "DeepCache",
        "2312.00858",
        "the U-Net value that enters the last up layers, copied (branch: how many of them still run)",
        "package DeepCache, every branch",
        {"site": "cut", "branch": 0},
    ),
    "deepcache_nonuniform": Method(
        "DeepCache, non-uniform",
        "2312.00858",
        "the same, on steps that are denser around `center`",
        "its published step lists",
        {"site": "cut", "branch": 0, "schedule": "quadratic", "power": 1.4},
    ),
    "faster_diffusion": Method(
        "Faster Diffusion",
        "2312.09608",
        "all that a U-Net's decoder reads of its encoder, copied; the decoder runs at every step, "
        "with its own time, for `span` steps at once",
        "its published key steps; refresh at every step changes nothing; its noise and its spans against step by step",
        {"site": "encoder", "schedule": "keys", "interval": 4},
        reconstructed="its noise is an option (prior=0.003), and added before each step in spans too",
    ),
    "delta_dit": Method(
        "Δ-DiT",
        "2406.01125",
        "the residual of all but the first blocks at early steps, of all but the last after them",
        "replay of its overlapping ranges in PyTorch; refresh at every step changes nothing",
        {"site": "stages", "predictor": "delta", "interval": 2, "front": None, "back": None},
        reconstructed="the step at which the ranges change places (half way), for any budget; 3/4 of the blocks, as in "
        "its study, are either range",
    ),
    "profilingdit": Method(
        "ProfilingDiT",
        "2504.03140",
        "residuals of runs of background blocks, after a warm-up",
        "replay of its runs in PyTorch; refresh at every step changes nothing",
        {"site": "runs", "predictor": "delta", "interval": 6, "warmup": 6},
        reconstructed="which blocks are background: the half whose residual changes least from step to step",
    ),
    "bac": Method(
        "BAC",
        "2506.13456",
        "each branch on steps of its own, by dynamic programming; feed-forwards also on those of the worst before",
        "brute force for the dynamic program",
        {"site": "branch", "schedule": "segments", "distance": "cosine", "union": 3, "each": True},
    ),
    "ddt": Method(
        "DDT",
        "2504.05741",
        "what the last blocks are given by all before them, copied whole, on steps by dynamic programming",
        "a network of its form with the condition passed in; brute force for the dynamic program",
        {"site": "encoder", "schedule": "segments", "distance": "cosine", "back": None},
        reconstructed="on a network whose last blocks do not read the sample, they read the copy alone; one cosine for "
        "the whole condition, not one for each token",
    ),
    "segments": Method(
        "Segments",
        "2504.05741, 2503.01323",
        "a range of blocks on the steps that dynamic programming finds (DDT's planner, on any site)",
        "brute force; its published golden values",
        {"front": 1, "schedule": "segments", "distance": "l1"},
    ),
    "cachequant": Method(
        "CacheQuant",
        "2503.01323",
        "the U-Net cut on steps by dynamic programming, corrected by a slope and an offset for each channel",
        "brute force; numpy.linalg.lstsq",
        {"site": "cut", "branch": 0, "schedule": "segments", "distance": "l1", "bounded": True, "correct": True},
        reconstructed="without its second correction, of the error of quantisation",
    ),
    "taylorseer": Method(
        "TaylorSeer",
        "2503.06923",
        "each branch extrapolated by backward differences (lite, site=range: the last block's output alone)",
        "diffusers' TaylorSeer hooks; its golden values",
        {"site": "branch", "predictor": "taylor2", "interval": 4, "warmup": 2},
    ),
    "lesa": Method(
        "LESA",
        "2602.20497",
        "the last block's output as a mix of its last `states` values, computed or predicted, with learned factors",
        "numpy.linalg.lstsq; TaylorSeer's extrapolation as a table of factors",
        {"site": "range", "predictor": "history", "states": 4, "warmup": 2},
        reconstructed="factors by step, for experts by noise; least squares for training; a loop closed on samples",
    ),
    "disca": Method(
        "DisCa",
        "2602.05449",
        "the last block's output by a small transformer block that reads the cache and what the blocks would read",
        "the module in PyTorch, with random weights; a network of zeros is what it refines",
        {"site": "range", "predictor": "net", "states": 2, "warmup": 2, "runs": 24},
        reconstructed="added to what two cached steps extrapolate to (states=1: to the copy), trained on the samples "
        "it leads to, without the adversarial stage",
    ),
    "flowturbo": Method(
        "FlowTurbo's refiner",
        "2409.18128",
        "what the network predicts, refined by a small transformer of it, the sample and the time",
        "the module in PyTorch, with random weights; a network of zeros is what it refines",
        {"site": "output", "predictor": "net", "states": 2, "warmup": 2, "runs": 24},
        reconstructed="with two cached steps for one; with the sampler that is asked for, in place of its own of Heun "
        "and pseudo-corrector steps",
    ),
    "learning_to_cache": Method(
        "Learning-to-Cache",
        "2406.01733",
        "at every second step the branches whose learned gates are shut, copied",
        "gates of zero and one are PyTorch's mask; their slopes against finite differences; beats intervals",
        {"site": "branch", "schedule": "learned_pairs", "share": 0.75, "runs": 24},
        reconstructed="gates stay open or shut, and change places to a budget by the slope of the final image's error",
    ),
    "harmonica": Method(
        "HarmoniCa",
        "2410.01723",
        "at every step the branches whose learned gates are shut, copied; trained from noise alone",
        "gates of zero and one are PyTorch's mask; their slopes against finite differences; beats intervals",
        {"site": "branch", "schedule": "learned", "runs": 24},
        reconstructed="gates change places as in learning_to_cache: that slope stands for its weights of steps",
    ),
    "ecad": Method(
        "ECAD",
        "2506.15682",
        "each branch on steps of its own, copied; by genetic search (NSGA-II) over a bit for each step and branch",
        "brute force for the front; trajectories of the search against PyTorch",
        {"site": "branch", "schedule": "searched", "trials": 500},
        reconstructed="images are judged by their distance to the teacher's; steps change places where it flips bits",
    ),
    "edit": Method(
        "E-DiT",
        "2602.13993",
        "in the second half of the steps the residuals of blocks whose routers value them least, ten times at most",
        "the routers in the graph against plain PyTorch; routers that open every gate change nothing",
        {"site": "block", "predictor": "delta", "schedule": "routed", "share": 0.7, "runs": 24},
        reconstructed="trained on its own trajectories, without widths; frozen by vote, ranked to a budget",
    ),
    "ertacache": Method(
        "ERTACache",
        "2508.21091",
        "what the network predicts less its input, held while near enough on recorded runs; corrected by least squares",
        "refresh at every step changes nothing; the replay against its definition",
        {"site": "output", "predictor": "delta", "schedule": "hold", "threshold": 0.1, "warmup": 2, "correct": True},
        reconstructed="the correction is of the residual, by channel; its step sizes are an option (resize): by its "
        "formula the reused steps of the glyph DiT lose nearly all of their length",
    ),
    "qandc": Method(
        "Q&C",
        "2503.02508",
        "attention and feed-forward before their gates, copied; each sample is given its variance back",
        "a gain of 1 changes nothing; on Gaussian samples the variance is the target's",
        {"site": "branch", "compensate": True},
        reconstructed="the gain is a ratio of standard deviations, one for each step, about the mean of all samples; "
        "without its choice of calibration samples",
    ),
    "teacache": Method(
        "TeaCache",
        "2411.19108",
        "the whole stack's residual; each step decides by the changes of the modulated input that add up",
        "its accumulator's golden decisions; its rule on recorded values; refresh at every step changes nothing",
        {
            "site": "range", "predictor": "delta", "schedule": "accumulate", "threshold": 0.15, "last": 1, "fit": True,
            "apart": False,
        },
    ),
    "fbcache": Method(
        "FBCache",
        "ParaAttention, diffusers",
        "residual of all blocks but the first; each step decides by how much the first one's changed",
        "diffusers' FirstBlockCache: decisions and samples",
        {"site": "range", "predictor": "delta", "schedule": "compare", "threshold": 0.05, "front": 1, "apart": False},
    ),
    "dbcache": Method(
        "DBCache",
        "cache-dit",
        "residual of the blocks between the first `front` and the last `back`; each block list decides for itself",
        "cache-dit: decisions and samples",
        {
            "site": "range", "predictor": "delta", "schedule": "compare", "threshold": 0.08, "front": 8, "warmup": 8,
        },
    ),
    "tdc": Method(
        "6Bit-Diffusion, temporal delta cache",
        "2603.18742",
        "each block's residual, at most two steps in a row, while it changed little when it was last computed",
        "its rule on recorded values; refresh at every step changes nothing",
        {
            "site": "block", "predictor": "delta", "schedule": "history", "threshold": 0.2, "longest": 2, "warmup": 2,
            "freeze": True, "apart": False,
        },
        reconstructed="the score grows with the steps since; frozen, as a step with a decision for each block is many "
        "graphs (site=range freeze=false decides at run time)",
    ),
}  # fmt: skip
