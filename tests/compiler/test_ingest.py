"""What is refused, in which words; what is read, in every form; and that the program is diffusers' own loop."""

import importlib.util
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import models
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dcompile.compiler.calibrate import example_conditions
from dcompile.compiler.errors import IngestError, UnsupportedError
from dcompile.compiler.execute import initial_slots, run
from dcompile.compiler.ingest import Source, ingest, load_network, model_name, parse_shape
from dcompile.compiler.program import Program
from dcompile.runtime.errors import DcompileError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def refusal(error: type[DcompileError] = IngestError, **source: Any) -> str:
    """The message of the refusal, after the checks that hold for all of them."""
    with pytest.raises(error) as caught:
        ingest(Source(**{"steps": 2, **{key: value for key, value in source.items() if value is not None}}))
    assert isinstance(caught.value, DcompileError)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def copy(folder: Path, to: Path, **files: str) -> Path:
    """The folder again, with some of its files written anew (a double underscore stands for the dot)."""
    to.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    for name, text in files.items():
        (to / name.replace("__", ".")).write_text(text)
    return to


def contract(folder: Path, text: str = models.TOKENS_CONTRACT) -> Path:
    (folder / "contract-given.yaml").write_text(text)
    return folder / "contract-given.yaml"


def change_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


# ---- files --------------------------------------------------------------------------------------------------------


def test_missing_path(tmp_path: Path) -> None:
    message = refusal(model=str(tmp_path / "nothing"))
    assert message.startswith(f"{tmp_path / 'nothing'}: no such file or folder")
    assert "package.module:factory" in message


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "model.h5").write_bytes(b"")
    assert "unknown kind of file '.h5'; give a diffusers folder" in refusal(model=str(tmp_path / "model.h5"))


def test_folder_without_config(tmp_path: Path) -> None:
    assert f"{tmp_path}: has no config.json" in refusal(model=str(tmp_path))


def test_folder_of_a_whole_pipeline_points_at_its_denoiser(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    message = refusal(model=str(tmp_path))
    assert f"is a whole pipeline; give its denoiser: {tmp_path / 'transformer'}" in message


def test_folder_without_safetensors(dit_folder: Path, tmp_path: Path) -> None:
    folder = copy(dit_folder, tmp_path)
    (folder / WEIGHTS).unlink()
    assert "has no .safetensors file; convert the weights to safetensors first" in refusal(model=str(folder))


@pytest.mark.parametrize("size", [0, 5, 200, -8])
def test_truncated_safetensors(dit_folder: Path, tmp_path: Path, size: int) -> None:
    folder = copy(dit_folder, tmp_path)
    (folder / WEIGHTS).write_bytes((dit_folder / WEIGHTS).read_bytes()[:size])
    message = refusal(model=str(folder))
    assert f"{folder / WEIGHTS}: not a whole safetensors file" in message
    assert "download it again" in message


def test_weights_that_the_file_lacks_are_not_made_up(dit_folder: Path, tmp_path: Path) -> None:
    folder = copy(dit_folder, tmp_path)
    change_weights(folder, lambda weights: weights.pop("transformer_blocks.1.ff.net.2.weight"))
    message = refusal(model=str(folder))
    assert "transformer_blocks.1.ff.net.2.weight" in message


def test_weights_of_another_shape(dit_folder: Path, tmp_path: Path) -> None:
    folder = copy(dit_folder, tmp_path)
    change_weights(folder, lambda weights: weights.update({"proj_out_1.bias": torch.zeros(7)}))
    assert "diffusers cannot load it as DiTTransformer2DModel" in refusal(model=str(folder))


@pytest.mark.parametrize(("value", "count"), [(float("nan"), 1), (float("inf"), 3)])
def test_weight_that_is_not_finite(dit_folder: Path, tmp_path: Path, value: float, count: int) -> None:
    folder = copy(dit_folder, tmp_path)

    def spoil(weights: dict[str, Any]) -> None:
        weights["transformer_blocks.2.attn1.to_q.weight"].view(-1)[:count] = value

    change_weights(folder, spoil)
    message = refusal(model=str(folder))
    assert f"weight 'transformer_blocks.2.attn1.to_q.weight' holds {count} values that are NaN or infinite" in message


def test_unknown_diffusers_class(dit_folder: Path, tmp_path: Path) -> None:
    folder = copy(dit_folder, tmp_path, config__json='{"_class_name": "DitTransformer2DModel"}')
    message = refusal(model=str(folder))
    assert "diffusers has no model class 'DitTransformer2DModel'; did you mean 'DiTTransformer2DModel'?" in message


@pytest.mark.parametrize("text", ["{", "[1, 2]", "{}", '{"_class_name": "UNet2DModelOutput"}'])
def test_config_that_is_none(dit_folder: Path, tmp_path: Path, text: str) -> None:
    folder = copy(dit_folder, tmp_path, config__json=text)
    assert "config.json: " in refusal(model=str(folder))


# ---- pickles ------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_nothing_in_a_pickle_runs_unless_trusted(tmp_path: Path, protocol: str) -> None:
    path, mark = tmp_path / "model.pt", tmp_path / "it-ran"
    if protocol == "torch":
        torch.save(Bomb(mark), path)
    else:
        path.write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    message = refusal(model=str(path))
    assert "loading one runs code that is in the file" in message
    assert "add --trust-pickle" in message
    assert not mark.exists()
    if protocol == "torch":  # the bomb is live
        assert "holds a NoneType; a torch.nn.Module is needed" in refusal(model=str(path), trust_pickle=True)
        assert mark.exists()


def test_damaged_pickle(tmp_path: Path) -> None:
    torch.save(models.Tokens(), tmp_path / "model.pt")
    (tmp_path / "model.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:-100])
    assert "torch.load cannot read it" in refusal(model=str(tmp_path / "model.pt"), trust_pickle=True)


def test_bare_state_dict(tmp_path: Path) -> None:
    torch.save(models.Tokens().state_dict(), tmp_path / "model.pt")
    message = refusal(model=str(tmp_path / "model.pt"))
    assert "holds weights only (a state_dict of 24 entries), not the code that uses them" in message
    assert "package.module:factory" in message


# ---- factories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("no_such_module:make", "no_such_module:make: cannot import 'no_such_module'"),
        ("models:token", "models has no callable 'token'; did you mean 'tokens'?"),
        ("models:TOKENS_CONTRACT", "models has no callable 'TOKENS_CONTRACT'"),
        ("pathlib:Path", "returned a PosixPath; a torch.nn.Module is needed"),
    ],
)
def test_factory_that_is_none(spec: str, words: str) -> None:
    assert words in refusal(model=spec)


