"""DropScheduler: measures, scores, decides and drops layers once per epoch, like a learning-rate scheduler."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from learndrop_ext import checkpoint, checks
from learndrop_ext.data.extras import (
    BatchExtras,
    GivenKey,
    InputKey,
    input_keys,
    input_of,
    one_key,
    some_of,
    to_device,
    with_input,
)
from learndrop_ext.data.id_source import IdKey
from learndrop_ext.data.loader import DropLoader
from learndrop_ext.data.source import settle_views, source_of
from learndrop_ext.decide import costs
from learndrop_ext.decide.deltas import Deltas, LayerChange
from learndrop_ext.decide.forecast import Forecast, forecast
from learndrop_ext.decide.policy import Budget, PlanningPolicy, Policy, Situation, StoppedLearning, uses_costs
from learndrop_ext.decide.scores import scores
from learndrop_ext.distributed import from_rank_zero, share_buffers, smallest_of_ranks
from learndrop_ext.forward.bypass import Bypass
from learndrop_ext.forward.chain import Chain, split_layers
from learndrop_ext.forward.proof import check_cut
from learndrop_ext.forward.statistics import TrainingCalls, batches_seen, recalibrate
from learndrop_ext.forward.wrapped import Wrap, WrappedModel
from learndrop_ext.guards import Guards, held_by
from learndrop_ext.history import Record
from learndrop_ext.kernels.chunks import DTYPE_CODES
from learndrop_ext.ledger import Ledger
from learndrop_ext.rows.config import CacheConfig, cache_config
from learndrop_ext.rows.rowset import RowSet
from learndrop_ext.rows.store.fingerprint import Fingerprint

#: Samples on which a cut is tried before layers are dropped.
TRIED = 4


class DropScheduler:
    """Drops layers that have stopped learning from the training step, forward and backward.

    Use `loader` of this object in the training loop, call your own model on its batches, and call `step()` after each epoch
    or every so many batches. `history` holds one `Record` per step. `close()`, or leaving the context, restores the model as
    it was and frees the rows.

    Args:
        model (nn.Module): the model that the loop calls. It stays whole, for evaluation and saving.
        optimizer (Optimizer): the optimizer of the model's parameters. It is never changed. A loop that makes a new one
            must set `drop.optimizer`.
        loader (Iterable): a DataLoader over a dataset with ids or, with `ids`, any object that gives batches each time it
            is iterated over.
        policy (Policy, optional): situation -> Decision, also asked before training. Default: `StoppedLearning()`
        epochs (int, optional): number of `step()` calls in the run. `Budget` and rules by schedule need it; with it,
            `StoppedLearning` makes no drop that comes too late to pay. Default: None
        cache (CacheConfig, str or None, optional): a configuration, the name of a codec, or None to keep no rows and run
            the frozen layers at each step. Default: "fp16"
        wrap (Callable, optional): applied to the live part of the model now and after every drop, such as `torch.compile`;
            the loop then calls `drop.model`. Default: None
        input (int or str, optional): key of the images in a batch that is not a tensor; `[("inputs", "x")]`, a path of keys,
            where they lie within an entry. Of several images of each sample (two views, a pair), a list of keys or paths,
            `[0, 1]` or `[(0, 0), (0, 1)]`; each goes through the model by itself or joined with others by `torch.cat` along
            the batch. Default: 0
        call (Callable, optional): (model, batch) -> what the model returns, if the loop calls the model otherwise than on
            the images alone: `call=lambda model, batch: model(pixel_values=batch["image"], scale=batch["scale"])`. It is
            called on the first batch, to find the layers and to time them; of several images it calls the model on one.
            Default: `model(images)`, of several images the first
        ids (int, str or tuple, optional): position in a batch of the samples' ids, one int or str per sample: a key, an
            index or a tuple of these. `loader` is read until all ids are known and have rows, then they are drawn. Default:
            None

    Raises:
        TypeError, ValueError: before anything is changed, for a loader without ids, a batch that cannot be stored, a model
            without cuts, a policy whose target cannot be met, and all else in docs/errors.md.
        RuntimeError: the model cannot be called as `call` says.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: Iterable[Any],
        *,
        policy: Policy | None = None,
        epochs: int | None = None,
        cache: CacheConfig | str | None = "fp16",
        wrap: Wrap | None = None,
        input: GivenKey = 0,
        call: Callable[[nn.Module, Any], Any] | None = None,
        ids: IdKey | None = None,
    ) -> None:
        begin = time.perf_counter()
        config = cache_config(cache)
        keys = input_keys(input, config)
        one, per_sample = one_key(keys), len(keys) if isinstance(keys, tuple) else 1
        source = source_of(loader, ids, key=keys, seed=config.seed, config=config)
        device = checks.device_of(model)
        checks.check_optimizer(optimizer, model)
        checks.check_free(model)
        checks.check_settings(model, policy, epochs, call)
        checks.make_folder(config)
        first = to_device(source.first(), device)
        images = input_of(first, keys)
        extras, beside = BatchExtras(key=keys, device=device, like=first), 0
        if cache is not None:
            beside = extras.row_bytes  # raises ValueError for a batch that cannot be stored
        self._base, self._input = model, one
        self._call = call or (lambda model, batch: model(input_of(batch, one)))
        head = some_of(first, torch.arange(max(2, min(len(images), TRIED))) % len(images), key=one, like=first)
        pair = some_of(first, torch.arange(2) % len(images), key=one, like=first)
        chain = split_layers(model, input_of(pair, one), call=partial(self._try_call, pair))
        self._chooses_views = config.views == "auto"
        if cache is not None:
            checks.check_precision(chain)
            speedup = policy.speedup if isinstance(policy, PlanningPolicy) else Budget.speedup
            row = per_sample * costs.smallest_row(chain, config) + beside
            config = settle_views(config, source, epochs=epochs, speedup=speedup, row_bytes=row, device=device)
        self._optimizer = optimizer
        self._policy: Policy = StoppedLearning() if policy is None else policy
        self._epochs, self._device = epochs, device
        self._head, self._first = head, first
        self._chain, self._source = chain, source
        self._history: list[Record] = []
        self._prefix = self._epoch = 0
        self._undropped: int | None = None
        self._forecast_seconds: float | None = None
        self._said_saturated = False
        self._extras = extras
        # None of these refers to the scheduler: without a reference cycle the workers of its loader end with it.
        self._run_on = run_on = partial(_run_on, self._call, model, head, first, one)
        self._rows = rows = RowSet(
            len(source),
            images=per_sample,
            beside=beside,
            config=config,
            device=device,
            made_of=lambda path, row: _made_of(
                chain, rows.config, guards, path, row if rows.images == 1 else f"{row} of {keys}"
            ),
            sample_keys=source.keys,
        )
        self._bypass = bypass = Bypass(
            chain.recorded, keep=rows.keep, watch=lambda images, trains: guards.check_step(images, trains)
        )
        self._guards = guards = Guards(chain, source, rows, extras, key=keys, like=first, run=run_on, bypass=bypass)
        self._model = model if wrap is None else WrappedModel(chain, bypass, wrap)
        self._calls = calls = TrainingCalls(self._model, device)
        self._loader = DropLoader(source, rows, extras, key=keys, like=first, bypass=bypass, guards=guards, calls=calls)
        self._forgotten = weakref.finalize(self._loader, bypass.release)  # once nobody can train on rows any more
        self._forgotten.atexit = False
        self._ledger = Ledger(chain, rows, self._loader, source, extras, keeps_rows=cache is not None)
        if wrap is not None:
            self._ledger.note_wrapped()
        self._deltas = self._deltas_from(0)
        self._traces, self._shapes = checks.traces_of(model), checks.shapes_of(model)
        self._norm_batches = batches_seen(model)
        self._ledger.read_budgets()
        if isinstance(self._policy, PlanningPolicy):
            self._measure_costs()
            self._policy.check(self._ledger.run_costs()[0], epochs)
        self._ledger.note_setup(time.perf_counter() - begin)
        reason = self._decide(0)
        if self._prefix:
            nothing = (None,) * len(chain)
            self._history.append(self._record(reason, changes=nothing, scores=nothing))
        self._ledger.note_setup(time.perf_counter() - begin)

    def _try_call(self, batch: Any) -> Any:
        """Call the model for the first time. RuntimeError if it cannot be called so."""
        try:
            return self._call(self._base, batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            images = input_of(batch, self._input)
            raise RuntimeError(
                "DropScheduler: call must call the model as the training loop does (call=lambda model, batch: ...; default: "
                f"model(images)), and with images {images.dtype} {list(images.shape)} it raised {type(error).__name__}: "
                f"{error}"
            ) from error

    @property
    def model(self) -> nn.Module:
        """The model to train: the user's own or, with `wrap`, an object that calls what `wrap` has made of it."""
        return self._model

    @property
    def loader(self) -> DropLoader:
        """The loader to iterate over."""
        return self._loader

    @property
    def history(self) -> tuple[Record, ...]:
        """One record per step, and one of layers dropped before training."""
        return tuple(self._history)

    @property
    def chain(self) -> Chain:
        """The layers of the model; see `split_layers`."""
        return self._chain

    @property
    def prefix(self) -> int:
        """The number of layers dropped now."""
        return self._prefix if self._bypass.cuts else 0

    @property
    def epoch(self) -> int:
        """How often `step()` was called."""
        return self._epoch

    @property
    def policy(self) -> Policy:
        """The policy."""
        return self._policy

    @property
    def config(self) -> CacheConfig:
        """How rows are kept, with the number of views that was given or chosen."""
        return self._rows.config

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer; a loop that makes a new one sets it here."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        checks.check_optimizer(optimizer, self._base)
        self._optimizer = optimizer
        self._guards.follow_optimizer(optimizer)
        self._ledger.forget_times()

    @torch.inference_mode(False)
    def step(self) -> Record:
        """Measure how the layers have changed since the last step, ask the policy, and drop layers as it decides.

        Rows are computed when their samples are next drawn. A step that raises can be called again.

        Raises:
            RuntimeError: the model was not trained on batches of `drop.loader` since the last step.
            ValueError: weights are not finite (the layer is named), or the decision cannot be followed. The model, the
                optimizer and the rows are not changed.
        """
        begin = time.perf_counter()
        self._check_open("step")
        self._calls.end()
        samples, epoch_seconds, _ = self._loader.counts
        dropped = self.prefix
        checks.check_trained(self._bypass, samples)
        checks.check_widths(self._base, self._shapes)
        fill_seconds = self._rows.counts[2]
        forward_flops, fill_flops = self._ledger.flops()
        self._guards.look("step")
        changes = self._deltas.measure(refresh=False)
        checks.check_finite(self._chain.names[self._prefix :], changes)
        if not self._prefix:
            checks.check_touched(self._base, self._traces, changes)
        gone: tuple[None, ...] = (None,) * self._prefix
        changed, measured = (*gone, *changes), (*gone, *scores(changes))
        self._follow_guards()
        if uses_costs(self._policy):
            self._measure_costs()
        self._ledger.read_budgets()
        wrap_seconds = self._ledger.wrapping()
        self._ledger.observe(dropped, wrap_seconds=wrap_seconds)
        now = changed, measured
        whole = None if dropped else epoch_seconds - wrap_seconds
        reason = self._decide(self._epoch + 1, now, epoch_seconds=epoch_seconds, whole_seconds=whole)
        self._deltas.measure()
        self._epoch += 1
        self._traces, self._norm_batches = checks.traces_of(self._base), batches_seen(self._base)
        self._loader.forget_counts()
        self._rows.forget_counts()
        self._bypass.forget_calls()
        record = self._record(
            reason,
            changes=changed,
            scores=measured,
            epoch_seconds=epoch_seconds,
            fill_seconds=fill_seconds,
            wrap_seconds=wrap_seconds,
            measure_seconds=time.perf_counter() - begin,
            samples=samples,
            forward_flops=forward_flops,
            fill_flops=fill_flops,
        )
        self._history.append(record)
        self._forecast_seconds = self._ledger.expect(self._prefix)
        cache = self._rows.cache
        if not self._said_saturated and cache is not None and cache.saturated:
            self._said_saturated = True
            checks.warn_saturated(self._chain.names[self._rows.cut - 1])
        return record

    @torch.inference_mode(False)
    def forecast(self, epochs: int | None = None) -> Forecast:
        """Forecast the run without drops, and with one drop of each number of layers after each epoch.

        Times some training steps of the model, which is left as it was.

        Args:
            epochs (int, optional): length of the run. Default: `epochs` of the constructor

        Raises:
            ValueError: the length is not known.
        """
        epochs = self._epochs if epochs is None else epochs
        if epochs is None:
            raise ValueError("drop.forecast: epochs must be known, give forecast(epochs) or DropScheduler(epochs=...)")
        self._measure_costs()
        run, choices = self._ledger.run_costs()
        return forecast(run, epochs, choices, extras_bytes=self._ledger.extras_bytes)

    @torch.inference_mode(False)
    def follow_widths(self) -> None:
        """Go on after a WidthScheduler has narrowed live layers: record the layers again, and time them when costs are next
        asked for. Call it after `step()`. Rows stay valid.

        Raises:
            RuntimeError: batches were trained since the last step, whose changes can no longer be measured.
            ValueError: the model has other layers than before.
        """
        self._check_open("follow_widths")
        self._follow_guards()
        if self._loader.counts[0]:
            raise RuntimeError(
                "drop.follow_widths: it must be called after drop.step() and before the next batch, got "
                f"{self._loader.counts[0]} samples trained since the last step"
            )
        with self._bypass.away():
            images = input_of(self._head, self._input)
            chain = split_layers(self._base, images, call=lambda: self._call(self._base, self._head))
        if chain.names != self._chain.names:
            raise ValueError(
                f"drop.follow_widths: the model must keep its layers, {', '.join(self._chain.names)}, got "
                f"{', '.join(chain.names)}"
            )
        self._chain.renew(chain.recorded)
        self._bypass.renew(chain.recorded)
        self._ledger.follow_widths()
        self._deltas = self._deltas_from(self._prefix)
        self._traces, self._shapes = checks.traces_of(self._base), checks.shapes_of(self._base)
        self._show(self._body(self._prefix))

    @torch.inference_mode(False)
    def undrop(self) -> None:
        """Train the whole model on images again: dropped layers become live and the rows are freed."""
        self._check_open("undrop")
        self._release()
        self._undropped = self._epoch

    @torch.inference_mode(False)
    def refresh(self, ids: Iterable[int] | None = None) -> None:
        """Compute the rows of samples again, and read their labels again, when they are next drawn.

        Args:
            ids (iterable of int, optional): numbers of samples in the dataset; of a loader with ids, in the order in which
                they first came. Default: all

        Raises:
            IndexError: a number is not that of a sample.
        """
        self._check_open("refresh")
        asked, size = None if ids is None else torch.as_tensor(list(ids), dtype=torch.int64), len(self._source)
        if asked is not None and bool((outside := (asked < 0) | (asked >= size)).any()):
            raise IndexError(
                f"drop.refresh: ids must be numbers of samples, within 0..{size - 1}, got {int(asked[outside][0])}"
            )
        self._guards.refresh(asked)

    def close(self) -> None:
        """End the run: restore the model as it was, and free the rows. Those that other runs can use stay in the store."""
        self.__exit__(None)

    def __enter__(self) -> DropScheduler:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._loader.close():
            return
        self._guards.release()  # without wrapping the model anew, where other ranks may have gone
        self._follow_guards()
        # After an error, keep the rows that a checkpoint names.
        self._rows.close(keep=kind is not None)

    @torch.inference_mode(False)
    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state as plain values and tensors, for `torch.save`.

        Model, optimizer and rows are not in it. With `CacheConfig(store=...)`, rows are written there if `store_bytes` holds
        them all, and the state names them; those that the state before named are deleted unless other runs can use them.
        """
        self._check_open("state_dict")
        self._follow_guards()
        return checkpoint.state_of(self)

    @torch.inference_mode(False)
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict()`. Load the model's own state first.

        Dropped layers are dropped again. Rows are read from the store. If they are not there any more (RuntimeWarning), they
        are computed again when their samples are drawn.

        Raises:
            ValueError: the state is of another model or dataset, or the dropped layers have other weights than when it
                was saved. Nothing is changed then.
            RuntimeError: this scheduler has already trained with dropped layers.
        """
        self._check_open("load_state_dict")
        self._follow_guards()
        checkpoint.load_state(self, state)

    def _measure_costs(self) -> None:
        if not self._ledger.measured:
            run = partial(self._call, self._base, self._first)
            with self._bypass.away():  # all layers are live in a timed step
                self._ledger.measure(run, self._optimizer, batch=len(input_of(self._first, self._input)))

    def _decide(
        self,
        epoch: int,
        *now: tuple[tuple[LayerChange | None, ...], tuple[float | None, ...]],
        epoch_seconds: float = 0.0,
        whole_seconds: float | None = None,
    ) -> str:
        """Ask the policy after `epoch` epochs, carry out its decision, and return the reason.

        now: the changes and scores of the epoch that has ended, whose seconds follow; whole_seconds are those without
        wrapping, if nothing was dropped in it.
        """
        run, choices = self._ledger.run_costs()
        known = self._ledger.measured
        fill_seconds, saved_seconds = run.drop_estimates(self._prefix) if known else ((), ())
        whole = self._ledger.full_epoch_seconds(self._history, whole_seconds)
        measured = (*((r.changes, r.scores) for r in self._history if r.epoch), *now)
        situation = Situation(
            epoch=epoch,
            epochs=self._epochs,
            prefix=self._prefix,
            layers=self._chain.names,
            scores=tuple(scores for _, scores in measured),
            changes=tuple(changes for changes, _ in measured),
            learning_rate=float(self._optimizer.param_groups[0]["lr"]),
            learning_rates=tuple(record.learning_rate for record in self._history),
            is_scheduled="initial_lr" in self._optimizer.param_groups[0],  # which every LRScheduler writes
            fill_seconds=fill_seconds,
            saved_seconds=saved_seconds,
            epoch_seconds=whole,
            costs=run if known else None,
            elapsed_seconds=self._ledger.elapsed(self._history) + epoch_seconds,
            full_seconds=whole * (self._epochs or 0) + run.wrap_seconds,
            undropped=self._undropped,
            asleep=self._asleep(),
        )
        decision = checks.checked_decision(self._policy(situation), self._prefix, len(self._chain) - 1)
        decision, choices = from_rank_zero((decision, choices))
        prefix, reason = decision.prefix, decision.reason
        if prefix > self._prefix:
            checks.check_free(self._base, self)
        while prefix > self._prefix:
            with self._bypass.away():
                refused = check_cut(self._chain, prefix, self._run_on, input_of(self._head, self._input))
            if refused is None:
                break
            reason = f"{reason}; not {prefix} layers: {refused}"
            prefix -= 1
        if prefix == self._prefix:
            return reason
        choice = choices[prefix]
        said = self._recalibrate(prefix) if epoch and decision.recalibrate else ""
        self._drop(prefix, choice, epoch)
        keeps_views = choice.cut and self._rows.cut and self._rows.views > 1
        views = f", {self._rows.views} views of each sample" if keeps_views else ""
        return f"{reason}; {choice.reason}{views}{said}"

    def _recalibrate(self, prefix: int) -> str:
        """Recalibrate the batch norms that were trained since the last step in layers that are about to be dropped. Return
        what to add to the reason."""
        trained = {norm for norm, count in batches_seen(self._base).items() if count != self._norm_batches.get(norm)}
        norms = [m for one in self._chain.recorded.before(prefix) for m in one.modules() if m in trained]
        if not norms:
            return ""
        calls, said = self._calls.repeats(self._base), ""
        (count,) = smallest_of_ranks((len(calls),))  # norms may wait for those of other ranks
        try:
            if count and recalibrate(self._chain, self._prefix, prefix, calls[:count], norms=norms):
                said = "; batch norms recalibrated"
        except Exception as error:  # of a forward that relies on what the loop does between its calls
            said = f"; batch norms not recalibrated: {error or repr(error)}"
        return from_rank_zero(said)

    def _drop(self, prefix: int, choice: costs.CutChoice, epoch: int) -> None:
        """Freeze `prefix` layers, keep their rows if they fit, and train the rest.

        Everything that can fail comes before the first visible change.
        """
        if not epoch:
            checks.warn_untrained(self._base, self._chain, prefix)
        share_buffers(b for m in self._chain.recorded.before(prefix) for b in m.buffers())
        body = self._body(prefix)
        left = None if self._epochs is None else self._epochs - epoch
        # Rows that neither this run nor another would read again are not kept; those of an earlier drop stay.
        shared = self._rows.config.store is not None and not epoch
        if choice.cut == prefix and (shared or left is None or left > self._rows.views):
            shape = self._ledger.row_shape(prefix)
            rows = self._loader.batches.expected_rows()
            self._rows.advance(prefix, shape, rows=rows, private=epoch > 0, budgets=choice.budgets)
            self._extras.move(self._ledger.extras_device)
        self._deltas.drop_first(prefix - self._prefix)
        self._freeze(prefix, body)

    def _freeze(self, prefix: int, body: nn.Module | None) -> None:
        self._ledger.note_drop(self._prefix)
        self._prefix = prefix
        self._bypass.put([*(cut for cut in self._rows.cuts if cut < prefix), prefix])
        self._guards.drop(prefix, self._optimizer)
        checks.HOLDERS[self._base] = weakref.ref(self), self._forgotten
        self._show(body)

    def _body(self, prefix: int) -> nn.Module | None:
        return self._model.wrapped(prefix) if isinstance(self._model, WrappedModel) else None

    def _show(self, body: nn.Module | None) -> None:
        if isinstance(self._model, WrappedModel) and body is not None:
            self._model.show(body, behind=self._prefix)
            self._ledger.note_wrapped()

    def _release(self) -> None:
        """Make all layers live again."""
        body = self._body(0)
        self._guards.release()
        self._follow_guards()
        self._show(body)

    def _follow_guards(self) -> None:
        """Go on with all layers if the guards have released them."""
        if self._prefix and not self._bypass.cuts:
            self._prefix, self._undropped = 0, self._epoch
            checks.HOLDERS.pop(self._base, None)
            self._deltas = self._deltas_from(0)

    def _asleep(self) -> int:
        """The number of first layers that do not train: those dropped, and those that the user has frozen behind them."""
        held = held_by(self._optimizer)
        trains = (
            any(p.requires_grad and id(p) in held for p in self._chain.parameters(i, i + 1))
            for i in range(self._prefix, len(self._chain))
        )
        return self._prefix + next((i for i, one in enumerate(trains) if one), 0)

    def _record(self, reason: str, **values: Any) -> Record:
        cache = self._rows.cache
        return Record(
            epoch=self._epoch,
            prefix=self._prefix,
            reason=reason,
            learning_rate=float(self._optimizer.param_groups[0]["lr"]),
            forecast_seconds=self._forecast_seconds,
            row_bytes=cache.row_bytes if cache is not None else 0,
            cache_bytes=cache.nbytes if cache is not None else 0,
            extras_bytes=self._extras.nbytes,
            tier=self._rows.tier,
            **values,
        )

    def _deltas_from(self, first: int) -> Deltas:
        # Others, such as quantized ones, do not train.
        layers = [
            [p for p in self._chain.parameters(i, i + 1) if p.dtype in DTYPE_CODES]
            for i in range(first, len(self._chain))
        ]
        return Deltas(layers, model=self._base)

    def _check_open(self, name: str) -> None:
        if self._loader.closed:
            raise RuntimeError(f"drop.{name}: the DropScheduler must be open, and it was closed")


def _run_on(
    call: Callable[[nn.Module, Any], Any], model: nn.Module, head: Any, like: Any, key: InputKey, x: torch.Tensor
) -> Any:
    """Call the model on images [n, ...], in the loop's way, with the rest of the batch `head`."""
    batch = some_of(head, torch.arange(len(x)) % len(input_of(head, key)), key=key, like=like)
    return call(model, with_input(batch, key, x))


def _made_of(chain: Chain, config: CacheConfig, guards: Guards, path: Sequence[int], row: str) -> Fingerprint:
    """Everything that rows depend on which went through these cuts. row: their dtype and shape."""
    k = path[-1]
    operations, tensors = guards.digests(k)
    return Fingerprint(
        weights=tensors,
        cut=k,
        codec=config.codec,
        layers=f"{type(chain.model).__name__}, cuts {list(path)}: {chain.names[:k]}, operations {operations}",
        loop=guards.loop.describe(),
        row=row,
        views="mirror" if config.mirror else "random" if config.rows_per_sample > 1 else "one",
    )
