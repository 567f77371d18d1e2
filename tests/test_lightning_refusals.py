"""What the callback refuses."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_lightning import IGNORED, callback, classifier, loader, trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from small_training import data

pytestmark = [pytest.mark.filterwarnings(text) for text in IGNORED]


def test_a_step_that_leaves_the_network_alone_is_refused(pl: Any) -> None:
    module = classifier(pl)
    module.training_step = lambda batch, batch_idx: module.net.fc.weight.sum()
    with pytest.raises(
        RuntimeError, match=r"wanted the model to be trained on drop.loader's batches, got no call of it"
    ):
        trainer(pl, callback()).fit(module, loader())
    assert all("forward" not in vars(child) for child in module.modules())


def test_options_and_attribute_are_checked(pl: Any) -> None:
    from learndrop_ext.lightning import LearnDropCallback

    with pytest.raises(TypeError, match=r"unexpected keyword argument 'codec'"):
        trainer(pl, LearnDropCallback("net", codec="fp16")).fit(classifier(pl), loader())
    with pytest.raises(AttributeError, match=r"has no attribute `backbone`"):
        trainer(pl, LearnDropCallback("backbone")).fit(classifier(pl), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overfit_batches": 1}, r"must have overfit_batches=0, got 1"),
        ({"reload_dataloaders_every_n_epochs": 2}, r"must have reload_dataloaders_every_n_epochs=0, got 2"),
    ],
)
def test_trainers_that_cannot_be_followed_are_refused(pl: Any, options: dict[str, Any], message: str) -> None:
    module = classifier(pl)
    with pytest.raises(ValueError, match=message):
        trainer(pl, callback(), **options).fit(module, loader())
    assert all("forward" not in vars(child) for child in module.modules())


def test_several_processes_and_wrapped_modules_are_refused(pl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = classifier(pl)
    run = trainer(pl, callback())
    monkeypatch.setattr(run.strategy, "world_size", 2)
    with pytest.raises(ValueError, match=r"the Trainer must run one process, got 2"):
        run.fit(module, loader())

    class Wrapping(pl.strategies.SingleDeviceStrategy):  # type: ignore[misc]
        def _setup_model(self, model: nn.Module) -> nn.Module:
            return nn.Sequential(model)

    with pytest.raises(ValueError, match=r"must run the plain LightningModule, got Sequential"):
        trainer(pl, callback(), accelerator="auto", strategy=Wrapping("cpu")).fit(module, loader())


def test_modules_and_loaders_that_cannot_be_followed_are_refused(pl: Any) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(data())

    def refused(kind: type[Exception], message: str, module: Any, batches: Any) -> None:
        with pytest.raises(kind, match=message):
            trainer(pl, callback()).fit(module, batches)

    refused(TypeError, r"loader must be a torch DataLoader, got list", classifier(pl), [loader(), loader()])
    refused(TypeError, r"over a dataset with ids", classifier(pl), DataLoader(Stream(), 8))
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