def test_factory_that_fails_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_factory.py").write_text("def make():\n    raise ValueError('no weights here')\n")
    monkeypatch.chdir(tmp_path)
    assert "failing_factory:make: raised ValueError: no weights here" in refusal(model="failing_factory:make")


def test_factory_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_factory.py").write_text("import torch\n\ndef make():\n    return torch.nn.Linear(2, 2).double()\n")
    monkeypatch.chdir(tmp_path)
    network, folder = load_network("own_factory:make", trust_pickle=False)
    assert (type(network), folder) == (torch.nn.Linear, None)
    assert network.weight.dtype == torch.float32
    assert str(tmp_path) not in sys.path
    assert importlib.util.find_spec("own_factory") is not None  # stays loaded, and was not left on the path


# ---- contracts ----------------------------------------------------------------------------------------------------


def test_module_of_no_known_class_needs_a_contract() -> None:
    message = refusal(model="models:tokens", sampler="flow_euler")
    assert "Tokens is no diffusers class" in message
    assert "--contract FILE.yaml" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            models.TOKENS_CONTRACT.replace("x", "latent", 1),
            "sample is 'latent', but Tokens.forward takes x, sigma, extra",
        ),
        (models.TOKENS_CONTRACT.replace("sigma", "t"), "timestep is 't', but Tokens.forward takes x, sigma, extra"),
        (models.TOKENS_CONTRACT + "conditions: {label: {}}\n", "condition is 'label', but Tokens.forward takes"),
        (models.TOKENS_CONTRACT + "cfg: 3\n", "cfg: Extra inputs are not permitted; known keys: sample, sample_shape"),
        (models.TOKENS_CONTRACT + "conditions: {extra: {size: 3}}\n", "conditions.extra.size: Extra inputs"),
        (models.TOKENS_CONTRACT.replace("flow", "noise"), "predicts: Input should be 'epsilon', 'v_prediction'"),
        ("timestep: sigma\n", "sample: Field required"),
        ("[x, sigma]", "needs a mapping with at least `sample: <argument name>`; found list"),
        ("sample: [x", "cannot be read"),
    ],
)
def test_wrong_contract(tmp_path: Path, text: str, words: str) -> None:
    assert words in refusal(model="models:tokens", contract=contract(tmp_path, text), sampler="flow_euler")


