"""Filling a cache: images, or rows of an earlier drop, through the newly frozen layers; and the checks before it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from learndrop_ext.cache.cache import ActivationCache
from learndrop_ext.data.extras import BatchExtras, InputKey, input_of, to_device
from learndrop_ext.graph.chain import Layer, Segment
from learndrop_ext.rng import fork_rng


@contextlib.contextmanager
def frozen_pass(segment: Segment, autocast: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Eval mode, no gradients, and the autocast of the training step; the training flags come back on leaving."""
    flags = [(m, m.training) for m in segment.modules()]
    for module, _ in flags:
        module.training = False
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            yield
    finally:
        for module, training in flags:
            module.training = training


def read_batch(loader: DataLoader[Any], ids: Sequence[int]) -> Any:
    """The batch that the loader would make of these samples, read in this process."""
    dataset: Any = loader.dataset
    many = getattr(dataset, "__getitems__", None)
    samples = many(list(ids)) if callable(many) else [dataset[i] for i in ids]
    return loader.collate_fn(samples)


def same_image_each_time(loader: DataLoader[Any], key: InputKey, *, probes: int = 16) -> bool:
    """Whether a few samples, read three times, give the same model input each time. The run's random state stays."""
    size = len(loader.dataset)  # type: ignore[arg-type]
    probes = min(probes, size)
    ids = [i * size // probes for i in range(probes)]
    with fork_rng(0):
        first, *again = [input_of(read_batch(loader, ids), key).clone() for _ in range(3)]
    return all(first.shape == other.shape and torch.equal(first, other) for other in again)


def check_purity(segment: Segment, x: torch.Tensor, model: nn.Module, autocast: torch.dtype | None) -> None:
    """Raise ValueError naming the module whose rows depend on the other samples of a batch or on the random state.

    x: [B, ...], a batch of the segment's inputs, B >= 1. The first half is run twice: beside the other half and beside
    itself, from two random states. Equal means within 1e-3 of the largest value, 2e-2 where 16-bit arithmetic is used.
    The module named is the innermost that makes different rows of equal ones.
    """
    if len(x) == 1:
        x = torch.cat([x, torch.zeros_like(x)])
    half = len(x) // 2
    others = torch.cat([x[:half], x[:half], x[2 * half :]])
    with frozen_pass(segment, autocast, x.device):
        first, second = (_seen_rows(segment, batch, half, seed) for seed, batch in enumerate((x, others)))
    layers = [m for m in segment.layers if isinstance(m, Layer)]
    names: dict[nn.Module, str] = {m: f"{name} ({type(m).__name__})" for name, m in model.named_modules()}
    names |= {part: f"layer {m.name}" for m in layers for part in (m, m.train_graph, m.eval_graph)}
    for module, (came, left) in first.items():
        came_again, left_again = second.get(module, (came, left))
        if _alike(came, came_again, autocast) and not _alike(left, left_again, autocast):
            raise ValueError(
                "DropScheduler: the rows of a dropped layer must be a function of the sample alone, and those of "
                f"{names.get(module, type(module).__name__)} change with the other samples of the "
                "batch or the random state, in eval mode too; drop only the layers before it"
            )


def _seen_rows(
    segment: Segment, batch: torch.Tensor, half: int, seed: int
) -> dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """What enters and what leaves each module for the first half of a batch, the innermost modules first."""
    came: dict[nn.Module, torch.Tensor] = {}
    seen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def is_rows(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == len(batch)

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and is_rows(inputs[0]):
            came[module] = inputs[0][:half].clone()

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        if module in came and is_rows(output):
            seen[module] = came[module], output[:half].clone()

    hooks = [h for m in segment.modules() for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        with fork_rng(seed):
            segment(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _alike(wanted: torch.Tensor, got: torch.Tensor, autocast: torch.dtype | None) -> bool:
    if not wanted.is_floating_point():
        return torch.equal(wanted, got)
    relative = 2e-2 if autocast is not None or wanted.dtype.itemsize == 2 else 1e-3
    bound = relative * float(wanted.abs().max()) if wanted.numel() else 0.0
    return bool((((wanted - got).abs() <= bound) | (wanted == got) | (wanted.isnan() & got.isnan())).all())


def fill_from_images(
    loader: DataLoader[Any],
    ids: torch.Tensor,
    slots: torch.Tensor,
    segment: Segment,
    cache: ActivationCache,
    rest: BatchExtras,
    *,
    views: int,
    batch_size: int,
    seed: int,
    autocast: torch.dtype | None,
    workers: bool = True,
) -> None:
    """Read the samples `ids` [n] once per view and keep the rows that leave the segment at slots * views + view.

    ids, slots: [n] int64 (CPU). The samples are read by the loader's workers (not for a few: workers=False) and
    collate_fn; `seed` fixes the random state they see, so that the same call fills the same rows again, and the run's
    own random state stays.
    """
    groups = list(zip(ids.split(batch_size), slots.split(batch_size), strict=True))
    reader = rebuilt(loader, [group.tolist() for group, _ in groups], fill_seed=seed, workers=workers)
    with fork_rng(seed), frozen_pass(segment, autocast, cache.device):
        for view in range(views):
            for (_, where), batch in zip(groups, reader, strict=True):
                at = where * views + view
                batch = to_device(batch, cache.device)
                rest.put(batch, at)
                cache.append(at, segment(input_of(batch, rest.key)))


def fill_from_rows(
    old: ActivationCache, segment: Segment, cache: ActivationCache, *, batch_size: int, autocast: torch.dtype | None
) -> None:
    """Run the rows of an earlier drop through the newly dropped layers: no image is read."""
    filled = torch.nonzero(old.filled).flatten()
    with frozen_pass(segment, autocast, cache.device):
        for at in filled.split(batch_size):
            cache.append(at, segment(old.gather(at)))


def rebuilt(
    loader: DataLoader[Any], batch_sampler: Any, *, fill_seed: int | None = None, workers: bool = True
) -> DataLoader[Any]:
    """The user's loader with another batch sampler and everything else as it was.

    For a fill (fill_seed) its generator is one of its own, so that the user's does not move, and no worker outlives it.
    """
    generator = loader.generator if fill_seed is None else torch.Generator().manual_seed(fill_seed)
    options: dict[str, Any] = {}
    if loader.num_workers > 0 and workers:
        options = {
            "num_workers": loader.num_workers,
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers and fill_seed is None,
            "multiprocessing_context": loader.multiprocessing_context,
            "timeout": loader.timeout,
        }
    return DataLoader(
        loader.dataset,
        batch_sampler=batch_sampler,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=generator,
        **options,
    )
