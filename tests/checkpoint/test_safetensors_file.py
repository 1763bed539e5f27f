"""safetensors files against the library, and headers that lie."""

import json
from collections import deque

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from dsv3.checkpoint.safetensors_file import METADATA, Entry, file_bytes, read_header
from dsv3.errors import CheckpointError
from tests.checkpoint.folders import save

TENSORS = {
    "matrix": np.arange(15, dtype=np.float32).reshape(5, 3),
    "half": np.arange(4, dtype=np.float16),
    "wide": np.arange(7).astype(ml_dtypes.bfloat16),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_reads_what_the_library_writes_and_the_other_way(tmp_path):
    save_file(TENSORS, tmp_path / "theirs", metadata={"a": "b"})
    theirs = read_header(tmp_path / "theirs")
    assert_equal({name: tensor.read() for name, tensor in theirs.items()}, TENSORS)
    save(tmp_path / "ours", TENSORS, METADATA)
    assert_equal(load_file(tmp_path / "ours"), TENSORS)
    codes = np.arange(6, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(2, 3)
    save(tmp_path / "fp8", {"codes": codes}, {})
    assert_equal({"codes": read_header(tmp_path / "fp8")["codes"].read()}, {"codes": codes})


def test_reads_rows(tmp_path):
    save(tmp_path / "file", TENSORS, METADATA)
    tensor = read_header(tmp_path / "file")["matrix"]
    np.testing.assert_array_equal(tensor.read(slice(1, 4)), TENSORS["matrix"][1:4])
    assert tensor.read(slice(2, 2)).shape == (0, 3)


def test_a_file_cut_short_while_it_is_read(tmp_path):
    save(tmp_path / "file", TENSORS, METADATA)
    tensors = read_header(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match="became shorter"):
        for tensor in tensors.values():
            tensor.read()


def test_parts_have_to_be_what_was_announced(tmp_path):
    entries, half = {"a": Entry("F32", (2, 2))}, np.ones(2, np.float32)
    whole = b"".join(part.tobytes() for part in file_bytes(entries, {}, [half, half]))
    (tmp_path / "whole").write_bytes(whole)
    assert load_file(tmp_path / "whole")["a"].tolist() == [[1, 1], [1, 1]]
    for parts in ([half], [half, half, half]):
        with pytest.raises(ValueError, match="announced"):
            deque(file_bytes(entries, {}, parts), maxlen=0)


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F16", "shape": [3], "data_offsets": [8, 14]}}  # fmt: skip


def write(path, header, data=14):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def changed(name="b", **fields):
    return GOOD | {name: GOOD[name] | fields}


@pytest.mark.parametrize(
    ("header", "data", "fault"),
    [
        (changed(data_offsets=[6, 12]), 14, "b overlaps a"),
        (changed(data_offsets=[0, 6]), 14, "overlaps"),
        (changed(data_offsets=[10, 16]), 16, "b leaves a gap behind a"),
        (changed(data_offsets=[8, 15]), 15, "is said to take 7 bytes"),
        (changed(data_offsets=[14, 8]), 14, "is said to take -6 bytes"),
        (changed("a", data_offsets=[-8, 0]), 14, "at -8 to 0"),
        (changed(data_offsets=[8]), 14, "lacks dtype, shape or data_offsets"),
        (changed(shape=[3.0]), 14, "b is 'F16'"),
        (changed(shape=[True, 3]), 14, "b is 'F16'"),
        (changed(shape=3), 14, "lacks dtype, shape or data_offsets"),
        (changed(dtype="F24"), 14, "b is 'F24'"),
        (changed(dtype=["F16"]), 14, "b is"),
        (GOOD, 13, "its header describes"),
        (GOOD, 15, "its header describes"),
        ([1], 0, "its header is no JSON object"),
        (b"{]", 14, "its header is not sound"),
        (b"\xff\xfe", 14, "its header is not sound"),
        (b"[" * 100_000, 0, "its header is not sound"),
        (b'{"a": 1, "a": 2}', 14, "'a' stands there twice"),
        ({"a": 5}, 0, "lacks dtype, shape or data_offsets"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, data, fault):
    assert read_header(write(tmp_path / "good", GOOD)).keys() == GOOD.keys()
    with pytest.raises(CheckpointError) as caught:
        read_header(write(tmp_path / "file", header, data))
    assert f"{tmp_path / 'file'} is damaged or no safetensors file: " in str(caught.value)
    assert fault in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" * 8 + b"{}", bytes(8) + b"{}"])
def test_what_is_no_header_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot hold a header"):
        read_header(tmp_path / "file")
    with pytest.raises(CheckpointError, match="is missing"):
        read_header(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


@given(at=st.integers(0, 200), bit=st.integers(0, 7))
def test_a_flipped_bit_of_the_header_is_refused_or_leaves_readable_tensors(
    tmp_path_factory, at, bit
):
    file = tmp_path_factory.mktemp("flipped") / "file"
    content = bytearray(write(file, GOOD).read_bytes())
    content[at % len(content)] ^= 1 << bit
    file.write_bytes(content)
    try:
        tensors = read_header(file)
    except CheckpointError as error:
        assert str(file) in str(error)
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) == 14
