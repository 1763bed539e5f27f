import struct
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.errors import DataError
from dsv3.evaluation import logits as module
from dsv3.evaluation.logits import logits, read_tokens
from dsv3.parallel.shard import Shard


def saved(tmp_path, content):
    path = tmp_path / "T.npy"
    np.save(path, content)
    return path


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint64"])
def test_integers_of_any_width_are_read(tmp_path, dtype):
    tokens = read_tokens(saved(tmp_path, np.array([[0, 9], [3, 4]], dtype)), 10)
    assert tokens.dtype == np.int32 and tokens.tolist() == [[0, 9], [3, 4]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([[1.0, 2.0]], "holds float64, not integers"),
        ([[True]], "holds bool"),
        ([["a"]], "holds <U1"),
        ([1, 2], r"shape \[2\], not \[B, T\]"),
        ([[[1]]], r"shape \[1, 1, 1\]"),
        (np.zeros((0, 4), int), r"shape \[0, 4\]"),
        (np.zeros((4, 0), int), r"shape \[4, 0\]"),
        ([[1, 2], [3, 10]], r"T.npy\[1, 1\] = 10 is no id of the vocabulary, 0 to 9"),
        ([[1, -2], [3, 10]], r"T.npy\[0, 1\] = -2 is no id"),
        (np.array([[2**63]], np.uint64), r"T.npy\[0, 0\] = 9223372036854775808"),
    ],
)
def test_what_is_no_batch_of_tokens_is_named(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_tokens(saved(tmp_path, content), 10)


def npy(header):
    """A .npy file of that header and one number."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(8)


def test_what_is_no_file_of_an_array_is_named(tmp_path):
    path = tmp_path / "T.npy"
    headers = (
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776, 1099511627776)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (99999999, 9999999)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (2, 2)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 2)}",
        "{'descr': '<i8', 'shape': (2,",
        "(" * 5000,
    )
    for content in (b"", b"not numpy", b"\x93NUMPY\x01\x00", b"PK\x03\x04", *map(npy, headers)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"T\.npy is no \.npy file") as found:
            read_tokens(path, 10)
        assert "pickle" not in str(found.value)
    np.savez(tmp_path / "T.npz", tokens=[[1]])
    with pytest.raises(DataError, match=r"T\.npz holds an \.npz archive"):
        read_tokens(tmp_path / "T.npz", 10)
    with pytest.raises(DataError, match=r"absent\.npy cannot be read: No such file"):
        read_tokens(tmp_path / "absent.npy", 10)
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_tokens(tmp_path, 10)


@pytest.mark.parametrize(("ranks", "batches"), [(1, [2, 2, 1]), (4, [4, 4])])
def test_every_depth_is_answered_in_batches_of_whole_sequences(monkeypatch, ranks, batches):
    """On a mesh of a multiple of its ranks; what fills them up is not in the answer."""
    shapes = []

    def answer(model, tokens_BT):
        shapes.append(tokens_BT.shape)
        output = jnp.broadcast_to(tokens_BT[..., None], (*tokens_BT.shape, 6)).astype("float32")
        return module._named(SimpleNamespace(logits_BTV=output, mtp_logits=(-output, 2 * output)))

    monkeypatch.setattr(module, "_logits", answer)
    monkeypatch.setattr(module, "POSITIONS", 8)
    tokens_BT = np.arange(15, dtype=np.int32).reshape(5, 3)
    found = logits(SimpleNamespace(shard=Shard(data_ranks=ranks)), tokens_BT)
    assert shapes == [(rows, 3) for rows in batches]
    assert list(found) == ["logits", "mtp_logits", "mtp_logits_2"]
    for array, factor in zip(found.values(), (1, -1, 2), strict=True):
        assert array.shape == (5, 3, 6) and array.dtype == np.float32
        assert (array == factor * tokens_BT[..., None]).all()
