import numpy as np
import pytest

from dcompile.runtime.random import normal, philox

KNOWN_ANSWERS = [  # Random123, kat_vectors: counter, key, expected
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

GOLDEN = [
    -0.9701898097991943,
    0.1940186619758606,
    -1.2356207370758057,
    1.923926591873169,
    -0.07318136096000671,
    0.13913720846176147,
]  # seed 42, draw 0


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> np.ndarray:
        return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)

    np.testing.assert_array_equal(philox(words(counter), words(key)), words(expected))


def test_normal_follows_the_documented_rule() -> None:
    seed, draw = 0x1234_5678_9ABC_DEF0, 3
    noise = normal([seed], draw, (2, 5))[0].reshape(-1)
    for element in (0, 1, 6, 9):
        block, lane = divmod(element, 4)
        words = philox(np.array([block, 0, draw, 0], np.uint32), np.array([0x9ABCDEF0, 0x12345678], np.uint32))
        first, second = [(float(word >> np.uint32(8)) + 1) / 2**24 for word in words[lane // 2 * 2 :][:2]]
        wave = np.sin if lane % 2 else np.cos
        assert noise[element] == np.float32(np.sqrt(-2 * np.log(first)) * wave(2 * np.pi * second))


def test_golden_normals() -> None:
    """The C++ twin must give these."""
    assert normal([42], 0, (6,))[0].tolist() == GOLDEN


def test_a_sample_depends_on_its_seed_alone() -> None:
    together = normal([5, 2**64 - 1, 7], 1, (3, 3))
    for i, seed in enumerate([5, 2**64 - 1, 7]):
        np.testing.assert_array_equal(together[i], normal([seed], 1, (3, 3))[0])
    assert not np.array_equal(together[0], together[2])
    assert not np.array_equal(together, normal([5, 2**64 - 1, 7], 2, (3, 3)))
    np.testing.assert_array_equal(normal([5], 1, (7,))[0], normal([5], 1, (20,))[0, :7])


def test_moments_are_those_of_a_standard_normal() -> None:
    noise = normal([0], 0, (400_000,))[0].astype(np.float64)
    assert noise.dtype == np.float64
    assert np.isfinite(noise).all()
    moments = [np.mean(noise**k) for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.05)  # five standard errors of the fourth: 0.077
    pairs = np.corrcoef(noise.reshape(-1, 4).T) - np.eye(4)
    assert np.abs(pairs).max() < 5 / np.sqrt(len(noise) / 4)


def test_shapes() -> None:
    assert normal([1, 2], 0, ()).shape == (2,)
    assert normal([], 0, (3,)).shape == (0, 3)
    assert normal([1], 0, (2, 0)).shape == (1, 2, 0)
    assert normal([1], 0, (3,)).dtype == np.float32
