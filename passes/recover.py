"""Train what is left of a network to say what the whole one said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..compiler import rewrite
from ..compiler.calibrate import Calibration
from ..compiler.errors import RecipeError
from ..compiler.ingest import load_callable
from ..compiler.program import Decision, PassResult, Program, Record
from ..compiler.recipe import options_of
from ..compiler.regions import Region, all_blocks
from ..compiler.store import digest, fingerprint
from .order import refuse_late
from .recovery.data import Noised
from .recovery.examples import Examples, Trajectories
from .recovery.losses import feature_loss, matched, output_loss
from .recovery.network import Network
from .recovery.trainer import Settings, train

_ORDER = "put recover between the passes that cut and those"
_OF_DATA = 0.1  # of the loss
_TIMES = 4  # steps of the trajectory in each batch: one is read at a time


@dataclass(frozen=True)
class Recover:
    """Distil the model as it came into what the passes before left of it. Needs no data: the model's own trajectories
    are what is trained on, with its predictions, guidance included.

    data: `package.module:loader`, called as loader(number, samples) -> {"sample": [samples, *shape], and each condition
    by its name}, the same for the same number. Then its samples with noise are trained on, and a tenth of the loss is
    what they say themselves (TinyFusion).

    steps: of training. batch: samples a step of training, from four steps of the sampler. rate: of AdamW at its
    highest; it falls by a cosine. features: weight of what the blocks say beside what the network predicts, falling to
    0 (TinyFusion, 2412.01199); blocks are matched by their place. average: decay of the average of the weights, which
    is what is kept. precision: of the products in training; weights, averages and what is matched stay in fp32. seed:
    of the noise that trajectories start from.

    Left alone: everything, where no pass before changed the network. Must run before cache_steps, quantize and
    fold_timestep, which measure the weights as they then are.
    """

    name: ClassVar[str] = "recover"

    steps: int = 1000
    batch: int = 16
    rate: float = 2e-4
    features: float = 0.01
    average: float = 0.999
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    data: str | None = None

    def __post_init__(self) -> None:
        for option, least in (("steps", 1), ("batch", _TIMES), ("seed", 0)):
            if getattr(self, option) < least:
                raise RecipeError(f"recover: {option} is {getattr(self, option)}, needed {least} or more")
        if self.rate <= 0:
            raise RecipeError(f"recover: rate is {self.rate}, needed more than 0")
        if self.features < 0:
            raise RecipeError(f"recover: features is {self.features}, needed 0 or more")
        if not 0 <= self.average < 1:
            raise RecipeError(f"recover: average is {self.average}, needed 0 or more and less than 1")

    def decide(self, program: Program, calibration: Calibration, /) -> Decision:
        """The trained weights."""
        refuse_late(program, self.name, _ORDER)
        teacher = calibration.original
        if program.graph is teacher.graph:
            return Decision()
        pairs = _pairs(program, teacher) if self.features else []
        student = Network(program, [mine.streams[0].exit for mine, _ in pairs])
        student.unfreeze()
        whole = Network(teacher, [other.streams[0].exit for _, other in pairs])
        examples = self._examples(teacher)

        def loss(step: int, done: float) -> Tensor:
            losses = [
                self._loss(student, whole, examples, step * _TIMES + each, self.features * (1 - done) if pairs else 0.0)
                for each in range(_TIMES)
            ]
            return torch.stack(losses).mean()

        key = digest("recover", fingerprint(program), fingerprint(teacher), options_of(self)) + "-training"
        settings = Settings(self.steps, self.rate, self.average)
        trained = train(student.weights, loss, settings, calibration.store, key, calibration.progress)
        choices: dict[str, Any] = {
            "loss": [list(point) for point in trained.curve],
            "matched": {mine.path: other.path for mine, other in pairs},
            **({"stopped": trained.stopped} if trained.stopped is not None else {}),
        }
        return Decision(choices, dict(trained.weights))

    def _examples(self, teacher: Program) -> Examples:
        batch = max(1, self.batch // _TIMES)
        if self.data is None:
            return Trajectories(teacher, batch, self.steps * _TIMES, self.seed)
        return Noised(teacher, load_callable(self.data), self.data, batch, self.seed)

    def _loss(self, student: Network, whole: Network, examples: Examples, number: int, features: float) -> Tensor:
        example = examples.example(number, _TIMES)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            found, *mine = student(example.step, example.slots)
            with torch.no_grad():
                theirs = whole(example.step, example.slots)[1:] if features else []
        loss = output_loss(found.float(), example.expected)
        if example.truth is not None:
            loss = (1 - _OF_DATA) * loss + _OF_DATA * output_loss(found.float(), example.truth)
        if not features:
            return loss
        return loss + features * feature_loss([each.float() for each in mine], [each.float() for each in theirs])

    def apply(self, program: Program, decision: Decision, /) -> PassResult:
        refuse_late(program, self.name, _ORDER)
        if not decision.tensors:
            why = "no pass before changed the network, so there is nothing to recover"
            return PassResult(program, Record(self.name, refused=(("every weight", why),)))
        graph = rewrite.clone(program.graph)
        for name, value in decision.tensors.items():
            rewrite.assign(graph, name, torch.nn.Parameter(torch.from_numpy(value)))
        refused: tuple[tuple[str, str], ...] = ()
        if "stopped" in decision.choices:
            why = f"the loss diverged at step {decision.choices['stopped']}; the weights before are kept: lower rate"
            refused = (("the rest of the training", why),)
        record = Record(self.name, changed=len(decision.tensors), refused=refused, details=dict(decision.choices))
        return PassResult(program.with_graph(rewrite.finish(graph)), record)


def _pairs(program: Program, teacher: Program) -> list[tuple[Region, Region]]:
    """Blocks of the student, each with the block of the teacher that it is to match."""
    mine, others = all_blocks(program.graph), all_blocks(teacher.graph)
    found = [(one, others[index]) for one, index in zip(mine, matched(len(mine), len(others)), strict=True)]
    return [
        (one, other) for one, other in found
        if one.streams and other.streams and _shape(program, one) == _shape(teacher, other)
    ]  # fmt: skip


def _shape(program: Program, block: Region) -> list[str]:
    return [*map(str, rewrite.shape_of(rewrite.node_named(program.graph, block.streams[0].exit)))]
