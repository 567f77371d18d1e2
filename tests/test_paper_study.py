"""The study of the paper's networks in bench/: its order, the drops that it chooses without scores, and its tables."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("paper_cases")


@pytest.fixture
def study(cases: ModuleType) -> ModuleType:
    return importlib.import_module("bench_paper")


@pytest.fixture
def table(cases: ModuleType) -> ModuleType:
    return importlib.import_module("paper_table")


def test_a_study_that_is_broken_off_has_one_seed_of_all_networks(cases: ModuleType) -> None:
    scale = cases.SCALES["cpu"]
    planned = list(cases.plan(scale, parts=cases.PARTS, seeds=2))
    assert len({*planned}) == len(planned)
    tried = 6 * len(scale.lrs)
    recipes, table = planned[:tried], planned[tried : tried + 27 * 5]
    assert {(case.setting, case.seed) for case in recipes} == {("recipe", 0)}
    assert tuple(case.lr for case in recipes[: len(scale.lrs)]) == scale.lrs
    assert [case.side for case in table[:5]] == ["baseline", "budget", "stopped", "short", "freeze-only"]
    assert len({(case.dataset, case.model) for case in table}) == 27
    assert {(case.setting, case.seed) for case in table} == {("paper", 0)}
    seeds = [case.seed for case in planned]
    assert seeds == sorted(seeds)


def test_what_a_side_follows_comes_before_it(cases: ModuleType) -> None:
    before: set[Any] = set()
    for case in cases.plan(cases.SCALES["cpu"], parts=cases.PARTS, seeds=1):
        for side in cases.SIDES[case.side].follows:
            assert (case.setting, case.dataset, case.model, side) in before
        before.add((case.setting, case.dataset, case.model, case.side))


# Four layers of 1, 2, 3 and 4 FLOPs.
FLOPS = (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("drops", "epochs", "saved"),
    [
        ({}, 5, 0),
        ({1: 1}, 5, 4),
        ({0: 2}, 5, 15),
        ({1: 2, 3: 3}, 5, 2 * 3 + 2 * 6),
        ({3: 3, 1: 2}, 5, 18),
        ({5: 3}, 5, 0),
    ],
)
def test_saved_flops(cases: ModuleType, drops: dict[int, int], epochs: int, saved: int) -> None:
    assert cases.saved_flops(drops, FLOPS, epochs) == saved


@pytest.mark.parametrize(
    ("drops", "wanted"),
    [
        # One drop of 3 layers saves 6 an epoch.
        ({4: 3}, {4: 3}),
        # Two drops in 10 epochs that save 3 * 3 + 2 * 6 = 21: from epoch 5 on 2 layers (of 1.5), 3 from 7 on save 24,
        # and from 6 on 3 * 2 + 2 * 6 = 18.
        ({5: 2, 8: 3}, {5: 2, 7: 3}),
        # More drops than epochs are left fall together.
        ({7: 1, 8: 2, 9: 3}, {7: 1, 8: 2, 9: 3}),
    ],
)
def test_drops_at_an_even_pace_save_as_much(cases: ModuleType, drops: dict[int, int], wanted: dict[int, int]) -> None:
    assert cases.evenly(drops, flops=FLOPS, moved=[[0.0] * 4] * 10) == wanted


@pytest.mark.parametrize(
    ("moved", "drops", "wanted"),
    [
        # The first layer rests after two epochs, and the others move on: one layer for two epochs saves 2 FLOPs.
        ([[5, 5, 5, 5], [5, 5, 5, 5], [0, 5, 5, 5], [0, 5, 5, 5]], {2: 1}, {2: 1}),
        # Three layers in the last epoch save 6. Two in the last two save as much, and the second of them rests earlier.
        ([[9, 9, 9, 9], [9, 9, 9, 9], [0, 1, 9, 9], [0, 1, 9, 9]], {3: 3}, {2: 2}),
        # The last layer is never dropped, however it rests; nor is any before the first step.
        ([[0, 0, 0, 0], [0, 0, 0, 0]], {1: 3}, {1: 3}),
    ],
)
def test_drops_by_hindsight_lose_the_least(
    cases: ModuleType, moved: list[list[float]], drops: dict[int, int], wanted: dict[int, int]
) -> None:
    chosen = cases.hindsight(drops, flops=FLOPS, moved=moved)
    assert chosen == wanted
    assert cases.saved_flops(chosen, FLOPS, len(moved)) >= cases.saved_flops(drops, FLOPS, len(moved))


def record(side: str, seconds: float = 10.0, accuracy: float = 80.0, **changes: Any) -> dict[str, Any]:
    values = {"setting": "paper", "dataset": "mnist", "model": "vgg11", "side": side, "seed": 0, "epochs": 8}
    values |= {"seconds": seconds, "accuracy": accuracy, "forward_flops": 2e12, "drops": [], "layers": 9}
    return values | {"recipe": {"lr": 0.1}, "validation_accuracy": accuracy} | changes


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:] if line.startswith("|")]


def drops(after: dict[int, int], reason: str = "budget 2x") -> list[dict[str, Any]]:
    return [{"epoch": epoch, "prefix": prefix, "reason": reason} for epoch, prefix in after.items()]


BUDGET = record("budget", 4.0, 79.0, forward_flops=1e12, drops=drops({1: 2, 4: 5}))
SIDES = [record("baseline"), BUDGET, record("short", 4.0, 78.5, forward_flops=0.8e12, epochs=3.4)]


def test_runs_of_a_seed_are_of_one_machine(table: ModuleType) -> None:
    """Of the file with the most of them; another seed may be of another."""
    slow = [record("baseline", 30.0), record("budget", 10.0), record("baseline", 30.0, model="vgg13")]
    machines = ({"gpu": None, "cpu": name, "cores": 1, "torch": "2.13", "date": "today"} for name in ("A", "B", "C"))
    files = [
        {"machine": machine, "epochs": 8, "records": records}
        for machine, records in zip(
            machines, (slow, SIDES, [record("baseline", 8.0, seed=1), record("budget", 4.0, seed=1)]), strict=True
        )
    ]
    study = table.combined(files)
    assert table.title_of(study).startswith("[1] A, 1 core; torch 2.13, today; [2] B")
    assert [(r["model"], r["seed"], r["seconds"]) for r in study["records"]] == [
        *(("vgg11", 0, seconds) for seconds in (10.0, 4.0, 4.0)),
        ("vgg13", 0, 30.0),
        *(("vgg11", 1, seconds) for seconds in (8.0, 4.0)),
    ]
    rows = cells(table.rows(study))
    assert [row[1] for row in rows if row[2] == "budget*"] == ["vgg11 [2, 3]"]
    assert [row[2:5] for row in rows if row[1] == "vgg13 [1]"] == [["baseline", "8", "30.0"]]
    # 10 / 4 and 8 / 4 in mean.
    assert table.of_network(study, "mnist", "vgg11")["speedup"] == pytest.approx(2.25)
    one = table.combined(files[:1])
    assert table.title_of(one) == "A, 1 core; torch 2.13, today"
    assert {row[1] for row in cells(table.rows(one))} == set(table.NETWORKS)


def test_without_records_every_row_is_not_measured(table: ModuleType) -> None:
    empty: dict[str, Any] = {"records": []}
    assert [row[:3] for row in cells(table.rows(empty))] == [
        [dataset, model, "not measured"] for dataset in ("mnist", "cifar10", "imagenette") for model in table.NETWORKS
    ]
    assert {row[1] for row in cells(table.summary(empty))} == {"not measured"}
    assert {row[2] for row in cells(table.aims(empty))} == {"not measured"}
    assert table.scores(empty).endswith("Not measured.")
    assert table.long(empty).endswith("Not measured.")


def test_rows_compare_a_side_with_runs_of_its_seeds(table: ModuleType) -> None:
    more = [record("baseline", 20.0, 90.0, seed=1), record("freeze-only", 5.0, 70.0, seed=7)]
    rows = {row[2]: row[3:] for row in cells(table.rows({"records": [*SIDES, *more]})) if row[1] == "vgg11"}
    assert rows["baseline"] == ["8", "15.0", "2 T", "85.00 %", "", "", "", "2"]
    assert rows["budget*"] == [
        *("8", "4.0 (2.50x)", "1 T (-50.0 %)", "79.00 %", "-1.00", "+0.50", "2 after 1, 5 after 4; of 9", "1"),
    ]
    assert rows["short"] == ["3.4", "4.0 (2.50x)", "0.8 T (-60.0 %)", "78.50 %", "-1.50", "", "", "1"]
    assert rows["freeze-only"] == ["8", "5.0", "2 T", "70.00 %", "", "", "", "1"]


def test_sides_whose_batch_norms_stayed_as_they_were_have_a_star(table: ModuleType) -> None:
    recalibrated = drops({1: 2}) + drops({4: 5}, "budget 2x; batch norms recalibrated")
    assert table.marked("budget", [record("budget", drops=recalibrated)]) == "budget"
    assert table.marked("budget", [record("budget", drops=recalibrated), BUDGET]) == "budget*"
    assert table.marked("short", [record("short")]) == "short"


def test_the_summary_and_the_aims_are_means_over_the_datasets(table: ModuleType) -> None:
    cifar = [one | {"dataset": "cifar10"} for one in SIDES[:2]]
    cifar[1] = cifar[1] | {"accuracy": 80.0, "seconds": 10.0, "forward_flops": 2e12}
    deeper = [one | {"model": "vgg13"} for one in SIDES]
    study = {"records": [*SIDES, *cifar, *deeper]}
    rows = cells(table.summary(study))
    assert rows[0] == ["vgg11", "1.75x", "-25.0 %", "-17.83 %", "-0.50", "+0.50", "2, 2"]
    assert rows[1] == ["vgg13", "2.50x", "-50.0 %", "", "-1.00", "+0.50", "1, 1"]
    assert [row[2] for row in cells(table.aims(study))] == [
        *("2.00", "-0.67 points", "not measured", "not measured", "in 1 of 1 steps", "not measured", "2 of 2"),
    ]


def test_scores_stand_beside_drops_without_them(table: ModuleType) -> None:
    even = [record("budget-even", 4.5, 78.0), record("budget-hindsight", 4.2, 81.0)]
    another = record("budget", 9.0, 99.0, seed=1)  # with nothing beside it
    text = table.scores({"records": [*SIDES, *even, another]})
    assert cells(text)[0] == ["mnist", "vgg11", "budget", "79.00 %", "78.00 %", "81.00 %", "4.0 / 4.5 / 4.2", "1"]
    assert text.endswith("Scores against an even pace: +1.00 points in mean, better in 1 of 1 rows.")


def test_thresholds_are_means_over_the_networks(table: ModuleType) -> None:
    drop = [{"epoch": 3, "prefix": 2}]
    records = [
        record("baseline"),
        record("stopped", 8.0, 79.0, drops=drop),
        record("threshold-0.4", 5.0, 77.0, drops=drop),
    ]
    records += [one | {"model": "resnet18", "drops": []} for one in records[:2]]
    records += [record("stopped", 1.0, 99.0, seed=1)]  # with nothing beside it
    assert cells(table.thresholds({"records": records})) == [
        ["0.1", "not measured", "", "", ""],
        ["0.2", "2", "1", "1.25", "-1.00"],
        ["0.4", "1", "1", "2.00", "-3.00"],
    ]


def test_long_schedules_say_where_dropping_was_better(table: ModuleType) -> None:
    records = [one | {"setting": f"long {schedule}"} for one in SIDES for schedule in ("one-cycle", "constant")]
    records[3] = records[3] | {"accuracy": 70.0}  # budget, constant
    text = table.long({"records": records})
    assert [row[1:3] for row in cells(text)[:2]] == [["vgg11, one-cycle", "baseline"], ["vgg11, one-cycle", "budget*"]]
    assert text.endswith("`Budget(2.0, start=1)` is better than `short` in 1 of 2 schedules.")


def test_recipes_show_what_was_tried(table: ModuleType) -> None:
    tried = [record("baseline", 1.0, 60.0 + 10 * lr, setting="recipe", recipe={"lr": lr}) for lr in (0.5, 1.0)]
    assert cells(table.recipes({"records": tried}))[0] == ["mnist", "vgg11", "65.00 %", "70.00 %"]


def test_plots_show_what_is_measured(table: ModuleType) -> None:
    rule = record("freezeout:0.5", 6.0, 77.0)
    study = {"records": [*SIDES, rule]}
    assert "<svg" in table.plot_flops(study)
    assert "mnist" in table.plot_flops(study)
    drawn = table.plot_accuracy(study)
    assert "freezeout" in drawn
    assert "autofreeze" not in drawn


def test_norms_are_compared_seed_by_seed(table: ModuleType) -> None:
    assert table.norms({"records": []}).splitlines()[-1] == "Not measured."
    runs = [
        record(side, accuracy=accuracy, seed=seed, dataset="mnist", drops=[{"epoch": 1, "prefix": 3}], layers=9)
        for side, of_seeds in {"as-trained": (90.0, 80.0), "recalibrated": (91.0, 83.0, 99.0)}.items()
        for seed, accuracy in enumerate(of_seeds)
    ]
    lines = table.norms({"records": runs}).splitlines()
    assert lines[2] == "| mnist | vgg11 | 3 after 1; of 9 | 85.00 % | 87.00 % | +2.00 | 2 |"
    assert lines[-1] == "+2.00 points in mean, better in 1 of 1 rows."


def test_the_recipe_is_the_best_one_on_validation_images(study: ModuleType, cases: ModuleType) -> None:
    scale = cases.SCALES["cpu"]
    tried = [
        record("baseline", setting="recipe", recipe={"lr": lr}, validation_accuracy=accuracy, model=model)
        for model, lr, accuracy in (("vgg11", 0.02, 70.0), ("vgg11", 0.05, 75.0), ("resnet18", 0.2, 90.0))
    ]
    found = [
        study.chosen_lr({"records": tried}, cases.Case("paper", dataset, model, "baseline", 0), scale)
        for dataset, model in (("mnist", "vgg19"), ("mnist", "resnet152"), ("cifar10", "vgg19"))
    ]
    assert found == [0.05, 0.2, scale.default_lr]


def test_a_side_that_cannot_be_trained_says_why(study: ModuleType, cases: ModuleType) -> None:
    scale = cases.SCALES["toy"]
    split = study.load_split("digits", None, scale)
    split = dataclasses.replace(split, train=split.train.subset(range(16)))

    def refuses(side: str, reason: str, *records: dict[str, Any]) -> None:
        case = cases.Case("paper", "digits", "vgg11", side, 0)
        recipe = study.recipe_of(case, split, {"epochs": 1, "records": []}, scale, device="cpu")
        with pytest.raises(study.NotRunError, match=reason):
            study.run_case(case, split, recipe, {one["side"]: one for one in records})

    refuses("short", "^it follows budget$")
    refuses("stopped-even", "^it follows watched, stopped$")
    watched = record("watched", layer_flops=[1, 2], relative=[[0.1, 0.1]])
    refuses("stopped-even", "^nothing was dropped that it could choose otherwise$", watched, record("stopped"))
    refuses("budget", "^Budget: speedup must be at most 1.00, ")


@pytest.mark.slow
def test_a_rehearsal_runs_every_side_once_and_refuses_another_recipe(
    cases: ModuleType,
    study: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Steps of milliseconds, on a machine with other work, may not be halved by any drop.
    monkeypatch.setitem(study.SIDES, "budget", cases.named("budget:1.2,start=1"))

    def run(*more: str) -> dict[str, Any]:
        study.main(["--toy", "--seeds", "1", "--tests-passed", "1", "--out", str(tmp_path), "--name", "toy", *more])
        written: dict[str, Any] = json.loads((tmp_path / "toy.json").read_text())
        return written

    once = run()
    table = [(r["model"], r["side"]) for r in once["records"] if r["setting"] == "paper"]
    assert table[:10] == [
        (model, side)
        for model in ("vgg11", "resnet18")
        for side in ("baseline", "budget", "stopped", "short", "freeze-only")
    ]
    # The default policy may drop nothing in so few epochs: then there is nothing to choose in its place.
    found = {r["side"] for r in once["records"]}
    assert found >= {*study.SIDES} - {"stopped-even", "stopped-hindsight"}
    by_side = {r["side"]: r for r in once["records"] if (r["setting"], r["model"]) == ("paper", "vgg11")}
    drops = {side: [(d["epoch"], d["prefix"]) for d in r["drops"]] for side, r in by_side.items()}
    assert drops["freeze-only"] == drops["as-trained"] == drops["recalibrated"] == drops["budget"] != []
    assert drops["baseline"] == drops["watched"] == drops["short"] == []
    assert by_side["short"]["epochs"] <= by_side["baseline"]["epochs"] == 5
    assert by_side["freeze-only"]["forward_flops"] == by_side["baseline"]["forward_flops"]
    assert {r["recipe"]["schedule"] for r in once["records"] if r["setting"] == "long constant"} == {"constant"}
    assert run()["records"] == once["records"]
    capsys.readouterr()
    assert run("--seeds", "2", "--seconds", "0")["records"] == once["records"]
    assert "the time is over" in capsys.readouterr().out
    once["records"][2]["recipe"]["width"] = 16
    (tmp_path / "toy.json").write_text(json.dumps(once))
    with pytest.raises(
        SystemExit, match=r"toy\.json: the runs of vgg11 on digits in this file have width = 16, got 8: give --name"
    ):
        run("--seeds", "2", "--parts", "paper")
