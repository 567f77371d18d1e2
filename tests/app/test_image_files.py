from __future__ import annotations

import gzip
import os
import pickle
import pickletools
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from learndrop_ext.app.image_files import (
    IntegrityError,
    check_labels,
    find_file,
    read_cifar,
    read_idx,
)

IDX_2X3 = struct.pack(">4B2I", 0, 0, 8, 2, 2, 3) + bytes([0, 1, 2, 3, 4, 255])


def cifar_content(n: int = 4) -> dict[bytes, object]:
    data = (np.arange(n * 3072) % 251).astype(np.uint8).reshape(n, 3072)
    return {
        b"batch_label": b"a batch",
        b"labels": list(range(n)),
        b"data": data,
        b"filenames": [b"x.png"] * n,
    }


def write_pickle(path: Path, content: object, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("name", ["values", "values.gz"])
def test_read_idx(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(IDX_2X3) if name.endswith(".gz") else IDX_2X3)
    assert torch.equal(read_idx(path, dims=2), torch.tensor([[0, 1, 2], [3, 4, 255]], dtype=torch.uint8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an IDX header has 12 bytes, got 0"),
        (IDX_2X3[:11], "an IDX header has 12 bytes, got 11"),
        (
            struct.pack(">3I", 0x803, 2, 3),
            "the IDX magic number must be 2050 (bytes, 2 dimensions), got 2051",
        ),
        (
            struct.pack(">3I", 0x0D02, 2, 3),
            "the IDX magic number must be 2050 (bytes, 2 dimensions), got 3330",
        ),
        (struct.pack(">3I", 0x802, 0, 3), "must hold at least one sample, got the shape [0, 3]"),
        (IDX_2X3[:-1], "the header promises [2, 3], 6 bytes of values, got 5"),
        (IDX_2X3 + b"\0\0", "the header promises [2, 3], 6 bytes of values, got more than 6"),
        (
            struct.pack(">3I", 0x802, 0xFFFFFFFF, 0xFFFFFFFF),
            "the header promises [4294967295, 4294967295], 18446744065119617025 bytes of values, got 0",
        ),
    ],
)
def test_read_idx_refuses(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "values"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=f"^{re.escape(f'{path}: {message}')}$"):
        read_idx(path, dims=2)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (gzip.compress(IDX_2X3, mtime=0)[:-9], "Compressed file ended before the end-of-stream marker was reached"),
        (gzip.compress(IDX_2X3, mtime=0)[:8], "Compressed file ended before the end-of-stream marker was reached"),
        (IDX_2X3, "Not a gzipped file"),
        (gzip.compress(IDX_2X3, mtime=0)[:-8] + bytes(8), "CRC check failed"),
    ],
)
def test_read_idx_refuses_damaged_gzip(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "values.gz"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=f"^{re.escape(f'{path}: could not be read to its end: {reason}')}"):
        read_idx(path, dims=2)


def test_find_file(tmp_path: Path) -> None:
    (tmp_path / "a.gz").touch()
    assert find_file(tmp_path, "a", suffixes=("", ".gz")) == tmp_path / "a.gz"
    (tmp_path / "a").touch()
    assert find_file(tmp_path, "a", suffixes=("", ".gz")) == tmp_path / "a"
    with pytest.raises(IntegrityError, match=re.escape(f"{tmp_path / 'b'}: no such file, nor with the ending .gz")):
        find_file(tmp_path, "b", suffixes=("", ".gz"))


def test_integrity_error_survives_a_worker(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(IntegrityError(tmp_path, "gone")))
    assert (type(error), str(error), error.args) == (IntegrityError, f"{tmp_path}: gone", (tmp_path, "gone"))


@pytest.mark.parametrize("protocol", [2, 4])
def test_read_cifar(tmp_path: Path, protocol: int) -> None:
    content = cifar_content()
    path = write_pickle(tmp_path / "batch", content, protocol)
    images, labels = read_cifar(path, labels="labels", classes=10)
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.uint8
    # sample 1, green, row 2, column 3: 3072 + 1024 + 2 * 32 + 3 = 4163 = 16 * 251 + 147
    assert images[1, 1, 2, 3] == 147
    assert torch.equal(labels, torch.tensor([0, 1, 2, 3]))


