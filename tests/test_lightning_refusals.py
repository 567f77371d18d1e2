"""What the callback refuses."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_lightning import IGNORED, ByEpoch, callback, classifier, loader, trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from small_training import data

pytestmark = [pytest.mark.filterwarnings(text) for text in IGNORED]


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

    with pytest.raises(ValueError, match=r"one compiled or wrapped by Wrapping; .* wrap=torch.compile"):
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
    refused(ValueError, r"net must use the forward of its class", patched, loader())
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
