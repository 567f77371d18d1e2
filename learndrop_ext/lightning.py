"""Learn & Drop in a Lightning Trainer. Requires Lightning 2.x: `pip install 'learndrop_ext[lightning]'`."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from learndrop_ext.data.loader import DropLoader
from learndrop_ext.scheduler import DropScheduler

__all__ = ["LearnDropCallback"]

#: Precisions that keep weights and images in fp32, which rows require, and the autocast dtype of their training steps.
PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
#: Arguments of DropScheduler that come from the Trainer.
FROM_TRAINER = ("self", "model", "optimizer", "loader")


def _lightning() -> Any:
    """Return the package of the Trainer: `lightning.pytorch`, or `pytorch_lightning` if only that one is imported."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    if names[1] in sys.modules and names[0] not in sys.modules:
        names.reverse()
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
    raise ImportError(
        "learndrop_ext.lightning: Lightning 2.x must be installed, got neither lightning nor pytorch_lightning; "
        "pip install 'learndrop_ext[lightning]'"
    )


_Callback: Any = _lightning().Callback


class LearnDropCallback(_Callback):  # type: ignore[misc]
    """Drops layers of a LightningModule's network that have stopped learning.

    The LightningModule has its network in an attribute and calls it in `training_step`:

        class Classifier(LightningModule):
            def training_step(self, batch, batch_idx):
                x, y = batch
                return cross_entropy(self.net(x), y)

        callback = LearnDropCallback("net")
        Trainer(max_epochs=30, callbacks=[callback]).fit(Classifier(), train_loader, val_loader)

    In a training batch, `self.net(x)` calls `DropScheduler.model`; otherwise (in validation, in checkpoints, after the fit)
    it is the whole network. Batches come from `DropScheduler.loader`. `DropScheduler.step()` is called after the last batch
    of each epoch, before validation. The Trainer's checkpoints hold the state of the scheduler, and `fit(ckpt_path=...)`
    resumes from it.

    `drop` is the DropScheduler of the last fit, with its `history`, or None before the first fit. It is closed at the end
    of the fit.

    Args:
        attribute (str, optional): name of the submodule to split, such as "backbone.body". Default: "net"
        options: keyword arguments of DropScheduler, except model, optimizer and loader. `epochs` defaults to the Trainer's
            max_epochs.

    Raises:
        TypeError: If DropScheduler has no such option.
        ValueError: If `attribute` is not a name. At the start of a fit, before anything is changed: if the Trainer has
            several processes, optimizers or training loaders, a wrapped or compiled LightningModule, a precision other
            than 32-true, bf16-mixed or 16-mixed, overfit_batches or reload_dataloaders_every_n_epochs; and as
            DropScheduler.
    """

    def __init__(self, attribute: str = "net", **options: Any) -> None:
        super().__init__()
        if not isinstance(attribute, str) or not attribute:
            raise ValueError(
                f"LearnDropCallback: attribute must name a submodule of the LightningModule, got {attribute!r}"
            )
        known = [name for name in inspect.signature(DropScheduler.__init__).parameters if name not in FROM_TRAINER]
        for name in options:
            if name not in known:
                raise TypeError(f"LearnDropCallback: options must be among {', '.join(known)}, got {name}")
        self.attribute = attribute
        self.options = options
        self.drop: DropScheduler | None = None
        self._net: nn.Module | None = None
        self._batches: _Batches | None = None
        self._source: Any = None  # the Trainer's own data source
        self._state: dict[str, Any] = {}  # the scheduler's state at the end of the last fit
        self._resumed: dict[str, Any] = {}  # the state in the checkpoint that the next fit resumes from
        self._paused: float | None = None  # time.perf_counter() at the start of a validation

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Discard the checkpoint of an earlier run. The Trainer loads that of this run after `setup`."""
        self._resumed = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Construct the scheduler and replace the training loader by `DropScheduler.loader`."""
        _check_trainer(trainer, pl_module)
        net = _submodule(pl_module, self.attribute)
        _check_hooks(net, self.attribute)
        options = dict(self.options)
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and trainer.max_steps < 0:
            options.setdefault("epochs", trainer.max_epochs)
        options.setdefault("autocast", PRECISIONS.get(trainer.precision))
        source = trainer.fit_loop._data_source
        loader = _training_loader(source.dataloader())
        if int(os.environ.get("PL_SEED_WORKERS", "0")) and loader.worker_init_fn is None:
            fabric = "lightning_fabric" if _Callback.__module__.startswith("pytorch_lightning") else "lightning.fabric"
            seed = importlib.import_module(f"{fabric}.utilities.seed")
            loader.worker_init_fn = functools.partial(seed.pl_worker_init_function, rank=trainer.global_rank)
        drop = DropScheduler(net, trainer.optimizers[0], loader, **options)
        if self._resumed:
            drop.load_state_dict(self._resumed)
        self.drop, self._net, self._resumed = drop, net, {}
        self._source, self._batches = source, _Batches(drop.loader)
        trainer.fit_loop._data_source = type(source)(self._batches, source.name)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Make the network call the live model."""
        if self.drop is None or self._net is None:
            return
        _check_hooks(self._net, self.attribute)
        if self.drop.model.training != self._net.training:
            self.drop.model.train(self._net.training)
            if self.drop.rows.frozen is not None:
                self.drop.rows.frozen.hold_eval()
        _call_live(self._net, self.drop)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Restore the network's forward. After the last batch of an epoch, call `DropScheduler.step()`."""
        self._show_whole()
        if trainer.is_last_batch:
            self._step()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Call `DropScheduler.step()` if the epoch stopped before its last batch."""
        self._show_whole()
        self._step()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Pause the timing of the epoch."""
        self._show_whole()
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Resume the timing of the epoch."""
        if self._paused is not None and self._batches is not None and self._batches.running:
            self._batches.loader.exclude(time.perf_counter() - self._paused)
        self._paused = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore the network and free the rows."""
        self._end(trainer, None)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Do the same if no epoch was left to train."""
        self._end(trainer, None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the network. Files of rows stay for a run that resumes from a checkpoint."""
        self._end(trainer, exception)

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state for the Trainer's checkpoint; after a fit, the state at its end."""
        if self.drop is None or self.drop.loader.closed:
            return self._state
        return self.drop.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state in a checkpoint for the next fit, which resumes from it."""
        self._resumed = state_dict

    def _step(self) -> None:
        if self._batches is None or self.drop is None:
            return
        self._batches.end()
        # A Trainer that resumes from a finished epoch ends that epoch again, without a batch.
        if self.drop.loader.ledger[0]:
            self.drop.step()

    def _show_whole(self) -> None:
        if self._net is not None:
            self._net.__dict__.pop("forward", None)

    def _end(self, trainer: Any, error: BaseException | None) -> None:
        self._show_whole()
        if self.drop is None or self.drop.loader.closed:
            return
        assert self._batches is not None
        self._batches.end()
        self._state = self.drop.state_dict()
        self.drop.__exit__(None if error is None else type(error), error, None)
        trainer.fit_loop._data_source = self._source
        self._net = self._batches = self._source = None


class _Batches:
    """A DropLoader for the Trainer, which stops after the last batch of an epoch without exhausting the iterator."""

    def __init__(self, loader: DropLoader) -> None:
        self.loader = loader
        self.dataset = loader.user.dataset
        self.sampler = loader.user.sampler  # for the Trainer's set_epoch
        self.batch_sampler = loader.user.batch_sampler
        self._iterator: Any = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.end()
        self._iterator = iter(self.loader)
        return self._iterator  # type: ignore[no-any-return]

    @property
    def running(self) -> bool:
        """Whether an epoch is in progress."""
        return self._iterator is not None

    def end(self) -> None:
        """End the epoch."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None


