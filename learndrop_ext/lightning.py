"""Learn & Drop in a Lightning Trainer. Requires Lightning 2.x: `pip install 'learndrop_ext[lightning]'`."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from learndrop_ext.data.loader import FORWARDED
from learndrop_ext.scheduler import DropScheduler

__all__ = ["LearnDropCallback"]


def _lightning() -> Any:
    """Return the package of the Trainer: `lightning.pytorch`, or `pytorch_lightning` if only that one is imported."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    if names[1] in sys.modules and names[0] not in sys.modules:
        names.reverse()
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise ImportError(
        "learndrop_ext.lightning: Lightning 2.x must be installed, got neither lightning nor pytorch_lightning; "
        "pip install 'learndrop_ext[lightning]'"
    )


_Callback: Any = _lightning().Callback


class _Loader:
    """The Trainer's loader: the user's and, once there is a scheduler, `drop.loader`."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._user: Any = None
        self._drop: DropScheduler | None = None
        self._epoch: Any = None

    def __getattr__(self, name: str) -> Any:
        if name not in FORWARDED:
            raise AttributeError(name)
        return getattr(self.user, name)

    def __len__(self) -> int:
        return len(self.user if self._drop is None else self._drop.loader)

    def __iter__(self) -> Iterator[Any]:
        self.end()
        epoch = self._batches()
        self._epoch = epoch
        return epoch

    def _batches(self) -> Iterator[Any]:
        # Runs from the first batch on: an iterator may have been asked for before there was a scheduler.
        yield from self.user if self._drop is None else self._drop.loader

    @property
    def user(self) -> Any:
        """The user's loader, asked for once."""
        if self._user is None:
            self._user = self._source.dataloader()
        return self._user

    def use(self, drop: DropScheduler | None) -> None:
        """Give the batches of a scheduler from now on."""
        self._drop = drop

    def end(self) -> None:
        """End the epoch: the Trainer stops after the last batch, without exhausting the iterator."""
        if self._epoch is not None:
            self._epoch.close()
        self._epoch = None


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
        self._loader: Any = None
        self._state: dict[str, Any] = {}  # of the last fit, at its end
        self._resumed: dict[str, Any] = {}  # in the checkpoint that the next fit resumes from
        self._paused = 0.0  # time.perf_counter() at the start of a validation

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put a loader in place before the Trainer, or `estimated_stepping_batches`, first asks for one."""
        self._resumed = {}
        if stage == "fit":
            source = trainer.fit_loop._data_source
            self._loader = _Loader(source)
            trainer.fit_loop._data_source = type(source)(self._loader, source.name)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Construct the scheduler."""
        _check(trainer, pl_module)
        options = dict(self.options)
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and trainer.max_steps < 0:
            options.setdefault("epochs", trainer.max_epochs)
        key = options.get("input", 0)

        def call(model: Any, batch: Any) -> Any:
            precision = trainer.precision_plugin
            with precision.forward_context():
                return model(precision.convert_input(batch if hasattr(batch, "dtype") else batch[key]))

        options.setdefault("call", call)
        net = pl_module.get_submodule(self.attribute)
        self.drop = DropScheduler(net, trainer.optimizers[0], self._loader.user, **options)
        if self._resumed:
            self.drop.load_state_dict(self._resumed)
        self._loader.use(self.drop)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the last batch of an epoch, call `DropScheduler.step()`."""
        if trainer.is_last_batch:
            self._step()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Do so if the epoch stopped before its last batch."""
        self._step()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Pause the timing of the epoch."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Resume the timing of the epoch."""
        if self.drop is not None and not self.drop.loader.closed and self._loader._epoch is not None:
            self.drop.loader.exclude(time.perf_counter() - self._paused)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore the network and free the rows."""
        self._end(trainer, None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Do so; files of rows stay for a run that resumes from a checkpoint."""
        self._end(trainer, exception)

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state for the Trainer's checkpoint; after a fit, the state at its end."""
        return self._state if self.drop is None or self.drop.loader.closed else self.drop.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state in a checkpoint for the fit, which resumes from it."""
        self._resumed = state_dict

    def _step(self) -> None:
        self._loader.end()
        # A Trainer that resumes from a finished epoch ends that epoch again, without a batch.
        if self.drop is not None and self.drop.loader.counts[0]:
            self.drop.step()

    def _end(self, trainer: Any, error: BaseException | None) -> None:
        if self._loader is None:
            return
        self._loader.end()
        if self.drop is not None and not self.drop.loader.closed:
            self._state = self.drop.state_dict()
            self.drop.__exit__(None if error is None else type(error), error, None)
        self._loader.use(None)
        trainer.fit_loop._data_source, self._loader = self._loader._source, None


def _check(trainer: Any, pl_module: Any) -> None:
    """Raise ValueError for a Trainer that cannot be followed."""
    source = getattr(trainer.fit_loop._data_source, "instance", None)
    for wanted, got, holds in (
        ("run one process", trainer.world_size, trainer.world_size == 1),
        ("run the plain LightningModule", type(trainer.model).__name__, trainer.model is pl_module),
        ("have one optimizer", len(trainer.optimizers), len(trainer.optimizers) == 1),
        ("have overfit_batches=0", trainer.overfit_batches, not trainer.overfit_batches),
        ("keep one training loader", "another one", isinstance(source, _Loader)),
        (
            "have reload_dataloaders_every_n_epochs=0",
            trainer.reload_dataloaders_every_n_epochs,
            not trainer.reload_dataloaders_every_n_epochs,
        ),
    ):
        if not holds:
            raise ValueError(f"LearnDropCallback: the Trainer must {wanted}, got {got}")
