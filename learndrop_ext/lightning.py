"""Learn & Drop in a Lightning Trainer. Requires Lightning 2.x: `pip install 'learndrop_ext[lightning]'`."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from learndrop_ext.data.extras import input_keys, input_of, one_key
from learndrop_ext.data.loader import FORWARDED
from learndrop_ext.rows.config import cache_config
from learndrop_ext.scheduler import DropScheduler

__all__ = ["LearnDropCallback"]

#: The package of the Trainer: the one that is imported already.
_NAMES = sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules)
_Callback: Any = None
for _name in _NAMES:
    with contextlib.suppress(ModuleNotFoundError):
        _Callback = _Callback or importlib.import_module(_name).Callback
if _Callback is None:
    raise ImportError(
        "learndrop_ext.lightning: Lightning 2.x must be installed, got neither lightning nor pytorch_lightning; "
        "pip install 'learndrop_ext[lightning]'"
    )


class _Loader:
    """The Trainer's loader, put in its place: the user's and, once there is a scheduler, `drop.loader`."""

    def __init__(self, fit_loop: Any) -> None:
        self._fit_loop, self._source = fit_loop, fit_loop._data_source
        self.drop: DropScheduler | None = None
        fit_loop._data_source = type(self._source)(self, self._source.name)

    @cached_property
    def user(self) -> Any:
        """The user's loader, asked for once."""
        return self._source.dataloader()

    def put_back(self) -> None:
        """Give the Trainer what it had."""
        self._fit_loop._data_source = self._source

    def __getattr__(self, name: str) -> Any:
        if name not in FORWARDED:
            raise AttributeError(name)
        return getattr(self.user, name)

    def __len__(self) -> int:
        return len(self.user if self.drop is None else self.drop.loader)

    def __iter__(self) -> Iterator[Any]:
        # Runs from the first batch on: it may be asked for before there is a scheduler.
        yield from self.user if self.drop is None else self.drop.loader


def _check(trainer: Any, pl_module: Any, loader: _Loader) -> None:
    """Raise ValueError for a fit that cannot be followed."""
    reload = trainer.reload_dataloaders_every_n_epochs
    in_place = getattr(trainer.fit_loop._data_source, "instance", None)
    for wanted, got, holds in (
        ("run one process", trainer.world_size, trainer.world_size == 1),
        ("run the plain LightningModule", type(trainer.model).__name__, trainer.model is pl_module),
        ("have one optimizer", len(trainer.optimizers), len(trainer.optimizers) == 1),
        ("have overfit_batches=0", trainer.overfit_batches, not trainer.overfit_batches),
        ("keep one training loader", "another one", in_place is loader),
        ("have reload_dataloaders_every_n_epochs=0", reload, not reload),
    ):
        if not holds:
            raise ValueError(f"LearnDropCallback: the Trainer must {wanted}, got {got}")


def _call_under(precision: Any, options: dict[str, Any]) -> Any:
    """Call the network on a batch's images as Lightning calls `training_step`, under its precision."""
    key = one_key(input_keys(options.get("input", 0), cache_config(options.get("cache", "fp16"))))

    def call(model: Any, batch: Any) -> Any:
        with precision.forward_context():
            return model(precision.convert_input(input_of(batch, key)))

    return call


class LearnDropCallback(_Callback):  # type: ignore[misc]
    """Drops layers of a LightningModule's network that have stopped learning.

    The LightningModule has its network in an attribute and calls it in `training_step`. Nothing of it changes:

        Trainer(max_epochs=30, callbacks=[LearnDropCallback("net")]).fit(Classifier(), train_loader, val_loader)

    Batches come from `DropScheduler.loader`; `DropScheduler.step()` is called after the last batch of each epoch, before
    validation. Checkpoints hold the scheduler's state, and `fit(ckpt_path=...)` resumes from it. `drop` is the
    DropScheduler of the last fit, closed at its end; None before.

    Args:
        attribute (str, optional): name of the submodule whose layers are dropped, such as "backbone.body". Default: "net"
        options: keyword arguments of DropScheduler. `epochs` defaults to the Trainer's max_epochs, and `call` to one of the
            network on the images under the Trainer's precision.

    Raises:
        ValueError: at the start of a fit, before anything is changed: several processes, optimizers or training loaders, a
            wrapped LightningModule, overfit_batches, reload_dataloaders_every_n_epochs; and as DropScheduler.
    """

    def __init__(self, attribute: str = "net", **options: Any) -> None:
        super().__init__()
        self.attribute, self.options = attribute, options
        self.drop: DropScheduler | None = None
        self._loader: Any = None  # while there is a fit
        self._state: dict[str, Any] = {}  # of the last fit, at its end
        self._resumed: dict[str, Any] = {}  # in the checkpoint that the next fit resumes from
        self._paused = 0.0  # time.perf_counter() at the start of a validation

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put a loader in place before the Trainer, or `estimated_stepping_batches`, first asks for one."""
        self._resumed = {}
        if stage == "fit":
            self._loader = _Loader(trainer.fit_loop)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Construct the scheduler."""
        _check(trainer, pl_module, self._loader)
        options = dict(self.options)
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and trainer.max_steps < 0:
            options.setdefault("epochs", trainer.max_epochs)
        options.setdefault("call", _call_under(trainer.precision_plugin, options))
        net = pl_module.get_submodule(self.attribute)
        self.drop = self._loader.drop = DropScheduler(net, trainer.optimizers[0], self._loader.user, **options)
        if self._resumed:
            self.drop.load_state_dict(self._resumed)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the last batch of an epoch, call `DropScheduler.step()`."""
        if trainer.is_last_batch:
            self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Do so if the epoch stopped before its last batch."""
        if self.drop is not None:
            self.drop.loader.end()
            # A Trainer that resumes from a finished epoch ends that epoch again, without a batch.
            if self.drop.loader.counts[0]:
                self.drop.step()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Pause the timing of the epoch."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Resume the timing of the epoch."""
        if self.drop is not None:
            self.drop.loader.exclude(time.perf_counter() - self._paused)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore the network and free the rows."""
        self._end(None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Do so; rows in a store stay for a run that resumes from a checkpoint."""
        self._end(type(exception))

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state for the Trainer's checkpoint; after a fit, the state at its end."""
        return self._state if self._loader is None or self._loader.drop is None else self._loader.drop.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state in a checkpoint for the fit, which resumes from it."""
        self._resumed = state_dict

    def _end(self, error: type[BaseException] | None) -> None:
        loader, self._loader = self._loader, None
        if loader is None:
            return
        loader.put_back()
        if loader.drop is not None:
            loader.drop.loader.end()
            self._state = loader.drop.state_dict()
            loader.drop.__exit__(error)
            loader.drop = None
