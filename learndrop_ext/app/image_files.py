"""Readers of the IDX and CIFAR file formats. Each checks what it reads and raises IntegrityError.

N samples, C channels, H and W pixels.
"""

from __future__ import annotations

import gzip
import math
import pickle
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor


class IntegrityError(ValueError):
    """A data file or folder is missing, damaged or in the wrong format. Its arguments: the path and the problem."""

    def __str__(self) -> str:
        return "{}: {}".format(*self.args)


def find_file(folder: Path, name: str, *, suffixes: Sequence[str] = ("",)) -> Path:
    """Return the file `name` in a folder, with the first suffix that exists. Raise IntegrityError if none does."""
    for suffix in suffixes:
        path = folder / (name + suffix)
        if path.is_file():
            return path
    others = "".join(f", nor with the ending {suffix}" for suffix in suffixes[1:])
    raise IntegrityError(folder / (name + suffixes[0]), f"no such file{others}")


def read_idx(path: Path, *, dims: int) -> Tensor:
    """Read an IDX file of bytes with `dims` dimensions, gzipped if its name ends in .gz, as a uint8 tensor.

    Source: "The IDX file format" on the MNIST page of LeCun, Cortes and Burges: two zero bytes, the type (8 for unsigned
    bytes), the number of dimensions, each size as a big-endian 32-bit integer, then the values in C order.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * dims)
            if len(head) < 4 + 4 * dims:
                raise IntegrityError(path, f"an IDX header has {4 + 4 * dims} bytes, got {len(head)}")
            magic, *sizes = struct.unpack(f">{1 + dims}I", head)
            if magic != 0x800 + dims:
                raise IntegrityError(
                    path, f"the IDX magic number must be {0x800 + dims} (bytes, {dims} dimensions), got {magic}"
                )
            wanted = math.prod(sizes)
            if wanted == 0:
                raise IntegrityError(path, f"must hold at least one sample, got the shape {sizes}")
            data = bytearray()
            while chunk := file.read(min(wanted + 1 - len(data), 1 << 24)):
                data += chunk
    except (OSError, EOFError, zlib.error) as error:
        raise IntegrityError(path, f"could not be read to its end: {error}") from error
    if len(data) != wanted:
        got = f"more than {wanted}" if len(data) > wanted else str(len(data))
        raise IntegrityError(path, f"the header promises {sizes}, {wanted} bytes of values, got {got}")
    return torch.frombuffer(data, dtype=torch.uint8).view(sizes)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes must be encoded as latin1, got {encoding!r}")
    return text.encode("latin1")


_reconstruct = np.empty(0).__reduce__()[0]
#: The globals in the original files (numpy 2.0 moved _reconstruct), and the one for bytes in files written by Python 3.
_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}


class _CifarUnpickler(pickle.Unpickler):
    def __init__(self, path: Path, file: BinaryIO) -> None:
        super().__init__(file, encoding="bytes")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise IntegrityError(self.path, f"refused: it asks for {module}.{name}, which no CIFAR file holds")
        return _GLOBALS[module, name]


def _unpickle(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            content = _CifarUnpickler(path, file).load()
    except IntegrityError:
        raise
    except Exception as error:
        raise IntegrityError(path, f"is not a whole pickle: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise IntegrityError(path, f"must hold a dictionary, got {type(content).__name__}")
    return {k.decode("latin1") if isinstance(k, bytes) else str(k): v for k, v in content.items()}


def read_cifar(path: Path, *, labels: str, classes: int) -> tuple[Tensor, Tensor]:
    """Read one CIFAR batch: images [N, 3, 32, 32] uint8 and labels [N] int64 in [0, classes). labels: their key.

    Source: "the CIFAR-10 and CIFAR-100 datasets", the python version: a pickled dictionary whose `data` is a uint8 array
    [N, 3072] of red, green and blue planes, each 32 by 32. A pickle may ask for numpy's arrays; any other global is refused
    before it is imported.
    """
    content = _unpickle(path)
    images, values = content.get("data"), content.get(labels)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        got = f"one of {images.dtype}" if isinstance(images, np.ndarray) else type(images).__name__
        raise IntegrityError(path, f"'data' must be a numpy array of uint8, got {got}")
    if images.ndim != 2 or len(images) < 1 or images.shape[1] != 3072:
        raise IntegrityError(path, f"'data' must be [N, 3072], got {images.shape}")
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise IntegrityError(path, f"{labels!r} must be a list of integers, got {type(values).__name__}")
    if len(values) != len(images):
        raise IntegrityError(path, f"{labels!r} must hold {len(images)} labels, one an image, got {len(values)}")
    check_labels(path, min(values), max(values), classes=classes)
    return torch.tensor(images).view(-1, 3, 32, 32), torch.tensor(values, dtype=torch.int64)


def check_labels(path: Path, lowest: int, highest: int, *, classes: int) -> None:
    """Raise IntegrityError unless the lowest and highest labels are in [0, classes)."""
    if lowest < 0 or highest >= classes:
        raise IntegrityError(path, f"labels must be from 0 to {classes - 1}, got {lowest if lowest < 0 else highest}")
