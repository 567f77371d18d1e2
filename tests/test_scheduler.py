from __future__ import annotations

import copy
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from learndrop_ext import CacheConfig, Decision, DropScheduler, Fixed, Situation, StoppedLearning
from learndrop_ext.guards import PROBES
from small_training import Net, called, data, epoch, parts, prefix_rows


def test_the_eight_line_loop_works_with_all_defaults() -> None:
    model, optimizer, loader = parts()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    drop = DropScheduler(model, optimizer, loader)
    for _ in range(3):
        for x, y in drop.loader:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        drop.step()
    assert [record.epoch for record in drop.history] == [1, 2, 3]


def test_step_records_what_it_saw_and_did() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}))
    assert drop.model is model
    assert drop.forecast(3).full_seconds > 0
    epoch(drop, optimizer)
    record = drop.step()
    assert drop.chain.names == ("conv1", "conv2", "conv3", "fc")
    assert (record.epoch, record.prefix, record.tier, drop._rows.cut) == (1, 2, "device", 2)
    assert record.reason == "set by hand; rows after conv2"
    assert record.learning_rate == 0.05
    assert record.samples == 24
    # Multiplies and adds of 3x3 convolutions on 8x8 and 4x4 outputs, and of the classifier.
    conv1, conv2, conv3, fc = 2 * 64 * 4 * 27, 2 * 16 * 6 * 36, 2 * 16 * 8 * 54, 2 * 8 * 5
    assert record.forward_flops == 24 * (conv1 + conv2 + conv3 + fc)
    assert record.fill_flops == 0
    assert record.row_bytes == 256  # 6 x 4 x 4 fp16 values are 192 bytes, padded to 128
    assert record.cache_bytes == 24 * 256
    assert all(value is not None and value > 0 for value in record.relative)
    assert record.cosine == (None,) * 4
    epoch(drop, optimizer)
    record = drop.step()
    assert record.forward_flops == 24 * (conv3 + fc)
    assert record.fill_flops == 24 * (conv1 + conv2)
    assert 0 < record.fill_seconds < record.epoch_seconds
    assert record.scores[:2] == (None, None)
    assert record.scores[2] is not None
    assert record.changes[0] is None
    assert record.changes[2].l2 > 0
    assert record.forecast_seconds > 0
    epoch(drop, optimizer)
    assert drop.step().fill_flops == 0


def test_a_policy_without_costs_has_nothing_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), epochs=3)
    monkeypatch.setattr(drop._ledger, "measure", lambda *_, **__: pytest.fail("Fixed reads no costs"))
    for _ in range(3):
        epoch(drop, optimizer)
        assert drop.step().forecast_seconds is None


def test_the_default_policy_waits_for_a_scheduled_learning_rate_to_fall() -> None:
    model, optimizer, loader = parts()
    policy = StoppedLearning(threshold=1.0, patience=1, warmup=0, min_saving=0.0)
    drop = DropScheduler(model, optimizer, loader, policy=policy)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3], gamma=0.1)  # made after the DropScheduler
    waits = "the learning rate is 100% of its highest; drops wait for 50%"
    for i in range(2):
        epoch(drop, optimizer)
        schedule.step()
        assert (drop.step().prefix, drop.history[-1].reason) == (0, waits), i
    state, weights, rates = drop.state_dict(), copy.deepcopy(model.state_dict()), optimizer.state_dict()
    drop.close()
    model, optimizer, loader = parts()
    model.load_state_dict(weights)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], gamma=0.1)
    optimizer.load_state_dict(rates)
    with DropScheduler(model, optimizer, loader, policy=policy) as drop:
        drop.load_state_dict(state)
        epoch(drop, optimizer)
        schedule.step()
        assert drop.step().prefix > 0


def test_images_are_read_once_after_a_drop_and_the_prefix_stays() -> None:
    read: list[int] = []

    class Counted(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return super().__getitem__(index)

        __getitems__ = None

    model, optimizer, loader = parts(Counted(*data().tensors))
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2, 2: 3}))
    epoch(drop, optimizer)
    drop.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    read.clear()
    epoch(drop, optimizer)
    assert sorted(read) == list(range(24))
    drop.step()
    assert drop.prefix == 3
    read.clear()
    for _ in range(2):
        epoch(drop, optimizer)
    # A few are read again at each epoch, to see whether they are still what they were.
    assert len(read) <= 2 * PROBES
    after = model.state_dict()
    for name, value in before.items():
        same = torch.equal(value, after[name])
        assert same == name.startswith(("conv1", "bn1", "conv2", "bn2")), name


