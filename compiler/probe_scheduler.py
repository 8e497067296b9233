"""Turn a diffusers scheduler into rows by running its own `step` on one-hot tensors: no solver is written here."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from .errors import UnsupportedError
from .sampler import Float64, Sampler

MAX_RING = 5
# A coefficient read from a one-hot carries the scheduler's float32 rounding (6e-8) and a row adds a handful of them; a
# wrong ring misses by 1e-3 and more.
FIT_TOLERANCE = 1e-6
# Of max |x| over the run. Linear schedulers stay below 1e-5 even where they cast to float32 in every step (measured);
# clipping cost at least 9e-5, with a start of 80 sigma, and 0.1 to 0.8 in most schedulers.
LINEAR_TOLERANCE = 2e-5
DRIFT_TOLERANCE = 1e-3  # of max |x|; a schedule that goes by its own timesteps misses by 1e-2 and more

_FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"solver_order": 2, "algorithm_type": "dpmsolver++"}),
    "dpm++2m_karras": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 2, "algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpm++3m": ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "dpmsolver++"}),
    "dpm++2m_sde": ("DPMSolverMultistepScheduler", {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
    "dpm++2s": (
        "DPMSolverSinglestepScheduler",
        {"solver_order": 2, "algorithm_type": "dpmsolver++", "lower_order_final": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "sa": ("SASolverScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow_lcm": ("FlowMatchLCMScheduler", {}),
    "flow_dpm++2m": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 2, "algorithm_type": "dpmsolver++", **_FLOW},
    ),
    "flow_dpm++3m": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "algorithm_type": "dpmsolver++", **_FLOW},
    ),
    "flow_deis": ("DEISMultistepScheduler", dict(_FLOW)),
    "flow_unipc": ("UniPCMultistepScheduler", dict(_FLOW)),
}


# ---- which scheduler ------------------------------------------------------------------------------------------------


def make_scheduler(name: str | None, scheduler_config: Mapping[str, Any] | None, *, predicts: str | None = None) -> Any:
    """The diffusers scheduler for a model: its own (name None), or the class behind `name` with the model's options.

    name: a key of SAMPLERS. scheduler_config: what scheduler_config.json holds; options that the named class shares
    with the model's own class are kept. predicts: what the model's output is (epsilon, v_prediction, sample, flow).
    A named sampler clips its samples only where scheduler_config asks for it: rows cannot, and latents must not be.
    Raises: UnsupportedError for an unknown name or class, or a sampler that does not go with what the model predicts.
    """
    diffusers = _diffusers()
    config = dict(scheduler_config or {})
    if name is None and not config:
        raise UnsupportedError(
            "the model has no scheduler_config.json, so its sampler is not known: choose --sampler from "
            + ", ".join(SAMPLERS)
        )
    if name is not None and name not in SAMPLERS:
        close = get_close_matches(name, SAMPLERS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UnsupportedError(f"no sampler is called {name!r}.{hint} The samplers are {', '.join(SAMPLERS)}")

    declared = _declared_prediction(diffusers, config)
    if name is None:
        cls = _scheduler_class(diffusers, config)
        options: dict[str, Any] = {}
    else:
        cls = getattr(diffusers, SAMPLERS[name][0])
        options = dict(SAMPLERS[name][1])
    takes = inspect.signature(cls.__init__).parameters
    if name is not None:
        if "clip_sample" in takes:
            options.setdefault("clip_sample", config.get("clip_sample", False))
        for ours, theirs in (("shift", "flow_shift"), ("flow_shift", "shift")):
            if ours in takes and ours not in config and theirs in config:
                options[ours] = config[theirs]
    if predicts not in (None, "flow") and "prediction_type" in takes and declared is None:
        options.setdefault("prediction_type", predicts)
    try:
        scheduler = cls.from_config(config, **options)
    except Exception as error:
        raise UnsupportedError(
            f"{cls.__name__} cannot be made from scheduler_config.json: {_one_line(error)}; "
            "correct the file or choose --sampler"
        ) from error
    _check_prediction(scheduler, name, declared, predicts)
    return scheduler


def _diffusers() -> Any:
    try:
        return import_module("diffusers")
    except ImportError as error:
        raise UnsupportedError(
            "samplers are read from diffusers, which is not installed: pip install 'dcompile[diffusers]'"
        ) from error


def _scheduler_class(diffusers: Any, config: Mapping[str, Any]) -> Any:
    """The class that scheduler_config.json names; only a scheduler of diffusers itself will do."""
    class_name = config.get("_class_name")
    if not isinstance(class_name, str):
        raise UnsupportedError("scheduler_config.json has no _class_name: add one, or choose --sampler")
    cls = getattr(diffusers, class_name, None)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.SchedulerMixin)):
        known = [entry for entry in dir(diffusers) if entry.endswith("Scheduler")]
        close = get_close_matches(class_name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UnsupportedError(
            f"scheduler_config.json names _class_name {class_name!r}, which is no scheduler of diffusers "
            f"{diffusers.__version__}.{hint} Correct it, or choose --sampler"
        )
    return cls


def _is_flow(class_name: str, options: Mapping[str, Any]) -> bool:
    return class_name.startswith(("FlowMatch", "FlowMap")) or bool(options.get("use_flow_sigmas"))


def _declared_prediction(diffusers: Any, config: Mapping[str, Any]) -> str | None:
    """What the model predicts according to its scheduler_config.json; None where the file does not settle it."""
    class_name = str(config.get("_class_name", ""))
    if _is_flow(class_name, config) or config.get("prediction_type") == "flow_prediction":
        return "flow"
    if "prediction_type" in config:
        return str(config["prediction_type"])
    cls = getattr(diffusers, class_name, None)
    takes = inspect.signature(cls).parameters if inspect.isclass(cls) else {}
    return str(takes["prediction_type"].default) if "prediction_type" in takes else None


def _check_prediction(scheduler: Any, name: str | None, declared: str | None, predicts: str | None) -> None:
    """Refuse a flow-matching sampler on a model that predicts no flow, the reverse, and two sources that disagree."""
    if declared is not None and predicts is not None and declared != predicts:
        raise UnsupportedError(
            f"scheduler_config.json is for a model that predicts {declared!r}, "
            f"this one is said to predict {predicts!r}: make them agree"
        )
    wanted = predicts or declared
    label = f"--sampler {name}" if name else type(scheduler).__name__
    is_flow = _is_flow(type(scheduler).__name__, _own_options(scheduler))
    if wanted is None or is_flow == (wanted == "flow"):
        return
    fitting = ", ".join(_fitting_samplers("flow" if wanted == "flow" else "epsilon"))
    needs = "a model that predicts 'flow'" if is_flow else "a model that predicts 'epsilon', 'v_prediction' or 'sample'"
    raise UnsupportedError(f"{label} needs {needs}, this one predicts {wanted!r}: choose --sampler from {fitting}")


def _fitting_samplers(prediction: str) -> list[str]:
    """Names of SAMPLERS for models with this output."""
    return [name for name, (cls, options) in SAMPLERS.items() if _is_flow(cls, options) == (prediction == "flow")]


def _own_options(scheduler: Any) -> dict[str, Any]:
    """The config values that this class takes; `from_config` also stores other classes' values, which do nothing."""
    takes = inspect.signature(type(scheduler).__init__).parameters
    return {key: value for key, value in getattr(scheduler, "config", {}).items() if key in takes}


