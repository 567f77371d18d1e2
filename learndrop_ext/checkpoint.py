"""The scheduler's state, saved to and restored from a checkpoint."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from learndrop_ext.forward.statistics import batches_seen
from learndrop_ext.history import record_of

if TYPE_CHECKING:
    from learndrop_ext.scheduler import DropScheduler

STATE = {
    *("layers", "prefix", "cuts", "stored", "epochs_begun", "seen", "view_offset", "generator", "loop"),
    *("weights", "deltas", "history", "epoch", "undropped", "scale", "views"),
}


def state_of(drop: DropScheduler) -> dict[str, Any]:
    """Return the state without model, optimizer and rows; see `DropScheduler.state_dict`."""
    rows = drop._rows
    return {
        "layers": list(drop._chain.names),
        "prefix": drop.prefix,
        "cuts": list(rows.path),
        "stored": rows.save(),
        # What cannot be read by number: the samples by slot, and what is kept beside their rows.
        "rest": None if drop._source.readable else (rows.slots.order(), drop._extras.state()),
        "epochs_begun": drop._loader.epochs,
        "seen": drop._loader.batches.seen.clone(),
        "view_offset": rows.slots.view_offset.clone(),
        "generator": rows.generator.get_state(),
        "loop": drop._guards.loop.describe(),
        "ids": drop._source.state(),
        "weights": drop._guards.checksum(drop.prefix),
        "deltas": drop._deltas.state_dict(),
        "history": [dataclasses.asdict(record) for record in drop.history],
        "epoch": drop.epoch,
        "undropped": drop._undropped,
        "scale": drop._ledger.scale,
        "views": rows.config.views,
    }


def load_state(drop: DropScheduler, state: dict[str, Any]) -> None:
    """Resume from a state; see `DropScheduler.load_state_dict`."""
    _check(drop, state)
    deltas = drop._deltas_from(state["prefix"])
    deltas.load_state_dict(state["deltas"])
    history = [record_of(values) for values in state["history"]]
    body = drop._body(state["prefix"])
    if drop.prefix:
        drop._release()
    rows = drop._rows
    drop._source.load(state.get("ids"))
    rows.renumber(len(drop._source), state["view_offset"], state["views"] if drop._chooses_views else rows.config.views)
    drop._loader.resume(state["epochs_begun"], state["seen"])
    rows.generator.set_state(state["generator"])
    if state["prefix"]:
        drop._guards.loop.resume(state["loop"])
        if state["cuts"]:
            order, extras = state.get("rest") or (None, None)
            drop._ledger.read_budgets()  # before the rows take their memory
            drop._extras.move(drop._ledger.extras_device)
            rows.resume(state["stored"], state["cuts"], drop._ledger.row_shape(state["cuts"][-1]), order=order)
            if extras is not None:
                drop._extras.load(extras)
        drop._freeze(state["prefix"], body)
    drop._deltas, drop._history, drop._norm_batches = deltas, history, batches_seen(drop._base)
    drop._epoch, drop._undropped = state["epoch"], state["undropped"]
    drop._ledger.resume(state["scale"])


def _check(drop: DropScheduler, state: dict[str, Any]) -> None:
    name = "DropScheduler.load_state_dict"
    if missing := STATE - set(state):
        raise ValueError(f"{name}: state must be of DropScheduler.state_dict(), got none of {sorted(missing)}")
    if list(drop._chain.names) != state["layers"]:
        raise ValueError(
            f"{name}: state must be of a model with the layers {', '.join(drop._chain.names)}; "
            f"got {', '.join(state['layers'])}"
        )
    drop._source.check_state(state.get("ids"))
    size = len(drop._rows.slots)
    if drop._source.readable and len(state["seen"]) > size:
        raise ValueError(f"{name}: state must be of a dataset with {size} samples or fewer, got {len(state['seen'])}")
    if drop.prefix and drop._loader.epochs:
        raise RuntimeError(f"{name}: wanted a scheduler that has not trained with dropped layers, call undrop()")
    if state["prefix"] and drop._guards.checksum(state["prefix"]) != state["weights"]:
        raise ValueError(
            f"{name}: the dropped layers must have the weights and buffers that the state was saved with, and they "
            "differ; load the model's state_dict first"
        )