def test_the_model_stays_whole() -> None:
    model, optimizer, loader = parts()
    keys = list(model.state_dict())
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), cache="fp32")
    epoch(drop, optimizer)
    drop.step()
    running = model.bn1.running_mean.clone()
    for _ in range(2):  # on images, whose rows are kept, and on rows
        for x, _ in drop.loader:
            model.train()
            model(x)
            assert not model.bn1.training
            assert model.conv3.training
        assert torch.equal(model.bn1.running_mean, running)
    images, labels = data().tensors
    model.eval()
    for x, y in drop.loader:
        read = x.read()
        ids = [next(i for i in range(24) if torch.equal(image, images[i])) for image in read]
        assert torch.equal(labels[ids], y)
        with torch.no_grad():
            assert torch.equal(model(x), model(read))
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        wanted = model(images)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert list(other.state_dict()) == keys
            assert torch.equal(other(images), wanted)
            # The copy trains as an ordinary model, and knows nothing of what was dropped.
            other.train()(images)
            assert not torch.equal(other.bn1.running_mean, running)
    assert torch.equal(model.bn1.running_mean, running)


def test_labels_and_the_rest_of_the_batch_stay_with_their_rows() -> None:
    class Dicts(Dataset[Any]):
        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> dict[str, Any]:
            x, y = data()[index]
            return {"label": y, "image": x, "id": index, "name": f"n{index}"}

    model, optimizer, loader = parts(Dicts())
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), input="image", cache="fp32")
    for _ in range(2):
        order = []
        for batch in drop.loader:
            assert list(batch) == ["label", "image", "id", "name"]
            assert batch["name"] == [f"n{i}" for i in batch["id"].tolist()]
            for i, label in zip(batch["id"].tolist(), batch["label"].tolist(), strict=True):
                assert label == int(data()[i][1])
            order += batch["id"].tolist()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch["image"]), batch["label"]).backward()
            optimizer.step()
        assert sorted(order) == list(range(24))
        drop.step()
    assert drop.prefix == 2


def test_wrap_is_applied_at_the_start_and_after_every_drop() -> None:
    wrapped = []

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module
            wrapped.append(sum(p.numel() for p in module.parameters() if p.requires_grad))

        def forward(self, x: torch.Tensor) -> Any:
            return self.module(x)

    model, optimizer, loader = parts()
    live = DropScheduler(model, optimizer, loader, policy=Fixed({1: 1, 2: 3}), wrap=Wrapper)
    drop_model = live.model
    for _ in range(2):
        epoch(live, optimizer)
        live.step()
    assert live.model is drop_model
    conv1, conv2, conv3, fc = 3 * 4 * 9 + 4 + 8, 4 * 6 * 9 + 6 + 12, 6 * 8 * 9 + 8, 8 * 5 + 5
    assert wrapped == [conv1 + conv2 + conv3 + fc, conv2 + conv3 + fc, fc]
    with pytest.raises(TypeError, match=r"wrap must return a torch.nn.Module, got NoneType"):
        DropScheduler(*parts(), wrap=lambda module: None)  # type: ignore[arg-type,return-value]


def test_undrop_trains_the_whole_model_again() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}))
    epoch(drop, optimizer)
    drop.step()
    drop.undrop()
    assert drop.prefix == 0
    assert drop._rows.cut == 0
    before = model.conv1.weight.clone()
    epoch(drop, optimizer)
    drop.step()
    # What was set for an earlier epoch does not count any more.
    assert drop.prefix == 0
    assert not torch.equal(model.conv1.weight, before)
    assert model.bn1.training


def test_a_budget_that_is_too_small_keeps_no_rows_and_says_so() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), cache=CacheConfig(budget_bytes=1000))
    epoch(drop, optimizer)
    record = drop.step()
    assert (record.prefix, record.tier, record.cache_bytes) == (2, "none", 0)
    assert "no rows: they take 6.144 kB and the budget is 1 kB" in record.reason
    before = model.conv1.weight.clone()
    epoch(drop, optimizer)
    assert torch.equal(model.conv1.weight, before)


