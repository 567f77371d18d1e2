"""Loaders with ids: runs that go on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ids_streams import (
    Stream,
    assert_rows,
    begun,
    epochs,
    resumed,
    saved,
    trained,
)

from learndrop_ext import CacheConfig, DropScheduler
from small_training import parts, prefix_rows


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("strings", [False, True])
def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path, after: int, strings: bool) -> None:
    def make(x: torch.Tensor, y: torch.Tensor, i: torch.Tensor) -> Any:
        return x, y, [f"{v}" for v in i.tolist()] if strings else i

    cache = CacheConfig(codec="fp32", store_bytes=1 << 20, store=tmp_path)
    user = Stream(make)
    whole, optimizer = begun(user, cache=cache)
    epochs(whole, optimizer, after)
    torch.save(saved(whole, optimizer), tmp_path / "state.pt")
    order = user.generator.get_state()
    wanted = epochs(whole, optimizer, 5 - after)

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    stream = Stream(make)
    stream.generator.manual_seed(99)  # the first batch holds other samples
    second, other = resumed(stream, state, cache=cache)
    stream.generator.set_state(order)
    got = epochs(second, other, 5 - after)
    for one, two in zip(wanted, got, strict=True):
        assert [list(batch[2]) for batch in one] == [list(batch[2]) for batch in two]
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, two, strict=True))
    for value, before in zip(second._base.parameters(), whole._base.parameters(), strict=True):
        assert torch.equal(value, before)
    assert stream.iterations == 1 + max(0, 2 - after)


def test_a_resumed_run_without_a_file_makes_its_rows_again() -> None:
    first, optimizer = begun(Stream())
    epochs(first, optimizer, 3)
    stream = Stream()
    stream.generator.manual_seed(99)
    second, other = resumed(stream, saved(first, optimizer))
    fill, later = epochs(second, other, 2)
    assert_rows(fill + later, second)
    assert stream.iterations == 2


def test_rows_of_images_that_have_changed_since_the_checkpoint_are_made_anew(tmp_path: Path) -> None:
    cache = CacheConfig(codec="fp32", store_bytes=1 << 20, store=tmp_path)
    first, optimizer = begun(Stream(), cache=cache)
    epochs(first, optimizer, 3)
    stream = Stream()
    stream.images = stream.images + 0.5
    second, other = resumed(stream, saved(first, optimizer), cache=cache)
    with pytest.warns(RuntimeWarning, match="the rows are computed again: the images of some samples"):
        batches = trained(second, other)
    with torch.no_grad():
        rows = second.chain.prefix(2).eval()(stream.images)
    assert all(torch.equal(x, rows[ids]) for x, _, ids in batches)


def test_rows_that_cannot_be_compared_after_a_checkpoint_are_compared_as_images_come_by(tmp_path: Path) -> None:
    cache = CacheConfig(codec="fp32", store_bytes=1 << 20, store=tmp_path)
    first, optimizer = begun(Stream(), cache=cache)
    epochs(first, optimizer, 3)
    stream = Stream(lambda x, y, i: (x, y, i + 1000), shuffle=False)
    second, other = resumed(stream, saved(first, optimizer), cache=cache)
    batches = trained(second, other)
    assert stream.iterations == 2
    rows = prefix_rows(second, 2)
    assert all(torch.equal(x, rows[ids - 1000]) for x, _, ids in batches)


@pytest.mark.parametrize("resumes_ids", [True, False])
def test_a_state_with_ids_and_one_without_are_told_apart(resumes_ids: bool) -> None:
    model, optimizer, loader = parts()
    plain = DropScheduler(model, optimizer, loader, cache="fp32")
    with_ids, _ = begun(Stream())
    one, other = (with_ids, plain) if resumes_ids else (plain, with_ids)
    wanted = "a run with ids=, got one without" if resumes_ids else "without ids=, got one with ids"
    with pytest.raises(ValueError, match=wanted):
        one.load_state_dict(other.state_dict())


def test_a_state_with_ids_of_another_type_is_refused() -> None:
    one, _ = begun(Stream())
    other, _ = begun(Stream(lambda x, y, i: (x, y, [str(v) for v in i])))
    with pytest.raises(ValueError, match="state must be of a run whose ids are str, got int"):
        other.load_state_dict(one.state_dict())


# What is refused


def test_names_in_arrays_of_any_width_are_kept_and_saved(tmp_path: Path) -> None:
    def make(x: torch.Tensor, y: torch.Tensor, i: torch.Tensor) -> Any:
        return x, y, i, np.array([f"photo {v}" for v in i.tolist()])

    stream = Stream(make, shuffle=False)
    first, optimizer = begun(stream)
    epochs(first, optimizer, 3)
    torch.save(saved(first, optimizer), tmp_path / "state.pt")
    second, other = resumed(Stream(make, shuffle=False), torch.load(tmp_path / "state.pt", weights_only=True))
    for one in epochs(second, other, 2):
        for batch in one:
            assert batch[3].tolist() == [f"photo {i}" for i in batch[2].tolist()]
