"""Learn & Drop in a Hugging Face Trainer: `pip install 'learndrop_ext[huggingface]'`."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

from learndrop_ext.scheduler import DropScheduler

__all__ = ["LearnDropCallback", "LearnDropMixin"]

_Callback: Any = importlib.import_module("transformers").TrainerCallback
_utils: Any = importlib.import_module("transformers.trainer_utils")
_Mixed: Any = object

#: The scheduler's state, in the folder of a checkpoint.
STATE_FILE = "learndrop.pt"


class _Loader(IterableDataset[Any]):
    """The Trainer's loader, which gives the batches of `drop.loader`.

    It is a loader over a dataset of batches, itself: accelerate can skip those that came before a checkpoint.
    """

    batch_size, drop_last, prefetch_factor = None, False, None

    def __init__(self, prepared: Any) -> None:
        self._prepared = prepared
        self.user = getattr(prepared, "base_dataloader", prepared)  # without what accelerate wraps around it
        self.drop: Any = None

    def __len__(self) -> int:
        return len(self.user)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.drop.loader)

    @property
    def dataset(self) -> _Loader:
        """The batches."""
        return self

    def collate_fn(self, batch: Any) -> Any:
        """Return a batch as it is."""
        return batch

    def set_epoch(self, epoch: int) -> None:
        """Have the sampler draw the order of this epoch."""
        if hasattr(self._prepared, "set_epoch"):
            self._prepared.set_epoch(epoch)


class LearnDropCallback(_Callback):  # type: ignore[misc]
    """Drops layers of a Trainer's model that have stopped learning. The Trainer's class has `LearnDropMixin`:

        class MyTrainer(LearnDropMixin, Trainer): ...

        MyTrainer(model, args, train_dataset=train_set, callbacks=[LearnDropCallback()]).train()

    Batches come from `DropScheduler.loader`; `DropScheduler.step()` is called after the last batch of each epoch, before
    evaluation. Checkpoints hold the scheduler's state, and `train(resume_from_checkpoint=...)` resumes from it. `drop` is
    the DropScheduler of the last training, closed at its end; None before.

    Args:
        options: keyword arguments of DropScheduler. `epochs` defaults to the Trainer's, `input` to "pixel_values", and
            `call` to `model(**batch)`.

    Raises:
        ValueError: at the start of the training, before anything is changed: a Trainer without the mixin, several
            processes, a wrapped or compiled model; and as DropScheduler.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.drop: DropScheduler | None = None
        self._trainer: Any = None  # while it trains
        self._checkpoint: str | None = None  # that it resumes from
        self._loader: Any = None
        self._end = contextlib.ExitStack()

    @contextlib.contextmanager
    def training(self, trainer: Any, checkpoint: str | None) -> Iterator[None]:
        """Follow a Trainer inside. On leaving, restore the model and free the rows; after an error a store keeps its own."""
        self._trainer, self._checkpoint = trainer, checkpoint
        try:
            with self._end:
                yield
        finally:
            self._trainer = self._loader = None

    def loader_of(self, trainer: Any, prepared: Any) -> Any:
        """Return the loader to train on, for one that accelerate has prepared."""
        if self._trainer is not trainer:
            return prepared
        self._loader = _Loader(prepared)
        return self._loader

    def on_train_begin(self, args: Any, state: Any, control: Any, **at: Any) -> None:
        """Construct the scheduler."""
        trainer, loader = self._trainer, self._loader
        model = None if trainer is None else trainer.model_wrapped
        for wanted, got, holds in (
            ("take its loader from LearnDropMixin", "another one", loader is not None),
            ("run one process", args.world_size, args.world_size == 1),
            ("train the plain model", f"a {type(model).__name__} around it", model is at["model"]),
        ):
            if not holds:
                raise ValueError(f"LearnDropCallback: the Trainer must {wanted}, got {got}")
        self._end.close()  # of a try that was too large, with auto_find_batch_size
        options: dict[str, Any] = {"epochs": state.num_train_epochs, "input": "pixel_values", "call": _call}
        optimizer = getattr(at["optimizer"], "optimizer", at["optimizer"])
        drop = DropScheduler(at["model"], optimizer, loader.user, **{**options, **self.options})
        self.drop = loader.drop = self._end.enter_context(drop)
        if self._checkpoint is not None and (file := Path(self._checkpoint, STATE_FILE)).exists():
            drop.load_state_dict(torch.load(file))
            if not float(state.epoch).is_integer():  # the Trainer iterates over this epoch again
                drop.loader.resume(drop.loader.epochs - 1, drop.loader.batches.seen)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **at: Any) -> None:
        """Set the epoch of the order, which the Trainer does not where it skips batches."""
        self._loader.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **at: Any) -> None:
        """After the last batch of an epoch, call `DropScheduler.step()`: a checkpoint may follow."""
        if float(state.epoch).is_integer():
            self._step()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **at: Any) -> None:
        """Do so if the epoch stopped before its last batch."""
        self._step()

    def on_save(self, args: Any, state: Any, control: Any, **at: Any) -> None:
        """Save the scheduler's state."""
        folder = Path(args.output_dir, f"{_utils.PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if self.drop is not None and folder.is_dir():
            torch.save(self.drop.state_dict(), folder / STATE_FILE)

    def _step(self) -> None:
        if self.drop is not None:
            self.drop.loader.end()
            if self.drop.loader.counts[0]:
                self.drop.step()


class LearnDropMixin(_Mixed):  # type: ignore[misc]
    """For the class of a Trainer with a `LearnDropCallback`. Without one it changes nothing."""

    def _learn_drop(self) -> LearnDropCallback | None:
        return next((c for c in self.callback_handler.callbacks if isinstance(c, LearnDropCallback)), None)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, and end the scheduler after it."""
        checkpoint, callback = resume_from_checkpoint or None, self._learn_drop()
        if checkpoint is True:
            checkpoint = _utils.get_last_checkpoint(self.args.output_dir)
        with contextlib.nullcontext() if callback is None else callback.training(self, checkpoint):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Return the Trainer's loader; while it trains, one that gives the batches of `drop.loader`."""
        prepared, callback = super().get_train_dataloader(), self._learn_drop()
        return prepared if callback is None else callback.loader_of(self, prepared)

    def num_examples(self, dataloader: Any) -> int:
        """Return the number of samples of a loader."""
        return int(super().num_examples(dataloader.user if isinstance(dataloader, _Loader) else dataloader))

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Train `drop.model`, which with `wrap=` is not the Trainer's model."""
        callback = self._learn_drop()
        drop = None if callback is None else callback.drop
        return super().training_step(model if drop is None else drop.model, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; the seconds do not count as training."""
        begin = time.perf_counter()
        metrics, callback = super().evaluate(*args, **kwargs), self._learn_drop()
        if callback is not None and callback.drop is not None:
            callback.drop.loader.exclude(time.perf_counter() - begin)
        return metrics


def _call(model: Any, batch: Any) -> Any:
    return model(**batch)
