"""The scheduler's state, saved to and restored from a checkpoint."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from learndrop_ext.cache.fingerprint import weights_digest
from learndrop_ext.graph.live import live_body
from learndrop_ext.history import record_of

if TYPE_CHECKING:
    from learndrop_ext.scheduler import DropScheduler

STATE = {
    *("layers", "prefix", "cuts", "rows_file", "epochs_begun", "seen", "view_offset", "generator", "autocast"),
    *("example_ids", "weights", "deltas", "history", "epoch", "undropped", "scale", "views"),
}


def state_of(drop: DropScheduler) -> dict[str, Any]:
    """Return the state without model, optimizer and rows; see `DropScheduler.state_dict`."""
    autocast = drop.model.autocast
    return {
        "layers": list(drop.chain.names),
        "prefix": drop.prefix,
        "cuts": list(drop.rows.cuts),
        "rows_file": drop.rows.save(),
        "epochs_begun": drop.loader.epochs,
        "seen": drop.loader.batches.seen.clone(),
        "view_offset": drop.rows.slots.view_offset.clone(),
        "generator": drop.rows.generator.get_state(),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
        "example_ids": drop.rows.example_ids,
        "ids": drop.rows.source.state(),
        "weights": weights_digest(drop.chain, drop.prefix),
        "deltas": drop._deltas.state_dict(),
        "history": [dataclasses.asdict(record) for record in drop.history],
        "epoch": drop.epoch,
        "undropped": drop._undropped,
        "scale": drop.ledger.costs.scale,
        "views": drop.config.views,
    }


def load_state(drop: DropScheduler, state: dict[str, Any]) -> None:
    """Resume from a state; see `DropScheduler.load_state_dict`."""
    _check(drop, state)
    deltas = drop._deltas_from(state["prefix"])
    deltas.load_state_dict(state["deltas"])
    history = [record_of(values) for values in state["history"]]
    if drop.prefix:
        drop._release()
    drop.loader.epochs = state["epochs_begun"]
    drop.rows.source.load(state.get("ids"))
    drop.rows.renumber(state["view_offset"], state["views"] if drop._chooses_views else drop.config.views)
    drop.loader.batches.load(state["seen"])
    drop.rows.generator.set_state(state["generator"])
    drop.model.autocast = None if state["autocast"] is None else getattr(torch, state["autocast"])
    drop.rows.set_autocast(drop.model.autocast)
    if state["prefix"]:
        body = live_body(drop.base_model, drop.chain, [0, *state["cuts"]][-1], state["prefix"], drop.wrap)
        if state["cuts"]:
            drop.rows.find(state["rows_file"], state["cuts"], state["example_ids"])
        drop._freeze(state["prefix"], body)
    drop._deltas, drop.history = deltas, history
    drop.epoch, drop._undropped, drop.ledger.costs.scale = state["epoch"], state["undropped"], state["scale"]


def _check(drop: DropScheduler, state: dict[str, Any]) -> None:
    name = "DropScheduler.load_state_dict"
    if missing := STATE - set(state):
        raise ValueError(f"{name}: state must be of DropScheduler.state_dict(), got none of {sorted(missing)}")
    if list(drop.chain.names) != state["layers"]:
        raise ValueError(
            f"{name}: state must be of a model with the layers {', '.join(drop.chain.names)}; "
            f"got {', '.join(state['layers'])}"
        )
    drop.rows.source.check_state(state.get("ids"))
    size = len(drop.rows.slots)
    if drop.rows.source.readable and len(state["seen"]) > size:
        raise ValueError(f"{name}: state must be of a dataset with {size} samples or fewer, got {len(state['seen'])}")
    if drop.prefix and drop.loader.epochs:
        raise RuntimeError(f"{name}: wanted a scheduler that has not trained with dropped layers, call undrop()")
    if weights_digest(drop.chain, state["prefix"]) != state["weights"]:
        raise ValueError(
            f"{name}: the dropped layers must have the weights and buffers that the state was saved with, and they "
            "differ; load the model's state_dict first"
        )
