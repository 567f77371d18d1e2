"""Faults of memory, disk and process: a clear error or the right rows, never a wrong one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from learndrop_ext.cache import host as host_rows
from learndrop_ext.cache import tiered as tiered_rows
from learndrop_ext.cache.cache import ActivationCache
from learndrop_ext.cache.fingerprint import Fingerprint
from learndrop_ext.cache.plan import Budgets, TierPlan

CPU = torch.device("cpu")
ON_DISK = Budgets(0, 0, 1 << 30)
PRINT = Fingerprint(weights="w", cut=1, codec="fp32", views=1, samples=9, dataset="d")
# Each row takes two pages.
SHAPE = (1500,)


def rows(count: int) -> torch.Tensor:
    return torch.randn(12, *SHAPE, generator=torch.Generator().manual_seed(0))[:count]


def child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, with the names of this file."""
    source = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_cache_faults import *\n"
    command = [sys.executable, "-c", source + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


# A fill, a save, a reopening, a change and a second save, in 9 rows of which 2 are on the device and 7 on disk.
# The process forks for each point at which it is killed: the n-th call that changes a file, before it or half-way.
KILLED = """
    import signal
    from learndrop_ext.cache import file as disk
    from learndrop_ext.ops import transfer

    torch.set_num_threads(1)
    path = Path(sys.argv[1]) / "rows"
    calls, kill_at, midway = 0, 0, False

    def counted(name, real, half):
        def call(*arguments, **options):
            global calls
            calls += 1
            if calls == kill_at and not midway:
                os.kill(os.getpid(), signal.SIGKILL)
            if calls == kill_at:
                half(real, *arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return call

    def half_bytes(real, descriptor, data, offset):
        real(descriptor, bytes(data)[: len(data) // 2], offset)

    def half_rows(real, file, slots, rows, checksums, **options):
        real(file, slots[: len(slots) // 2], rows, checksums, **options)

    def whole(real, *arguments):
        real(*arguments)

    transfer.write_rows = counted("write_rows", transfer.write_rows, half_rows)
    for name, half in (("pwrite", half_bytes), ("posix_fallocate", whole), ("ftruncate", whole), ("fsync", whole),
                       ("rename", whole)):
        setattr(os, name, counted(name, getattr(os, name), half))

    def work():
        budgets = Budgets((2 + 4) * 6016, 0, 1 << 30)
        cache = ActivationCache(9, SHAPE, codec="fp32", device=CPU, budgets=budgets, path=path, staging=2)
        assert cache.plan == TierPlan(2, 0, 7, 2)
        for at in torch.arange(9).split(4):
            cache.append(at, rows(9)[at])
        cache.save(PRINT)
        cache.close()
        cache = ActivationCache.open(path, PRINT, device=CPU, budgets=ON_DISK)
        cache.append(torch.tensor([3, 7]), -rows(9)[[3, 7]])
        cache.save(PRINT)
        cache.close()

    points = refusals = 0
    changed = rows(9)
    changed[[3, 7]] *= -1
    for point in range(1, 1000):
        for half_way in (False, True):
            for name in os.listdir(path.parent):
                (path.parent / name).unlink()
            process = os.fork()
            if process == 0:
                calls, kill_at, midway = 0, point, half_way
                work()
                os._exit(0)
            status = os.waitpid(process, 0)[1]
            if status == 0:
                break
            assert os.WTERMSIG(status) == signal.SIGKILL, (point, half_way, status)
            points += 1
            try:
                cache = ActivationCache.open(path, PRINT, device=CPU, budgets=ON_DISK)
            except FileNotFoundError:
                refusals += 1
            else:
                got = cache.gather(torch.arange(9))
                assert torch.equal(got, rows(9)) or torch.equal(got, changed), (point, half_way)
                cache.close()
            # What is left does not stand in the way of the next fill.
            work()
            cache = ActivationCache.open(path, PRINT, device=CPU)
            assert torch.equal(cache.gather(torch.arange(9)), changed)
            cache.close()
        else:
            continue
        break
    print(points, refusals, sorted(os.listdir(path.parent)))
"""


def test_a_killed_fill_leaves_no_file_or_the_right_rows(tmp_path: Path) -> None:
    run = child(KILLED, tmp_path)
    assert run.returncode == 0, run.stderr
    points, refusals, left = run.stdout.split(" ", 2)
    assert int(points) > 40
    assert 0 < int(refusals) < int(points)
    assert left.strip() == "['rows']"


FULL = """
    import resource, signal
    path = Path(sys.argv[1]) / "rows"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    budgets = ON_DISK if sys.argv[3] == "disk" else None
    try:
        cache = ActivationCache(9, SHAPE, codec="fp32", device=CPU, budgets=budgets, path=path)
        cache.append(torch.arange(9), rows(9))
        cache.save(PRINT)
    except OSError as error:
        print(os.listdir(path.parent), error)
        if budgets is None:
            assert torch.equal(cache.gather(torch.arange(9)), rows(9))
"""


@pytest.mark.parametrize(
    ("limit", "tier", "message"),
    [
        (30_000, "disk", "must have 73,728 bytes of disk space for 9 rows, got File too large"),
        (77_824, "disk", "must have disk space for its tables, got File too large"),
        (30_000, "memory", "must have 73,728 bytes of disk space for 9 rows, got File too large"),
    ],
)
def test_a_file_that_may_not_grow_is_an_error_and_costs_no_row(
    tmp_path: Path, limit: int, tier: str, message: str
) -> None:
    run = child(FULL, tmp_path, limit, tier)
    assert run.returncode == 0, run.stderr
    left, _, said = run.stdout.partition(" [Errno 27] ")
    assert left == ("['rows.part']" if limit > 70_000 else "[]")
    assert f"cache file {tmp_path / 'rows'}: {message}" in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; skips where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_met_before_the_fill_and_costs_no_row(small_disk: Path) -> None:
    path = small_disk / "rows"
    with pytest.raises(OSError, match=r"must have 73,728 bytes of disk space for 9 rows, got No space left on device"):
        ActivationCache(9, SHAPE, codec="fp32", device=CPU, budgets=ON_DISK, path=path)
    assert os.listdir(small_disk) == []
    cache = ActivationCache(6, SHAPE, codec="fp32", device=CPU, budgets=ON_DISK, path=path)
    cache.append(torch.arange(6), rows(6))
    with pytest.raises(OSError, match="must have 98,304 bytes of disk space for 12 rows, got No space left on device"):
        cache.grow(12)
    assert len(cache.filled) == 6
    assert torch.equal(cache.gather(torch.arange(6)), rows(6))
    cache.save(PRINT)
    # The second file has no room beside the first, which stays.
    other = ActivationCache(4, SHAPE, codec="fp32", device=CPU, path=path)
    other.append(torch.arange(4), rows(4))
    with pytest.raises(OSError, match="must have 32,768 bytes of disk space for 4 rows, got No space left on device"):
        other.save(PRINT)
    with pytest.raises(OSError, match="No space left on device"):
        other.spill(ON_DISK)
    assert torch.equal(other.gather(torch.arange(4)), rows(4))
    cache.close()
    cache = ActivationCache.open(path, PRINT, device=CPU)
    assert torch.equal(cache.gather(torch.arange(6)), rows(6))
    cache.close()


def test_rows_whose_write_failed_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = Budgets((2 + 4) * 6016, 0, 1 << 30)
    cache = ActivationCache(9, SHAPE, codec="fp32", device=CPU, budgets=budgets, path=tmp_path / "rows", staging=2)
    cache.append(torch.arange(6), rows(6))
    real = tiered_rows.DiskTier.write

    def failing(self: tiered_rows.DiskTier, slots: torch.Tensor, stored: torch.Tensor) -> None:
        if 5 in slots.tolist():
            raise OSError(28, "No space left on device")
        real(self, slots, stored)

    monkeypatch.setattr(tiered_rows.DiskTier, "write", failing)
    with pytest.raises(OSError, match="No space left"):
        cache.append(torch.arange(9), rows(9))
    # Two device rows and the disk's first two pieces' worth were written, 4 and 5 were being written over.
    assert torch.nonzero(cache.filled).flatten().tolist() == [0, 1, 2, 3]
    assert torch.equal(cache.gather(torch.arange(4)), rows(9)[:4])
    with pytest.raises(IndexError, match="must have been written, got 4"):
        cache.gather(torch.tensor([4]))
    monkeypatch.undo()
    cache.append(torch.arange(4, 9), rows(9)[4:])
    assert torch.equal(cache.gather(torch.arange(9)), rows(9))
    cache.close()


def test_a_spill_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: tiered_rows.DiskTier, slots: torch.Tensor, stored: torch.Tensor) -> None:
        raise OSError(5, "Input/output error")

    cache = ActivationCache(9, SHAPE, codec="fp32", device=CPU, path=tmp_path / "rows")
    cache.append(torch.arange(9), rows(9))
    monkeypatch.setattr(tiered_rows.DiskTier, "write", failing)
    for call in (lambda: cache.spill(ON_DISK), lambda: cache.save(PRINT)):
        with pytest.raises(OSError, match="Input/output error"):
            call()
        assert os.listdir(tmp_path) == []
        assert cache.plan == TierPlan(9)
        assert torch.equal(cache.gather(torch.arange(9)), rows(9))