# ---- probing --------------------------------------------------------------------------------------------------------


def probe(
    scheduler: Any,
    steps: int,
    *,
    prediction: str | None = None,
    step_options: Mapping[str, Any] | None = None,
    timestep_options: Mapping[str, Any] | None = None,
    rows: Sequence[int] | None = None,
) -> Sampler:
    """The rows of a diffusers scheduler: len(scheduler.timesteps) of them, one a network call (Heun makes two a step).

    Each step runs once with its sample, its output and its noise draw as one-hots of their own, so that coefficients
    are read off one by one, in float64 unless the scheduler casts. Rows are then fitted with the smallest ring that
    reproduces every step, and run against the scheduler itself on random data. `scheduler` is not changed.

    prediction: what the model's output is; checked against the scheduler's own. step_options: further arguments of
    `step`, e.g. {"eta": 1.0}. timestep_options: further arguments of `set_timesteps`, e.g. {"mu": 1.15}. rows: of the
    schedule of `steps`, those that are kept; None for all.
    Raises: UnsupportedError where a step is not linear in (sample, outputs, one noise draw), needs an output older than
    MAX_RING calls, or cannot be called as step(output, timestep, sample); where rows are not the scheduler's to choose.
    """
    kept = None if rows is None else tuple(rows)
    run = _Run(scheduler, steps, dict(step_options or {}), dict(timestep_options or {}), kept)
    kind = _prediction(scheduler, prediction)
    trace = _one_hot_trace(run)
    fitted = _fit(trace)
    if fitted is None:
        raise UnsupportedError(_refusal(scheduler, kind, f"no ring of up to {MAX_RING} outputs reproduces its steps"))
    options = {**_changed_options(scheduler), **run.step_options, **run.timestep_options}
    signal, noise_level = _marginals(run) or (None, None)
    sampler = Sampler(
        name=f"{run.name}({', '.join(f'{key}={value!r}' for key, value in options.items())})",
        prediction=kind,
        timesteps=trace.timesteps,
        timestep_dtype=trace.timestep_dtype,
        s=trace.scale,
        initial_scale=trace.initial_scale,
        signal=signal,
        noise_level=noise_level,
        choose=partial(_chosen, scheduler, prediction, step_options, timestep_options),
        **fitted,
    )
    error = _mismatch(run, sampler)
    if not error <= LINEAR_TOLERANCE:
        found = (
            f"its steps and their rows differ by {error:.1e} of max |x| on random data, allowed {LINEAR_TOLERANCE:.0e}"
        )
        raise UnsupportedError(_refusal(scheduler, kind, found))
    return sampler


