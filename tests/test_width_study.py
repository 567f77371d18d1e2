"""The study of narrowing in bench/: what it runs, how it goes on, and the tables made of it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("bench_width")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("width_table")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.. before:UserWarning")
def test_a_toy_study_runs_each_method_once_and_goes_on(
    study: ModuleType, table: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*more: str) -> dict[str, Any]:
        study.main(["--toy", "--out", str(tmp_path), "--name", "toy", "--tests-passed", "1", "--keeps", "0.5", *more])
        written: dict[str, Any] = json.loads((tmp_path / "toy.json").read_text())
        return written

    methods = ["full", "short-0.5", "narrow-from-start", "one-cycle", "tolerance", "sparse-flat", "drops-and-one-cycle"]
    once = run("--models", "resnet18", "--methods", *methods)
    found = {record["run"]: record for record in once["records"]}
    assert list(found) == methods
    full = found["full"]
    assert found["short-0.5"]["epochs"] == 1
    assert full["keep"] is found["tolerance"]["keep"] is None
    assert found["narrow-from-start"]["parameters"] == found["one-cycle"]["parameters"] < full["parameters"] / 3
    assert found["narrow-from-start"]["flops"] == found["one-cycle"]["flops"] < full["flops"] / 3
    assert found["tolerance"]["parameters"] < full["parameters"] == found["sparse-flat"]["parameters"]
    assert all(share == pytest.approx(0.5, abs=0.05) for share in found["sparse-flat"]["zeros"].values())
    assert len(full["curve"]) == 2
    assert found["sparse-flat"]["seconds"] == full["seconds"]  # of the network that `full` has trained

    more = run("--models", "mlp", "resnet18", "--methods", "full", "coreset")
    assert more["records"][: len(methods)] == once["records"]
    assert [(r["model"], r["run"]) for r in more["records"][len(methods) :]] == [("mlp", "full"), ("mlp", "coreset")]
    with pytest.raises(SystemExit, match=r"bench_width: toy\.json: its runs have .*'lr': 0\.1.* give --name"):
        run("--methods", "full", "--lr", "0.2")
    assert "LeNet-300-100" in table.systems([more])


def record(run: str, accuracy: float, parameters: int, keep: float | None = None, **changes: Any) -> dict[str, Any]:
    values = {"dataset": "mnist", "model": "vgg16", "run": run, "keep": keep, "seed": 0, "accuracy": accuracy}
    return values | {"parameters": parameters, "seconds": 10.0, "flops": 2_000_000, "epochs": 8} | changes


def test_a_system_is_compared_with_the_full_network(table: ModuleType) -> None:
    records = [
        record("full", 98.0, 1000),
        record("full", 99.0, 1000, seed=1),
        record("zeros", 97.0, 250, 0.5),
        record("zeros", 98.0, 250, 0.5, seed=1),
        record("zeros", 90.0, 40, 0.2),
    ]
    lines = {
        line.split("|")[1].strip(): line.split("|")[-2].strip()
        for line in table.systems([{"records": records}]).splitlines()
    }
    assert lines["Zero-keep filter pruning"] == "**zeros** vgg16, mnist: -1.0 (25 %), -8.5 (4 %)"
    assert lines["DropNet (2207.06646)"] == "not measured"
    assert len(lines) == 12


def test_the_table_has_means_over_the_seeds(table: ModuleType) -> None:
    machine = {"gpu": None, "cpu": "a CPU", "cores": 2, "torch": "2.13.0", "date": "2026-11-29"}
    records = [
        record("full", 98.0, 1000, seconds=20.0),
        record("one-cycle", 97.0, 250, 0.5, seconds=12.0, flops=500_000),
        record("one-cycle", 96.0, 270, 0.5, seconds=8.0, flops=500_000, seed=1),
    ]
    text = table.table({"machine": machine, "records": records})
    assert text.startswith("a CPU, 2 cores; torch 2.13.0, 2026-11-29\n")
    assert "| mnist, vgg16 | full |  | 8 | 20.0 (1.00x) | 2.00 | 1,000 | 98.00 % | 1 |" in text
    assert "| mnist, vgg16 | one-cycle | 0.5 | 8 | 10.0 (2.00x) | 0.50 | 260 | 96.50 % | 2 |" in text


def test_every_system_of_the_issue_has_a_row_and_its_runs_exist(study: ModuleType, table: ModuleType) -> None:
    assert len(table.SYSTEMS) == 10
    assert {run for _, runs, _ in table.SYSTEMS.values() for run in runs} <= set(study.METHODS)