def no_memory(monkeypatch: pytest.MonkeyPatch, *, above: int, host: bool = False) -> None:
    """Device memory of more than `above` rows cannot be had; none of the host's if `host`."""
    real = tiered_rows.allocate

    def allocate(count: int, stride_bytes: int, device: torch.device) -> torch.Tensor:
        if count > above:
            raise torch.OutOfMemoryError(f"{count} rows do not fit")
        return real(count, stride_bytes, device)

    def init(self: host_rows.HostTier, count: int, stride_bytes: int, device: torch.device) -> None:
        raise torch.OutOfMemoryError("no host memory")

    monkeypatch.setattr(tiered_rows, "allocate", allocate)
    if host:
        monkeypatch.setattr(host_rows.HostTier, "__init__", init)


@pytest.mark.parametrize("host", [False, True])
def test_out_of_memory_falls_to_the_next_tier_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: bool
) -> None:
    no_memory(monkeypatch, above=4, host=host)
    budgets = Budgets(None, 5 * 6016, 1 << 30)
    with pytest.warns(RuntimeWarning) as seen:
        cache = ActivationCache(9, SHAPE, codec="fp32", device=CPU, budgets=budgets, path=tmp_path / "rows", staging=2)
    said = [str(warning.message) for warning in seen]
    assert said[0].startswith(
        "ActivationCache: the rows that were to be kept on the device did not fit into its memory; "
        "now 5 rows on host, 4 rows on disk (9 rows do not fit)"
    )
    assert len(said) == 1 + host
    if host:
        assert said[1].startswith("ActivationCache: the rows that were to be kept on the host did not fit")
        assert "now 9 rows on disk" in said[1]
    assert cache.plan == (TierPlan(0, 0, 9, 2) if host else TierPlan(0, 5, 4, 2))
    cache.append(torch.arange(9), rows(9))
    assert torch.equal(cache.gather(torch.arange(9)), rows(9))
    cache.close()


