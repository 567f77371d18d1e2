"""The files of a store: the offsets of rows, their checksums, positioned reads and writes by several threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from learndrop_ext import _C
from learndrop_ext.ops import transfer
from learndrop_ext.rows.layout import RowLayout


@pytest.mark.parametrize("portable", [False, True])
def test_crc32c_is_that_of_the_standard(portable: bool) -> None:
    # RFC 3720, B.4, and the check value of the catalogue of CRCs.
    assert _C.crc32c(b"123456789", portable=portable) == 0xE3069283
    assert _C.crc32c(bytes(32), portable=portable) == 0x8A9136AA
    assert _C.crc32c(b"\xff" * 32, portable=portable) == 0x62A8AB43
    assert _C.crc32c(bytes(range(32)), portable=portable) == 0x46DD794E
    assert _C.crc32c(b"", portable=portable) == 0


def test_crc32c_is_the_same_without_the_instruction() -> None:
    data = os.urandom(3000)
    for begin in range(9):
        for end in (*range(begin, 300, 7), *range(700, len(data), 61)):
            part = memoryview(data)[begin:end]
            assert _C.crc32c(part) == _C.crc32c(part, portable=True)


# row bytes, stride, rows a group, group bytes
@pytest.mark.parametrize(
    ("row", "stride", "group", "size"),
    [(14, 128, 32, 4096), (1000, 1024, 4, 4096), (1300, 1408, 2, 4096), (2049, 2176, 1, 4096), (4097, 4224, 1, 8192)],
)
def test_places_put_no_row_across_a_page_that_it_need_not_cross(row: int, stride: int, group: int, size: int) -> None:
    layout = RowLayout(row, stride)
    assert (layout.rows_per_group, layout.group_bytes) == (group, size)
    assert layout.begin(0) == 4096
    assert layout.begin(group) == 4096 + size
    assert layout.end(group + 1) == 4096 + 2 * size


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_read_and_write_rows_are_the_same_with_any_number_of_threads(tmp_path: Path, threads: int) -> None:
    layout = RowLayout(50_000, 50_048)
    stored = torch.randint(0, 256, (40, 50_048), dtype=torch.uint8)
    checksums = torch.zeros(40, dtype=torch.int32)
    order = torch.randperm(40)
    with (tmp_path / "rows").open("w+b") as opened:
        transfer.write_rows(layout.file(opened.fileno()), order, stored[order], checksums, threads=threads)
        into = torch.zeros_like(stored)
        assert (
            transfer.read_rows(layout.file(opened.fileno()), torch.arange(40), into, checksums, threads=threads) is None
        )
        assert torch.equal(into[:, :50_000], stored[:, :50_000])
        assert [_C.crc32c(row[:50_000].numpy().tobytes()) for row in stored] == [c % 2**32 for c in checksums.tolist()]
        checksums[7] += 1
        checksums[21] += 1
        asked = torch.tensor([3, 21, 7])
        assert transfer.read_rows(layout.file(opened.fileno()), asked, into, checksums, threads=threads) == 1


@pytest.mark.parametrize("block_bytes", [1, 4096, 128 << 10])
def test_read_rows_gives_the_same_rows_from_the_disk_and_from_the_page_cache(tmp_path: Path, block_bytes: int) -> None:
    layout = RowLayout(3000, 3008)
    stored = torch.randint(0, 256, (300, 3008), dtype=torch.uint8)
    checksums = torch.zeros(300, dtype=torch.int32)
    with (tmp_path / "rows").open("w+b") as opened:
        transfer.write_rows(layout.file(opened.fileno()), torch.arange(300), stored, checksums, threads=4)
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for slots in (torch.tensor([299, 0, 150]), torch.randperm(300), torch.arange(300)):
            into = torch.zeros(len(slots), 3008, dtype=torch.uint8)
            args = (layout.file(opened.fileno()), slots, into, checksums)
            assert transfer.read_rows(*args, threads=4, block_bytes=block_bytes) is None
            assert torch.equal(into[:, :3000], stored[slots, :3000])