def test_missing_contract(tmp_path: Path) -> None:
    message = refusal(model="models:tokens", contract=tmp_path / "none.yaml", sampler="flow_euler")
    assert f"contract {tmp_path / 'none.yaml'}: cannot be read" in message


@pytest.mark.parametrize("text", ["predicts: noise\n", "sample_shape: [4, wide, 8]\n", "guidance: strong\n"])
def test_wrong_contract_of_a_known_class_names_the_key(dit_folder: Path, tmp_path: Path, text: str) -> None:
    message = refusal(model=str(copy(dit_folder, tmp_path, contract__yaml=text)))
    assert message.startswith("contract ")
    assert f"{text.partition(':')[0]}" in message


def test_argument_without_a_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Needy(models.Tokens):
        def forward(self, x: Any, sigma: Any, needed: Any) -> Any:  # type: ignore[override]
            return x

    monkeypatch.setattr(models, "needy", Needy, raising=False)
    message = refusal(model="models:needy", contract=contract(tmp_path), sampler="flow_euler")
    assert "Needy.forward needs 'needed', which has no role; add it under `conditions`" in message


def test_size_that_nothing_tells(tmp_path: Path) -> None:
    text = models.TOKENS_CONTRACT.replace("sample_shape: [6, 4]\n", "")
    message = refusal(model="models:tokens", contract=contract(tmp_path, text), sampler="flow_euler")
    assert "the size of a sample is not known; give it with --shape" in message
    message = refusal(model="models:flux", sampler="flow_euler")
    assert "FluxTransformer2DModel: its config does not tell the size of a sample" in message
    assert "--shape 1024x64 (tokens, channels)" in message


def test_shape_that_the_network_refuses(dit_folder: Path) -> None:
    message = refusal(model=str(dit_folder), shape=(3, 8, 8))
    assert message.startswith("DiTTransformer2DModel refuses a sample of shape 3x8x8: ")
    assert message.endswith("give another with --shape")


def test_network_that_fixes_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(models.Tokens):
        def forward(self, x: Any, sigma: Any, extra: Any = None) -> Any:
            return super().forward(x, sigma * torch.ones(len(x)))

    monkeypatch.setattr(models, "fixed", Fixed, raising=False)
    message = refusal(model="models:fixed", contract=contract(tmp_path), sampler="flow_euler")
    assert message.startswith("Fixed computes with its batch as a fixed number: ")


def test_network_that_computes_otherwise_at_batch_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Particular(models.Tokens):
        def forward(self, x: Any, sigma: Any, extra: Any = None) -> Any:
            return super().forward(x if x.shape[0] > 1 else 2 * x, sigma)

    monkeypatch.setattr(models, "particular", Particular, raising=False)
    message = refusal(model="models:particular", contract=contract(tmp_path), sampler="flow_euler")
    assert message == "Particular computes something else at batch 1 than at 2; its batch cannot be dynamic"


def test_network_that_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Choosing(models.Tokens):
        def forward(self, x: Any, sigma: Any, extra: Any = None) -> Any:
            return super().forward(x if x.sum() > 0 else -x, sigma)

    monkeypatch.setattr(models, "choosing", Choosing, raising=False)
    message = refusal(model="models:choosing", contract=contract(tmp_path), sampler="flow_euler")
    assert message.startswith("Choosing cannot be exported: ")


@pytest.mark.parametrize("text", ["", "4x", "4x0x4", "-4x4", "4,8,8", "axb"])
def test_shape_that_is_none(text: str) -> None:
    with pytest.raises(IngestError, match="needs positive sizes joined by x"):
        parse_shape(text)


def test_shape_is_read() -> None:
    assert parse_shape("4x32X16") == (4, 32, 16)


# ---- conditions and samplers --------------------------------------------------------------------------------------


