from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_lightning import IGNORED, Counted, assert_equal, by_hand, callback, classifier, loader, trainer
from torch import nn
from torch.utils.data import DataLoader

from learndrop_ext import CacheConfig, Fixed
from learndrop_ext.guards import PROBES
from small_training import data

pytestmark = [pytest.mark.filterwarnings(text) for text in IGNORED]


def test_fit_equals_a_loop_by_hand(pl: Any) -> None:
    module, learn_drop, images = classifier(pl), callback(), Counted()
    keys = list(module.state_dict())
    reads: list[int] = []

    class Reads(pl.Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, *_: Any) -> None:
            reads.append(len(images.read))
            images.read.clear()

    trainer(pl, learn_drop, Reads()).fit(module, loader(images), DataLoader(data(), 8))
    wanted, net = by_hand(4)
    assert module.losses == wanted
    assert_equal(module.net, net)
    assert [record.prefix for record in learn_drop.drop.history] == [2, 3, 3, 3]
    assert [record.samples for record in learn_drop.drop.history] == [24] * 4
    # Validation sees images and runs the whole network.
    assert all(shape[1:] == [3, 8, 8] for shape in module.val_shapes)
    assert list(module.state_dict()) == keys
    # The whole set in two epochs, then a few that are read again.
    assert reads[1] == 24
    assert max(reads[2:]) <= PROBES


@pytest.mark.cuda
def test_fit_on_a_gpu_follows_the_loop_by_hand(pl: Any) -> None:
    module, learn_drop = classifier(pl), callback()
    trainer(pl, learn_drop, accelerator="gpu", devices=1).fit(module, loader())
    wanted, _ = by_hand(4)
    torch.testing.assert_close(module.losses, wanted, rtol=1e-2, atol=1e-3)
    assert [record.prefix for record in learn_drop.drop.history] == [2, 3, 3, 3]


class Pairs(Counted):
    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x, x.flip(-1), y


def test_pairs_of_images_have_rows(pl: Any) -> None:
    module, learn_drop, images = classifier(pl), callback(input=[0, 1]), Pairs()

    def step(batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(module.net(torch.cat(batch[:2])), batch[2].repeat(2))

    module.training_step = step
    trainer(pl, learn_drop).fit(module, loader(images))
    assert [record.prefix for record in learn_drop.drop.history] == [2, 3, 3, 3]
    assert [record.fill_flops > 0 for record in learn_drop.drop.history] == [False, True, True, False]


def test_the_model_is_given_back_as_it_was(pl: Any) -> None:
    module, learn_drop = classifier(pl), callback()
    before = {name: sorted(child.__dict__) for name, child in module.named_modules()}
    user = loader()
    run = trainer(pl, learn_drop, max_epochs=3)
    run.fit(module, user)
    before[""] = sorted(module.__dict__)
    assert {name: sorted(child.__dict__) for name, child in module.named_modules()} == before
    assert all(child.training for child in module.modules())
    assert learn_drop.drop.loader.closed
    assert learn_drop.drop._rows.cache is None
    assert run.fit_loop._data_source.instance is user
    copy.deepcopy(module.net)(data().tensors[0])
    # The same callback serves a second fit.
    trainer(pl, learn_drop, max_epochs=2).fit(module, user)
    assert [record.prefix for record in learn_drop.drop.history] == [2, 3]


@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_fit_equals_the_uninterrupted_one(pl: Any, stop: int, validates: bool, tmp_path: Path) -> None:
    val = DataLoader(data(), 8) if validates else None
    wanted = classifier(pl)
    whole = callback()
    trainer(pl, whole, max_epochs=5).fit(wanted, loader(), val)
    # Saved at the end of validation or of the training epoch, whichever the Trainer does.
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="at", save_on_train_epoch_end=not validates)
    first = classifier(pl)
    trainer(pl, callback(), saver, max_epochs=stop, enable_checkpointing=True).fit(first, loader(), val)
    second, learn_drop = classifier(pl), callback()
    trainer(pl, learn_drop, max_epochs=5).fit(second, loader(), val, ckpt_path=tmp_path / "at.ckpt")
    assert first.losses + second.losses == wanted.losses
    assert_equal(second.net, wanted.net)
    assert [r.scores for r in learn_drop.drop.history] == [r.scores for r in whole.drop.history]