def test_read_cifar_with_the_globals_of_the_original_files(tmp_path: Path) -> None:
    """The originals name numpy.core.multiarray and hold Python 2 strings; this one is put together by hand."""
    data = bytes(range(256)) * 24
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR(I1\n(I2\nI3072\nt"
        b"cnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\nI0\ntbI00\nT"
        + struct.pack("<I", len(data))
        + data
        + b"tb"
    )
    path = tmp_path / "batch"
    path.write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x06labels](I7\nI9\neu.")
    images, labels = read_cifar(path, labels="labels", classes=10)
    assert images[0, 0, 0].tolist() == list(range(32))
    assert images[1].flatten().tolist() == list(range(256)) * 12
    assert labels.tolist() == [7, 9]


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("key", [b"data", b"labels", b"extra"])
def test_read_cifar_refuses_foreign_globals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_pickle(tmp_path / "batch", {**cifar_content(), key: Hostile()})
    message = f"{path}: refused: it asks for posix.system, which no CIFAR file holds"
    with pytest.raises(IntegrityError, match=re.escape(message)):
        read_cifar(path, labels="labels", classes=10)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "builtins getattr", "numpy load", "numpy.core.multiarray scalar", "_codecs decode"],
)
def test_read_cifar_admits_only_its_list(tmp_path: Path, name: str) -> None:
    path = tmp_path / "batch"
    path.write_bytes(b"c" + name.replace(" ", "\n").encode() + b"\n.")
    assert [str(arg) for op, arg, _ in pickletools.genops(path.read_bytes()) if op.name == "GLOBAL"] == [name]
    with pytest.raises(IntegrityError, match=f"refused: it asks for {re.escape(name.replace(' ', '.'))}, which"):
        read_cifar(path, labels="labels", classes=10)


def test_read_cifar_refuses_another_encoding_of_bytes(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    path.write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x05\0\0\0utf-7\x86R.")
    with pytest.raises(IntegrityError, match="bytes must be encoded as latin1, got 'utf-7'"):
        read_cifar(path, labels="labels", classes=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"data": b"raw"}, "'data' must be a numpy array of uint8, got bytes"),
        ({b"data": None}, "'data' must be a numpy array of uint8, got NoneType"),
        ({b"data": np.zeros((4, 3072), np.int16)}, "'data' must be a numpy array of uint8, got one of int16"),
        ({b"data": np.zeros((4, 784), np.uint8)}, "'data' must be [N, 3072], got (4, 784)"),
        ({b"data": np.zeros(3072, np.uint8)}, "'data' must be [N, 3072], got (3072,)"),
        ({b"data": np.zeros((0, 3072), np.uint8)}, "'data' must be [N, 3072], got (0, 3072)"),
        ({b"labels": None}, "'labels' must be a list of integers, got NoneType"),
        ({b"labels": [0, 1, 2, "3"]}, "'labels' must be a list of integers, got list"),
        ({b"labels": [0, 1, 2]}, "'labels' must hold 4 labels, one an image, got 3"),
        ({b"labels": [0, 1, 2, 10]}, "labels must be from 0 to 9, got 10"),
        ({b"labels": [0, -1, 2, 3]}, "labels must be from 0 to 9, got -1"),
    ],
)
def test_read_cifar_refuses(tmp_path: Path, change: dict[bytes, object], message: str) -> None:
    path = write_pickle(tmp_path / "batch", {**cifar_content(), **change}, protocol=4)
    with pytest.raises(IntegrityError, match=f"^{re.escape(f'{path}: {message}')}$"):
        read_cifar(path, labels="labels", classes=10)


def test_read_cifar_refuses_an_array_shorter_than_its_shape(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    whole = pickle.dumps(cifar_content(1), protocol=4)
    path.write_bytes(whole.replace(b"K\x01M\x00\x0c", b"K\x02M\x00\x0c"))
    with pytest.raises(IntegrityError, match="is not a whole pickle: ValueError: buffer size"):
        read_cifar(path, labels="labels", classes=10)


@pytest.mark.parametrize("kept", [0, 1, 100, 5000, -1])
def test_read_cifar_refuses_a_broken_pickle(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(cifar_content(), protocol=4)[:kept])
    with pytest.raises(IntegrityError, match=f"^{re.escape(f'{path}: is not a whole pickle: ')}"):
        read_cifar(path, labels="labels", classes=10)


def test_read_cifar_refuses_a_list(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="must hold a dictionary, got list"):
        read_cifar(write_pickle(tmp_path / "batch", [1]), labels="labels", classes=10)


def test_check_labels(tmp_path: Path) -> None:
    check_labels(tmp_path, 0, 9, classes=10)
    with pytest.raises(IntegrityError, match="labels must be from 0 to 9, got 10"):
        check_labels(tmp_path, 0, 10, classes=10)