def _chosen(
    scheduler: Any, prediction: str | None, step_options: Mapping[str, Any] | None,
    timestep_options: Mapping[str, Any] | None, steps: int, rows: Sequence[int],
) -> Sampler:  # fmt: skip
    """The sampler of these rows. Raises UnsupportedError where it leads elsewhere than from row to row."""
    options: dict[str, Any] = {"step_options": step_options, "timestep_options": timestep_options}
    sampler = probe(scheduler, steps, prediction=prediction, rows=rows, **options)
    off = sampler.drift()
    if off is None or off > DRIFT_TOLERANCE:
        found = "does not say how much noise its rows are for" if off is None else f"misses them by {off:.1e}"
        instead = "flow_euler or flow_dpm++2m" if sampler.prediction == "flow" else "euler or dpm++2m"
        raise UnsupportedError(
            f"{type(scheduler).__name__} cannot go through timesteps of one's choice: it {found}; choose another "
            f"--sampler, e.g. {instead}"
        )
    return sampler


def _marginals(run: _Run) -> tuple[Float64, Float64] | None:
    """How the scheduler mixes data and noise for training at each row's timestep: (of data, of noise), [T] each."""
    scheduler = run.start()
    if hasattr(scheduler, "_begin_index"):
        scheduler._begin_index = None  # else it answers for the row it stands at, whatever it is asked
    found = []
    for data, noise in ((1.0, 0.0), (0.0, 1.0)):
        one, other = (torch.full((1, 1), value, dtype=torch.float64) for value in (data, noise))
        try:
            rows = [
                scheduler.add_noise(one, other, t[None]) if hasattr(scheduler, "add_noise")
                else scheduler.scale_noise(one, t[None], other)
                for t in scheduler.timesteps
            ]  # fmt: skip
        except Exception:  # whatever it is that this scheduler does not do
            return None
        found.append(np.array([float(row) for row in rows], dtype=np.float64))
    return (found[0], found[1]) if np.isfinite(found).all() else None