def test_a_fit_that_fails_goes_on_from_its_checkpoint_and_its_rows(pl: Any, tmp_path: Path) -> None:
    cache = CacheConfig(codec="fp32", store=tmp_path, key=str)
    wanted = classifier(pl)
    trainer(pl, callback(), max_epochs=5).fit(wanted, loader())

    class Failing(pl.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 4:
                raise OSError("the machine went away")

    first, learn_drop = classifier(pl), callback(cache=cache)
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="at")
    with pytest.raises(OSError, match="the machine went away"):
        trainer(pl, learn_drop, Failing(), saver, max_epochs=5, enable_checkpointing=True).fit(first, loader(Counted()))
    assert "forward" not in first.net.__dict__
    assert learn_drop.drop.loader.closed
    assert len(list(tmp_path.glob("rows-*.bin"))) == 1
    second, images = classifier(pl), Counted()

    class Start(pl.Callback):  # type: ignore[misc]
        def on_train_epoch_start(self, *_: Any) -> None:
            images.read.clear()

    run = trainer(pl, callback(cache=cache), Start(), max_epochs=5)
    run.fit(second, loader(images), ckpt_path=tmp_path / "at.ckpt")
    assert first.losses + second.losses == wanted.losses
    assert_equal(second.net, wanted.net)
    # In the epoch that was left the rows were found: each sample is read for its label alone, which nobody else offers.
    assert set(images.read) == set(range(24))
    assert len(images.read) <= 24 + PROBES
    assert list(tmp_path.glob("rows-*")) == []


def test_limit_train_batches_ends_epochs_early(pl: Any) -> None:
    module, learn_drop = classifier(pl), callback()
    trainer(pl, learn_drop, limit_train_batches=2).fit(module, loader(), DataLoader(data(), 8))
    wanted, net = by_hand(4, limit=2)
    assert module.losses == wanted
    assert_equal(module.net, net)
    assert [record.samples for record in learn_drop.drop.history] == [16] * 4


def test_max_steps_ends_an_epoch_in_its_middle(pl: Any) -> None:
    module, learn_drop = classifier(pl), callback()
    trainer(pl, learn_drop, max_epochs=-1, max_steps=7).fit(module, loader())
    assert module.losses == by_hand(3)[0][:7]
    assert [record.samples for record in learn_drop.drop.history] == [24, 24, 8]


def test_gradients_are_accumulated(pl: Any) -> None:
    module = classifier(pl)
    trainer(pl, callback(), accumulate_grad_batches=2).fit(module, loader())
    wanted, net = by_hand(4, accumulate=2)
    assert module.losses == wanted
    assert_equal(module.net, net)


def test_bf16_rows_are_made_under_the_precision_of_the_training(pl: Any) -> None:
    module, learn_drop = classifier(pl), callback()
    trainer(pl, learn_drop, precision="bf16-mixed").fit(module, loader(), DataLoader(data(), 8))
    wanted, net = by_hand(4, bf16=True)
    assert module.losses == wanted
    assert_equal(module.net, net)
    assert learn_drop.drop._guards.loop.autocast == torch.bfloat16