def test_out_of_memory_while_it_grows_moves_the_rows_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = Budgets(None, 0, 1 << 30)
    cache = ActivationCache(5, SHAPE, codec="fp32", device=CPU, budgets=budgets, path=tmp_path / "rows", staging=2)
    cache.append(torch.arange(5), rows(5))
    no_memory(monkeypatch, above=5)
    with pytest.warns(RuntimeWarning, match="now 9 rows on disk"):
        cache.grow(9)
    cache.append(torch.arange(5, 9), rows(9)[5:])
    assert torch.equal(cache.gather(torch.arange(9)), rows(9))
    # It is not tried again.
    cache.grow(10)
    assert cache.plan == TierPlan(0, 0, 10, 2)
    cache.close()


def test_out_of_memory_without_a_next_tier_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ActivationCache(4, SHAPE, codec="fp32", device=CPU)
    cache.append(torch.arange(4), rows(4))
    no_memory(monkeypatch, above=4)
    with pytest.raises(torch.OutOfMemoryError, match="9 rows do not fit"):
        ActivationCache(9, SHAPE, codec="fp32", device=CPU)
    with pytest.raises(torch.OutOfMemoryError, match="9 rows do not fit"):
        cache.grow(9)
    assert torch.equal(cache.gather(torch.arange(4)), rows(4))


def test_memory_that_the_machine_does_not_have_is_out_of_memory() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        ActivationCache(1 << 20, (1 << 25,), codec="fp32", device=CPU)


def test_a_forked_child_does_not_take_the_file_away(tmp_path: Path) -> None:
    run = child(
        """
        path = Path(sys.argv[1]) / "rows"
        torch.set_num_threads(1)
        cache = ActivationCache(9, SHAPE, codec="fp32", device=CPU, budgets=ON_DISK, path=path)
        cache.append(torch.arange(9), rows(9))
        process = os.fork()
        if process == 0:
            cache.close()
            del cache
            sys.exit(0)
        assert os.waitpid(process, 0)[1] == 0
        assert os.listdir(path.parent) == ["rows.part"]
        assert torch.equal(cache.gather(torch.arange(9)), rows(9))
        cache.save(PRINT)
        """,
        tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert os.listdir(tmp_path) == ["rows"]