def test_a_sampler_of_few_samples_fills_only_those_and_fetches_the_others_when_drawn() -> None:
    class Chosen:
        def __init__(self) -> None:
            self.ids = [3, 5, 7, 9]

        def __iter__(self) -> Iterator[int]:
            return iter(self.ids)

        def __len__(self) -> int:
            return len(self.ids)

    chosen = Chosen()
    model, optimizer, loader = parts(sampler=chosen, shuffle=False, batch_size=2)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), cache="fp32")
    epoch(drop, optimizer)
    drop.step()
    cache = drop._rows.cache
    assert cache is not None
    assert len(cache.filled) == 4
    epoch(drop, optimizer)
    assert len(cache.filled) == 4
    chosen.ids = [9, 11, 3, 0]
    labels = data().tensors[1]
    ids = torch.tensor(chosen.ids)
    wanted = prefix_rows(drop, 2)[ids]
    model.train()
    for _ in range(2):  # the first time, two samples have no row
        got = [(called(drop, x)[1], y) for x, y in drop.loader]
        assert int(cache.filled.sum()) == 6
        torch.testing.assert_close(torch.cat([x for x, _ in got]), wanted)
        assert torch.equal(torch.cat([y for _, y in got]), labels[ids])


def test_rows_stay_where_they_are_if_those_of_more_layers_do_not_fit() -> None:
    def run(cache: Any) -> tuple[list[float], DropScheduler]:
        _, _, loader = parts()
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 2, 3)),
            *(nn.Flatten(), nn.Linear(8, 5)),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 1, 2: 2}), cache=cache)
        losses = []
        for number in range(5):
            losses += epoch(drop, optimizer)
            drop.step()
            if number == 2:
                drop.refresh()  # images go through all dropped layers again
        return losses, drop

    # 24 rows of 6 x 4 x 4 fp32 values take 9,216 bytes, of 8 x 4 x 4 values 12,288.
    got, drop = run(CacheConfig(codec="fp32", budget_bytes=10_000))
    assert (drop.prefix, drop._rows.cut) == (2, 1)
    assert "rows stay after 0 (no rows: they take 12.288 kB" in drop.history[1].reason
    assert got == pytest.approx(run(None)[0], rel=1e-6)


@pytest.mark.parametrize("drops", [{1: 2}, {1: 1, 2: 3}, {1: 1, 2: 2, 3: 3}, {}])
def test_a_resumed_run_equals_the_uninterrupted_one(drops: dict[int, int]) -> None:
    def run(stop: int | None) -> tuple[list[float], Net, DropScheduler]:
        model, optimizer, loader = parts()
        drop = DropScheduler(model, optimizer, loader, policy=Fixed(drops))
        losses: list[float] = []
        for done in range(5):
            if done == stop:
                saved = io.BytesIO()
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "drop": drop.state_dict()}
                torch.save(state, saved)
                order = loader.generator.get_state()
                saved.seek(0)
                loaded = torch.load(saved, weights_only=True)
                model, optimizer, loader = parts()
                loader.generator.set_state(order)
                model.load_state_dict(loaded["model"])
                optimizer.load_state_dict(loaded["optimizer"])
                drop = DropScheduler(model, optimizer, loader, policy=Fixed(drops))
                drop.load_state_dict(loaded["drop"])
            losses += epoch(drop, optimizer)
            drop.step()
        return losses, model, drop

    wanted, whole, before = run(None)
    for stop in (2, 3):
        got, resumed, after = run(stop)
        assert got == wanted
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name])
        assert [r.scores for r in after.history] == [r.scores for r in before.history]


def test_the_policy_sees_what_an_epoch_took_before_anything_was_dropped() -> None:
    seen: list[Situation] = []

    def policy(situation: Situation) -> Decision:
        seen.append(situation)
        return Decision(2 if situation.epoch >= 3 else 0, "")

    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=policy)
    for seconds in (5.0, 1.0, 2.0):
        epoch(drop, optimizer)
        drop.loader._seconds = seconds
        drop.step()
    # The median of the epochs without drops.
    assert [situation.epoch_seconds for situation in seen[1:]] == pytest.approx([5.0, 3.0, 2.0])
    assert seen[0].epoch == 0
    assert seen[0].scores == ()
    assert seen[3].elapsed_seconds >= 8.0