def test_label_count(dit_folder: Path, tmp_path: Path) -> None:
    folder = copy(dit_folder, tmp_path, labels__json=json.dumps(["a", "b", "c"]))
    assert "labels: 3 names for 10 classes; give one name a class" in refusal(model=str(folder))


def test_labels_that_are_no_list(dit_folder: Path, tmp_path: Path) -> None:
    folder = copy(dit_folder, tmp_path, labels__json='{"0": "a"}')
    assert f"{folder / 'labels.json'}: needs a JSON list of class names" in refusal(model=str(folder))


def test_guidance_needs_a_condition(tmp_path: Path) -> None:
    message = refusal(model="models:tokens", contract=contract(tmp_path), sampler="flow_euler", guidance=3.0)
    assert "--guidance 3.0: the model has no condition to guide by; leave --guidance out" in message


def test_scheduler_that_is_not_linear(dit_folder: Path, tmp_path: Path) -> None:
    scheduler = {**models.SCHEDULERS["epsilon"], "clip_sample": True}
    folder = copy(dit_folder, tmp_path, scheduler_config__json=json.dumps(scheduler))
    message = refusal(UnsupportedError, model=str(folder))
    assert "DDIMScheduler with clip_sample=True is not linear in its sample" in message
    assert "--sampler" in message


def test_sampler_that_does_not_suit_the_prediction(dit_folder: Path) -> None:
    assert "predicts 'flow'" in refusal(UnsupportedError, model=str(dit_folder), sampler="ddim")


def test_no_scheduler_at_all() -> None:
    assert "choose --sampler from" in refusal(UnsupportedError, model="models:dit")


@pytest.mark.parametrize("steps", [0, -3])
def test_steps_below_one(dit_folder: Path, steps: int) -> None:
    assert f"--steps {steps}: at least 1 is needed" in refusal(model=str(dit_folder), steps=steps)


# ---- what is read -------------------------------------------------------------------------------------------------


def test_folder(dit: Program, dit_folder: Path) -> None:
    contract = dit.contract
    assert dit.name == dit_folder.name
    assert contract.sample.shape == (4, 8, 8)
    assert contract.value_range is None
    assert (contract.predicts, contract.steps, contract.guidance) == ("flow", 6, 2.0)
    assert (contract.batch.min, contract.batch.max) == (1, 64)
    assert [(c.name, c.dtype, c.classes) for c in contract.conditions] == [("class_labels", "int64", 10)]
    assert list(dit.tables) == ["timestep", "row"]
    assert [len(table) for table in dit.tables.values()] == [6, 6]
    assert dit.plan.sites == ()
    targets = {str(node.target) for node in dit.graph.graph.nodes if node.op == "call_function"}
    assert {"aten.linear.default", "aten.scaled_dot_product_attention.default"} <= targets
    assert not targets & {"aten.clone.default", "aten.dropout.default", "aten._assert_tensor_metadata.default"}


def test_contract_in_the_folder(unet: Program) -> None:
    (labels,) = unet.contract.conditions
    assert (labels.name, labels.classes) == ("class_labels", 10)
    assert unet.contract.value_range == (-1.0, 1.0)


def test_labels_beside_the_model(dit_folder: Path, tmp_path: Path) -> None:
    names = [f"digit {i}" for i in range(10)]
    folder = copy(dit_folder, tmp_path, labels__json=json.dumps(names))
    (labels,) = ingest(Source(str(folder), steps=1)).contract.conditions
    assert labels.labels == tuple(names)


def test_without_an_unconditional_label_guidance_asks_for_a_negative(tmp_path: Path) -> None:
    text = models.TOKENS_CONTRACT.replace("extra", "c") + "conditions: {extra: {shape: [3]}}\nguidance: 4.0\nsteps: 3\n"
    program = ingest(Source("models:tokens", contract=contract(tmp_path, text), sampler="flow_euler"))
    assert [condition.name for condition in program.contract.conditions] == ["extra", "negative_extra"]
    assert (program.contract.guidance, program.contract.steps) == (4.0, 3)
    asked = Source("models:tokens", contract=contract(tmp_path, text), sampler="flow_euler", guidance=1.0, steps=2)
    program = ingest(asked)  # what the user asks goes before what the contract says
    assert [condition.name for condition in program.contract.conditions] == ["extra"]
    assert (program.contract.guidance, program.contract.steps) == (1.0, 2)


