"""DropScheduler: measures, scores, decides and drops layers once per epoch, like a learning-rate scheduler."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from learndrop_ext import checkpoint
from learndrop_ext.cache.config import CacheConfig, cache_config
from learndrop_ext.checks import (
    HOLDERS,
    check_finite,
    check_folder,
    check_free,
    check_settings,
    check_trained,
    checked_decision,
    input_name,
    warn_saturated,
    warn_unseen,
    warn_untrained,
)
from learndrop_ext.data.drift import follow_code, follow_model
from learndrop_ext.data.extras import BatchExtras, InputKey, input_of, to_device
from learndrop_ext.data.ids import IdKey
from learndrop_ext.data.loader import DropLoader
from learndrop_ext.data.rowset import RowSet
from learndrop_ext.data.source import settle_views, source_of
from learndrop_ext.decide import costs
from learndrop_ext.decide.deltas import Deltas
from learndrop_ext.decide.forecast import Forecast, forecast
from learndrop_ext.decide.policy import Budget, Policy, Situation, StoppedLearning
from learndrop_ext.decide.scores import scores
from learndrop_ext.distributed import from_rank_zero, share_buffers
from learndrop_ext.graph.call import Inputs, arguments_of
from learndrop_ext.graph.chain import Chain, split_layers
from learndrop_ext.graph.freeze import FrozenPrefix, check_optimizer, device_of
from learndrop_ext.graph.live import LiveModel, Wrap, live_body
from learndrop_ext.history import Record
from learndrop_ext.ledger import Ledger


class DropScheduler:
    """Drops layers that have stopped learning from the training step, forward and backward.

    Use `loader` and `model` of this object in the training loop, and call `step()` after each epoch or every so many
    batches. `history` holds one `Record` per step. `close()`, or leaving the context, restores the model as it was and
    frees the rows.

    Args:
        model (nn.Module): any model that `split_layers` can split. It stays whole, for evaluation and saving.
        optimizer (Optimizer): the optimizer of the model's parameters. It is never changed. A loop that makes a new one
            must set `drop.optimizer`.
        loader (Iterable): a DataLoader over a dataset with ids or, with `ids`, any object that gives batches each time it
            is iterated over.
        policy (Policy, optional): situation -> Decision, also asked before training. Default: `StoppedLearning()`
        epochs (int, optional): number of `step()` calls in the run. If given, no drop comes too late to pay. Default: None
        cache (CacheConfig, str or None, optional): a configuration, the name of a codec, or None to keep no rows and run
            the frozen layers at each step. Default: "fp16"
        views (int, optional): random augmentations kept of each sample, for a random dataset. Default: as in `CacheConfig`
        wrap (Callable, optional): applied to the live model now and after every drop, such as `torch.compile`.
        input (int or str, optional): key of the model's input in a batch that is not a tensor. Default: 0
        inputs (Callable, optional): batch -> (args, kwargs), how the loop calls the model, if with more than its input:
            `inputs=lambda batch: ((batch[0],), {"labels": batch[1]})`. There are no cuts after the first use of another
            tensor. It is called with batches of images only.
        ids (int, str or tuple, optional): position in a batch of the samples' ids, one int or str per sample: a key, an
            index or a tuple of these. `loader` is read until all ids are known and have rows, then they are drawn.
        layers (Sequence[str], optional): names of modules to split at; see `split_layers`.
        seed (int, optional): random seed of views and the order of `ids`. Default: 0
        check_input (bool, optional): raise if the loop changes the input between `loader` and `model`. Default: True
        autocast (torch.dtype, optional): dtype of the loop's `torch.autocast`, under which layers are timed. Default: None

    Raises:
        TypeError, ValueError: before anything is changed, for a loader without ids, a batch that cannot be stored, a model
            that cannot be split, a policy whose target cannot be met, and all else in docs/errors.md.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: Iterable[Any],
        *,
        policy: Policy | None = None,
        epochs: int | None = None,
        cache: CacheConfig | str | None = "fp16",
        views: int | None = None,
        wrap: Wrap | None = None,
        input: InputKey = 0,
        inputs: Inputs | None = None,
        ids: IdKey | None = None,
        layers: Sequence[str] | None = None,
        seed: int = 0,
        check_input: bool = True,
        autocast: torch.dtype | None = None,
    ) -> None:
        begin = time.perf_counter()
        config = cache_config(cache, views)
        source = source_of(loader, ids, key=input, seed=seed, config=config)
        device = device_of(model)
        check_folder(config)
        check_optimizer(optimizer, model)
        check_free(model)
        check_settings(policy, epochs, autocast)
        numbers, batch = source.first()
        batch = to_device(batch, device)
        example = input_of(batch, input)
        if cache is not None:
            BatchExtras(key=input, device=device).check(batch)
        given = arguments_of(inputs, batch)
        self.chain: Chain = split_layers(model, example, layers=layers, inputs=given)
        self._chooses_views = config.views == "auto"
        if cache is not None:
            speedup = policy.speedup if isinstance(policy, Budget) else Budget.speedup
            row = costs.smallest_row(self.chain, config.codec)
            config = settle_views(config, source, epochs=epochs, speedup=speedup, row_bytes=row, device=device)
        self.base_model = model
        self.optimizer = optimizer
        self.policy: Policy = StoppedLearning() if policy is None else policy
        self.epochs = epochs
        self.wrap = wrap
        self.device = device
        self.history: list[Record] = []
        self.prefix = 0
        self.epoch = 0  # how often step() was called
        self._layer_names, self._arguments = layers, given
        self._keeps_rows = cache is not None
        self._undropped: int | None = None
        self._forecast_seconds: float | None = None
        self.rows = RowSet(self.chain, model, source, config=config, key=input, ids=numbers, batch=batch, seed=seed)
        self.model = LiveModel(
            live_body(model, self.chain, 0, 0, wrap), model, input_name(model), call=given and self.chain.call
        )
        self.model.check_input = check_input
        self.model.set_mode(model.training, but=model)
        self.model.image_shape = tuple(example.shape[1:])
        self.model.autocast = self.model.told_autocast = autocast
        self.rows.set_autocast(autocast)
        self.loader = DropLoader(self.rows, self.model, key=input, follow_code=weakref.WeakMethod(self._begin_epoch))
        self.ledger = Ledger(self.chain, optimizer, self.rows, self.loader, keeps_rows=cache is not None, inputs=inputs)
        self._deltas = self._deltas_from(0)
        check = getattr(self.policy, "check", None)  # Budget refuses a speedup that cannot be reached
        if check is not None:
            self.ledger.probe(model)
            check(self.ledger.run_costs()[0], epochs)
        self.ledger.setup_seconds = time.perf_counter() - begin
        self._decide_before_training()
        self.ledger.setup_seconds = time.perf_counter() - begin

    @property
    def config(self) -> CacheConfig:
        """How rows are kept, with the number of views that was given or chosen."""
        return self.rows.config

    @property
    def cut(self) -> int:
        """The number of layers after which rows are kept; 0 while the model trains on images."""
        return self.rows.cut

    def step(self) -> Record:
        """Measure how the layers have changed since the last step, ask the policy, and drop layers as it decides.

        Rows are computed when their samples are next drawn. A step that raises can be called again.

        Raises:
            RuntimeError: `drop.model` was not trained on batches of `drop.loader` since the last step.
            ValueError: weights are not finite (the layer is named), or the decision cannot be followed. The model, the
                optimizer and the rows are not changed.
        """
        begin = time.perf_counter()
        self._check_open("step")
        samples, epoch_seconds = self.loader.ledger
        check_trained(self.model, samples)
        self.ledger.check_autocast(self.model.autocast)
        follow_model(self.rows)
        self._follow_code("step", run=False)
        changes = self._deltas.measure(refresh=False)
        check_finite(self.chain.names[self.prefix :], changes)
        gone: tuple[None, ...] = (None,) * self.prefix
        measured = (*gone, *scores(changes))
        images, older, fill_seconds = self.rows.ledger
        forward_flops, fill_flops = self.ledger.flops(samples, images, older)
        relabelled = self.rows.relabelled
        self.ledger.observe(self.prefix, samples=samples, made=images + older, read=relabelled, seconds=epoch_seconds)
        situation, choices = self._situation(self.epoch + 1, measured, epoch_seconds)
        reason = self._follow(situation, choices)
        self._deltas.measure()
        self.epoch += 1
        self.loader.forget_ledger()
        self.rows.forget_ledger()
        self.model.calls = self.model.eval_calls = 0
        warn_saturated(self.rows, self.chain)
        record = self._record(
            reason,
            changes=(*gone, *changes),
            scores=measured,
            epoch_seconds=epoch_seconds,
            fill_seconds=fill_seconds,
            measure_seconds=time.perf_counter() - begin,
            samples=samples,
            forward_flops=forward_flops,
            fill_flops=fill_flops,
        )
        self.history.append(record)
        self._forecast_seconds = self.ledger.expect(self.prefix)
        return record

    def forecast(self, epochs: int | None = None) -> Forecast:
        """Forecast the run without drops, and with one drop of each number of layers after each epoch.

        Times some training steps on a copy of the model and the optimizer.

        Args:
            epochs (int, optional): length of the run. Default: `epochs` of the constructor

        Raises:
            ValueError: the length is not known.
        """
        epochs = self.epochs if epochs is None else epochs
        if epochs is None:
            raise ValueError("drop.forecast: epochs must be known, give forecast(epochs) or DropScheduler(epochs=...)")
        if not self.prefix:  # with frozen layers the timed step would be too short
            self.ledger.probe(self.base_model)
        run, choices = self.ledger.run_costs()
        tiers = self.ledger.costs.tiers() if self._keeps_rows else ()
        return forecast(run, epochs, row_bytes=[choice.row_bytes for choice in choices], tiers=tiers)

    def undrop(self) -> None:
        """Train the whole model on images again: dropped layers become live and the rows are freed."""
        self._check_open("undrop")
        self._undropped = self.epoch
        self._release()

    def close(self) -> None:
        """End the run: restore the model as it was, free the rows and delete their files."""
        self._close(keep_files=False)

    def __enter__(self) -> DropScheduler:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error, keep the file for a run that resumes from the checkpoint.
        self._close(keep_files=kind is not None)

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state as plain values and tensors, for `torch.save`.

        Model, optimizer and rows are not in it. With `CacheConfig(disk_dir=...)`, rows that changed since the last call
        are written to a file there if `disk_bytes` holds them all. The state names it; the one it replaces is deleted.
        """
        self._check_open("state_dict")
        return checkpoint.state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict()`. Load the model's own state first.

        Dropped layers are dropped again. Rows are read from the file that the state names. If it is missing or has
        another fingerprint (RuntimeWarning), they are computed again when their samples are drawn.

        Raises:
            ValueError: the state is of another model or dataset, or the dropped layers have other weights than when it
                was saved. Nothing is changed then.
            RuntimeError: this scheduler has already trained with dropped layers.
        """
        self._check_open("load_state_dict")
        checkpoint.load_state(self, state)

    def _decide_before_training(self) -> None:
        """Ask the policy before training, as epoch 0 without scores."""
        situation, choices = self._situation(0, None, 0.0)
        reason = self._follow(situation, choices)
        if self.prefix:
            nothing = (None,) * len(self.chain)
            self.history.append(self._record(reason, changes=nothing, scores=nothing))

    def _situation(
        self, epoch: int, measured: tuple[float | None, ...] | None, epoch_seconds: float
    ) -> tuple[Situation, list[costs.CutChoice]]:
        run, choices = self.ledger.run_costs()
        fill_seconds, saved_seconds = run.drop_estimates(self.prefix)
        whole = self.ledger.full_epoch_seconds(self.history, None if self.prefix or not epoch else epoch_seconds)
        situation = Situation(
            epoch=epoch,
            epochs=self.epochs,
            prefix=self.prefix,
            layers=self.chain.names,
            scores=(*(r.scores for r in self.history if r.epoch), *([measured] if measured is not None else [])),
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            fill_seconds=fill_seconds,
            saved_seconds=saved_seconds,
            epoch_seconds=whole,
            costs=run,
            elapsed_seconds=self.ledger.elapsed(self.history) + epoch_seconds,
            full_seconds=whole * (self.epochs or 0),
            undropped=self._undropped,
        )
        return situation, choices

    def _follow(self, situation: Situation, choices: list[costs.CutChoice]) -> str:
        """Ask the policy, carry out its decision, and return the reason."""
        decision = checked_decision(self.policy(situation), self.prefix, len(self.chain) - 1)
        decision, choices = from_rank_zero((decision, choices))
        if decision.prefix <= self.prefix:
            return decision.reason
        choice = choices[decision.prefix]
        self._drop(decision.prefix, choice.cut, situation)
        views = f", {self.rows.views} views of each sample" if choice.cut and self.rows.views > 1 else ""
        return f"{decision.reason}; {choice.reason}{views}"

    def _drop(self, prefix: int, cut: int, situation: Situation) -> None:
        """Freeze `prefix` layers, keep rows after `cut` of them, and train the rest.

        Everything that can fail comes before the first visible change.
        """
        check_free(self.base_model, self)
        if not situation.epoch:
            warn_untrained(self.base_model, self.chain, prefix)
        elif not self.prefix:
            self._follow_code("step", run=True)
        share_buffers(self.chain.prefix(prefix).buffers())
        body = live_body(self.base_model, self.chain, cut, prefix, self.wrap)
        if cut > self.cut:
            warn_unseen(self.base_model, self.chain, self.cut, cut)
            left = None if self.epochs is None else self.epochs - situation.epoch
            stores = left is None or left > self.rows.views
            self.rows.advance(cut, rows=self.loader.batches.expected_rows(), stores=stores)
        self._deltas.drop_first(prefix - self.prefix)
        self._freeze(prefix, body)

    def _freeze(self, prefix: int, body: nn.Module) -> None:
        frozen = FrozenPrefix(self.base_model, self.chain, prefix, self.optimizer, before=self.rows.frozen)
        self.rows.frozen = self.model.frozen = frozen
        self.ledger.prefix_before, self.prefix = self.prefix, prefix
        HOLDERS[self.base_model] = weakref.ref(self)
        self._show(body)

    def _release(self) -> None:
        """Make all layers live again."""
        if self.rows.frozen is not None:
            self.rows.frozen.release()
        self.rows.frozen = self.model.frozen = None
        self.rows.clear()
        self.prefix = 0
        HOLDERS.pop(self.base_model, None)
        self._show(live_body(self.base_model, self.chain, 0, 0, self.wrap))
        self._deltas = self._deltas_from(0)

    def _close(self, *, keep_files: bool) -> None:
        if self.loader.closed:
            return
        self.loader.closed = True
        if self.prefix:
            self._release()
        if not keep_files:
            self.rows.file.delete()

    def _show(self, body: nn.Module) -> None:
        self.model.body = body
        self.model.set_mode(self.model.training, but=self.base_model)
        if self.rows.frozen is not None:
            self.rows.frozen.hold_eval()
        self.model.row_shape = self.chain.layer(self.cut - 1).shape if self.cut else None
        self.model.stale = self.chain.stale if self.prefix else None

    def _begin_epoch(self) -> None:
        if self.rows.frozen is not None:
            self.rows.frozen.optimizer = self.optimizer
            self._follow_code("loader", run=True)

    def _follow_code(self, where: str, *, run: bool) -> None:
        if follow_code(self.rows, where, run=run, layers=self._layer_names, inputs=self._arguments):
            self.chain = self.rows.chain
            if self.prefix:
                self._freeze(self.prefix, live_body(self.base_model, self.chain, self.cut, self.prefix, self.wrap))

    def _record(self, reason: str, **values: Any) -> Record:
        cache = self.rows.cache
        return Record(
            epoch=self.epoch,
            prefix=self.prefix,
            cut=self.cut,
            reason=reason,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            forecast_seconds=self._forecast_seconds,
            row_bytes=cache.row_bytes if cache is not None else 0,
            cache_bytes=cache.nbytes if cache is not None else 0,
            **values,
        )

    def _deltas_from(self, first: int) -> Deltas:
        layers = [list(self.chain.layer(i).parameters()) for i in range(first, len(self.chain))]
        return Deltas(layers, model=self.base_model)

    def _check_open(self, name: str) -> None:
        if self.loader.closed:
            raise RuntimeError(f"drop.{name}: the DropScheduler must be open, and it was closed")
