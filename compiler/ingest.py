"""Read a trained model, whatever its form, and make a Program of it."""

from __future__ import annotations

import importlib
import inspect
import json
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..runtime.errors import did_you_mean
from ..runtime.manifest import Batch, Condition, Contract, SampleSpec
from . import network as roles
from .errors import IngestError
from .network import NetworkSpec
from .plan import Plan
from .probe_scheduler import make_scheduler, probe
from .program import Program
from .step_graph import MAX_BATCH, Step, condition_inputs, export_step

DEFAULT_STEPS = 30


@dataclass(frozen=True)
class Source:
    """Where the model is and how the user asked to read it; the fields are the command line's options.

    model: a diffusers folder, `model.pt2`, `model.pt`, or `package.module:factory`. shape: the sample, without batch.
    sampler: short name or None for the model's own scheduler. trust_pickle: unpickling runs code that is in the file.
    """

    model: str
    shape: tuple[int, ...] | None = None
    contract: Path | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    trust_pickle: bool = False


def ingest(source: Source) -> Program:
    """Load, check the weights, work out the roles of the inputs, probe the sampler, export the step graph.

    Raises IngestError (file, contract, shape, weights) or UnsupportedError (the scheduler is not linear).
    """
    network, folder = load_network(source.model, source.trust_pickle)
    check_finite(network)
    scheduler_config = (
        read_json(folder / "scheduler_config.json") if folder and (folder / "scheduler_config.json").exists() else None
    )
    spec = network_spec(network, source, folder, scheduler_config)
    roles.check_roles(spec, network)
    if spec.sample_shape is None:
        raise IngestError(
            f"{source.model}: the size of a sample is not known; give it with --shape, for example --shape 4x32x32"
        )
    assert spec.predicts is not None
    scheduler = make_scheduler(source.sampler, scheduler_config, predicts=spec.predicts)
    steps = next(given for given in (source.steps, spec.steps, DEFAULT_STEPS) if given is not None)
    if steps < 1:
        raise IngestError(f"--steps {steps}: at least 1 is needed")
    sampler = probe(scheduler, steps, prediction=spec.predicts)
    guidance = next(given for given in (source.guidance, spec.guidance, 1.0) if given is not None)
    if guidance != 1.0 and not condition_inputs(spec, guided=False):
        raise IngestError(f"--guidance {guidance}: the model has no condition to guide by; leave --guidance out")
    step = Step(network.eval(), spec, sampler, guidance)
    graph = export_step(step)
    tables = {
        "timestep": torch.from_numpy(sampler.timesteps.astype(np.float32)).reshape(-1, 1),
        "row": torch.from_numpy(sampler.row_table()),
    }
    contract = make_contract(spec, guidance, sampler, folder)
    return Program(model_name(source.model), graph, contract, sampler, tables, Plan(sampler.steps))


def model_name(model: str) -> str:
    """A short name for the artifact: the folder's, its parent's where it is just called "model", or the factory's."""
    if ":" in model and not Path(model).exists():
        return model.partition(":")[2]
    path = Path(model).resolve()
    stem = path.stem if path.is_file() else path.name
    return path.parent.name if stem in ("model", "transformer", "unet") else stem


def make_contract(spec: NetworkSpec, guidance: float, sampler: Any, folder: Path | None) -> Contract:
    conditions = []
    for name in condition_inputs(spec, guidance != 1.0):
        condition = spec.conditions[name.removeprefix("negative_")]
        conditions.append(
            Condition(name, condition.dtype, condition.shape, condition.classes, _labels(condition, folder))
        )
    assert spec.sample_shape is not None
    assert spec.predicts is not None
    return Contract(
        sample=SampleSpec(spec.sample_shape, "float32"),
        value_range=spec.value_range,
        predicts=spec.predicts,
        steps=sampler.steps,
        guidance=float(guidance),
        initial_scale=float(sampler.initial_scale),
        stochastic=sampler.stochastic,
        batch=Batch(1, MAX_BATCH),
        conditions=tuple(conditions),
    )


def _labels(condition: roles.ConditionSpec, folder: Path | None) -> tuple[str, ...] | None:
    if condition.classes is None:
        return None
    names: Any = condition.labels
    if names is None and folder and (folder / "labels.json").exists():
        names = "labels.json"
    if isinstance(names, str):
        path = (folder or Path()) / names
        names = read_json(path)
        if not isinstance(names, list):
            raise IngestError(f"{path}: needs a JSON list of class names")
    if names is None:
        return None
    if len(names) != condition.classes:
        raise IngestError(f"labels: {len(names)} names for {condition.classes} classes; give one name a class")
    return tuple(str(name) for name in names)