@pytest.fixture(scope="module")
def expected_tokens() -> Any:
    """Two samples of `models.tokens` after four Euler steps of flow matching, by hand."""
    network = models.tokens()
    start = initial_slots_of((6, 4))
    return by_hand(lambda x, t: network(x, t.expand(2)), models.SCHEDULERS["flow"], 4, start)


def initial_slots_of(shape: tuple[int, ...]) -> Any:
    from dcompile.runtime.random import normal

    return torch.from_numpy(normal([0, 1], 0, shape))


@pytest.mark.parametrize("form", ["factory", "pt", "pt2"])
def test_every_form_of_a_module_of_no_known_class(form: str, tmp_path: Path, expected_tokens: Any) -> None:
    if form == "factory":
        model = "models:tokens"
    elif form == "pt":
        model = str(tmp_path / "model.pt")
        torch.save(models.tokens(), model)
    else:
        model = str(tmp_path / "model.pt2")
        batch = torch.export.Dim.DYNAMIC
        inputs = (torch.randn(2, 6, 4), torch.tensor([500.0, 400.0]))
        torch.export.save(torch.export.export(models.tokens(), inputs, dynamic_shapes=({0: batch}, {0: batch})), model)
    source = Source(model, contract=contract(tmp_path), sampler="flow_euler", steps=4, trust_pickle=form == "pt")
    program = ingest(source)
    assert program.contract.sample.shape == (6, 4)
    assert program.contract.conditions == ()
    torch.testing.assert_close(run(program, {}, [0, 1]), expected_tokens, rtol=1e-5, atol=1e-5)
    assert [region.path.partition("blocks.")[2] for region in program.regions] == ["0", "1", "2"]


def test_archive_with_arguments_that_are_no_tensors(tmp_path: Path) -> None:
    network, batch = models.Tokens(blocks=1), {0: torch.export.Dim.DYNAMIC}
    given = {"x": torch.randn(2, 6, 4), "sigma": torch.tensor([500.0, 400.0]), "extra": None}
    shapes = {"x": batch, "sigma": batch, "extra": None}
    torch.export.save(torch.export.export(network, (), given, dynamic_shapes=shapes), tmp_path / "model.pt2")
    source = Source(str(tmp_path / "model.pt2"), contract=contract(tmp_path), sampler="flow_euler", steps=1)
    start = initial_slots_of((6, 4))
    expected = by_hand(lambda x, t: network(x, t.expand(2)), models.SCHEDULERS["flow"], 1, start)
    torch.testing.assert_close(run(ingest(source), {}, [0, 1]), expected, rtol=1e-5, atol=1e-5)


def test_archive_of_one_batch_size_is_refused(tmp_path: Path) -> None:
    model = str(tmp_path / "model.pt2")
    inputs = (torch.randn(3, 6, 4), torch.tensor([500.0, 400.0, 300.0]))
    torch.export.save(torch.export.export(models.tokens(), inputs), model)
    assert "ArchivedNetwork" in refusal(model=model, contract=contract(tmp_path), sampler="flow_euler")


def test_archive_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"PK\x03\x04 nothing")
    assert "torch.export cannot load it" in refusal(model=str(tmp_path / "model.pt2"))


def test_name_of_the_artifact(tmp_path: Path) -> None:
    (tmp_path / "glyphs" / "model").mkdir(parents=True)
    (tmp_path / "glyphs" / "cat.pt").touch()
    assert model_name(str(tmp_path / "glyphs")) == "glyphs"
    assert model_name(str(tmp_path / "glyphs" / "model")) == "glyphs"
    assert model_name(str(tmp_path / "glyphs" / "cat.pt")) == "cat"
    assert model_name("package.module:make") == "make"


# ---- the same numbers as the model --------------------------------------------------------------------------------


def by_hand(network: Callable[[Any, Any], Any], scheduler_config: dict[str, Any], steps: int, start: Any) -> Any:
    """A pipeline's loop: the real scheduler, and a network that has guidance in it."""
    cls = getattr(diffusers, scheduler_config["_class_name"])
    scheduler = cls.from_config(scheduler_config)
    scheduler.set_timesteps(steps)
    sample = start * getattr(scheduler, "init_noise_sigma", 1.0)
    with torch.no_grad():
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
            sample = scheduler.step(network(scaled, t), t, sample).prev_sample
    return sample


