from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from learndrop_ext import CacheConfig, DropScheduler, Fixed
from learndrop_ext.data.drift import PROBES
from small_training import Net, data

#: Of the framework, about the smallness of the test and about its own use of torch.
IGNORED = (
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    r"ignore:.*(does not have many workers|logging interval|no `val_dataloader`|in eval mode at the start):",
    "ignore:You're resuming from a checkpoint that ended before the epoch",
    r"ignore:Checkpoint directory .* exists and is not empty",
    r"ignore:.*callbacks used to create the checkpoint need to be provided",
)
pytestmark = [pytest.mark.filterwarnings(text) for text in IGNORED]


@pytest.fixture(scope="module")
def pl(request: pytest.FixtureRequest) -> Any:
    """Lightning, which imports torchvision where it is installed."""
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed")
    if importlib.util.find_spec("torchvision") is not None:
        request.getfixturevalue("torchvision_stub")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning.pytorch
    return lightning.pytorch


class ByEpoch:
    """An order that is a function of the epoch, which the Trainer sets."""

    def __init__(self, size: int = 24) -> None:
        self.size = size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Counted(Dataset[Any]):
    """The small data, with the ids that were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return data()[index]


def loader(dataset: Dataset[Any] | None = None, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset or data(), **{"batch_size": 8, "sampler": ByEpoch(), **options})


def classifier(pl: Any) -> Any:
    """A LightningModule that keeps what it saw: losses, shapes of the training inputs, weights at each epoch's end."""

    class Classifier(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = Net()
            self.losses: list[float] = []
            self.val_shapes: list[list[int]] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x), y)
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.val_shapes.append(list(x.shape))
            self.log("val_loss", nn.functional.cross_entropy(self.net(x), y), on_epoch=True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    return Classifier()


def trainer(pl: Any, *callbacks: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(**{**quiet, "enable_checkpointing": False, "max_epochs": 4, **options}, callbacks=list(callbacks))


def callback(**options: Any) -> Any:
    from learndrop_ext.lightning import LearnDropCallback

    return LearnDropCallback("net", **{"policy": Fixed({1: 2, 2: 3}), "cache": "fp32", **options})


def by_hand(
    epochs: int, *, limit: int | None = None, accumulate: int = 1, bf16: bool = False
) -> tuple[list[float], Net]:
    """The same training in a loop of one's own."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches = loader()
    drop = DropScheduler(model, optimizer, batches, policy=Fixed({1: 2, 2: 3}), cache="fp32")
    losses = []
    for epoch in range(epochs):
        batches.sampler.set_epoch(epoch)
        total = limit or len(batches)
        for i, (x, y) in enumerate(drop.loader):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = nn.functional.cross_entropy(drop.model(x), y)
            losses.append(loss.item())
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0 or i + 1 == total:
                optimizer.step()
                optimizer.zero_grad()
            if i + 1 == total:
                break
        drop.step()
    return losses, model


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    wanted = other.state_dict()
    assert one.state_dict().keys() == wanted.keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, wanted[name]), name


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
    assert learn_drop.drop.rows.cache is None
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
    cache = CacheConfig(codec="fp32", disk_dir=str(tmp_path), disk_bytes=1 << 20)
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
    # In the epoch that was left the rows were found: only a few are read again.
    assert len(images.read) <= PROBES
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
    assert learn_drop.drop.rows.autocast == torch.bfloat16


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
    assert learn_drop.drop.epochs == 3
    learn_drop = callback(epochs=7)
    trainer(pl, learn_drop, max_epochs=1).fit(classifier(pl), loader())
    assert learn_drop.drop.epochs == 7


def test_a_step_that_leaves_the_network_alone_is_refused(pl: Any) -> None:
    module = classifier(pl)
    module.training_step = lambda batch, batch_idx: module.net.fc(batch[0].mean((1, 2))).sum()
    with pytest.raises(
        RuntimeError, match=r"wanted drop.model to be trained on drop.loader's batches, got no call of it"
    ):
        trainer(pl, callback()).fit(module, loader())
    assert "forward" not in module.net.__dict__


def test_options_and_attribute_are_checked(pl: Any) -> None:
    from learndrop_ext.lightning import LearnDropCallback

    with pytest.raises(TypeError, match=r"options must be among policy, epochs, .*, got codec"):
        LearnDropCallback("net", codec="fp16")
    with pytest.raises(ValueError, match=r"attribute must name a submodule of the LightningModule, got ''"):
        LearnDropCallback("")
    with pytest.raises(ValueError, match=r"a submodule of Classifier, which has net; got 'backbone'"):
        trainer(pl, LearnDropCallback("backbone")).fit(classifier(pl), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16-true"}, r"a precision among 32-true, bf16-mixed, 16-mixed, got bf16-true"),
        ({"overfit_batches": 1}, r"must have overfit_batches=0, got 1"),
        ({"reload_dataloaders_every_n_epochs": 2}, r"got reload_dataloaders_every_n_epochs=2"),
    ],
)
def test_trainers_that_cannot_be_followed_are_refused(pl: Any, options: dict[str, Any], message: str) -> None:
    module = classifier(pl)
    with pytest.raises(ValueError, match=message):
        trainer(pl, callback(), **options).fit(module, loader())
    assert "forward" not in module.net.__dict__


def test_several_processes_and_wrapped_modules_are_refused(pl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = classifier(pl)
    run = trainer(pl, callback())
    monkeypatch.setattr(run.strategy, "world_size", 2)
    with pytest.raises(ValueError, match=r"the Trainer must run one process, got 2"):
        run.fit(module, loader())

    class Wrapping(pl.strategies.SingleDeviceStrategy):  # type: ignore[misc]
        def _setup_model(self, model: nn.Module) -> nn.Module:
            return nn.Sequential(model)

    with pytest.raises(ValueError, match=r"one that is compiled or wrapped by Wrapping; .* wrap=torch.compile"):
        trainer(pl, callback(), accelerator="auto", strategy=Wrapping("cpu")).fit(module, loader())


def test_modules_and_loaders_that_cannot_be_followed_are_refused(pl: Any) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(data())

    class Endless(ByEpoch):
        __len__ = None  # type: ignore[assignment]

    def refused(kind: type[Exception], message: str, module: Any, batches: Any) -> None:
        with pytest.raises(kind, match=message):
            trainer(pl, callback()).fit(module, batches)

    refused(TypeError, r"must have one training DataLoader, got list", classifier(pl), [loader(), loader()])
    refused(TypeError, r"must have a length, got a sampler without one", classifier(pl), loader(sampler=Endless()))
    refused(TypeError, r"over a dataset with ids", classifier(pl), DataLoader(Stream(), 8))
    hooked = classifier(pl)
    hooked.net.register_forward_hook(lambda *_: None)
    refused(ValueError, r"net must have no forward hooks, .* got 1", hooked, loader())
    patched = classifier(pl)
    patched.net.forward = patched.net.forward
    refused(ValueError, r"net must have its class's forward", patched, loader())
    two = classifier(pl)
    two.automatic_optimization = False
    two.configure_optimizers = lambda: [torch.optim.SGD(two.parameters(), lr=0.1) for _ in range(2)]
    refused(ValueError, r"must have one optimizer, got 2", two, loader())


def test_without_lightning_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] in ("lightning", "pytorch_lightning") or name == "learndrop_ext.lightning":
            monkeypatch.delitem(sys.modules, name)
    for name in ("lightning", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=r"Lightning 2.x must be installed, .* pip install 'learndrop_ext\[lightning\]'"
    ):
        importlib.import_module("learndrop_ext.lightning")
