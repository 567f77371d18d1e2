"""Whether rows are still what the model and the dataset would give, checked at the start of each epoch."""

from __future__ import annotations

import warnings

import torch

from learndrop_ext.data.extras import input_of
from learndrop_ext.data.fill import frozen_pass, rows_agree
from learndrop_ext.data.rowset import RowSet
from learndrop_ext.data.slots import filled_at
from learndrop_ext.graph.freeze import FrozenPrefix
from learndrop_ext.rng import fork_rng

#: Samples that are read again at each epoch.
PROBES = 4
#: How often they are read where the dataset is random: an entry that changes with p = 0.5 is known as random by 4
#: samples in all but one of 2^12 cases.
READINGS = 4
#: What a codec may change of a row, as a share of its largest value.
CODEC_ERROR = {"fp32": 0.0, "fp16": 1e-3, "bf16": 1e-2, "uint8": 1e-2}


def follow_model(rows: RowSet) -> None:
    """Have the rows made anew, with a RuntimeWarning, where a dropped layer's weights, buffers or attributes have
    changed.

    Raises:
        RuntimeError: a dropped layer that did not train is asked to now.
    """
    frozen = rows.frozen
    if frozen is None:
        return
    frozen.hold_eval()
    if woken := frozen.first_woken():
        raise RuntimeError(
            f"drop.loader: the parameters of {woken} are to train (requires_grad, and in the optimizer), and the layer "
            "is dropped: call drop.undrop() to train all layers, or leave them as they were"
        )
    if changed := frozen.first_changed_value():
        frozen.accept()
        _make_anew(rows, f"the weights or buffers of the dropped layer {changed} have changed")
    elif moved := frozen.first_changed_attribute():
        same = _attributes_do_not_matter(rows, frozen)
        frozen.accept()
        if not same:
            _make_anew(rows, moved)


def follow_data(rows: RowSet, epoch: int) -> None:
    """Have the rows made anew, with a RuntimeWarning, where a few samples are no longer what the dataset gives.

    Raises:
        RuntimeError: images have another shape than those that the model was split for.
    """
    if changed := _first_difference(rows, epoch):
        _make_anew(rows, f"{changed} of some samples are no longer what the dataset gave when their rows were made")


def _make_anew(rows: RowSet, reason: str) -> None:
    if rows.cache is not None and bool(rows.cache.filled.any()):
        warnings.warn(f"drop.loader: the rows are made anew: {reason}", RuntimeWarning, stacklevel=5)
    rows.forget()


def _attributes_do_not_matter(rows: RowSet, frozen: FrozenPrefix) -> bool:
    """Whether the frozen layers make the same rows of the example, to the bit, with their attributes as they are and as
    they were: a dropout rate or a momentum says nothing in eval mode."""
    segment = rows.chain.prefix(rows.cut)
    with fork_rng(0), frozen_pass(segment, rows.autocast, rows.device):
        now = segment(rows.example)
        with frozen.attributes_as_accepted() as possible:
            return possible and torch.equal(segment(rows.example), now)


def _first_difference(rows: RowSet, epoch: int) -> str | None:
    """What of a few samples is no longer what the dataset gives, None where nothing is.

    Labels and all else in a batch are compared to the bit, rows (of a dataset without randomness) with what the frozen
    layers make of the images now.
    """
    if rows.cache is None or not rows.stores:
        return None
    kept = rows.slots.drawn()
    kept = kept[filled_at(rows.cache, rows.slots.places(kept, epoch))]
    if not len(kept):
        return None
    chosen = torch.randint(len(kept), (PROBES,), generator=torch.Generator().manual_seed(rows.seed + epoch))
    ids = kept[chosen].unique()
    at = rows.slots.places(ids, epoch)
    batch = rows.read(ids, epoch)
    shape, wanted = list(input_of(batch, rows.key).shape[1:]), list(rows.example.shape[1:])
    if shape != wanted:
        raise RuntimeError(
            f"drop.loader: images must keep their shape {wanted} while layers are dropped, got {shape}; call "
            "drop.undrop() and make a new DropScheduler for images of another size"
        )
    if rows.views > 1 and not rows.config.mirror:
        others = [rows.read(ids, epoch + i) for i in range(1, READINGS)]
        return rows.extras.first_difference(batch, at, others)
    made, stored = rows.made_of(batch, ids, epoch), rows.cache.gather(at)
    if rows.config.codec == "fp16":
        made = made.clamp(-65504, 65504)
    if not rows_agree(made, stored, rows.autocast, error=CODEC_ERROR[rows.config.codec]):
        return "the images"
    return rows.extras.first_difference(batch, at)
