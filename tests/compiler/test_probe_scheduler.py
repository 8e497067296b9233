"""Probed rows against the scheduler they come from, in float32 as a pipeline runs it, and against analytic rows.

The oracle loop is its own: it replaces `randn_tensor` in the scheduler's module; the probe intercepts torch.randn.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from dcompile.compiler.errors import UnsupportedError
from dcompile.compiler.probe_scheduler import SAMPLERS, make_scheduler, probe
from dcompile.compiler.sampler import Sampler

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # numpy 2 on diffusers

SHAPE = (1, 4, 4, 4)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
# (class without "Scheduler", options, further options of `step`, ring at 20 steps, stochastic)
CASES: list[tuple[str, dict[str, Any], dict[str, Any], int, bool]] = [
    ("DDIM", {"clip_sample": False}, {}, 1, False),
    ("DDIM", {"clip_sample": False}, {"eta": 1.0}, 1, True),
    ("DDIM", {"clip_sample": False, "prediction_type": "sample"}, {}, 1, False),
    (
        "DDIM",
        {
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
        {},
        1,
        False,
    ),
    ("DDPM", {"clip_sample": False}, {}, 1, True),
    ("EulerDiscrete", {}, {}, 1, False),
    ("EulerDiscrete", {"prediction_type": "v_prediction", "use_karras_sigmas": True}, {}, 1, False),
    ("EulerAncestralDiscrete", {}, {}, 1, True),
    ("HeunDiscrete", {}, {}, 2, False),
    ("HeunDiscrete", {"prediction_type": "v_prediction"}, {}, 2, False),
    ("KDPM2Discrete", {}, {}, 2, False),
    ("LMSDiscrete", {"prediction_type": "v_prediction"}, {}, 4, False),
    ("PNDM", {"skip_prk_steps": True}, {}, 5, False),
    ("IPNDM", {}, {}, 4, False),
    ("DPMSolverMultistep", {}, {}, 2, False),
    ("DPMSolverMultistep", {"prediction_type": "v_prediction", "use_karras_sigmas": True}, {}, 2, False),
    ("DPMSolverMultistep", {"solver_order": 3}, {}, 3, False),
    ("DPMSolverMultistep", {"solver_order": 3, **FLOW}, {}, 3, False),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, {}, 2, True),
    ("DPMSolverMultistep", {"flow_shift": 3.0, **FLOW}, {}, 2, False),
    ("DPMSolverSinglestep", {"lower_order_final": True}, {}, 2, False),
    ("DEISMultistep", {}, {}, 2, False),
    ("DEISMultistep", {"solver_order": 3}, {}, 3, False),
    ("UniPCMultistep", {}, {}, 3, False),
    ("UniPCMultistep", {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}, {}, 4, False),
    ("UniPCMultistep", {"flow_shift": 3.0, **FLOW}, {}, 3, False),
    ("SASolver", {}, {}, 3, True),
    ("LCM", {}, {}, 1, True),
    ("TCD", {}, {}, 1, True),
    ("EDMDPMSolverMultistep", {}, {}, 2, False),
    ("FlowMatchEulerDiscrete", {}, {}, 1, False),
    ("FlowMatchEulerDiscrete", {"shift": 3.0, "stochastic_sampling": True}, {}, 1, True),
    ("FlowMatchHeunDiscrete", {}, {}, 2, False),
    ("FlowMatchLCM", {}, {}, 1, True),
]
NAMES = [f"{case[0]}-{'-'.join(map(str, [*case[1].values(), *case[2]]))}" for case in CASES]

Network = Callable[[Any, float], Any]


def make(case: tuple[Any, ...]) -> Any:
    return getattr(diffusers, f"{case[0]}Scheduler")(**case[1])


def networks() -> dict[str, Network]:
    """A linear one and one that is not: rows are linear in what the network says, not in what it does."""
    random = np.random.default_rng(1)
    base, drift = (random.standard_normal((64, 64)) / 16 for _ in range(2))

    def linear(x: Any, t: float) -> Any:
        return (0.7 * x.reshape(64) + (base + np.cos(t) * drift) @ x.reshape(64)).reshape(x.shape)

    def bent(x: Any, t: float) -> Any:
        return (np.tanh(base @ x.reshape(64) + np.cos(t)) + 0.5 * x.reshape(64)).reshape(x.shape)

    return {"linear": linear, "tanh": bent}


@contextmanager
def fixed_noise(scheduler: Any, noise: list[np.ndarray]) -> Iterator[None]:
    """The scheduler draws noise[0] next; the caller replaces it before each step."""
    module: Any = sys.modules[type(scheduler).__module__]
    original = getattr(module, "randn_tensor", None)
    if original is not None:
        module.randn_tensor = lambda shape, generator=None, device=None, dtype=None, layout=None: torch.tensor(
            noise[0], dtype=dtype
        )
    try:
        yield
    finally:
        if original is not None:
            module.randn_tensor = original


def run_scheduler(case: tuple[Any, ...], steps: int, network: Network, start: np.ndarray, noise: np.ndarray) -> Any:
    """Every sample of the real loop, float32."""
    scheduler = make(case)
    scheduler.set_timesteps(steps)
    sample, samples, draw = torch.tensor(start, dtype=torch.float32), [start], [noise[0]]
    with fixed_noise(scheduler, draw):
        for i, t in enumerate(scheduler.timesteps):
            draw[0] = noise[i]
            scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
            output = network(scaled.double().numpy(), float(t))
            sample = scheduler.step(torch.tensor(output, dtype=torch.float32), t, sample, **case[2]).prev_sample
            samples.append(sample.double().numpy())
    return np.stack(samples)


def worst_error(case: tuple[Any, ...], sampler: Sampler, steps: int, kind: str) -> float:
    """Largest difference over the whole run, relative to the largest |x|."""
    random = np.random.default_rng(2)
    start = sampler.initial_scale * random.standard_normal(SHAPE)
    noise = random.standard_normal((sampler.steps, *SHAPE))
    network = networks()[kind]
    real = run_scheduler(case, steps, network, start, noise)
    return float(np.abs(sampler.trajectory(network, start, noise) - real).max() / np.abs(real).max())


@pytest.mark.parametrize("steps", [6, 20])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_rows_agree_with_the_scheduler(case: tuple[Any, ...], steps: int) -> None:
    scheduler = make(case)
    sampler = probe(scheduler, steps, step_options=case[2])
    scheduler.set_timesteps(steps)
    assert np.array_equal(sampler.timesteps, scheduler.timesteps.double().numpy())
    assert sampler.timestep_dtype == str(scheduler.timesteps.dtype).removeprefix("torch.")
    assert sampler.stochastic == case[4]
    for kind in ("linear", "tanh"):
        # float32 of the real loop: a few roundings (6e-8) of max |x| a step, times 1/alpha near pure noise
        assert worst_error(case, sampler, steps, kind) < 2e-5
    if steps == 20:
        assert sampler.ring == case[3]
    assert sampler.ring <= case[3]


def test_one_step() -> None:
    for case in (CASES[0], CASES[5], CASES[14], CASES[30]):
        sampler = probe(make(case), 1)
        assert (sampler.steps, sampler.ring) == (1, 1)
        assert worst_error(case, sampler, 1, "tanh") < 1e-6


def test_probe_leaves_the_scheduler_alone_and_is_deterministic() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    before = scheduler.timesteps.clone()
    first, second = probe(scheduler, 9), probe(scheduler, 9)
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.num_inference_steps is None
    assert np.array_equal(first.row_table(), second.row_table())


def test_name_and_prediction() -> None:
    sampler = probe(diffusers.DPMSolverMultistepScheduler(solver_order=3, use_karras_sigmas=True), 4)
    assert sampler.name == "DPMSolverMultistepScheduler(solver_order=3, use_karras_sigmas=True)"
    assert sampler.prediction == "epsilon"
    assert probe(diffusers.FlowMatchEulerDiscreteScheduler(), 4).prediction == "flow"
    assert probe(diffusers.DPMSolverMultistepScheduler(**FLOW), 4, prediction="flow").prediction == "flow"
    assert probe(diffusers.IPNDMScheduler(), 4).prediction == "unspecified"


# ---- analytic rows ---------------------------------------------------------------------------------------------------


def test_ddim_rows_are_the_formula() -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    sampler = probe(scheduler, 10)
    cumulative = scheduler.alphas_cumprod.double().numpy()
    t = sampler.timesteps.astype(int)
    alpha, sigma = np.sqrt(cumulative[t]), np.sqrt(1 - cumulative[t])
    following = np.append(cumulative[t[1:]], float(scheduler.final_alpha_cumprod))
    next_alpha, next_sigma = np.sqrt(following), np.sqrt(1 - following)
    # x' = next_alpha * (x - sigma m) / alpha + next_sigma * m, whatever conversion the probe took
    on_sample, on_output = sampler.a + sampler.b[:, 0] * sampler.p, sampler.b[:, 0] * sampler.q
    np.testing.assert_allclose(on_sample, next_alpha / alpha, rtol=1e-6)
    np.testing.assert_allclose(on_output, next_sigma - next_alpha * sigma / alpha, rtol=1e-5)
    assert np.all(sampler.s == 1)
    assert not sampler.stochastic


def test_flow_euler_rows_are_the_formula() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    sampler = probe(scheduler, 10)
    scheduler.set_timesteps(10)
    steps = np.diff(scheduler.sigmas.double().numpy())
    np.testing.assert_allclose(sampler.b[:, 0], steps, rtol=1e-6)
    assert np.all(sampler.p == 0)
    assert np.all(sampler.q == 1)
    assert np.allclose(sampler.a, 1, rtol=1e-7)


def test_euler_rows_are_the_formula() -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    sampler = probe(scheduler, 10)
    scheduler.set_timesteps(10)
    sigma = scheduler.sigmas.double().numpy()
    np.testing.assert_allclose(sampler.s, 1 / np.sqrt(sigma[:-1] ** 2 + 1), rtol=1e-6)
    np.testing.assert_allclose(sampler.b[:, 0], np.diff(sigma), rtol=1e-5)
    assert np.allclose(sampler.a, 1, rtol=1e-6)
    assert sampler.initial_scale == pytest.approx(sigma[0], rel=1e-6)


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_dpm_solver_2m_rows_are_the_formula(solver: str) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_type=solver)
    sampler = probe(scheduler, 16)
    scheduler.set_timesteps(16)
    karras = scheduler.sigmas.double().numpy()
    alpha = 1 / np.sqrt(karras**2 + 1)
    sigma = karras * alpha
    np.testing.assert_allclose(sampler.p, 1 / alpha[:-1], rtol=1e-6)
    np.testing.assert_allclose(sampler.q, -sigma[:-1] / alpha[:-1], rtol=1e-6)
    lam = np.log(alpha[:-1]) - np.log(sigma[:-1])
    for i in range(1, 15):  # row 0 and the last one are first order
        h, r = lam[i + 1] - lam[i], (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
        shrink = np.expm1(-h)
        w = -0.5 * alpha[i + 1] * shrink if solver == "midpoint" else alpha[i + 1] * (shrink / h + 1)
        assert sampler.a[i] == pytest.approx(sigma[i + 1] / sigma[i], rel=1e-4)
        np.testing.assert_allclose(sampler.b[i], [-alpha[i + 1] * shrink + w / r, -w / r], rtol=1e-4)
    np.testing.assert_allclose(sampler.b[-1], [1, 0], atol=1e-6)
    assert sampler.a[-1] == pytest.approx(0, abs=1e-6)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (
            lambda: diffusers.DDIMScheduler(clip_sample=True),
            r"DDIMScheduler with clip_sample=True is not linear in its sample: .* "
            r"set clip_sample=false in scheduler_config.json or choose --sampler euler$",
        ),
        (lambda: diffusers.DDPMScheduler(), "DDPMScheduler with clip_sample=True is not linear"),
        (
            lambda: diffusers.DPMSolverMultistepScheduler(thresholding=True),
            "thresholding=True is not linear in its sample: .* set thresholding=false",
        ),
        (
            lambda: diffusers.UniPCMultistepScheduler(thresholding=True, **FLOW),
            "thresholding=True .* choose --sampler flow_euler$",
        ),
        (lambda: diffusers.CMStochasticIterativeScheduler(), "clip_denoised=True is not linear"),
        (lambda: diffusers.PNDMScheduler(), "skip_prk_steps=False starts with Runge-Kutta .* set skip_prk_steps=true"),
        (
            lambda: diffusers.RePaintScheduler(),
            r"RePaintScheduler cannot be run as rows: step\(output, timestep, sample\) failed in row 0: .*original",
        ),
        (
            lambda: diffusers.UniPCMultistepScheduler(predict_x0=False),
            "not finite in row 15 of 16: choose final_sigmas_type=sigma_min in scheduler_config.json",
        ),
        (
            lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "use_dynamic_shifting=True takes its timesteps from the image size: set use_dynamic_shifting=false",
        ),
    ],
)
def test_what_is_no_row_is_refused_in_one_line(scheduler: Callable[[], Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words) as caught:
        probe(scheduler(), 16)
    assert "\n" not in str(caught.value)


def test_a_flag_kept_for_another_class_is_not_to_blame() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        {"_class_name": "DDIMScheduler", "clip_sample": True, "num_train_timesteps": 1000}
    )
    assert scheduler.config["clip_sample"] is True  # diffusers keeps what it does not use
    assert probe(scheduler, 16).ring == 2


def test_bad_step_counts() -> None:
    with pytest.raises(UnsupportedError, match="0 steps were asked for"):
        probe(diffusers.FlowMatchEulerDiscreteScheduler(), 0)
    with pytest.raises(UnsupportedError, match=r"DDIMScheduler.set_timesteps\(2000\) failed: "):
        probe(diffusers.DDIMScheduler(), 2000)


def test_prediction_that_disagrees_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="set for a model that predicts 'flow', this one predicts 'epsilon'"):
        probe(diffusers.FlowMatchEulerDiscreteScheduler(), 4, prediction="epsilon")
    with pytest.raises(UnsupportedError, match="predicts 'epsilon', this one predicts 'v_prediction'"):
        probe(diffusers.EulerDiscreteScheduler(), 4, prediction="v_prediction")


def test_data_dependent_step_is_refused() -> None:
    class Normalising(diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
        def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
            return super().step(model_output / model_output.std(), timestep, sample, **options)

    with pytest.raises(UnsupportedError, match="Normalising is not linear in its sample, its last 5 outputs"):
        probe(Normalising(), 4)


def test_two_draws_in_a_step_are_refused() -> None:
    class Twice(diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
        def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
            noise = torch.randn(sample.shape) + torch.randn_like(sample)
            return super().step(model_output + noise, timestep, sample, **options)

    with pytest.raises(UnsupportedError, match="Twice draws noise 2 times in row 0"):
        probe(Twice(), 4)


# ---- make_scheduler --------------------------------------------------------------------------------------------------

STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
FLOW_MODEL = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_short_name_makes_rows(name: str) -> None:
    predicts, config = ("flow", FLOW_MODEL) if name.startswith("flow_") else ("epsilon", STABLE_DIFFUSION)
    scheduler = make_scheduler(name, config, predicts=predicts)
    assert type(scheduler).__name__ == SAMPLERS[name][0]
    assert probe(scheduler, 6, prediction=predicts).prediction == predicts


def test_a_name_keeps_the_models_own_options() -> None:
    scheduler = make_scheduler("dpm++2m", STABLE_DIFFUSION)
    assert scheduler.config.beta_end == 0.012
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert scheduler.config.steps_offset == 1
    assert make_scheduler("ddim", STABLE_DIFFUSION).config.clip_sample is False
    assert make_scheduler("ddim", {**STABLE_DIFFUSION, "clip_sample": True}).config.clip_sample is True
    assert make_scheduler("euler", None, predicts="v_prediction").config.prediction_type == "v_prediction"


def test_flow_shift_has_two_spellings() -> None:
    assert make_scheduler("flow_unipc", FLOW_MODEL).config.flow_shift == 3.0
    video = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 5.0, **FLOW}
    assert make_scheduler("flow_euler", video).config.shift == 5.0


def test_without_a_name_the_model_s_own_class_is_used() -> None:
    assert type(make_scheduler(None, FLOW_MODEL, predicts="flow")).__name__ == "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("name", "config", "predicts", "words"),
    [
        (
            "eulr",
            STABLE_DIFFUSION,
            None,
            r"no sampler is called 'eulr'. Did you mean 'euler'\? The samplers are ddim, ",
        ),
        ("qqq", None, None, "no sampler is called 'qqq'. The samplers are ddim, "),
        (None, None, None, "the model has no scheduler_config.json, .* choose --sampler from ddim, "),
        (None, {"beta_end": 0.1}, None, "scheduler_config.json has no _class_name"),
        (
            None,
            {"_class_name": "EulerDiscretScheduler"},
            None,
            "_class_name 'EulerDiscretScheduler', which is no scheduler of .* Did you mean 'EulerDiscreteScheduler'",
        ),
        (None, {"_class_name": "ConfigMixin"}, None, "'ConfigMixin', which is no scheduler"),
        (None, {"_class_name": "__version__"}, None, "'__version__', which is no scheduler"),
        ("flow_euler", STABLE_DIFFUSION, None, "--sampler flow_euler needs a model that predicts 'flow', .* 'epsilon'"),
        (
            "euler",
            FLOW_MODEL,
            None,
            "--sampler euler needs .* this one predicts 'flow': choose --sampler from flow_euler",
        ),
        ("euler", None, "flow", "--sampler euler needs a model that predicts 'epsilon'"),
        ("flow_dpm++2m", None, "epsilon", r"--sampler flow_dpm\+\+2m needs a model that predicts 'flow'"),
        (None, STABLE_DIFFUSION, "flow", "is for a model that predicts 'epsilon', this one is said to predict 'flow'"),
        (None, FLOW_MODEL, "epsilon", "is for a model that predicts 'flow', this one is said to predict 'epsilon'"),
        ("unipc", {"_class_name": "DDIMScheduler", "beta_schedule": "nope"}, None, "cannot be made .* nope is not"),
    ],
)
def test_what_does_not_go_together_is_refused(
    name: str | None, config: dict[str, Any] | None, predicts: str | None, words: str
) -> None:
    with pytest.raises(UnsupportedError, match=words):
        make_scheduler(name, config, predicts=predicts)


def test_diffusers_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'dcompile\[diffusers\]'"):
        make_scheduler("ddim", None)
