"""The study of the store in bench/: what it runs, that it can be continued, and the table made of it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("bench_sweep")


def test_trials_differ_and_are_the_same_in_each_study(study: ModuleType) -> None:
    runs = study.trials(200, 3)
    assert runs == study.trials(200, 3)
    assert len({run.lr for run in runs}) == len(runs) == study.TRIALS
    assert {run.smoothing for run in runs} == {0.0, 0.1}


def test_the_sweep_halves_by_validation_and_ends_with_three_seeds_of_the_best(study: ModuleType) -> None:
    done = []

    def train(run: object) -> dict[str, float]:
        done.append(run)
        return {"validation_accuracy": -abs(run.trial - 5)}  # type: ignore[attr-defined]

    study.sweep(200, 3, 32, train)
    of = {side: [run for run in done if run.side == side] for side in ("whole", "budget", "depth")}
    assert [len(of["whole"]), len(of["budget"])] == [12, 12]
    assert [run.epochs for run in of["depth"]] == [1] * 12 + [2] * 6 + [3] * 3 + [3] * 6
    assert sorted(run.trial for run in of["depth"][18:21]) == [4, 5, 6]
    assert {run.drop for run in of["depth"]} <= {12, 21, 27, "budget"}
    assert sorted((run.trial, run.seed) for run in of["depth"][21:]) == [(t, s) for t in (4, 5, 6) for s in (1, 2)]


def test_parts_that_are_not_complete_begin_anew_without_their_stores(study: ModuleType) -> None:
    done: list[dict[str, object]] = []
    study.folds(20, 1, 4, lambda run: done.append({"part": run.part, "photos": run.photos}) or {})
    whole = [*done, {"part": "seeds", "photos": 20}]
    assert study.complete(whole, 1, 4) == done
    assert study.complete(done[:-1], 1, 4) == []


@pytest.mark.slow
def test_a_study_counts_what_each_run_reads_and_goes_on_where_it_ended(
    study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 20), ("validation", 8), ("test", 8)):
        for i in range(count):
            folder = tmp_path / "clothing-160" / part / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            shade = tuple(torch.randint(0, 256, (3,), generator=generator).tolist())
            Image.new("RGB", (40, 40), shade).save(folder / f"{i}.png")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(study, "FOLDS", 2)
    out = tmp_path / "out"
    options = ["--data-root", tmp_path, "--photos", 20, "--epochs", 1, "--model", "resnet10", "--weights", "none"]
    options += ["--size", 32, "--tests-passed", 0, "--parts", "folds", "--out", out, "--work", tmp_path / "work"]
    assert study.main(map(str, options)) == 0
    (path,) = out.glob("*.json")
    records = json.loads(path.read_text())["records"]
    assert [record["side"] for record in records] == ["whole", "store"] * 2
    # The constructor's batch, and the epoch; with a store all photos of the first fold, then the part it left out.
    whole, stored = ([record["images_read"] for record in records[i::2]] for i in (0, 1))
    assert min(whole) >= 16
    assert sum(stored[1:]) <= sum(whole[1:])
    capsys.readouterr()
    assert study.main(map(str, options)) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    with pytest.raises(SystemExit, match=r"bench_sweep: the runs in .* have .*'epochs': 1.*, got .*'epochs': 2"):
        study.main([*map(str, options), "--epochs", "2"])
    table = importlib.import_module("sweep_table").table(json.loads(path.read_text()))
    assert "| folds | 20 | whole | 2 |" in table
    assert "x) |" in table