def test_the_policy_sees_the_changes_of_the_history() -> None:
    seen: list[Situation] = []

    def policy(situation: Situation) -> Decision:
        seen.append(situation)
        return Decision(2 if situation.epoch >= 2 else 0, "")

    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=policy)
    for _ in range(3):
        epoch(drop, optimizer)
        drop.step()
    assert [len(situation.changes) for situation in seen] == [0, 1, 2, 3]
    assert seen[-1].changes == tuple(record.changes for record in drop.history)
    assert [change is None for change in seen[-1].changes[-1]] == [True, True, False, False]


def test_rows_spill_to_disk_and_train_the_same(tmp_path: Path) -> None:
    def run(cache: CacheConfig) -> tuple[list[float], DropScheduler]:
        model, optimizer, loader = parts()
        drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 1, 2: 3}), cache=cache)
        losses = []
        for _ in range(4):
            losses += epoch(drop, optimizer)
            drop.step()
        return losses, drop

    wanted, _ = run(CacheConfig(codec="fp32"))
    # 24 rows after conv1 take 1 KiB each: 2 KiB hold none beside the areas that rows from the disk go through.
    got, drop = run(CacheConfig(codec="fp32", budget_bytes=2048, store_bytes=1 << 20, store=tmp_path))
    assert got == wanted
    assert drop._rows.cache is not None
    assert drop._rows.cache.plan.disk > 0
    assert len(list(tmp_path.glob("rows-*"))) == 1
    drop.undrop()
    assert list(tmp_path.glob("rows-*")) == []


def test_refresh_reads_the_labels_of_some_samples_again() -> None:
    class Corrected(TensorDataset):
        read: list[int]

        def __getitem__(self, index: int) -> Any:
            self.read.append(index)
            return super().__getitem__(index)

        __getitems__ = None

    dataset = Corrected(*(tensor.clone() for tensor in data().tensors), torch.arange(24))
    dataset.read = []
    model, optimizer, loader = parts(dataset, shuffle=False)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), cache="fp32")

    def seen() -> torch.Tensor:
        model.train()
        labels = []
        for x, y, _ in drop.loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            labels.append(y)
        drop.step()
        return torch.cat(labels)

    for _ in range(3):
        seen()
    labels = dataset.tensors[1]
    labels[[2, 9]] = (labels[[2, 9]] + 1) % 5
    drop.refresh([2, 9])
    dataset.read.clear()
    assert torch.equal(seen(), labels)  # and no warning, which would be an error
    # The two samples are read, and a few are compared.
    assert {2, 9} <= set(dataset.read)
    assert len(dataset.read) <= 2 + PROBES
    assert drop.history[-1].fill_flops == 2 * sum(layer.flops for layer in drop.chain[:2])
    assert torch.equal(seen(), labels)
    assert drop.history[-1].fill_flops == 0
    labels[:] = 0
    drop.refresh()
    assert torch.equal(seen(), labels)
    for wrong in (24, -1):
        with pytest.raises(IndexError, match=rf"drop.refresh: ids must be numbers .*, within 0..23, got {wrong}$"):
            drop.refresh([0, wrong])


def test_a_new_optimizer_is_the_one_that_is_measured() -> None:
    class Slow(torch.optim.SGD):
        """Takes at least 50 ms."""

        def step(self, closure: Any = None) -> Any:
            time.sleep(0.05)
            return super().step(closure)

    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({}), epochs=3)
    steps = 3 * 3  # batches of all epochs
    assert drop.forecast().full_seconds < steps * 0.05
    with pytest.raises(ValueError, match="optimizer must hold the model's parameters, got none of its 12"):
        drop.optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    assert drop.optimizer is optimizer
    drop.optimizer = slow = Slow(model.parameters(), lr=0.25)
    assert drop.optimizer is slow
    assert drop.forecast().full_seconds >= steps * 0.05
    epoch(drop, slow)
    assert drop.step().learning_rate == 0.25