@dataclass(frozen=True)
class _Run:
    """How to call a scheduler. Every run starts from a fresh copy, because schedulers keep state between steps."""

    scheduler: Any
    steps: int
    step_options: dict[str, Any]
    timestep_options: dict[str, Any]
    rows: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        return type(self.scheduler).__name__

    def start(self) -> Any:
        """A copy of the scheduler, its timesteps set, ready for row 0."""
        if self.steps < 1:
            raise UnsupportedError(f"{self.steps} steps were asked for, needed at least 1")
        dynamic = _own_options(self.scheduler).get("use_dynamic_shifting")
        if dynamic and "mu" not in self.timestep_options:
            raise UnsupportedError(
                f"{self.name} with use_dynamic_shifting=True takes its timesteps from the image size: set "
                "use_dynamic_shifting=false and a fixed shift in scheduler_config.json"
            )
        scheduler = copy.deepcopy(self.scheduler)
        try:
            scheduler.set_timesteps(self.steps, **self.timestep_options)
        except Exception as error:
            raise UnsupportedError(
                f"{self.name}.set_timesteps({self.steps}) failed: {_one_line(error)}; "
                "choose other steps or another --sampler"
            ) from error
        if self.rows is not None:
            _keep(scheduler, self.rows)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # else a repeated first timestep would start the run at its second row
        return scheduler

    def scaled(self, scheduler: Any, row: int, sample: torch.Tensor) -> torch.Tensor:
        """The network's input."""
        if not hasattr(scheduler, "scale_model_input"):
            return sample
        scaled: torch.Tensor = scheduler.scale_model_input(sample, scheduler.timesteps[row])
        return scaled

    def step(
        self, scheduler: Any, row: int, output: torch.Tensor, sample: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, Any]:
        """(next sample, all that the scheduler returned); a draw of normal noise inside gets `noise`."""
        try:
            with _Draw(noise) as draw:
                result = scheduler.step(output, scheduler.timesteps[row], sample, **self.step_options)
            following = result[0] if isinstance(result, tuple) else result.prev_sample
            if following.shape != sample.shape:
                raise ValueError(f"it returned shape {list(following.shape)} for a sample of {list(sample.shape)}")
        except Exception as error:
            raise UnsupportedError(
                f"{self.name} cannot be run as rows: step(output, timestep, sample) failed in row {row}: "
                f"{_one_line(error)}; choose another --sampler"
            ) from error
        if draw.count > 1:
            raise UnsupportedError(
                f"{self.name} draws noise {draw.count} times in row {row}, a row has one draw: choose another --sampler"
            )
        return following, result


def _keep(scheduler: Any, rows: Sequence[int]) -> None:
    """Leave the scheduler these rows of its schedule. What it works out by other means than rows shows as a drift."""
    timesteps, sigmas, index = scheduler.timesteps, getattr(scheduler, "sigmas", None), torch.tensor(rows)
    scheduler.timesteps, scheduler.num_inference_steps = timesteps[index], len(rows)
    if sigmas is not None and len(sigmas) == len(timesteps) + 1:  # one a row, and where the last row leads
        scheduler.sigmas = torch.cat([sigmas[index], sigmas[-1:]])


class _Draw(TorchFunctionMode):
    """Answers every normal draw with the given tensor: diffusers' `randn_tensor` ends in torch.randn as well."""

    def __init__(self, noise: torch.Tensor) -> None:
        super().__init__()
        self.noise, self.count = noise, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        drawn = func(*args, **(kwargs or {}))
        if func not in (torch.randn, torch.randn_like, torch.normal):
            return drawn
        self.count += 1
        return self.noise.to(drawn.dtype).reshape(drawn.shape)


@dataclass(frozen=True)
class _Trace:
    """What one-hots show. A row of `steps` [T, 3T] is the next sample in terms of x_0.., m_0.., noise_0.. (T of each),
    each sample standing for itself; `conversions` are the (p, q) that may be what the scheduler keeps in its history.
    """

    timesteps: Float64
    timestep_dtype: Literal["int64", "float32"]
    initial_scale: float
    scale: Float64
    steps: Float64
    conversions: list[tuple[Float64, Float64]]