def network_spec(
    network: nn.Module, source: Source, folder: Path | None, scheduler_config: Mapping[str, Any] | None
) -> NetworkSpec:
    """What the class tells, with the user's contract file, or else the folder's contract.yaml, over it."""
    given = source.contract or (folder / "contract.yaml" if folder and (folder / "contract.yaml").exists() else None)
    overrides = roles.read_yaml(given) if given else {}
    base: dict[str, Any] = {}
    if getattr(network, "config", None) and "sample" not in overrides:
        predicts = overrides.get("predicts") or _prediction(scheduler_config)
        shape = source.shape or overrides.get("sample_shape")
        base = roles.infer_spec(network, shape, predicts).model_dump(exclude_none=True)
    elif not overrides:
        raise IngestError(
            f"{type(network).__name__} is no diffusers class, so its inputs have no known roles; "
            "describe them in a contract: --contract FILE.yaml"
        )
    merged = {**base, **overrides}
    if source.shape:
        merged["sample_shape"] = source.shape
    merged.setdefault("predicts", _prediction(scheduler_config) or "epsilon")
    return roles.parse_spec(merged, str(given or source.model))


def _prediction(scheduler_config: Mapping[str, Any] | None) -> str | None:
    """What the model predicts, from its scheduler's config."""
    if not scheduler_config:
        return None
    if str(scheduler_config.get("_class_name", "")).startswith("FlowMatch"):
        return "flow"
    kind = scheduler_config.get("prediction_type")
    return {"flow_prediction": "flow"}.get(kind, kind) if kind else None


def load_network(model: str, trust_pickle: bool) -> tuple[nn.Module, Path | None]:
    """The network in float32 on the CPU, and the folder that its side files are in."""
    path = Path(model)
    if path.is_dir():
        return load_folder(path), path
    if path.is_file():
        if path.suffix == ".pt2":
            return load_archive(path), path.parent
        if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
            return load_pickle(path, trust_pickle), path.parent
        raise IngestError(
            f"{model}: unknown kind of file {path.suffix!r}; "
            "give a diffusers folder, model.pt2, model.pt, or package.module:factory"
        )
    if ":" in model and "/" not in model:
        return load_factory(model), None
    raise IngestError(
        f"{model}: no such file or folder; give a diffusers folder, model.pt2, model.pt, or package.module:factory"
    )


