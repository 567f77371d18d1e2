"""Learn & Drop in a Lightning Trainer. Wants Lightning 2.x: `pip install 'learndrop_ext[lightning]'`."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from learndrop_ext.data.loader import DropLoader
from learndrop_ext.scheduler import DropScheduler

__all__ = ["LearnDropCallback"]

#: Precisions in which the network's weights and the images are fp32, as the rows want them.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
#: Arguments of DropScheduler that the callback takes from the Trainer.
FROM_TRAINER = ("self", "model", "optimizer", "loader")


def _lightning() -> Any:
    """Return the package that the Trainer comes from: `lightning.pytorch`, or `pytorch_lightning` where that is the
    one in use."""
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
    """Drops the layers of a LightningModule's network that have stopped learning.

    The LightningModule keeps its network in an attribute and calls it in `training_step`:

        class Classifier(LightningModule):
            def training_step(self, batch, batch_idx):
                x, y = batch
                return cross_entropy(self.net(x), y)

        callback = LearnDropCallback("net")
        Trainer(max_epochs=30, callbacks=[callback]).fit(Classifier(), train_loader, val_loader)

    While a training batch is run, `self.net(x)` trains what `DropScheduler.model` trains; at all other times (validation,
    checkpoints, after the fit) it is the whole network. Batches come from `DropScheduler.loader`, and the scheduler's
    `step()` is called after the last batch of each epoch, before the validation. The Trainer's checkpoints hold the
    scheduler's state, and `fit(ckpt_path=...)` goes on from it.

    `drop` is the DropScheduler of the last fit, with its `history`; None before. It is closed at the end of a fit.

    Args:
        attribute: name of the submodule that is split, "net" or "backbone.body".
        options: arguments of DropScheduler by name, except model, optimizer and loader. `epochs` is the Trainer's
            max_epochs by default.

    Raises:
        TypeError: an option that DropScheduler does not have.
        ValueError: attribute is no name. At the start of a fit, before anything is changed: a Trainer with several
            processes, a wrapped or compiled LightningModule, several optimizers or training loaders, a precision other
            than 32-true, bf16-mixed or 16-mixed, overfit_batches or reload_dataloaders_every_n_epochs; and what
            DropScheduler raises.
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
        self._source: Any = None  # the Trainer's own source of batches
        self._state: dict[str, Any] = {}  # of the last fit
        self._resumed: dict[str, Any] = {}  # of the checkpoint that the coming fit goes on from
        self._paused: float | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget the checkpoint of an earlier run; the Trainer loads that of this one next."""
        self._resumed = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the scheduler and put its loader in the place of the training loader."""
        _check_trainer(trainer, pl_module)
        net = _submodule(pl_module, self.attribute)
        _check_hooks(net, self.attribute)
        options = dict(self.options)
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and trainer.max_steps < 0:
            options.setdefault("epochs", trainer.max_epochs)
        source = trainer.fit_loop._data_source
        loader = _training_loader(source.dataloader())
        if int(os.environ.get("PL_SEED_WORKERS", "0")) and loader.worker_init_fn is None:
            seed_worker = importlib.import_module("lightning_fabric" if _is_old_name() else "lightning.fabric")
            seed = importlib.import_module(f"{seed_worker.__name__}.utilities.seed")
            loader.worker_init_fn = functools.partial(seed.pl_worker_init_function, rank=trainer.global_rank)
        drop = DropScheduler(net, trainer.optimizers[0], loader, **options)
        if self._resumed:
            drop.load_state_dict(self._resumed)
        self.drop, self._net, self._resumed = drop, net, {}
        self._source, self._batches = source, _Batches(drop.loader)
        trainer.fit_loop._data_source = type(source)(self._batches, source.name)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Let the network's name stand for what is trained now."""
        if self.drop is None or self._net is None:
            return
        _check_hooks(self._net, self.attribute)
        if self.drop.model.training != self._net.training:
            self.drop.model.train(self._net.training)
            if self.drop.rows.frozen is not None:
                self.drop.rows.frozen.hold_eval()
        _show_live(self._net, self.drop)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Give the whole network its name back; after the last batch of an epoch, measure and decide."""
        self._show_whole()
        if trainer.is_last_batch:
            self._step()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure and decide where the epoch was broken off."""
        self._show_whole()
        self._step()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Stop the clock of the epoch."""
        self._show_whole()
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Let the clock of the epoch go on."""
        if self._paused is not None and self._batches is not None and self._batches.running:
            self._batches.loader.exclude(time.perf_counter() - self._paused)
        self._paused = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the network back as it was found and free the rows."""
        self._end(trainer, None)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Do the same where nothing was left to train."""
        self._end(trainer, None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the network back; files of rows stay for the run that goes on from a checkpoint."""
        self._end(trainer, exception)

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state, for the Trainer's checkpoint; after a fit, as it was at its end."""
        if self.drop is None or self.drop.loader.closed:
            return self._state
        return self.drop.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of the checkpoint that the coming fit goes on from."""
        self._resumed = state_dict

    def _step(self) -> None:
        if self._batches is None or self.drop is None:
            return
        self._batches.end()
        # The Trainer also ends epochs that it goes on from, after their last batch.
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
    """A DropLoader as a Trainer iterates it, which leaves an epoch after its last batch without asking for one more."""

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
        """Whether an epoch has begun and not ended."""
        return self._iterator is not None

    def end(self) -> None:
        """End the epoch."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None


def _show_live(net: nn.Module, drop: DropScheduler) -> None:
    """Have calls of the network train the live model. Checkpoints and named modules stay those of the network."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        # The live model may be the network itself.
        del net.forward
        try:
            return drop.model(*args, **kwargs)
        finally:
            net.forward = forward

    net.forward = forward


def _is_old_name() -> bool:
    return bool(_Callback.__module__.startswith("pytorch_lightning"))


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
            f"LearnDropCallback: {attribute} must have its class's forward, got an instance with one of its own"
        )
    return net


def _training_loader(loader: Any) -> DataLoader[Any]:
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"LearnDropCallback: the Trainer must have one training DataLoader, got {type(loader).__name__}"
        )
    try:
        # Streams are refused by the scheduler, which says why.
        isinstance(loader.dataset, IterableDataset) or len(loader)
    except TypeError:
        raise TypeError(
            "LearnDropCallback: the training DataLoader must have a length, got a sampler without one: the Trainer would "
            "read a batch ahead"
        ) from None
    return loader


def _check_hooks(net: nn.Module, attribute: str) -> None:
    if net._forward_hooks or net._forward_pre_hooks:
        raise ValueError(
            f"LearnDropCallback: {attribute} must have no forward hooks, which would see cached rows after a drop, got "
            f"{len(net._forward_hooks) + len(net._forward_pre_hooks)}; put them on its submodules or on the LightningModule"
        )


def _check_trainer(trainer: Any, pl_module: Any) -> None:
    """Raise ValueError for a Trainer that the scheduler cannot follow."""
    refused = "LearnDropCallback: the Trainer must"
    if trainer.world_size > 1:
        raise ValueError(
            f"{refused} run one process, got {trainer.world_size}: it wraps the LightningModule once, and a layer dropped "
            "after that leaves DistributedDataParallel waiting; use DropScheduler(wrap=DistributedDataParallel) in a loop "
            "of your own"
        )
    if trainer.model is not pl_module or getattr(pl_module, "_compiler_ctx", None) is not None:
        raise ValueError(
            f"{refused} run the LightningModule as it is, got one that is compiled or wrapped by "
            f"{type(trainer.strategy).__name__}; to compile what is trained, give wrap=torch.compile"
        )
    if len(trainer.optimizers) != 1:
        raise ValueError(f"{refused} have one optimizer, got {len(trainer.optimizers)}")
    if trainer.precision not in PRECISIONS:
        raise ValueError(f"{refused} have a precision among {', '.join(PRECISIONS)}, got {trainer.precision}")
    if trainer.overfit_batches:
        raise ValueError(
            f"{refused} have overfit_batches=0, got {trainer.overfit_batches}: it puts another sampler into the loader; "
            "give a loader over a Subset"
        )
    if trainer.reload_dataloaders_every_n_epochs:
        raise ValueError(
            f"{refused} keep one training loader, got "
            f"reload_dataloaders_every_n_epochs={trainer.reload_dataloaders_every_n_epochs}"
        )
