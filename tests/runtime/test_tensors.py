import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save, save_file

from dcompile.runtime import BundleError
from dcompile.runtime.tensors import read_tensors

DTYPES = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]
arrays = hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))


@given(st.dictionaries(st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"), arrays, max_size=4))
def test_reads_what_safetensors_writes(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, np.ndarray]
) -> None:
    path = tmp_path_factory.mktemp("tensors") / "t.safetensors"
    save_file(tensors, path, metadata={"made by": "a test"})
    found = read_tensors(path)
    assert found.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert found[name].dtype == expected.dtype
        assert found[name].flags.aligned
        assert found[name].flags.writeable  # memory of its own: no table changes with another
        np.testing.assert_array_equal(found[name], expected)


def with_header(**entry: object) -> bytes:
    """One array of six floats, two entries of whose header are as given."""
    text = json.dumps({"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **entry}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(24)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (b"\xff" * 8, "a header of 18446744073709551615 bytes in a file of 8"),
        ((2).to_bytes(8, "little") + b"{]", "Expecting property name"),
        ((2).to_bytes(8, "little") + b"[]", "the header is no object"),
        (with_header(shape=[2, 4]), r"x: \[2, 4\] F32 at bytes 0 to 24 of 24"),
        (with_header(shape=[-2, -3]), r"x: \[-2, -3\] F32 at bytes 0 to 24 of 24"),
        (with_header(data_offsets=[4, 28]), "at bytes 4 to 28 of 24"),
        (with_header(data_offsets=[-4, 20]), "at bytes -4 to 20 of 24"),
        (with_header(data_offsets=[0]), r"x.data_offsets: expected tuple\[int, int\]"),
        (with_header(dtype="BF16"), "x: dtype 'BF16'; did you mean 'F16'"),
        (with_header(more=1), "x.more: unknown field"),
    ],
)
def test_a_damaged_file_is_refused_in_words(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=rf"t.safetensors: cannot be read \(.*{message}.*; copy the bundle again"):
        read_tensors(path)


@given(st.binary(max_size=40), st.integers(0, 80))
def test_no_bytes_break_it(tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int) -> None:
    """Any damage to a sound file is a BundleError, or leaves it sound; nothing else is raised."""
    sound = save({"x": np.arange(6, dtype=np.float32), "y": np.ones((2, 2), np.int64)})
    path = tmp_path_factory.mktemp("tensors") / "t.safetensors"
    path.write_bytes(sound[:at] + noise + sound[at + len(noise) :])
    try:
        read_tensors(path)
    except BundleError:
        return


def test_a_missing_file_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No such file"):
        read_tensors(tmp_path / "none.safetensors")