def _one_hot_trace(run: _Run) -> _Trace:
    scheduler = run.start()
    kept: list[torch.Tensor] = []
    if hasattr(scheduler, "convert_model_output"):  # solvers with a history convert an output once, when they store it
        convert = scheduler.convert_model_output

        def convert_and_keep(*args: Any, **kwargs: Any) -> Any:
            kept.append(convert(*args, **kwargs))
            return kept[-1]

        scheduler.convert_model_output = convert_and_keep

    count = len(scheduler.timesteps)
    one_hot = torch.eye(3 * count, dtype=torch.float64).reshape(3 * count, 1, 3 * count, 1, 1)
    scale, rows, converted = np.zeros(count), np.zeros((count, 3 * count)), np.full((count, 3 * count), np.nan)
    for i in range(count):
        sample, output, noise = one_hot[i], one_hot[count + i], one_hot[2 * count + i]
        scale[i] = _flat(run.scaled(scheduler, i, sample))[i]
        kept.clear()
        following, result = run.step(scheduler, i, output, sample, noise)
        rows[i] = _flat(following)
        denoised = kept[0] if kept else getattr(result, "pred_original_sample", None)
        if denoised is not None:
            converted[i] = _flat(denoised)
    if not np.isfinite(rows).all():
        row = int(np.argwhere(~np.isfinite(rows))[0][0])
        hint = "other steps or another --sampler"
        if _own_options(run.scheduler).get("final_sigmas_type") == "zero":
            hint = "final_sigmas_type=sigma_min in scheduler_config.json, " + hint
        raise UnsupportedError(f"{run.name} gives a value that is not finite in row {row} of {count}: choose {hint}")
    timesteps = torch.as_tensor(scheduler.timesteps)
    return _Trace(
        timesteps=timesteps.to(torch.float64).numpy(),
        timestep_dtype="float32" if timesteps.is_floating_point() else "int64",
        initial_scale=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        scale=scale,
        steps=rows,
        conversions=list(_conversions(rows, converted)),
    )


def _conversions(steps: Float64, converted: Float64) -> Iterable[tuple[Float64, Float64]]:
    """(p, q) to try: the raw output, what the scheduler made of it, what the next row shows that it kept of it."""
    count = len(steps)
    index = np.arange(count)
    yield np.zeros(count), np.ones(count)
    p, q = converted[index, index], converted[index, count + index]
    if np.isfinite(converted).all() and np.count_nonzero(converted) == np.count_nonzero(p) + np.count_nonzero(q):
        yield p, q
    # Each row's sample is a one-hot of its own, so x_i and m_i reach row i+1 only through what was kept of row i.
    p, q = np.zeros(count), np.ones(count)
    p[:-1], q[:-1] = steps[index[1:], index[:-1]], steps[index[1:], count + index[:-1]]
    size = np.hypot(p, q)
    if size.all():
        yield p / size, q / size


def _fit(trace: _Trace) -> dict[str, Float64] | None:
    """p, q, a, b, n with the smallest ring, of equals the first conversion; None where none reproduces all steps."""
    count = len(trace.timesteps)
    samples = _cumulative(trace.steps)
    outputs = np.eye(2 * count + 1)[1 : count + 1]
    noise = trace.steps[np.arange(count), 2 * count + np.arange(count)]
    targets = samples[1:].copy()
    targets[np.arange(count), 1 + count + np.arange(count)] -= noise
    for ring in range(1, min(MAX_RING, count) + 1):
        for p, q in trace.conversions:
            fitted = _fit_ring(samples, p[:, None] * samples[:-1] + q[:, None] * outputs, targets, ring)
            if fitted is not None:
                return {"p": p, "q": q, "a": fitted[:, 0], "b": fitted[:, 1:], "n": noise}
    return None


def _cumulative(steps: Float64) -> Float64:
    """[T, 3T] -> [T+1, 1+2T]: every sample in terms of the first sample, the outputs and the noise draws."""
    count = len(steps)
    samples = np.zeros((count + 1, 1 + 2 * count))
    samples[0, 0] = 1
    for i, row in enumerate(steps):
        samples[i + 1] = row[: i + 1] @ samples[: i + 1]
        samples[i + 1, 1:] += row[count:]
    return samples