def test_after_a_drop_a_new_optimizer_may_wake_what_slept() -> None:
    model, optimizer, loader = parts()
    optimizer = torch.optim.SGD([*model.conv2.parameters(), *model.conv3.parameters()], lr=0.05)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}))
    epoch(drop, optimizer)
    drop.step()
    epoch(drop, optimizer)
    drop.optimizer = torch.optim.SGD(model.parameters(), lr=0.05)  # conv1 did not train when it was dropped
    with pytest.warns(RuntimeWarning, match="drop.step: all layers train again, .* layer conv1 have been set to"):
        record = drop.step()
    assert (drop.prefix, record.prefix) == (0, 0)
    assert record.changes[:2] == (None, None)  # what was dropped did not change
    assert None not in record.changes[2:]
    assert record.forward_flops < drop.history[0].forward_flops
    before = model.conv1.weight.detach().clone()
    epoch(drop, drop.optimizer)
    assert not torch.equal(model.conv1.weight, before)
    assert None not in drop.step().changes


def test_a_wrapped_model_trains_whole_again_when_a_frozen_layer_is_set_to_train() -> None:
    model, _, loader = parts()
    model.conv1.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    wrapped = []

    def wrap(body: nn.Module) -> nn.Module:
        wrapped.append(body)
        return nn.Sequential(body)

    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}), wrap=wrap)
    epoch(drop, optimizer)
    drop.step()
    model.conv1.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.conv1.parameters())})
    before = model.conv1.weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="all layers train again"):
        epoch(drop, optimizer)
    assert not torch.equal(model.conv1.weight, before)
    assert wrapped[-1] is model
    assert drop.step().prefix == 0
    drop.close()


def test_a_state_saved_after_a_frozen_layer_was_set_to_train_has_no_dropped_layers() -> None:
    model, _, loader = parts()
    model.conv1.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}))
    epoch(drop, optimizer)
    drop.step()
    model.conv1.requires_grad_(True)
    with pytest.warns(RuntimeWarning, match="all layers train again"):
        next(iter(drop.loader))
    state = drop.state_dict()
    assert (state["prefix"], state["undropped"]) == (0, 1)
    drop.close()
    resumed = DropScheduler(model, optimizer, loader, policy=Fixed({0: 2}))
    resumed.load_state_dict(state)
    assert resumed.prefix == 0
    epoch(resumed, optimizer)
    record = resumed.step()
    assert record.prefix == 0
    assert None not in record.changes


def test_a_policy_sees_how_many_of_the_first_layers_do_not_train() -> None:
    seen = []

    def policy(situation: Situation) -> Decision:
        seen.append((situation.prefix, situation.asleep))
        return Decision(1 if situation.epoch else 0, "one")

    model, _, loader = parts()
    model.conv2.requires_grad_(False)
    model.bn2.requires_grad_(False)
    optimizer = torch.optim.SGD([*model.conv2.parameters(), *model.conv3.parameters()], lr=0.05)
    drop = DropScheduler(model, optimizer, loader, policy=policy)
    for _ in range(2):
        epoch(drop, optimizer)
        drop.step()
    model.conv2.requires_grad_(True)
    epoch(drop, optimizer)
    drop.step()
    assert seen == [(0, 2), (0, 2), (1, 2), (1, 1)]


def test_the_default_policy_drops_a_frozen_backbone_after_one_epoch() -> None:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    model[:5].requires_grad_(False)
    optimizer = torch.optim.SGD(model[7].parameters(), lr=0.05)
    images = TensorDataset(torch.randn(64, 3, 48, 48), torch.randint(0, 5, (64,)))
    drop = DropScheduler(model, optimizer, DataLoader(images, 16), epochs=20)
    for _ in range(2):
        epoch(drop, optimizer)
        drop.step()
    assert [record.prefix for record in drop.history] == [5, 5]
    assert drop.history[0].reason.startswith("frozen by the user")


def test_a_policy_that_never_drops_leaves_the_model_untouched() -> None:
    model, optimizer, loader = parts()
    hooks = [name for name in vars(model) if name.endswith("_hooks")]
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    weights = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.eval().modules()]
    state = torch.get_rng_state()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({}))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name

    def assert_untouched() -> None:
        assert {name: set(vars(module)) for name, module in model.named_modules()} == before
        assert not any(getattr(module, name) for module in model.modules() for name in hooks)
        assert all(type(module.forward).__name__ == "method" for module in model.modules())

    for _ in range(2):
        assert_untouched()
        for x, _ in drop.loader:
            assert type(x) is torch.Tensor
        epoch(drop, optimizer)
        drop.step()
    assert_untouched()
    drop.close()
    assert_untouched()
