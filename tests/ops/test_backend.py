"""What a machine has free. What a build has is tested in test_build.py."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from learndrop_ext.ops import backend, free_bytes

CPU = torch.device("cpu")
MEMINFO = "MemTotal:       16000 kB\nMemFree:         1000 kB\nMemAvailable:    3000 kB\nBuffers:           10 kB\n"


def test_free_bytes_of_the_cpu_are_those_that_are_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "open", lambda *_, **__: io.StringIO(MEMINFO), raising=False)
    assert free_bytes(CPU) == 3000 * 1024


# limit, used and inactive bytes of the outer and of the inner group, and what is free
GROUPS = [
    (("max", 900, 0), ("max", 700, 0), 3000 * 1024),
    (("max", 900, 0), ("1000", 700, 50), 350),
    (("1000", 900, 30), ("2000", 700, 50), 130),
    (("max", 900, 0), ("1000", 1100, 50), 0),
    (("max", 900, 0), (str(1 << 40), 700, 0), 3000 * 1024),
]


@pytest.mark.parametrize(("outer", "inner", "wanted"), GROUPS)
def test_free_bytes_of_the_cpu_keep_to_the_limits_of_a_container(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    outer: tuple[str, int, int],
    inner: tuple[str, int, int],
    wanted: int,
) -> None:
    own, groups = tmp_path / "cgroup", tmp_path / "groups"
    own.write_text("5:cpu:/other\n0::/outer/inner\n")
    for folder, (limit, used, inactive) in ((groups / "outer", outer), (groups / "outer" / "inner", inner)):
        folder.mkdir(parents=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")
    monkeypatch.setattr(backend, "OWN_GROUP", own)
    monkeypatch.setattr(backend, "GROUPS", groups)
    monkeypatch.setattr(backend, "open", lambda *_, **__: io.StringIO(MEMINFO), raising=False)
    assert free_bytes(CPU) == wanted


def test_free_bytes_of_this_machine() -> None:
    total = re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert total is not None
    # At least what this test itself has just been given, and in bytes.
    assert 1 << 24 < free_bytes(CPU) < int(total[1]) * 1024


def test_free_bytes_of_a_gpu_are_those_of_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def mem_get_info(device: Any) -> tuple[int, int]:
        asked.append(device)
        return 700, 900

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    assert free_bytes(torch.device("cuda:1")) == 700
    assert asked == [torch.device("cuda:1")]


def test_free_bytes_wants_a_system_that_says_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "open", lambda *_, **__: io.StringIO("MemFree: 1000 kB\n"), raising=False)
    with pytest.raises(RuntimeError, match=r"must hold MemAvailable; give CacheConfig\(budget_bytes=...\) instead"):
        free_bytes(CPU)
