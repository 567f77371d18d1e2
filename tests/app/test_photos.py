from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from learndrop_ext.app.image_files import IntegrityError
from learndrop_ext.app.photos import PHOTO_SUFFIXES, list_class_folders, read_photo


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def test_list_class_folders(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.jpg", "b/1.JPEG", "b/.DS_Store", "b/Thumbs.db", "a/1.png", "readme.txt", ".cache/x.txt")
    assert list_class_folders(tmp_path) == {
        "a": (tmp_path / "a/1.png",),
        "b": (tmp_path / "b/1.JPEG", tmp_path / "b/2.jpg"),
    }
    assert list(list_class_folders(tmp_path, classes=("b", "a"))) == ["a", "b"]


@pytest.mark.parametrize(
    ("classes", "problem"),
    [
        (("a", "b", "c"), "3 class folders of the training part, got c missing"),
        (("a",), "1 class folders of the training part, got b unknown"),
        (("a", "c"), "2 class folders of the training part, got c missing and b unknown"),
        ("abcdefghi", "9 class folders of the training part, got c, d, e, f, g and 2 more missing"),
    ],
)
def test_list_class_folders_names_classes_that_differ(tmp_path: Path, classes: tuple[str, ...], problem: str) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    with pytest.raises(IntegrityError, match=f"^{re.escape(f'{tmp_path}: must hold the {problem}')}$"):
        list_class_folders(tmp_path, classes=classes)


@pytest.mark.parametrize(
    ("names", "where", "problem"),
    [
        ([], "", "must hold one folder a class, got none"),
        (["a/1.jpg", "b/.hidden"], "b", f"must hold photos ({', '.join(PHOTO_SUFFIXES)}), got none"),
        (["a/1.jpg", "a/notes.txt"], "a/notes.txt", "a class folder must hold photos only"),
        (["a/1.jpg", "a/photo.heic"], "a/photo.heic", "a class folder must hold photos only"),
    ],
)
def test_list_class_folders_refuses(tmp_path: Path, names: list[str], where: str, problem: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(IntegrityError, match=f"^{re.escape(f'{tmp_path / where}: {problem}')}"):
        list_class_folders(tmp_path)


def test_list_class_folders_refuses_folders_in_class_folders(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg")
    (tmp_path / "a/more.jpg").mkdir()
    with pytest.raises(IntegrityError, match=re.escape(f"{tmp_path / 'a/more.jpg'}: ") + ".*got a folder$"):
        list_class_folders(tmp_path)
    with pytest.raises(IntegrityError, match=re.escape(f"{tmp_path / 'no'}: no such folder")):
        list_class_folders(tmp_path / "no")


def test_read_photo_cuts_the_middle_square(tmp_path: Path) -> None:
    photo = np.zeros((32, 96, 3), np.uint8)
    photo[:, :32] = (255, 0, 0)
    photo[:, 32:64] = (10, 200, 30)
    photo[:, 64:] = (0, 0, 255)
    path = tmp_path / "photo.jpg"
    Image.fromarray(photo).save(path, quality=100, subsampling=0)
    whole = read_photo(path, size=32)
    assert whole.shape == (3, 32, 32)
    assert whole.dtype == torch.uint8
    for size in (32, 16, 48):
        inner = read_photo(path, size=size).float()[:, 2:-2, 2:-2]
        assert inner.shape == (3, size - 4, size - 4)
        assert (inner - torch.tensor([10.0, 200.0, 30.0]).view(3, 1, 1)).abs().max() < 12


def test_read_photo_of_a_large_jpeg_is_the_same_scene(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 640, dtype=np.uint8)[None, :, None], (640, 640, 3))
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.ascontiguousarray(ramp)).save(path, quality=100)
    got = read_photo(path, size=16)[:, 8].float()
    # The mean of the ramp over each sixteenth
    wanted = torch.tensor([255 * (i + 0.5) / 16 for i in range(16)])
    assert (got - wanted).abs().max() < 3


GREY16 = np.array([[0, 257], [25700, 65535]], np.uint16).repeat(4, 0).repeat(4, 1)


@pytest.mark.parametrize(
    ("image", "name", "corners"),
    [
        (Image.new("L", (8, 8), 100), "grey.jpg", [[100] * 3] * 4),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "cmyk.jpg", [[254, 0, 0]] * 4),
        (Image.new("P", (8, 8), 0), "palette.png", [[0, 0, 0]] * 4),
        (Image.fromarray(GREY16), "grey16.png", [[0] * 3, [1] * 3, [100] * 3, [255] * 3]),
        (Image.fromarray(GREY16.astype(np.int32)), "grey32.tif", [[0] * 3, [1] * 3, [100] * 3, [255] * 3]),
        (Image.new("RGBA", (8, 8), (10, 20, 30, 255)), "opaque.png", [[10, 20, 30]] * 4),
        (Image.new("RGBA", (8, 8), (10, 20, 30, 0)), "clear.webp", [[255] * 3] * 4),
        (Image.new("LA", (8, 8), (100, 0)), "clear-grey.png", [[255] * 3] * 4),
        (Image.new("RGB", (8, 8), (10, 20, 30)), "colour.bmp", [[10, 20, 30]] * 4),
        (Image.new("1", (8, 8), 1), "bits.png", [[255] * 3] * 4),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_read_photo_of_any_kind_is_rgb(tmp_path: Path, image: Image.Image, name: str, corners: list[list[int]]) -> None:
    image.save(tmp_path / name, **({"quality": 100} if name.endswith("jpg") else {}))
    got = read_photo(tmp_path / name, size=8)
    assert (got.shape, got.dtype) == ((3, 8, 8), torch.uint8)
    found = torch.stack([got[:, 0, 0], got[:, 0, 7], got[:, 7, 0], got[:, 7, 7]])
    assert (found.int() - torch.tensor(corners)).abs().max() <= 2


def test_read_photo_turns_as_exif_says(tmp_path: Path) -> None:
    photo = np.zeros((8, 8, 3), np.uint8)
    photo[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # The top of the scene is at the right of the stored image: turn by 90 degrees clockwise.
    path = tmp_path / "turned.png"
    Image.fromarray(photo).save(path, exif=exif)
    got = read_photo(path, size=8)
    assert got[0, :, 4:].min() == 255
    assert got[0, :, :4].max() == 0


def test_read_photo_refuses_truncated_files(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for kept in (0, 20, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:kept])
        with pytest.raises(IntegrityError, match=f"^{re.escape(f'{path}: must be a whole image, got: ')}"):
            read_photo(path, size=64)


def test_read_photo_refuses_what_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("not an image")
    with pytest.raises(IntegrityError, match=f"^{re.escape(f'{path}: must be a whole image, got: ')}"):
        read_photo(path, size=8)
    deep = tmp_path / "deep.tif"
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(deep)
    with pytest.raises(IntegrityError, match=r"pixels must have 8 or 16 bits, got mode F and values up to 0\.5"):
        read_photo(deep, size=8)