def _call_live(net: nn.Module, drop: DropScheduler) -> None:
    """Replace the network's forward by a call of the live model. Its state_dict and submodules stay the same."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        # The live model may be the network itself, which must then run its class's forward.
        del net.forward
        try:
            return drop.model(*args, **kwargs)
        finally:
            net.forward = forward

    net.forward = forward


def _submodule(pl_module: nn.Module, attribute: str) -> nn.Module:
    try:
        net = pl_module.get_submodule(attribute)
    except AttributeError:
        names = ", ".join(name for name, _ in pl_module.named_children()) or "none"
        raise ValueError(
            f"LearnDropCallback: attribute must name a submodule of {type(pl_module).__name__}, which has {names}; "
            f"got {attribute!r}"
        ) from None
    if "forward" in net.__dict__:
        raise ValueError(
            f"LearnDropCallback: {attribute} must use the forward of its class, got one set on the instance"
        )
    return net


def _training_loader(loader: Any) -> DataLoader[Any]:
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"LearnDropCallback: the Trainer must have one training DataLoader, got {type(loader).__name__}"
        )
    try:
        # The scheduler refuses streams, with a reason.
        isinstance(loader.dataset, IterableDataset) or len(loader)
    except TypeError:
        raise TypeError(
            "LearnDropCallback: the training DataLoader must have a length, got a sampler without one: the Trainer would "
            "prefetch a batch"
        ) from None
    return loader


def _check_hooks(net: nn.Module, attribute: str) -> None:
    if net._forward_hooks or net._forward_pre_hooks:
        raise ValueError(
            f"LearnDropCallback: {attribute} must have no forward hooks, which would get cached rows after a drop, got "
            f"{len(net._forward_hooks) + len(net._forward_pre_hooks)}; put them on its submodules or on the LightningModule"
        )


def _check_trainer(trainer: Any, pl_module: Any) -> None:
    """Raise ValueError for a Trainer that the callback does not support."""
    refused = "LearnDropCallback: the Trainer must"
    if trainer.world_size > 1:
        raise ValueError(
            f"{refused} run one process, got {trainer.world_size}: it wraps the LightningModule once, and "
            "DistributedDataParallel would wait for the gradients of layers dropped later; write your own loop with "
            "DropScheduler(wrap=DistributedDataParallel)"
        )
    if trainer.model is not pl_module or getattr(pl_module, "_compiler_ctx", None) is not None:
        raise ValueError(
            f"{refused} run the plain LightningModule, got one compiled or wrapped by {type(trainer.strategy).__name__}; "
            "to compile the live model, give wrap=torch.compile"
        )
    if len(trainer.optimizers) != 1:
        raise ValueError(f"{refused} have one optimizer, got {len(trainer.optimizers)}")
    if trainer.precision not in PRECISIONS:
        raise ValueError(f"{refused} have a precision among {', '.join(PRECISIONS)}, got {trainer.precision}")
    if trainer.overfit_batches:
        raise ValueError(
            f"{refused} have overfit_batches=0, got {trainer.overfit_batches}: it replaces the sampler of the loader; "
            "give a loader over a Subset"
        )
    if trainer.reload_dataloaders_every_n_epochs:
        raise ValueError(
            f"{refused} keep one training loader, got "
            f"reload_dataloaders_every_n_epochs={trainer.reload_dataloaders_every_n_epochs}"
        )
