from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from learndrop_ext.app import runs
from learndrop_ext.app.datasets import Split, load_dataset
from learndrop_ext.app.recipe import Recipe, make_scheduler, set_up
from learndrop_ext.decide.policy import Fixed
from learndrop_ext.forward.chain import split_layers

RECIPE = Recipe(model="resnet10", stem="small", width=8, epochs=3, batch_size=32, lr=0.05)


@pytest.fixture(scope="module")
def digits() -> Split:
    return load_dataset("digits", limit=128)


def test_train_without_a_policy_is_a_plain_run(digits: Split) -> None:
    records: list[dict[str, Any]] = []
    result, model = runs.train("baseline", digits, RECIPE, on_epoch=records.append)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert result.drops == []
    assert result.fill_seconds == result.measure_seconds == 0.0
    assert result.accuracy == records[-1]["accuracy"] == runs.evaluate(model, digits.test, batch_size=50, amp=None)
    assert result.peak_memory_bytes > 1 << 20
    # Multiplies and adds of one 8x8 image: the stem, the four stages, each with a shortcut but the first, the classifier.
    convolutions = [(1, 8, 3, 8), (8, 8, 3, 8), (8, 8, 3, 8)]
    for width, size in ((16, 4), (32, 2), (64, 1)):
        convolutions += [(width // 2, width, 3, size), (width, width, 3, size), (width // 2, width, 1, size)]
    flops = sum(2 * i * o * k * k * size * size for i, o, k, size in convolutions) + 2 * 64 * 10
    assert result.forward_flops == 3 * 128 * flops


def test_train_with_a_policy_says_what_it_dropped(digits: Split) -> None:
    records: list[dict[str, Any]] = []
    steps: list[tuple[str, int, int, str]] = []
    result, model = runs.train(
        "learndrop",
        digits,
        RECIPE,
        policy=Fixed({1: 2, 2: 4}),
        on_epoch=records.append,
        progress=lambda *words: steps.append(words),
    )
    plain, _ = runs.train("baseline", digits, RECIPE)
    assert [(d.epoch, d.prefix, d.layers[-1], d.tier) for d in result.drops] == [
        (1, 2, "layer1.0", "device"),
        (2, 4, "layer3.0", "device"),
    ]
    assert [record["prefix"] for record in records] == [2, 4, 4]
    assert list(records[0]["scores"]) == ["conv1", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "fc"]
    assert records[2]["scores"]["layer3.0"] is None
    assert 0 < result.forward_flops < plain.forward_flops
    assert result.fill_seconds > 0
    assert steps[-1][:3] == ("learndrop", 12, 12)
    assert set(model.state_dict()) == set(runs.train("baseline", digits, RECIPE)[1].state_dict())


@pytest.mark.parametrize("policy", [None, Fixed({1: 2})])
def test_train_narrows_after_each_epoch(digits: Split, policy: Fixed | None) -> None:
    records: list[dict[str, Any]] = []
    result, model = runs.train("run", digits, RECIPE, policy=policy, narrow=("l1", 0.5), on_epoch=records.append)
    plain, wide = runs.train("run", digits, RECIPE, policy=policy)
    full = records[0]["full_widths"]
    assert next(iter(full)) == "conv1"
    left = [sum(record["widths"].values()) / sum(full.values()) for record in records]
    assert 1 > left[0] > left[1] >= left[2]
    if policy is None:
        assert left[2] == pytest.approx(0.5, abs=0.01)
    assert result.forward_flops < plain.forward_flops
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in wide.parameters())
    assert result.accuracy == runs.evaluate(model, digits.test, batch_size=50, amp=None)


def test_the_first_epoch_is_the_same_in_all_runs(digits: Split) -> None:
    losses = {}
    for name, policy in (("baseline", None), ("learndrop", Fixed({1: 2}))):
        records: list[dict[str, Any]] = []
        runs.train(name, digits, RECIPE, policy=policy, on_epoch=records.append)
        losses[name] = [record["train_loss"] for record in records]
    assert losses["baseline"][0] == losses["learndrop"][0]
    assert losses["baseline"][1] != losses["learndrop"][1]


def test_weights_and_rows_are_channels_last(digits: Split) -> None:
    setup = set_up(digits, RECIPE)
    filters = [p for p in setup.model.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)
    with make_scheduler(setup, RECIPE, Fixed({0: 2})) as drop:
        setup.model.train()
        for images, _labels in drop.loader:
            setup.model(images)
        for images, _labels in drop.loader:
            rows = images.standing.rows
            assert rows.shape == (32, 8, 8, 8)
            assert rows.is_contiguous(memory_format=torch.channels_last)
            assert not rows.is_contiguous()


def test_augmented_training_keeps_views(digits: Split) -> None:
    recipe = dataclasses.replace(RECIPE, augment="standard", views=2)
    result, _ = runs.train("learndrop", digits, recipe, policy=Fixed({1: 2}))
    assert result.drops[0].prefix == 2


def test_compare_gives_the_form_that_other_programs_read(digits: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def five_steps(split: Split, recipe: Recipe, *, seconds: float) -> Recipe:
        asked.append(seconds)
        return dataclasses.replace(recipe, epochs=2, steps=5)

    monkeypatch.setattr(runs, "policy_of", lambda recipe: Fixed({1: 2, 2: 4}))
    monkeypatch.setattr(runs, "shortened", five_steps)
    stages = []
    for out in runs.compare(digits, RECIPE, rivals=("freeze-only", "short")):
        stages.append(set(out))
    assert stages == [
        {"config", "baseline"},
        {"config", "baseline", "learndrop", "speedup"},
        {"config", "baseline", "learndrop", "speedup", "freeze-only"},
        {"config", "baseline", "learndrop", "speedup", "freeze-only", "short"},
    ]
    for run in ("baseline", "learndrop", "freeze-only", "short"):
        assert set(out[run]) == {
            *("seconds", "fill_seconds", "measure_seconds", "eval_seconds", "forward_flops", "accuracy"),
            *("peak_memory_bytes", "drops"),
        }
    assert out["speedup"] == out["baseline"]["seconds"] / out["learndrop"]["seconds"]
    dropped = [(drop["epoch"], drop["prefix"]) for drop in out["learndrop"]["drops"]]
    assert dropped == [(1, 2), (2, 4)]
    assert [(drop["epoch"], drop["prefix"]) for drop in out["freeze-only"]["drops"]] == dropped
    assert out["freeze-only"]["forward_flops"] == out["baseline"]["forward_flops"] > out["learndrop"]["forward_flops"]
    assert asked == [out["learndrop"]["seconds"]]
    assert out["config"]["short_epochs"] == 1.25
    steps, batches = 5, 4
    per_epoch = out["baseline"]["forward_flops"] / 3
    whole, rest = divmod(steps, batches)
    images = whole * len(digits.train) + rest * RECIPE.batch_size
    assert out["short"]["forward_flops"] == per_epoch / len(digits.train) * images


@pytest.mark.parametrize(
    # 128 images in batches of 32: 4 batches an epoch, which are the ones that are timed, in 2 s.
    ("seconds", "epochs", "batch_size", "timed", "wanted"),
    [
        (5.0, 3, 32, 128, (3, 10)),
        (2.1, 3, 32, 128, (1, 4)),
        (0.1, 3, 32, 128, (1, 1)),
        (1000.0, 3, 32, 128, (3, 12)),
        # 32 batches an epoch, 8 of 320 steps are timed: 0.25 s each.
        (20.0, 10, 4, 32, (3, 80)),
        # The last batch of an epoch has 8 images.
        (1.0, 1, 40, 128, (1, 2)),
    ],
)
def test_shortened_counts_steps_by_its_own_clock(
    digits: Split,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    epochs: int,
    batch_size: int,
    timed: int,
    wanted: tuple[int, int],
) -> None:
    seen: list[tuple[int, int, int]] = []

    def train(name: str, split: Split, recipe: Recipe, *, on_epoch: Any) -> None:
        seen.append((len(split.train), len(split.test), recipe.epochs))
        for total in (9.0, 11.0):
            on_epoch({"seconds": total})

    monkeypatch.setattr(runs, "train", train)
    recipe = dataclasses.replace(RECIPE, epochs=epochs, batch_size=batch_size)
    short = runs.shortened(digits, recipe, seconds=seconds)
    assert seen == [(timed, 1, 2)]
    assert (short.epochs, short.steps) == wanted
    assert dataclasses.replace(short, epochs=epochs, steps=None) == recipe


def test_shortened_times_real_steps(digits: Split) -> None:
    assert runs.shortened(digits, RECIPE, seconds=1e-9).steps == 1
    assert runs.shortened(digits, RECIPE, seconds=1e9).steps == 12


def test_warm_up_measures_makes_rows_and_reads_them(digits: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[runs.Result] = []
    train = runs.train

    def remember(*args: Any, **options: Any) -> tuple[runs.Result, Any]:
        results.append((ended := train(*args, **options))[0])
        return ended

    monkeypatch.setattr(runs, "train", remember)
    runs.warm_up(digits, dataclasses.replace(RECIPE, augment="flip", views=4, steps=7))
    plain, dropping = results
    assert plain.drops == []
    assert [(drop.epoch, drop.prefix) for drop in dropping.drops] == [(1, 3)]
    assert dropping.fill_seconds > 0
    assert dropping.measure_seconds > 0


def test_forward_flops_are_those_of_the_layers_that_ran(digits: Split) -> None:
    def flops(policy: Any, **options: Any) -> int:
        return runs.train("run", digits, RECIPE, policy=policy, **options)[0].forward_flops

    setup = set_up(digits, RECIPE)
    layers = [layer.flops for layer in split_layers(setup.model, next(iter(setup.loader))[0][:2])]
    whole = 128 * sum(layers)
    assert flops(Fixed({})) == flops(None) == 3 * whole
    # Rows are made in the second epoch, and read in the third.
    assert flops(Fixed({1: 2})) == 2 * whole + 128 * sum(layers[2:])
    # The third epoch is the last: rows of four layers would not be read, and those of two stay.
    assert flops(Fixed({1: 2, 2: 4})) == 2 * whole + 128 * sum(layers[2:])
    # In the second epoch rows of four layers are made from rows of two.
    assert flops(Fixed({0: 2, 1: 4})) == whole + 128 * sum(layers[2:]) + 128 * sum(layers[4:])
    assert flops(Fixed({1: 2}), caches=False) == 3 * whole
