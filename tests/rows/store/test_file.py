from __future__ import annotations

import dataclasses
import os
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from learndrop_ext.ops import transfer
from learndrop_ext.rows.cache import ActivationCache
from learndrop_ext.rows.disk import DiskTier
from learndrop_ext.rows.layout import RowLayout
from learndrop_ext.rows.plan import Budgets
from learndrop_ext.rows.store import file
from learndrop_ext.rows.store.file import CacheFileError, Sidecar
from learndrop_ext.rows.store.fingerprint import Fingerprint, describe, tells_apart

CPU = torch.device("cpu")
ON_DISK = Budgets(0, 0, 1 << 30)
PRINT = Fingerprint(weights="ab12", cut=2, codec="fp16", views=3, samples=70, dataset="Digits flip=True")


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).half().float()


def saved(path: Path, shape: tuple[int, ...] = (7,), *, slots: int = 70, budgets: Budgets = ON_DISK) -> Tensor:
    """A file of fp16 rows of which all but the last two slots are written; what they are."""
    cache = ActivationCache(slots, shape, codec="fp16", device=CPU, budgets=budgets, path=path)
    stored = rows(slots - 2, *shape)
    cache.append(torch.arange(slots - 2), stored)
    cache.save(PRINT)
    cache.close()
    return stored


@pytest.mark.parametrize("portable", [False, True])
def test_crc32c_is_that_of_the_standard(portable: bool) -> None:
    # RFC 3720, B.4, and the check value of the catalogue of CRCs.
    assert transfer.crc32c(b"123456789", portable=portable) == 0xE3069283
    assert transfer.crc32c(bytes(32), portable=portable) == 0x8A9136AA
    assert transfer.crc32c(b"\xff" * 32, portable=portable) == 0x62A8AB43
    assert transfer.crc32c(bytes(range(32)), portable=portable) == 0x46DD794E
    assert transfer.crc32c(b"", portable=portable) == 0


def test_crc32c_is_the_same_without_the_instruction() -> None:
    data = os.urandom(3000)
    for begin in range(9):
        for end in (*range(begin, 300, 7), *range(700, len(data), 61)):
            part = memoryview(data)[begin:end]
            assert transfer.crc32c(part) == transfer.crc32c(part, portable=True)


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