def test_early_stopping_and_checkpoints_see_the_whole_model(pl: Any, tmp_path: Path) -> None:
    module, learn_drop = classifier(pl), callback(policy=Fixed({1: 3}))
    stopping = pl.callbacks.EarlyStopping("val_loss", patience=1, min_delta=1e9)
    saver = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", filename="{epoch}", save_top_k=-1)
    run = trainer(pl, learn_drop, stopping, saver, max_epochs=9, enable_checkpointing=True)
    run.fit(module, loader(), DataLoader(data(), 24))
    assert [record.prefix for record in learn_drop.drop.history] == [3, 3]
    images, labels = data().tensors
    saved = []
    for epoch in range(2):
        state = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=False)["state_dict"]
        assert list(state) == list(module.state_dict())
        saved.append(state)
    fresh = classifier(pl)
    fresh.load_state_dict(saved[1])
    fresh.eval()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(fresh.net(images), labels)
    torch.testing.assert_close(run.callback_metrics["val_loss"], loss)
    # What was dropped after the first epoch stayed, the classifier learned.
    assert torch.equal(saved[0]["net.conv1.weight"], saved[1]["net.conv1.weight"])
    assert not torch.equal(saved[0]["net.fc.weight"], saved[1]["net.fc.weight"])


def test_validation_within_an_epoch_is_not_counted_as_training(pl: Any) -> None:
    class Slow(pl.Callback):  # type: ignore[misc]
        def on_validation_batch_end(self, *_: Any) -> None:
            time.sleep(1.0)

    module, learn_drop = classifier(pl), callback()
    run = trainer(pl, learn_drop, Slow(), max_epochs=1, val_check_interval=1, num_sanity_val_steps=0)
    run.fit(module, loader(), DataLoader(data(), 24))
    assert len(module.val_shapes) == 3  # after each batch
    assert 0 < learn_drop.drop.history[0].epoch_seconds < 2.0


def test_the_trainers_epochs_are_those_of_the_policy(pl: Any) -> None:
    learn_drop = callback()
    trainer(pl, learn_drop, max_epochs=3).fit(classifier(pl), loader())
    assert learn_drop.drop._epochs == 3
    learn_drop = callback(epochs=7)
    trainer(pl, learn_drop, max_epochs=1).fit(classifier(pl), loader())
    assert learn_drop.drop._epochs == 7


def test_a_recipe_that_asks_for_the_number_of_steps_before_the_fit_drops_all_the_same(pl: Any) -> None:
    """`estimated_stepping_batches`, as in any one-cycle recipe, loads the data before the fit starts."""
    module, learn_drop = classifier(pl), callback()
    steps: list[float] = []

    def configure_optimizers() -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        steps.append(module.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=int(steps[0]))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    module.configure_optimizers = configure_optimizers
    trainer(pl, learn_drop).fit(module, loader())
    assert steps == [12]
    assert [record.prefix for record in learn_drop.drop.history] == [2, 3, 3, 3]


def test_a_backbone_that_is_unfrozen_in_the_middle_of_the_fit_trains_again(pl: Any) -> None:
    """`BaseFinetuning` adds the backbone to the optimizer as an epoch begins."""
    net = (module := classifier(pl)).net
    backbone, weights = [net.conv1, net.bn1, net.conv2, net.bn2], []

    class Unfreezing(pl.callbacks.BaseFinetuning):  # type: ignore[misc]
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(backbone, train_bn=False)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            weights.append(net.conv1.weight.detach().clone())
            if epoch == 2:
                self.unfreeze_and_add_param_group(backbone, optimizer)

    def configure_optimizers() -> Any:
        return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05)

    module.configure_optimizers = configure_optimizers
    learn_drop = callback(policy=Fixed({1: 2}))
    with pytest.warns(RuntimeWarning, match="all layers train again"):
        trainer(pl, learn_drop, Unfreezing()).fit(module, loader())
    assert [record.prefix for record in learn_drop.drop.history] == [2, 2, 0, 0]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[2], weights[3])


def test_hooks_on_the_network_and_half_precision_work(pl: Any) -> None:
    module, learn_drop = classifier(pl), callback()
    called: list[int] = []
    module.net.register_forward_hook(lambda *_: called.append(1))
    trainer(pl, learn_drop, precision="bf16-true").fit(module, loader())
    assert [record.prefix for record in learn_drop.drop.history] == [2, 3, 3, 3]
    assert len(called) >= 12