def _fit_ring(samples: Float64, converted: Float64, targets: Float64, ring: int) -> Float64 | None:
    """[T, 1+ring]: a and b_0..b_{ring-1} of every row; None as soon as one row is not reproduced."""
    fitted = np.zeros((len(targets), 1 + ring))
    for i, target in enumerate(targets):
        terms = np.stack([samples[i], *converted[max(0, i - ring + 1) : i + 1][::-1]])
        size = np.abs(terms).max(axis=1)
        size[size == 0] = 1
        weights = np.linalg.lstsq((terms / size[:, None]).T, target, rcond=FIT_TOLERANCE)[0]
        scale = max(np.abs(target).max(), np.abs(weights).max(), 1e-30)
        if np.abs(weights @ (terms / size[:, None]) - target).max() > FIT_TOLERANCE * scale:
            return None
        weights[np.abs(weights) < 1e-9 * scale] = 0
        fitted[i, : len(weights)] = weights / size
    return fitted


def _mismatch(run: _Run, sampler: Sampler) -> float:
    """Scheduler against rows on random data, with a network that is not linear: largest difference over largest |x|.

    Outputs are large enough that a sample clipped to [-1, 1] shows.
    """
    random = np.random.default_rng(0)
    shape = (1, 4, 4, 4)
    mix = random.standard_normal((64, 64)) / 8
    start = sampler.initial_scale * random.standard_normal(shape)
    noise = random.standard_normal((sampler.steps, *shape))

    def network(x: Float64, t: float) -> Float64:
        mixed: Float64 = 0.6 * x + 0.5 * np.tanh(mix @ x.reshape(64) + np.cos(t)).reshape(shape)
        return mixed

    ours = sampler.trajectory(network, start, noise)
    scheduler = run.start()
    sample, theirs = torch.from_numpy(start), [start]
    for i in range(sampler.steps):
        output = torch.from_numpy(network(run.scaled(scheduler, i, sample).numpy(), float(scheduler.timesteps[i])))
        sample, _ = run.step(scheduler, i, output, sample, torch.from_numpy(noise[i]))
        theirs.append(sample.numpy())
    return float(np.abs(ours - np.stack(theirs)).max() / np.abs(np.stack(theirs)).max())


# ---- words ----------------------------------------------------------------------------------------------------------


def _prediction(scheduler: Any, given: str | None) -> str:
    """epsilon, v_prediction, sample or flow; 'unspecified' where neither the scheduler nor the caller says."""
    options = _own_options(scheduler)
    found = options.get("prediction_type")
    if _is_flow(type(scheduler).__name__, options) or found == "flow_prediction":
        found = "flow"
    if given is not None and found is not None and given != found:
        raise UnsupportedError(
            f"{type(scheduler).__name__} is set for a model that predicts {found!r}, this one predicts {given!r}: "
            "make prediction_type in scheduler_config.json agree, or choose another --sampler"
        )
    return str(given or found or "unspecified")


def _refusal(scheduler: Any, prediction: str, found: str) -> str:
    """Why a scheduler cannot become rows, and which of its options is to blame if one is known to be."""
    name, options = type(scheduler).__name__, _own_options(scheduler)
    instead = "flow_euler" if prediction == "flow" else "euler"
    for flag, blamed, why in (
        ("thresholding", True, "is not linear in its sample"),
        ("clip_sample", True, "is not linear in its sample"),
        ("clip_denoised", True, "is not linear in its sample"),
        ("skip_prk_steps", False, "starts with Runge-Kutta steps that no short ring holds"),
    ):
        if options.get(flag) is blamed:
            other = str(not blamed).lower()
            return (
                f"{name} with {flag}={blamed} {why}: {found}; "
                f"set {flag}={other} in scheduler_config.json or choose --sampler {instead}"
            )
    return (
        f"{name} is not linear in its sample, its last {MAX_RING} outputs and one noise draw: {found}; "
        f"choose another --sampler, e.g. {instead}"
    )


def _changed_options(scheduler: Any) -> dict[str, Any]:
    """Options that differ from the class's defaults; long ones (trained betas) are left out."""
    takes = inspect.signature(type(scheduler).__init__).parameters
    return {
        key: value
        for key, value in sorted(_own_options(scheduler).items())
        if value != takes[key].default and isinstance(value, bool | int | float | str)
    }


def _flat(tensor: torch.Tensor) -> Float64:
    flat: Float64 = tensor.detach().to(torch.float64).reshape(-1).numpy()
    return flat


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
