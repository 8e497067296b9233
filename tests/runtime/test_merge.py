from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcompile.runtime import DcompileError, EngineError, RequestError, Session, load
from dcompile.runtime.manifest import Batch
from dcompile.runtime.merge import Request, generate_merged

Build = Callable[..., Any]
SEEDS = st.integers(0, 2**63 - 1)
SAMPLES = st.lists(st.tuples(SEEDS, st.sampled_from("ABCDE")), min_size=1, max_size=2)


def asked(samples: list[tuple[int, str]]) -> Request:
    return Request(seeds=[seed for seed, _ in samples], labels=[label for _, label in samples])


@pytest.fixture
def session(tiny: Build) -> Session:
    return load(tiny(stochastic=True).path, threads=1)


@given(st.lists(SAMPLES, min_size=1, max_size=2))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_gets_what_it_would_get_alone(session: Session, requests: list[list[tuple[int, str]]]) -> None:
    answers = generate_merged(session, [asked(samples) for samples in requests])
    for samples, answer in zip(requests, answers, strict=True):
        labels, seeds = [label for _, label in samples], [seed for seed, _ in samples]
        np.testing.assert_array_equal(answer, session.generate(labels=labels, seed=seeds))


def test_wrong_requests_do_not_hinder_the_others(session: Session) -> None:
    broken = RequestError("broken before")
    good = asked([(7, "A"), (8, "E")])
    wrong = [
        asked([(1, "F")]),
        asked([(-1, "A")]),
        Request(seeds=[1, 2, 3], labels=["A"]),
        Request(seeds=[1], labels=["A"], conditions={"width": [1]}),
        asked([(seed, "A") for seed in range(5)]),
    ]
    answers = generate_merged(session, [wrong[0], good, broken, *wrong[1:], good])
    np.testing.assert_array_equal(answers[1], session.generate(labels=["A", "E"], seed=[7, 8]))
    np.testing.assert_array_equal(answers[1], answers[-1])
    assert answers[2] is broken
    sentences = [str(answer) for answer in answers if isinstance(answer, DcompileError)]
    assert len(sentences) == 6
    for said, sentence in zip(
        (
            "no label of 'class_labels' is called 'F'",
            "broken before",
            "seed -1 is outside",
            "3 seeds for a batch of 1",
            "no condition is called 'width'",
            "batch 5: this bundle takes 1..4",
        ),
        sentences,
        strict=True,
    ):
        assert said in sentence


def test_together_they_may_be_too_many(session: Session) -> None:
    answers = generate_merged(session, [asked([(1, "A"), (2, "A"), (3, "A")]), asked([(4, "A"), (5, "A")])])
    sentence = "batch 5: this bundle takes 1..4; split the request, or compile for a larger batch"
    assert [str(answer) for answer in answers] == [sentence, sentence]


def test_a_bundle_for_larger_batches_is_filled_up(tiny: Build) -> None:
    bundle = tiny(stochastic=True)
    with load(bundle.path) as session:
        alone = session.generate(labels=["C", "B"], seed=[9, 5])
    bundle.edit(contract=replace(bundle.manifest.contract, batch=Batch(4, 4)))
    with load(bundle.path) as session:
        with pytest.raises(RequestError, match=r"batch 2: this bundle takes 4\.\.4"):
            session.generate(labels=["C", "B"], seed=[9, 5])
        answers = generate_merged(session, [asked([(9, "C")]), asked([(5, "B")])])
    np.testing.assert_array_equal(np.concatenate(answers), alone)  # type: ignore[arg-type]


def test_nothing_sound_generates_nothing(session: Session) -> None:
    assert generate_merged(session, []) == []
    session.close()  # whoever generates now is told so
    assert "no label" in str(generate_merged(session, [asked([(1, "F")])])[0])


def test_a_failing_engine_answers_everyone(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EngineError("engines/full.onnx: out of memory")

    def generate(**_: object) -> None:
        raise broken

    monkeypatch.setattr(session, "generate", generate)  # a real engine fails where memory ends, and not on demand
    assert generate_merged(session, [asked([(1, "A")]), asked([(2, "B")])]) == [broken, broken]
