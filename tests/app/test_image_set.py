from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from learndrop_ext.app.image_set import ImageSet, collate_batch, make_loader


def small_set(n: int = 6, *, augment: str | None = None, flip: bool = True, pixels: int = 8) -> ImageSet:
    values = torch.randint(
        0, 256, (n, 3, pixels, pixels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return ImageSet(
        values,
        torch.arange(n),
        mean=(0.5, 0.25, 0.0),
        std=(0.5, 0.25, 1.0),
        augment=augment,
        flip=flip,
    )


def test_image_set_normalises() -> None:
    images = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).view(2, 2, 1, 1)
    data = ImageSet(images, torch.tensor([3, 7]), mean=(0.0, 0.2), std=(1.0, 0.4))
    x, y = data.__getitems__([1, 0])
    assert x.dtype == torch.float32
    # (102 / 255 - 0) / 1, (255 / 255 - 0.2) / 0.4; (0 / 255 - 0) / 1, (51 / 255 - 0.2) / 0.4
    assert torch.allclose(x.flatten(), torch.tensor([0.4, 2.0, 0.0, 0.0]), atol=1e-6)
    assert y.tolist() == [7, 3]
    image, label = data[1]
    assert torch.equal(image, x[0])
    assert (label.dtype, label.item(), label.shape) == (torch.int64, 7, ())


@pytest.mark.parametrize("ids", [[6], [-1], [0, 99]])
def test_image_set_refuses_ids_outside(ids: list[int]) -> None:
    with pytest.raises(IndexError, match=rf"^ImageSet: ids must be in \[0, 6\), got {ids[-1]}$"):
        small_set().__getitems__(ids)
    with pytest.raises(IndexError, match=r"ids must be in \[0, 6\)"):
        small_set()[ids[-1]]


def test_image_set_refuses_fractions() -> None:
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        small_set()[1.5]


def test_image_set_iterates_to_its_end() -> None:
    assert [int(label) for _, label in small_set()] == [0, 1, 2, 3, 4, 5]


PIXELS = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("images", "labels", "arguments", "message"),
    [
        (
            PIXELS.float(),
            LABELS,
            {},
            r"images must be uint8 \[N, C, H, W\], got torch.float32 \[2, 1, 4, 4\]",
        ),
        (PIXELS[0], LABELS, {}, r"images must be uint8 \[N, C, H, W\], got torch.uint8 \[1, 4, 4\]"),
        (PIXELS, LABELS[:1], {}, r"labels must be int64 \[2\], got torch.int64 \[1\]"),
        (PIXELS, LABELS.int(), {}, r"labels must be int64 \[2\], got torch.int32 \[2\]"),
        (
            PIXELS,
            LABELS,
            {"mean": (0.0,) * 3},
            r"mean and std \(> 0\) must have 1 values, got \(0.0, 0.0, 0.0\), ",
        ),
        (PIXELS, LABELS, {"std": (0.0,)}, r"mean and std \(> 0\) must have 1 values, got \(0.0,\), \(0.0,\)"),
        (PIXELS, LABELS, {"augment": "strong"}, r"augment must be None, 'standard', 'flip' or 'crop', got 'strong'"),
    ],
)
def test_image_set_refuses(images: Tensor, labels: Tensor, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^ImageSet: {message}"):
        ImageSet(images, labels, **{"mean": (0.0,), "std": (1.0,), **arguments})


def shifted(image: Tensor, dy: int, dx: int) -> Tensor:
    """``image`` [C, H, W] moved down by ``dy`` and right by ``dx``, zero where nothing came."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    kept = image[:, max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)]
    out[:, max(dy, 0) : height - max(-dy, 0), max(dx, 0) : width - max(-dx, 0)] = kept
    return out


@pytest.mark.parametrize(("pixels", "reach"), [(8, 1), (16, 2), (40, 4)])
@pytest.mark.parametrize("flip", [True, False])
def test_image_set_standard_augmentation_shifts_and_flips(pixels: int, reach: int, flip: bool) -> None:
    data = small_set(1, augment="standard", flip=flip, pixels=pixels)
    plain = data.images[0]
    torch.manual_seed(0)
    x, y = data.__getitems__([0] * 64)
    views = (x * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)) * 255
    moves = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
    allowed = {}
    for dy, dx in moves:
        moved = shifted(plain, dy, dx)
        allowed[moved.numpy().tobytes()] = (dy, dx, False)
        if flip:
            allowed[moved.flip(2).numpy().tobytes()] = (dy, dx, True)
    seen = [allowed[view.round().to(torch.uint8).numpy().tobytes()] for view in views]
    assert y.tolist() == [0] * 64
    assert {dy for dy, _, _ in seen} == set(range(-reach, reach + 1))
    assert {dx for _, dx, _ in seen} == set(range(-reach, reach + 1))
    assert {flipped for _, _, flipped in seen} == ({True, False} if flip else {False})
    assert x.is_contiguous()


def test_image_set_augmentation_follows_torch_seed() -> None:
    data = small_set(augment="standard")
    torch.manual_seed(1)
    first = data.__getitems__(range(6))[0]
    second = data.__getitems__(range(6))[0]
    torch.manual_seed(1)
    assert torch.equal(data.__getitems__(range(6))[0], first)
    assert not torch.equal(first, second)


def test_image_set_augmented_shares_the_images() -> None:
    data = small_set()
    changed = data.augmented()
    assert changed.augment == "standard"
    assert changed.images is data.images
    assert changed.augmented(None).augment is None
    assert repr(data) == "ImageSet(6 of 3x8x8, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0), augment=None)"
    assert repr(changed).endswith("augment=standard, flip)")


def test_image_set_offers_its_images_to_a_store_by_values_or_files(tmp_path: Path) -> None:
    data = small_set()
    assert data.data is data.images
    assert not hasattr(data, "samples")
    files = ImageSet([tmp_path / "a"], torch.tensor([3]), mean=[0.5] * 3, std=[1.0] * 3)
    assert files.samples == [(tmp_path / "a", 3)]
    assert not hasattr(files, "data")


def test_image_set_to_moves_everything() -> None:
    moved = small_set().to("meta")
    assert moved.device.type == "meta"
    x, y = moved.__getitems__([0, 5])
    assert (x.device.type, y.device.type, x.shape) == ("meta", "meta", (2, 3, 8, 8))


@pytest.mark.cuda
def test_image_set_on_cuda_equals_cpu() -> None:
    data = small_set(pixels=32)
    there = data.to("cuda")
    for (x, y), (there_x, there_y) in zip(make_loader(data, 4), make_loader(there, 4), strict=True):
        assert there_x.is_cuda
        assert torch.equal(x, there_x.cpu())
        assert torch.equal(y, there_y.cpu())
    augmented, _ = there.augmented().__getitems__([0] * 32)
    assert augmented.is_cuda
    assert len({view.cpu().numpy().tobytes() for view in augmented}) > 16
    with pytest.raises(IndexError, match=r"^ImageSet: ids must be in \[0, 6\), got 6$"):
        there.__getitems__([6])


def test_make_loader_gives_whole_batches() -> None:
    batches = list(make_loader(small_set(), 4))
    assert [(tuple(x.shape), y.tolist()) for x, y in batches] == [
        ((4, 3, 8, 8), [0, 1, 2, 3]),
        ((2, 3, 8, 8), [4, 5]),
    ]
    assert len(list(make_loader(small_set(), 4, drop_last=True))) == 1


def test_make_loader_shuffles_by_its_own_seed() -> None:
    def order(seed: int | None) -> list[int]:
        return [int(i) for _, y in make_loader(small_set(64), 16, shuffle=True, seed=seed) for i in y]

    state = torch.get_rng_state()
    assert order(3) == order(3)
    assert order(3) != order(4)
    assert sorted(order(3)) == list(range(64))
    assert torch.equal(torch.get_rng_state(), state)
    assert order(None) != order(None)


def test_make_loader_refuses_workers_off_the_cpu() -> None:
    with pytest.raises(ValueError, match=r"^make_loader: num_workers must be 0 for a set on meta, got 2$"):
        make_loader(small_set().to("meta"), 4, num_workers=2)


class OneByOne(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, data: ImageSet) -> None:
        self.data = data

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.data[index]

    def __len__(self) -> int:
        return len(self.data)


@pytest.mark.parametrize("wrap", [OneByOne, lambda data: Subset(data, range(6))])
def test_collate_batch_serves_wrapped_sets(wrap: type[OneByOne]) -> None:
    data = small_set()
    (x, y), _ = DataLoader(wrap(data), 4, collate_fn=collate_batch)
    wanted: Sequence[Tensor] = data.__getitems__([0, 1, 2, 3])
    assert torch.equal(x, wanted[0])
    assert torch.equal(y, wanted[1])


def test_subset_has_the_images_asked_for() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    whole = ImageSet(images, torch.arange(5), mean=(0.0,), std=(1.0,), augment="standard", flip=False)
    few = whole.subset([3, 1])
    assert few.labels.tolist() == [3, 1]
    assert torch.equal(torch.as_tensor(few.images), images[[3, 1]])
    assert (few.augment, few.flip, few.size) == ("standard", False, 2)
    files = ImageSet([Path("a"), Path("b"), Path("c")], torch.arange(3), mean=(0.0,) * 3, std=(1.0,) * 3)
    assert files.subset(range(2)).images == (Path("a"), Path("b"))


def test_image_set_normalized_reads_the_same_pixels_with_another_mean() -> None:
    data = small_set()
    other = data.normalized((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert torch.allclose(other[2][0] * 255, data.images[2].float(), atol=1e-4)
    assert data.mean == (0.5, 0.25, 0.0)


def test_image_set_resized() -> None:
    data = small_set(3, augment="standard", flip=False)
    larger = data.resized(16)
    assert isinstance(larger.images, Tensor)
    assert (larger.images.shape, larger.images.dtype, larger.size) == ((3, 3, 16, 16), torch.uint8, 16)
    assert (larger.augment, larger.flip, len(data.images[0, 0])) == ("standard", False, 8)
    # Twice the size: the middle of four pixels lies a quarter and three quarters between two.
    row = data.images[0, 0].float()
    column = 0.75 * row[:, 3] + 0.25 * row[:, 4]
    wanted = 0.75 * column[3] + 0.25 * column[4]
    assert abs(float(larger.images[0, 0, 7, 7]) - float(wanted)) <= 1
    assert torch.equal(larger.resized(16).images, larger.images)


def test_image_set_bytes_decoded() -> None:
    assert small_set(6, pixels=8).bytes_decoded == 6 * 3 * 8 * 8


def test_image_set_flip_mirrors_half_of_the_images_and_no_more() -> None:
    data = small_set(64).augmented("flip").normalized((0.0,) * 3, (1 / 255,) * 3)
    torch.manual_seed(0)
    x, _ = data.__getitems__(range(64))
    whole = data.images.float()
    kept = torch.isclose(x, whole, atol=1e-3).flatten(1).all(1)
    mirrored = torch.isclose(x, whole.flip(3), atol=1e-3).flatten(1).all(1)
    assert bool((kept ^ mirrored).all())
    assert 20 < int(kept.sum()) < 44


@pytest.mark.parametrize("from_files", [False, True])
def test_image_set_crop_scales_a_window_to_the_image(from_files: bool, tmp_path: Path) -> None:
    # Red grows from left to right and green from top to bottom, so that the corners of a crop say where it was.
    ramp = torch.arange(64.0).mul(4)
    image = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)]).to(torch.uint8)
    pytest.importorskip("PIL.Image").fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    images = [tmp_path / "a.png"] if from_files else image[None]
    pixels = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "size": 64}
    data = ImageSet(images, torch.zeros(1, dtype=torch.int64), augment="crop", **pixels)
    torch.manual_seed(0)
    x, _ = data.__getitems__([0] * 256)
    assert (x.shape, x.dtype) == ((256, 3, 64, 64), torch.float32)
    width, height = (x[:, 0, 0, -1] - x[:, 0, 0, 0]) / 252, (x[:, 1, -1, 0] - x[:, 1, 0, 0]) / 252
    area, ratio = width.abs() * height, width.abs() / height
    assert 0.07 < float(area.min()) < 0.15
    assert 0.9 < float(area.max()) < 1.02
    assert 0.72 < float(ratio.min()) < 0.8
    assert 1.25 < float(ratio.max()) < 1.38
    assert 96 < int((width < 0).sum()) < 160
    assert bool(((x > -0.01) & (x < 252.01)).all())
    unflipped = ImageSet(images, torch.zeros(1, dtype=torch.int64), augment="crop", flip=False, **pixels)
    assert bool((unflipped.__getitems__([0] * 64)[0].diff(dim=3)[:, 0] >= -0.01).all())
