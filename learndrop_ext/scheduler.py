"""DropScheduler: measures, scores, decides, drops and fills, once an epoch, like a learning-rate scheduler."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from learndrop_ext.cache.config import CacheConfig, cache_config
from learndrop_ext.cache.fingerprint import weights_digest
from learndrop_ext.cache.plan import budgets_of
from learndrop_ext.data import fill
from learndrop_ext.data.extras import InputKey, input_of, to_device
from learndrop_ext.data.loader import DropLoader, Rows, check_loader
from learndrop_ext.data.rowset import RowSet
from learndrop_ext.decide import costs
from learndrop_ext.decide.deltas import Deltas, LayerChange
from learndrop_ext.decide.policy import Decision, Policy, Situation, StoppedLearning
from learndrop_ext.decide.probes import tier_costs, tier_speeds
from learndrop_ext.decide.scores import scores
from learndrop_ext.distributed import from_rank_zero, share_buffers
from learndrop_ext.graph.chain import Chain, split_layers
from learndrop_ext.graph.freeze import Frozen, check_optimizer, device_of, freeze, unfreeze
from learndrop_ext.graph.live import LiveModel, Wrap, live_body
from learndrop_ext.history import Record, record_of
from learndrop_ext.rng import fork_rng

STATE = {
    *("layers", "prefix", "cuts", "rows_file", "epochs_loaded", "seen", "view_offset", "generator", "autocast"),
    *("fingerprint", "deltas", "history"),
}


class DropScheduler:
    """Drops the layers that have stopped learning from the training step, forward and backward.

    model: any module that torch.fx can trace, with one tensor as its input (see `split_layers`); it stays whole, for
    evaluation and saving, and stays the caller's. optimizer: holds the model's parameters; it is never changed, and
    the learning rate stays the caller's. loader: a DataLoader over a dataset with ids.

    policy: scores -> Decision; `StoppedLearning()` by default. epochs: length of the run if it is known, so that a drop
    that cannot earn its fill back is not made. cache: a `CacheConfig`, a codec's name, or None for no rows at all (the
    frozen prefix is then run at each step: "freeze only"). views: random augmentations kept of each sample, for a
    dataset with randomness. wrap: applied to the live model now and after every drop (`torch.compile`,
    DistributedDataParallel). input: place of the model's input in a batch that is no tensor. layers: module names to
    split at, see `split_layers`. seed: of the views and moves drawn.

    Use `loader` and `model` of this object in the training loop and call `step()` after each epoch. `history` holds one
    `Record` per step.

    Raises TypeError or ValueError, before anything is changed, for a loader without ids, a dataset that gives another
    image for the same id at each reading while views is 1, an optimizer that holds none of the model's parameters, a
    cache without its folder, or a model that cannot be split.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: DataLoader[Any],
        *,
        policy: Policy | None = None,
        epochs: int | None = None,
        cache: CacheConfig | str | None = "fp16",
        views: int | None = None,
        wrap: Wrap | None = None,
        input: InputKey = 0,
        layers: Sequence[str] | None = None,
        seed: int = 0,
        check_input: bool = True,
    ) -> None:
        check_loader(loader)
        config = cache_config(cache, views)
        device = device_of(model)
        folder = config.disk_dir
        if folder is not None and not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
            raise ValueError(
                "DropScheduler: cache must have a disk_dir that is a folder to write to, got "
                f"CacheConfig(disk_dir={folder!r})"
            )
        check_optimizer(optimizer, model)
        if epochs is not None and (not isinstance(epochs, int) or epochs < 1):
            raise ValueError(f"DropScheduler: epochs must be a whole number >= 1 or None, got {epochs!r}")
        if config.views == 1 and cache is not None and not fill.same_image_each_time(loader, input):
            raise ValueError(
                "DropScheduler: loader must give the same image for the same id at each reading, got another one, and "
                "a cached row would freeze it; give views=V to keep V random views of each sample, or a dataset without "
                "randomness"
            )
        size = len(loader.dataset)  # type: ignore[arg-type]
        batch = min(size, 32)
        with fork_rng(seed):
            example = input_of(to_device(fill.read_batch(loader, range(batch)), device), input)
        self.chain: Chain = split_layers(model, example[:2], layers=layers)
        self.costs = costs.measure_layers(self.chain, example)
        self.base_model = model
        self.optimizer = optimizer
        self.policy: Policy = StoppedLearning() if policy is None else policy
        self.epochs = epochs
        self.config = config
        self.keeps_rows = cache is not None
        self.wrap = wrap
        self.seed = seed
        self.check_input = check_input
        self.device = device
        self.history: list[Record] = []
        self.prefix = 0
        self.cuts: list[int] = []  # the cut of every fill since images were read
        self.loader = DropLoader(loader, key=input, device=device, config=config, seed=seed)
        self.keeper = RowSet(self.chain, model, self.loader, config, example=example, seed=seed)
        self.loader.fetch_missing = lambda ids: self.keeper.fetch_missing(ids, self.cut, self.model.autocast)
        self.model: LiveModel = LiveModel(live_body(model, self.chain, 0, 0, wrap), device)
        self.loader.on_first = self.model.expect
        self.model.train(model.training)
        self._frozen: list[Frozen] = []
        self._deltas = self._deltas_from(0)
        self._speeds: tuple[float, float, float] | None = None

    @property
    def cut(self) -> int:
        """After how many layers the rows are kept; 0 while images are read."""
        return self.cuts[-1] if self.cuts else 0

    def step(self) -> Record:
        """Measure the epoch that ended, decide, and where it says so drop: fill the cache and go on with the suffix.

        Raises RuntimeError when the epoch has not ended or `drop.model` was not what was trained, ValueError for
        weights that are not finite (named); the model, the optimizer and the rows are then as before.
        """
        self.loader.check_epoch_done()
        self._check_trained()
        begin = time.perf_counter()
        changes = self._deltas.measure()
        self._check_finite(changes)
        gone: tuple[None, ...] = (None,) * self.prefix
        measured = (*gone, *scores(changes))
        measure_seconds = time.perf_counter() - begin
        samples, epoch_seconds = self.loader.samples, self.loader.seconds
        forward_flops = samples * costs.forward_flops(self.costs[self.cut :])
        tiers = self._tiers()
        choices = self._choices(tiers)
        estimates = [self._estimate(k, choices[k].cut, tiers) for k in range(len(self.chain))]
        situation = Situation(
            epoch=len(self.history) + 1,
            epochs=self.epochs,
            prefix=self.prefix,
            layers=self.chain.names,
            scores=(*(r.scores for r in self.history), measured),
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            fill_seconds=tuple(e.fill_seconds for e in estimates),
            saved_seconds=tuple(e.saved_seconds for e in estimates),
            epoch_seconds=self._whole_epoch_seconds(),
        )
        decision, choices = from_rank_zero((self._decide(situation), choices))
        begin = time.perf_counter()
        before, reason, fill_flops = self.cut, decision.reason, 0
        if decision.prefix > self.prefix:
            choice = choices[decision.prefix]
            filled = self._drop(decision.prefix, choice.cut)
            fill_flops = filled * costs.forward_flops(self.costs[before : choice.cut])
            reason = f"{reason}; {choice.reason}"
        rows = self.loader.rows
        record = Record(
            epoch=situation.epoch,
            prefix=self.prefix,
            cut=self.cut,
            reason=reason,
            learning_rate=situation.learning_rate,
            relative=(*gone, *(c.relative for c in changes)),
            cosine=(*gone, *(c.cosine for c in changes)),
            scores=measured,
            epoch_seconds=epoch_seconds,
            measure_seconds=measure_seconds,
            fill_seconds=time.perf_counter() - begin if fill_flops else 0.0,
            samples=samples,
            forward_flops=forward_flops,
            fill_flops=fill_flops,
            row_bytes=rows.cache.row_bytes if rows is not None else 0,
            cache_bytes=rows.cache.nbytes if rows is not None else 0,
        )
        self.history.append(record)
        return record

    def undrop(self) -> None:
        """Train the whole model again, from images: the dropped layers are live and the rows are freed."""
        for frozen in reversed(self._frozen):
            unfreeze(frozen, training=self.base_model.training)
        self.keeper.free()
        self._frozen, self.cuts, self.prefix = [], [], 0
        self._show(live_body(self.base_model, self.chain, 0, 0, self.wrap))
        self._deltas = self._deltas_from(0)

    def state_dict(self) -> dict[str, Any]:
        """All but the model, the optimizer and the rows, as plain values and tensors, for `torch.save`.

        With `CacheConfig(disk_dir=...)` the rows are written to a file there, if they changed since the last call and
        disk_bytes holds them all; the state has its name. A file of rows that these stand in for is deleted.
        """
        return {
            "layers": list(self.chain.names),
            "prefix": self.prefix,
            "cuts": list(self.cuts),
            "rows_file": self.keeper.keep(self.cut, self.model.autocast),
            "epochs_loaded": self.loader.epochs,
            "seen": self.loader.batches.seen.clone(),
            "view_offset": self.loader.view_offset.clone(),
            "generator": self.loader.generator.get_state(),
            "autocast": None if self.model.autocast is None else str(self.model.autocast).removeprefix("torch."),
            "fingerprint": weights_digest(self.chain, self.prefix),
            "deltas": self._deltas.state_dict(),
            "history": [dataclasses.asdict(record) for record in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict()`; load the model's own state first.

        Dropped layers are dropped again. Their rows are those of the file that the state names, if it is there and its
        fingerprint is the one of this run, else (RuntimeWarning) they are filled again, through the same cuts.

        Raises ValueError, before anything is changed, when the state is of another model or the dropped layers'
        weights are not those that it was saved with; RuntimeError when layers were already dropped here.
        """
        if missing := STATE - set(state):
            raise ValueError(
                f"DropScheduler.load_state_dict: state must be of DropScheduler.state_dict(), got none of {sorted(missing)}"
            )
        if list(self.chain.names) != state["layers"]:
            raise ValueError(
                "DropScheduler.load_state_dict: state must be of a model with the layers "
                f"{', '.join(self.chain.names)}; got {', '.join(state['layers'])}"
            )
        if len(state["seen"]) != self.loader.size:
            raise ValueError(
                f"DropScheduler.load_state_dict: state must be of a dataset with {self.loader.size} samples, "
                f"got {len(state['seen'])}"
            )
        if self.prefix:
            raise RuntimeError(
                "DropScheduler.load_state_dict: wanted a scheduler that has not dropped yet, call undrop()"
            )
        if weights_digest(self.chain, state["prefix"]) != state["fingerprint"]:
            raise ValueError(
                "DropScheduler.load_state_dict: the dropped layers must have the weights and buffers that the state "
                "was saved with, and they differ; load the model's state_dict first"
            )
        deltas = self._deltas_from(state["prefix"])
        deltas.load_state_dict(state["deltas"])
        history = [record_of(values) for values in state["history"]]
        self.loader.epochs = state["epochs_loaded"]
        self.loader.batches.seen = state["seen"].clone()
        self.loader.view_offset = state["view_offset"].clone()
        self.loader.generator.set_state(state["generator"])
        self.model.autocast = None if state["autocast"] is None else getattr(torch, state["autocast"])
        found = self.keeper.find(state["rows_file"], [0, *state["cuts"]][-1], self.model.autocast)
        for cut in state["cuts"] if found is None else state["cuts"][-1:]:
            self._drop(cut, cut, found)
        self.cuts = list(state["cuts"])
        if state["prefix"] > self.prefix:
            self._drop(state["prefix"], self.cut)
        self._deltas, self.history = deltas, history

    def _deltas_from(self, first: int) -> Deltas:
        layers = [list(self.chain.layer(i).parameters()) for i in range(first, len(self.chain))]
        return Deltas(layers, model=self.base_model)

    def _whole_epoch_seconds(self) -> float:
        """The median of the epochs in which nothing was dropped."""
        before = [0, *(record.prefix for record in self.history)]
        seconds = [*(record.epoch_seconds for record in self.history), self.loader.seconds]
        return statistics.median([s for s, prefix in zip(seconds, before, strict=True) if prefix == 0])

    def _check_trained(self) -> None:
        if self.model.calls == 0:
            raise RuntimeError(
                "drop.step: wanted drop.model to be trained on drop.loader, got an epoch without a call of it"
            )
        self.model.calls = 0
        if self.check_input and self.model.foreign is not None:
            raise RuntimeError(
                "drop.step: drop.model must get the batch's input as drop.loader gave it, got another tensor "
                f"{list(self.model.foreign)}; what the loop does to images it would do to cached rows too: move it "
                "into the dataset or the model, or say check_input=False where it is meant for both"
            )

    def _check_finite(self, changes: Sequence[LayerChange]) -> None:
        for name, change in zip(self.chain.names[self.prefix :], changes, strict=True):
            if change.nonfinite:
                raise ValueError(
                    f"drop.step: weights must be finite, got {change.nonfinite} NaN or inf in layer {name}"
                )

    def _decide(self, situation: Situation) -> Decision:
        decision = self.policy(situation)
        last = len(self.chain) - 1
        if not self.prefix <= decision.prefix <= last:
            raise ValueError(f"drop.step: policy must decide on {self.prefix}..{last} layers, got {decision.prefix}")
        return decision

    def _tiers(self) -> list[costs.TierCost]:
        """What rows cost in each tier now: the speeds are measured once."""
        if not self.keeps_rows:
            return []
        budgets = budgets_of(self.config, self.device)
        if self._speeds is None:
            self._speeds = tier_speeds(budgets, self.config, self.device)
        return tier_costs(budgets, self._speeds)

    def _choices(self, tiers: Sequence[costs.TierCost]) -> list[costs.CutChoice]:
        """For each prefix length, where its rows would be kept."""
        if not self.keeps_rows:
            return [costs.CutChoice(0, 0, "frozen, no rows kept")] * len(self.chain)
        return [
            costs.choose_cut(
                self.costs,
                prefix,
                kept=self.cut,
                rows=self.keeper.count(),
                codec=self.config.codec,
                tiers=tiers,
                augmented=self.config.augmented,
            )
            for prefix in range(len(self.chain))
        ]

    def _estimate(self, prefix: int, cut: int, tiers: Sequence[costs.TierCost]) -> costs.Estimate:
        rows = self.keeper.count()

        def read_seconds(cut: int) -> float:
            shape = self.costs[cut - 1].shape if cut else None
            return 0.0 if shape is None else costs.row_seconds(shape, rows, self.config.codec, tiers) or 0.0

        return costs.estimate(
            self.costs,
            before=(self.prefix, self.cut),
            after=(prefix, cut),
            epoch_seconds=self.loader.seconds,
            samples=self.loader.samples,
            rows=rows,
            read_seconds=(read_seconds(self.cut), read_seconds(cut)),
        )

    def _drop(self, prefix: int, cut: int, found: Rows | None = None) -> int:
        """Fill rows after `cut` layers, freeze `prefix` layers and go on with the rest; the number of rows filled.

        found: rows after `cut` layers that there are already. All that can fail comes before anything that the user
        sees is changed.
        """
        before = self.cut
        rows = found or self.loader.rows
        filled = 0
        share_buffers(self.chain.prefix(prefix).buffers())
        if cut > before and found is None:
            rows = self.keeper.filled(before, cut, self.model.autocast)
            filled = int(rows.cache.filled.sum())
        body = live_body(self.base_model, self.chain, cut, prefix, self.wrap)
        self._frozen.append(freeze(self.base_model, self.chain, prefix))
        if cut > before:
            self.keeper.free()
            self.cuts.append(cut)
        self.loader.rows = rows
        self._deltas.drop_first(prefix - self.prefix)
        self.prefix = prefix
        self._show(body)
        return filled

    def _show(self, body: nn.Module) -> None:
        training = self.model.training
        self.model.body = body
        self.model.train(training)
        self.model.row_shape = self.chain.layer(self.cut - 1).shape if self.cut else None