def guided(network: Any, labels: Any, none: int, guidance: float) -> Callable[[Any, Any], Any]:
    def call(x: Any, t: Any) -> Any:
        outputs = [
            network(x, t.expand(len(x)), class_labels=given).sample[:, : x.shape[1]]
            for given in (labels, torch.full_like(labels, none))
        ]
        return outputs[1] + guidance * (outputs[0] - outputs[1])

    return call


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_guided_program_is_the_pipeline_loop(name: str, request: pytest.FixtureRequest) -> None:
    program: Program = request.getfixturevalue(name)
    network = models.dit() if name == "dit" else models.unet2d()
    conditions = {"class_labels": np.array([3, 7, 1])}
    start = initial_slots(program, conditions, [0, 1, 2])["sample"]
    step = guided(network, torch.tensor([3, 7, 1]), 10, program.contract.guidance)
    expected = by_hand(step, models.SCHEDULERS["flow"], 6, start)
    found = run(program, conditions, [0, 1, 2])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    unguided = by_hand(guided(network, torch.tensor([3, 7, 1]), 10, 1.0), models.SCHEDULERS["flow"], 6, start)
    assert (found - unguided).abs().max() > 0.05  # guidance does something


def test_learned_variance_is_left_out(tmp_path: Path) -> None:
    """DiT as published gives eight channels for four: the noise, and how sure it is."""
    network = diffusers.DiTTransformer2DModel(
        **{**models.dit().config, "out_channels": 8, "num_layers": 1}  # type: ignore[dict-item]
    )
    folder = models.save(models.randomise(network), tmp_path, models.SCHEDULERS["epsilon"])
    program = ingest(Source(str(folder), steps=3, guidance=1.5))
    conditions = {"class_labels": np.array([3, 7])}
    start = initial_slots(program, conditions, [0, 1])["sample"]
    expected = by_hand(guided(network, torch.tensor([3, 7]), 10, 1.5), models.SCHEDULERS["epsilon"], 3, start)
    torch.testing.assert_close(run(program, conditions, [0, 1]), expected, rtol=1e-5, atol=1e-5)


def by_name(name: str, x: Any, t: Any, given: dict[str, Any]) -> Any:
    """One call of a diffusers network as its pipeline makes it."""
    network: Any = models.ARCHITECTURES[name].make()
    arguments: dict[str, Any] = {"timestep": t.expand(len(x)), **given}
    if name == "pixart":
        arguments["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    if name == "flux":
        side = torch.arange(4.0)
        grid = torch.stack([torch.zeros(4, 4), side[:, None].expand(4, 4), side[None].expand(4, 4)], dim=-1)
        arguments |= {"img_ids": grid.reshape(16, 3), "txt_ids": torch.zeros(512, 3)}
        arguments |= {"timestep": t.expand(len(x)) / 1000, "guidance": torch.full((len(x),), 3.5)}
    with torch.no_grad():
        return network(x, **arguments, return_dict=False)[0][:, : x.shape[1]]


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_step_graph_is_the_network_and_the_row(name: str, program_of: Callable[[str], Program]) -> None:
    program = program_of(name)
    conditions = {key: torch.from_numpy(value) for key, value in example_conditions(program.contract, 3).items()}
    sample = torch.from_numpy(np.random.default_rng(0).standard_normal((3, *program.contract.sample.shape), np.float32))
    timestep, row = program.tables["timestep"][1], program.tables["row"][1]
    s, p, q, a, _, b = row
    expected = a * sample + b * (p * sample + q * by_name(name, s * sample, timestep, conditions))
    (found,) = program.graph(sample, *conditions.values(), timestep, row)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_writes_in_place_are_kept(tmp_path: Path) -> None:
    network = models.tokens_in_place()
    asked = Source("models:tokens_in_place", contract=contract(tmp_path), sampler="flow_euler", steps=3)
    program = ingest(asked)
    start = initial_slots_of((6, 4))
    expected = by_hand(lambda x, t: network(x, t.expand(2)), models.SCHEDULERS["flow"], 3, start)
    torch.testing.assert_close(run(program, {}, [0, 1]), expected, rtol=1e-5, atol=1e-5)
    assert not [
        node for node in program.graph.graph.nodes if str(node.target).partition(".")[2].partition(".")[0].endswith("_")
    ]
