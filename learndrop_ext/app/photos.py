"""Photos in one folder per class: list them, and read one as a tensor. H and W pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from learndrop_ext.app.image_files import IntegrityError

if TYPE_CHECKING:
    from PIL import Image

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

#: Files that file managers leave behind. Names that start with a dot are ignored too.
IGNORED_FILES = ("thumbs.db", "desktop.ini")

#: The window that is the whole image: left, top, width and height as shares of its side.
WHOLE = (0.0, 0.0, 1.0, 1.0)


def list_class_folders(folder: Path, *, classes: Sequence[str] | None = None) -> dict[str, tuple[Path, ...]]:
    """Return the photos of each class folder in `folder`, sorted by name. Files beside the class folders are ignored.

    Raises:
        IntegrityError: If the folder is missing, has no class folders or not exactly `classes`, or if a class folder has
            no photos or anything other than photos.
    """
    if not folder.is_dir():
        raise IntegrityError(folder, "no such folder")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise IntegrityError(folder, "must hold one folder a class, got none")
    if classes is not None and names != sorted(classes):
        missing, unknown = sorted(set(classes) - set(names)), sorted(set(names) - set(classes))
        problems = [f"{_shown(missing)} missing"] * bool(missing) + [f"{_shown(unknown)} unknown"] * bool(unknown)
        raise IntegrityError(
            folder, f"must hold the {len(classes)} class folders of the training part, got {' and '.join(problems)}"
        )
    return {name: _photos(folder / name) for name in names}


def _photos(folder: Path) -> tuple[Path, ...]:
    files = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in IGNORED_FILES:
            continue
        if path.suffix.lower() not in PHOTO_SUFFIXES or not path.is_file():
            kind = "a folder" if path.is_dir() else "a file of another kind"
            raise IntegrityError(
                path, f"a class folder must hold photos only ({', '.join(PHOTO_SUFFIXES)}), got {kind}"
            )
        files.append(path)
    if not files:
        raise IntegrityError(folder, f"must hold photos ({', '.join(PHOTO_SUFFIXES)}), got none")
    return tuple(files)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_photo(path: Path, *, size: int, window: Sequence[float] = WHOLE) -> Tensor:
    """Return a window of a photo's central square as RGB, uint8 [3, size, size] (bilinear, antialiased).

    window: left, top, width and height as shares of the square's side. Default: the whole square.

    The photo is rotated to its EXIF orientation. Grey, palette and CMYK photos are converted to RGB, 16-bit values are
    scaled to 8 bits, and transparent pixels become white. Raises IntegrityError if the file is not a photo or is damaged.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that leaves at least 3 * size pixels a side.
            opened.draft(None, (3 * size, 3 * size))
            image = _upright_rgb(opened)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise IntegrityError(path, f"must be a whole image, got: {error}") from error
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2 + window[0] * side, (height - side) / 2 + window[1] * side
    box = (left, top, min(width, left + window[2] * side), min(height, top + window[3] * side))
    if (width, height) != (size, size) or box != (0, 0, size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def _upright_rgb(opened: Image.Image) -> Image.Image:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(opened)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels must have 8 or 16 bits, got mode {image.mode} and values up to {values.max()}")
        # 65535 = 255 * 257
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image.convert("RGB")
