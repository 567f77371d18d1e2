"""Check at each epoch that rows are still what the model computes from the data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from learndrop_ext.data.extras import input_of, some_of
from learndrop_ext.data.fill import frozen_pass, rows_agree
from learndrop_ext.data.rowset import RowSet
from learndrop_ext.data.slots import filled_at
from learndrop_ext.graph.chain import difference_now, split_layers
from learndrop_ext.graph.freeze import FrozenPrefix
from learndrop_ext.graph.layers import same_layers
from learndrop_ext.rng import fork_rng

#: Samples that are read again at each epoch.
PROBES = 4
#: How often they are read if the dataset is random. An entry that changes with p = 0.5 passes for constant if 3 further
#: readings of 4 samples do not change it: once in 2^12 times.
READINGS = 4
#: The largest error of a codec, as a share of a row's largest value.
CODEC_ERROR = {"fp32": 0.0, "fp16": 1e-3, "bf16": 1e-2, "uint8": 1e-2}


def follow_model(rows: RowSet) -> None:
    """Discard the rows, with a RuntimeWarning, if a dropped layer's weights, buffers or attributes have changed.

    Raises:
        RuntimeError: a parameter of a dropped layer has been set to train.
    """
    frozen = rows.frozen
    if frozen is None:
        return
    frozen.hold_eval()
    if woken := frozen.first_woken():
        raise RuntimeError(
            f"drop.loader: the parameters of {woken} have been set to train (by requires_grad or by adding them to the "
            "optimizer), but the layer is dropped: call drop.undrop() to train all layers, or leave them as they were"
        )
    if changed := frozen.first_changed_value():
        frozen.accept()
        _recompute(rows, f"the weights or buffers of the dropped layer {changed} have changed")
    elif moved := frozen.first_changed_attribute():
        same = _attributes_do_not_matter(rows, frozen)
        frozen.accept()
        if not same:
            _recompute(rows, moved)


def follow_code(
    rows: RowSet,
    where: str,
    *,
    run: bool,
    layers: Sequence[str] | None,
    inputs: tuple[Sequence[Any], Mapping[str, Any]] | None,
) -> bool:
    """Split the model again if its forward has changed. Discard the rows, with a RuntimeWarning, if the dropped layers did.

    Args:
        rows: the run's rows; their chain is replaced.
        where: "loader" or "step", for messages.
        run: also run the model and the chain and compare their outputs, not only what forward reads from its modules.
        layers, inputs: the arguments of `split_layers`.

    Returns:
        Whether the model was split again.

    Raises:
        RuntimeError: the model now has other layers.
    """
    changed = rows.chain.stale() or (difference_now(rows.chain, rows.model) if run else None)
    if changed is None:
        return False
    chain = split_layers(rows.model, rows.example, layers=layers, inputs=inputs)
    if chain.names != rows.chain.names:
        raise RuntimeError(f"drop.{where}: the model must keep its layers, got other layers: {changed}")
    same = same_layers(rows.chain, chain, rows.cut)
    rows.chain = chain
    if rows.cuts and not same:
        warnings.warn(f"drop.{where}: the rows are computed again: {changed}", RuntimeWarning, stacklevel=5)
        rows.find(None, rows.cuts)
    return True


def follow_data(rows: RowSet, epoch: int) -> None:
    """Read a few samples again. Discard the rows, with a RuntimeWarning, if one has changed.

    Does nothing if samples cannot be read by number; see `follow_batch`.

    Raises:
        RuntimeError: the shape of the images has changed.
    """
    if not rows.source.readable or not rows.stores:
        return
    kept = rows.slots.drawn()
    kept = kept[filled_at(rows.cache, rows.slots.places(kept, epoch))]
    if not len(kept):
        return
    chosen = torch.randint(len(kept), (PROBES,), generator=torch.Generator().manual_seed(rows.seed + epoch))
    ids = kept[chosen].unique()
    batch = rows.read(ids, epoch)
    _check_shape(rows, batch)
    others: list[Any] = []
    if _has_random_views(rows):
        others = [rows.read(ids, epoch + i) for i in range(1, READINGS)]
    if changed := _first_difference(rows, batch, ids, epoch, others):
        _recompute(rows, changed)


def follow_batch(rows: RowSet, batch: Any, ids: torch.Tensor, epoch: int, again: torch.Tensor | None = None) -> bool:
    """Compare a few samples of a batch of images with their rows, as `follow_data` does. Random views are not compared.

    Args:
        rows: the run's rows.
        batch: the images of samples `ids`, on the device.
        ids: [B].
        epoch: number of epochs begun.
        again: [n] positions in the batch of ids that came before in this epoch; these are compared first.

    Returns:
        Whether any sample of the batch has a row, so that a change could be seen.

    Raises:
        RuntimeError: the shape of the images has changed.
        ValueError: an id stands for two samples in one epoch.
    """
    _check_shape(rows, batch)
    there = torch.nonzero(filled_at(rows.cache, rows.slots.places(ids, epoch))).flatten()
    if not len(there):
        return False
    if _has_random_views(rows):
        return True
    repeated = there if again is None else there[torch.isin(there, again)]
    among = repeated if again is not None and len(repeated) else there
    generator = torch.Generator().manual_seed(rows.seed + epoch)
    take = among[torch.randperm(len(among), generator=generator)[:PROBES]]
    part = some_of(batch, take, key=rows.key, like=rows.like)
    if changed := _first_difference(rows, part, ids[take], epoch, ()):
        if again is not None and len(repeated):
            raise ValueError(
                "drop.loader: an id must stand for one sample, got two samples with the same id in one iteration over "
                "loader; give each sample an id of its own, and views=V where it is another image each time"
            )
        _recompute(rows, changed, stacklevel=6)
    return True


def _recompute(rows: RowSet, reason: str, *, stacklevel: int = 5) -> None:
    if rows.cache is not None and bool(rows.cache.filled.any()):
        warnings.warn(f"drop.loader: the rows are computed again: {reason}", RuntimeWarning, stacklevel=stacklevel)
    rows.forget()


def _attributes_do_not_matter(rows: RowSet, frozen: FrozenPrefix) -> bool:
    """Whether the frozen layers compute the same rows, to the bit, with their attributes as they are and as they were. In
    eval mode a dropout rate or a momentum makes no difference."""
    segment = rows.chain.prefix(rows.cut)
    with fork_rng(0), frozen_pass(segment, rows.autocast, rows.device):
        now = segment(rows.example)
        with frozen.attributes_as_accepted() as possible:
            return possible and torch.equal(segment(rows.example), now)


def _has_random_views(rows: RowSet) -> bool:
    return rows.views > 1 and not rows.config.mirror


def _check_shape(rows: RowSet, batch: Any) -> None:
    shape, wanted = list(input_of(batch, rows.key).shape[1:]), list(rows.example.shape[1:])
    if shape != wanted:
        raise RuntimeError(
            f"drop.loader: images must keep their shape {wanted} while layers are dropped, got {shape}; call "
            "drop.undrop() and make a new DropScheduler for images of another size"
        )


def _first_difference(rows: RowSet, batch: Any, ids: torch.Tensor, epoch: int, others: Sequence[Any]) -> str | None:
    """Say what has changed of some samples with rows, or return None.

    Labels and all else in a batch are compared to the bit; rows, unless samples are random, with what the frozen layers
    compute from the images now. others: further readings of random samples.
    """
    assert rows.cache is not None
    at = rows.slots.places(ids, epoch)
    changed = None
    if not _has_random_views(rows):
        made, stored = rows.made_of(batch, ids, epoch), rows.cache.gather(at)
        if rows.config.codec == "fp16":
            made = made.clamp(-65504, 65504)
        if not rows_agree(made, stored, rows.autocast, error=CODEC_ERROR[rows.config.codec]):
            changed = "the images"
    if changed is None and bool(filled_at(rows.extras, at).all()):  # not those of shared rows that were not drawn yet
        changed = rows.extras.first_difference(batch, at, others)
    return changed and f"{changed} of some samples are no longer what the dataset gave when their rows were computed"