def load_folder(folder: Path) -> nn.Module:
    """A diffusers model: config.json with _class_name, and its weights as safetensors."""
    if not (folder / "config.json").exists():
        inner = [name for name in ("transformer", "unet") if (folder / name / "config.json").exists()]
        if inner:
            raise IngestError(f"{folder}: is a whole pipeline; give its denoiser: {folder / inner[0]}")
        raise IngestError(f"{folder}: has no config.json; a diffusers model folder holds config.json and *.safetensors")
    config = read_json(folder / "config.json")
    class_name = config.get("_class_name") if isinstance(config, dict) else None
    try:
        import diffusers
    except ImportError as error:
        raise IngestError("reading a diffusers folder needs diffusers: pip install 'dcompile[diffusers]'") from error
    cls: Any = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    is_network = inspect.isclass(cls) and issubclass(cls, nn.Module)
    if not is_network:
        known = [n for n in dir(diffusers) if n.endswith("Model")]
        raise IngestError(
            f"{folder}/config.json: diffusers has no model class {class_name!r}; {did_you_mean(str(class_name), known)}"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise IngestError(
            f"{folder}: has no .safetensors file; convert the weights to safetensors first (model.save_pretrained)"
        )
    for file in weights:
        check_safetensors(file)
    try:
        network: nn.Module
        network, loading = cls.from_pretrained(
            str(folder),
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise IngestError(f"{folder}: diffusers cannot load it as {class_name}: {_last_line(error)}") from error
    missing = [name for name, _ in network.named_parameters() if name in loading["missing_keys"]]
    if missing:  # diffusers fills them with random numbers
        raise IngestError(
            f"{folder}: its safetensors lack {len(missing)} weights of {class_name}, {missing[0]!r} first; "
            "config.json is another model's, or a file is missing: copy or download it again"
        )
    return network


def check_safetensors(file: Path) -> None:
    """Read the header only: a truncated or damaged file is named before anything is allocated."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as handle:
            handle.keys()
    except (SafetensorError, OSError) as error:
        raise IngestError(
            f"{file}: not a whole safetensors file ({_last_line(error)}); copy or download it again"
        ) from error


def load_archive(path: Path) -> nn.Module:
    try:
        exported = torch.export.load(str(path))
    except Exception as error:
        raise IngestError(
            f"{path}: torch.export cannot load it ({_last_line(error)}); it must come from torch.export.save"
        ) from error
    return ArchivedNetwork(exported)


class ArchivedNetwork(nn.Module):
    """A torch.export archive, called with keyword arguments by the names of its inputs.

    Its modules are made again, because regions are found by their paths. Inputs that were no tensors stay as they were.
    """

    def __init__(self, exported: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.inner = torch.export.unflatten(exported)
        args, kwargs = exported.example_inputs or ((), {})
        names = [str(name) for name in exported.graph_signature.user_inputs]
        self.positional = dict(zip(names, args, strict=False))
        self.constants = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
        given = {**self.positional, **kwargs}
        self.argument_names = tuple(name for name, value in given.items() if isinstance(value, Tensor))

    def train(self, mode: bool = True) -> ArchivedNetwork:
        """The graph is what it was when it was exported; torch refuses to switch it, even to what it is."""
        return self

    def forward(self, **arguments: Tensor) -> Any:
        positional = [arguments.pop(name, value) for name, value in self.positional.items()]
        return self.inner(*positional, **self.constants, **arguments)


def load_pickle(path: Path, trusted: bool) -> nn.Module:
    """A pickled module, only if trusted: unpickling runs whatever code the file names. Nothing runs otherwise."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trusted)
    except pickle.UnpicklingError as error:
        if trusted:
            raise IngestError(f"{path}: cannot be unpickled ({_last_line(error)})") from error
        raise IngestError(
            f"{path}: holds a pickled module, and loading one runs code that is in the file; "
            "if you trust where it comes from, add --trust-pickle, otherwise give the weights as safetensors"
        ) from error
    except Exception as error:
        raise IngestError(f"{path}: torch.load cannot read it ({_last_line(error)})") from error
    if isinstance(content, nn.Module):
        return content.float()
    if isinstance(content, Mapping):
        raise IngestError(
            f"{path}: holds weights only (a state_dict of {len(content)} entries), not the code that uses them; "
            "give package.module:factory, a callable that returns the loaded module"
        )
    raise IngestError(f"{path}: holds a {type(content).__name__}; a torch.nn.Module is needed")


def load_factory(spec: str) -> nn.Module:
    factory = load_callable(spec)
    try:
        network = factory()
    except Exception as error:
        raise IngestError(f"{spec}: raised {type(error).__name__}: {_last_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise IngestError(f"{spec}: returned a {type(network).__name__}; a torch.nn.Module is needed")
    return network.float()


def load_callable(spec: str) -> Any:
    """What `package.module:name` names, looked up in the current folder too. Raises IngestError where it is none."""
    module_name, _, attribute = spec.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise IngestError(
            f"{spec}: cannot import {module_name!r} ({error}); is it installed, or in this folder?"
        ) from error
    finally:
        sys.path.pop(0)
    found = getattr(module, attribute, None)
    if not callable(found):
        raise IngestError(
            f"{spec}: {module_name} has no callable {attribute!r}; {did_you_mean(attribute, dir(module))}"
        )
    return found


def check_finite(network: nn.Module) -> None:
    """Raises IngestError naming the first weight that holds NaN or infinity."""
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).sum())
            raise IngestError(
                f"weight {name!r} holds {bad} values that are NaN or infinite (of {value.numel()}); "
                "the checkpoint is damaged"
            )


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise IngestError(f"{path}: cannot be read as JSON ({_last_line(error)})") from error


def parse_shape(text: str) -> tuple[int, ...]:
    """ "4x32x32" -> (4, 32, 32)."""
    try:
        sizes = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise IngestError(f"--shape {text!r}: needs positive sizes joined by x, without the batch, for example 4x32x32")
    return sizes


def _last_line(error: BaseException) -> str:
    lines: Sequence[str] = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__