@pytest.mark.parametrize("shape", [(7,), (3, 20, 20), (5, 32, 32), (11, 51, 53)], ids=str)
def test_saved_rows_are_found_again(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "rows"
    stored = saved(path, shape, slots=20)
    assert not path.with_name("rows.part").exists()
    for budgets in (ON_DISK, None, Budgets(1 << 30, 0, 0)):
        cache = ActivationCache.open(path, PRINT, device=CPU, budgets=budgets)
        assert cache.dtype == torch.float32
        assert cache.filled.tolist() == [True] * 18 + [False] * 2
        order = torch.randperm(18, generator=torch.Generator().manual_seed(1))
        assert torch.equal(cache.gather(order), stored[order])
        with pytest.raises(IndexError, match="must have been written, got 19"):
            cache.gather(torch.tensor([19]))
        cache.close()
        assert path.exists()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_saved_rows_keep_dtype_and_memory_format(tmp_path: Path, memory_format: torch.memory_format) -> None:
    path = tmp_path / "rows"
    cache = ActivationCache(2, (3, 4, 5), codec="bf16", device=CPU, path=path)
    stored = rows(2, 3, 4, 5).bfloat16().contiguous(memory_format=memory_format)
    cache.append(torch.arange(2), stored)
    cache.save(PRINT)
    got = ActivationCache.open(path, PRINT, device=CPU, budgets=ON_DISK).gather(torch.arange(2))
    assert got.dtype == torch.bfloat16
    assert got.is_contiguous(memory_format=memory_format)
    assert torch.equal(got, stored)


def test_an_opened_cache_is_saved_and_has_its_sidecar(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    cache = ActivationCache(3, (2,), codec="fp32", device=CPU, path=path)
    assert (cache.saved, cache.device, cache.sidecar) == (False, CPU, Sidecar())
    cache.append(torch.arange(3), rows(3, 2))
    tensors = (torch.tensor([5, 7]), torch.zeros(0, 4, dtype=torch.bool), torch.tensor(1.5).half())
    cache.save(PRINT, Sidecar({"names": ["a", None, 2.5]}, tensors))
    assert cache.saved
    cache.close()
    cache = ActivationCache.open(path, PRINT, device=CPU)
    assert cache.saved
    assert cache.sidecar.values == {"names": ["a", None, 2.5]}
    for got, wanted in zip(cache.sidecar.tensors, tensors, strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(got, wanted)


def test_open_closes_a_file_whose_rows_find_no_place(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    saved(path)
    before = set(os.listdir("/proc/self/fd"))
    # The error is kept, and with it all that its traceback names.
    with pytest.raises(ValueError, match="budgets must hold 70 rows") as kept:
        ActivationCache.open(path, PRINT, device=CPU, budgets=Budgets(0, 0, 0))
    assert set(os.listdir("/proc/self/fd")) == before
    assert kept.value.args != ()


def test_an_empty_cache_is_saved_and_found(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    ActivationCache(0, (3,), codec="fp32", device=CPU, path=path).save(PRINT)
    cache = ActivationCache.open(path, PRINT, device=CPU, budgets=ON_DISK)
    assert cache.gather(torch.arange(0)).shape == (0, 3)
    cache.grow(2)
    cache.append(torch.tensor([1]), rows(1, 3))
    assert torch.equal(cache.gather(torch.tensor([1])), rows(1, 3))
    cache.close()


def test_a_file_that_was_not_saved_goes_with_its_cache(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    for forget in (False, True):
        cache = ActivationCache(4, (3,), codec="fp32", device=CPU, budgets=ON_DISK, path=path)
        cache.append(torch.arange(2), rows(2, 3))
        assert os.listdir(tmp_path) == ["rows.part"]
        if not forget:
            cache.close()
        del cache
        assert os.listdir(tmp_path) == []


def test_rows_at_the_path_never_change_in_place(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    stored = saved(path)
    before = path.read_bytes()
    cache = ActivationCache.open(path, PRINT, device=CPU, budgets=ON_DISK)
    cache.append(torch.tensor([5]), -stored[5:6])
    assert os.listdir(tmp_path) == ["rows.part"]
    cache.save(PRINT)
    assert os.listdir(tmp_path) == ["rows"]
    assert path.read_bytes() != before
    cache.close()
    cache = ActivationCache.open(path, PRINT, device=CPU)
    assert torch.equal(cache.gather(torch.tensor([5, 6])), torch.stack([-stored[5], stored[6]]))
    cache.grow(100)
    cache.append(torch.tensor([99]), stored[:1])
    assert os.listdir(tmp_path) == ["rows"]
    assert path.stat().st_size < 4096 * 10
    cache.close()


def test_commit_syncs_before_it_renames_and_the_folder_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("pwrite", "fsync", "rename"):
        real = getattr(os, name)

        def noting(*args: object, name: str = name, real: object = real) -> object:
            calls.append(name)
            return real(*args)  # type: ignore[operator]

        monkeypatch.setattr(os, name, noting)
    saved(tmp_path / "rows")
    assert calls == ["pwrite", "pwrite", "fsync", "rename", "fsync"]


def test_a_file_is_written_by_one_cache_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    first = ActivationCache(4, (3,), codec="fp32", device=CPU, budgets=ON_DISK, path=path)
    first.append(torch.arange(4), rows(4, 3))
    with pytest.raises(OSError, match=r"must be written by one cache at a time.*another one has it open"):
        ActivationCache(4, (3,), codec="fp32", device=CPU, budgets=ON_DISK, path=path)
    assert torch.equal(first.gather(torch.arange(4)), rows(4, 3))
    first.save(PRINT)
    reader = ActivationCache.open(path, PRINT, device=CPU, budgets=ON_DISK)
    with pytest.raises(OSError, match="must not be read by another process while rows are written"):
        first.append(torch.arange(1), rows(1, 3))
    assert torch.equal(reader.gather(torch.arange(4)), rows(4, 3))
    reader.close()
    first.append(torch.arange(1), rows(1, 3))
    with pytest.raises(FileNotFoundError):
        ActivationCache.open(path, PRINT, device=CPU)
    first.close()


def test_a_file_without_its_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"in a folder that is there, got No such file or directory"):
        ActivationCache(4, (3,), codec="fp32", device=CPU, budgets=ON_DISK, path=tmp_path / "none" / "rows")


OTHERS = {
    "weights": "ab13",
    "cut": 3,
    "codec": "uint8",
    "views": 1,
    "samples": 71,
    "dataset": "x",
    "loop": "y",
    "seed": 1,
    "layers": "z",
    "images": "w",
    "mirror": True,
}


@pytest.mark.parametrize("field", OTHERS)
def test_open_names_the_first_difference_of_another_cache(tmp_path: Path, field: str) -> None:
    path = tmp_path / "rows"
    saved(path)
    other = dataclasses.replace(PRINT, **{field: OTHERS[field]})
    message = f"its rows must be of {field} {OTHERS[field]!r}, got rows of {field} {getattr(PRINT, field)!r}"
    with pytest.raises(CacheFileError, match=message):
        ActivationCache.open(path, other, device=CPU)
    assert set(OTHERS) == {f.name for f in dataclasses.fields(Fingerprint)}


def damaged(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as opened:
        opened.seek(offset)
        opened.write(data)


def headed(path: Path, **changes: int) -> None:
    """Write a header with other values and the right checksum."""
    fields = dict(
        zip(
            ("magic", "version", "offset", "text", "tail", "sum"),
            file.HEADER.unpack(path.read_bytes()[:40]),
            strict=False,
        )
    )
    page = file.HEADER.pack(*(fields | changes).values()).ljust(4092, b"\0")
    damaged(path, 0, page + struct.pack("<I", transfer.crc32c(page)))


def test_open_refuses_a_file_that_is_none_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    with pytest.raises(FileNotFoundError):
        ActivationCache.open(path, PRINT, device=CPU)
    path.write_bytes(b"LDROWS")
    with pytest.raises(CacheFileError, match="the header must be 4096 bytes, got a file of 6"):
        ActivationCache.open(path, PRINT, device=CPU)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" * 1000)
    with pytest.raises(CacheFileError, match=r"the first bytes must be .*LDROWS.*got .*PNG"):
        ActivationCache.open(path, PRINT, device=CPU)


def test_open_refuses_another_version_and_rows_of_another_size(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    saved(path)
    headed(path, version=file.VERSION + 1)
    with pytest.raises(CacheFileError, match=f"the version must be {file.VERSION}, got {file.VERSION + 1}"):
        ActivationCache.open(path, PRINT, device=CPU)
    saved(path)
    content = path.read_bytes()
    offset = content.index(b'"row_bytes": 14')
    damaged(path, offset, b'"row_bytes": 99')
    _, _, tail, _, size, _ = file.HEADER.unpack(content[: file.HEADER.size])
    headed(path, sum=transfer.crc32c(path.read_bytes()[tail : tail + size]))
    with pytest.raises(CacheFileError, match=r"row_bytes of fp16 rows \(7,\) must be 14, got 99"):
        ActivationCache.open(path, PRINT, device=CPU)


@pytest.mark.parametrize("keep", [0, 1, 4095, 4096, 5000, -1])
def test_open_refuses_a_file_of_another_length(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "rows"
    saved(path)
    content = path.read_bytes()
    path.write_bytes(content[:keep] if keep >= 0 else content + b"\0")
    with pytest.raises(CacheFileError, match=r"the (header|file) must be"):
        ActivationCache.open(path, PRINT, device=CPU)


def test_every_flipped_bit_is_refused_or_in_no_row(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    stored = saved(path)
    content = path.read_bytes()
    header, tail = 4096, content.index(b'{"codec"')
    spots = [*range(0, 48), 4091, 4095, *range(header, header + 40), *range(tail - 1, len(content), 5)]
    refused = 0
    for i, spot in enumerate(spots):
        damaged(path, spot, bytes([content[spot] ^ 1 << i % 8]))
        cache = None
        try:
            cache = ActivationCache.open(path, PRINT, device=CPU, budgets=ON_DISK)
            assert torch.equal(cache.gather(torch.arange(68)), stored)
        except CacheFileError:
            refused += 1
        finally:
            if cache is not None:
                cache.close()
        damaged(path, spot, content[spot : spot + 1])
    # Rows take 14 of 128 bytes: only bytes between rows may differ.
    between = sum(header <= spot < tail and (spot - header) % 128 >= 14 for spot in spots)
    assert refused == len(spots) - between


@pytest.mark.parametrize("ahead", [False, True])
def test_gather_refuses_a_row_that_changed_since_it_was_written(tmp_path: Path, ahead: bool) -> None:
    path = tmp_path / "rows"
    cache = ActivationCache(70, (7,), codec="fp16", device=CPU, budgets=ON_DISK, path=path)
    cache.append(torch.arange(70), rows(70, 7))
    part = path.with_name("rows.part")
    damaged(part, 4096 + 33 * 128 + 5, b"\xaa")
    if ahead:
        cache.prefetch(torch.tensor([40, 33, 2]))
    with pytest.raises(CacheFileError, match="row 33 must have the checksum it was written with, got another"):
        cache.gather(torch.tensor([40, 33, 2]))
    assert torch.equal(cache.gather(torch.tensor([40, 2])), rows(70, 7)[[40, 2]])
    os.truncate(part, 4096 + 128)
    with pytest.raises(CacheFileError, match=r"row 33 .* the file was altered or truncated"):
        cache.gather(torch.tensor([0, 33]))
    cache.close()


def test_reading_a_file_that_cannot_be_read_is_an_os_error(tmp_path: Path) -> None:
    store = DiskTier(tmp_path / "rows", RowLayout(14, 128))
    store.grow(2, first=0)
    os.close(store._file.descriptor)
    with pytest.raises(OSError, match=r"cache file .*rows: must give 1 rows, got Bad file descriptor"):
        store.read(torch.tensor([0]), torch.empty(1, 128, dtype=torch.uint8))
    store._file.descriptor = os.open(tmp_path, os.O_RDONLY)
    store.close()


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
        assert [transfer.crc32c(row[:50_000].numpy().tobytes()) for row in stored] == [
            c % 2**32 for c in checksums.tolist()
        ]
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


def test_describe_is_the_same_in_the_next_run() -> None:
    class Pictures:
        def __init__(self) -> None:
            self.transform = object()

    first, second = describe(Pictures()), describe(Pictures())
    assert first == second
    assert first.startswith(f"{__name__}.")
    assert "transform=<object object>" in first


def test_describe_has_the_fingerprint_of_a_hugging_face_dataset() -> None:
    class Arrow:
        def __init__(self, fingerprint: str) -> None:
            self._fingerprint = fingerprint

        def __repr__(self) -> str:
            return "Dataset({ features: ['image', 'label'], num_rows: 160 })"

    assert tells_apart(Arrow("a"))
    assert describe(Arrow("a")) == describe(Arrow("a")) != describe(Arrow("b"))
