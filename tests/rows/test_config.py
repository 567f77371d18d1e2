from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from learndrop_ext import DropScheduler, Fixed
from learndrop_ext.rows.config import CacheConfig, cache_config
from small_training import epoch, parts


def test_cache_config_defaults() -> None:
    config = CacheConfig()
    assert (config.codec, config.views, config.budget_bytes) == ("fp16", "auto", "auto")
    assert (config.store, config.store_bytes, config.mirror, config.partition) == (None, "auto", False, "share")


@pytest.mark.parametrize(
    "arguments",
    [
        {"codec": "fp16"},
        {"codec": "bf16"},
        {"codec": "fp32"},
        {"codec": "uint8"},
        {"views": 8},
        {"budget_bytes": 0},
        {"budget_bytes": 1 << 40},
        {"host_bytes": "auto", "store_bytes": 5, "store": "/rows"},
        {"store": "/rows", "key": str, "targets": [0, 1]},
        {"mirror": True, "views": 1},
        {"partition": "all"},
    ],
)
def test_cache_config_takes(arguments: dict[str, Any]) -> None:
    config = CacheConfig(**arguments)
    assert {name: getattr(config, name) for name in arguments} == arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codec": "fp8"}, "CacheConfig: codec must be one of fp32, bf16, fp16, uint8, got 'fp8'"),
        ({"partition": "each"}, "CacheConfig: partition must be 'share' or 'all', got 'each'"),
        ({"views": 0}, "CacheConfig: views must be a whole number >= 1 or 'auto', got 0"),
        ({"views": 1.5}, r"CacheConfig: views must be a whole number >= 1 or 'auto', got 1\.5"),
        ({"budget_bytes": -1}, "CacheConfig: budget_bytes must be bytes >= 0 or 'auto', got -1"),
        ({"budget_bytes": "8GB"}, "CacheConfig: budget_bytes must be bytes >= 0 or 'auto', got '8GB'"),
        ({"host_bytes": -1}, "CacheConfig: host_bytes must be bytes >= 0 or 'auto', got -1"),
        ({"store_bytes": 0.5}, r"CacheConfig: store_bytes must be bytes >= 0 or 'auto', got 0\.5"),
        ({"store": 1}, "CacheConfig: store must be the path of a folder or None, got 1"),
        ({"key": "id"}, "CacheConfig: key must be a function of an index or None, got 'id'"),
        ({"views": True}, "CacheConfig: views must be a whole number >= 1 or 'auto', got True"),
        ({"budget_bytes": True}, "CacheConfig: budget_bytes must be bytes >= 0 or 'auto', got True"),
        ({"mirror": "yes"}, "CacheConfig: mirror must be True or False, got 'yes'"),
        ({"mirror": True, "views": 2}, "CacheConfig: views must be 1 if mirror is True, got 2"),
    ],
)
def test_cache_config_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheConfig(**arguments)


def test_cache_config_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        CacheConfig().codec = "fp32"  # type: ignore[misc]


# cache, what it means
MEANT: list[tuple[CacheConfig | str | None, CacheConfig]] = [
    (None, CacheConfig()),
    ("uint8", CacheConfig(codec="uint8")),
    (CacheConfig(host_bytes=9, views=3), CacheConfig(host_bytes=9, views=3)),
]


@pytest.mark.parametrize(("cache", "wanted"), MEANT)
def test_cache_config_of_the_schedulers_argument(cache: CacheConfig | str | None, wanted: CacheConfig) -> None:
    assert cache_config(cache) == wanted


def test_cache_config_of_another_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="DropScheduler: cache must be a CacheConfig, a codec or None, got int"):
        cache_config(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"CacheConfig: codec must be one of .*, got 'png'"):
        cache_config("png")


def test_a_store_stays_where_it_is_if_the_program_changes_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert CacheConfig(store="rows").store == str(tmp_path / "rows")
    assert CacheConfig(store=Path("~/rows")).store == str(tmp_path / "home" / "rows")
    model, optimizer, loader = parts()
    config = CacheConfig(store="rows", budget_bytes=0)
    with DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), cache=config) as drop:
        for folder in (".", "elsewhere", ".."):
            (tmp_path / "elsewhere").mkdir(exist_ok=True)
            monkeypatch.chdir(folder)
            epoch(drop, optimizer)
            assert drop.step().tier == "disk"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "rows"]
