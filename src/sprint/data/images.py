"""Images on disk: a folder in ImageNet's layout or with a dataset.json, cropped as ADM does. Needs Pillow."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sprint.arguments import checked
from sprint.checkpoint import PathLike
from sprint.data.decode import as_rgb, center_crop, read_image
from sprint.data.labels import read_labels

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif", ".heic",
    ".heif", ".hif", ".jp2", ".jxl", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".qoi",
)  # fmt: skip
"""Of files that are taken for pictures; what they hold is seen when they are read."""

LABELS = "dataset.json"

__all__ = ["Found", "ImageFolder", "as_rgb", "center_crop", "find_images", "read_image", "save_grid", "to_uint8", "to_unit"]


class Found(NamedTuple):
    """What `find_images` found; paths are relative to the folder."""

    images: list[tuple[Path, int]]
    """Path and class id."""
    classes: list[str]
    """Names, by id."""
    ignored: dict[Path, str]
    """Files and folders that are taken for no images, and why."""


@checked
def find_images(folder: PathLike) -> Found:
    """All images of a folder, in a fixed order, with their classes.

    Args:
        folder: with one subfolder per class (ImageNet's layout), numbered in alphabetical order; hidden ones are none. Or
            with a `dataset.json`, which gives every image a number (EDM's and StyleGAN's layout: `sprint.data.labels`).
            Links are followed.

    Returns:
        Images, classes, and what was left out.

    Raises:
        FileNotFoundError: no such folder, no class folders, or no images in them.
        ValueError: a dataset.json that does not fit the images.
    """
    root = Path(folder)
    if not root.is_dir():
        about = f"{root} is a file, expected a folder: unpack it" if root.exists() else f"there is no folder {root}"
        raise FileNotFoundError(about)
    files, ignored = _walk(root)
    if (root / LABELS).is_file():
        ignored.pop(Path(LABELS), None)
        named = read_labels(root / LABELS, [path.as_posix() for path in files])
        labelled = [(path, named[path.as_posix()]) for path in sorted(files)]
        classes = [str(number) for number in range(max(named.values()) + 1)]
    else:
        classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        number = {name: i for i, name in enumerate(classes)}
        labelled = [(path, number[path.parts[0]]) for path in files if len(path.parts) > 1]
        ignored |= {path: "in no class folder" for path in files if len(path.parts) == 1}
    if not labelled:
        raise FileNotFoundError(
            f"{root} holds no images in class folders, expected {root}/CLASS/NAME with one of {', '.join(SUFFIXES)}, or "
            f"images and their {LABELS}"
        )
    return Found(sorted(labelled, key=lambda image: (image[1], image[0])), classes, dict(sorted(ignored.items())))


def _walk(root: Path) -> tuple[list[Path], dict[Path, str]]:
    """Files that may be images, relative to a folder, and why others are none."""
    files, ignored, walked = list[Path](), dict[Path, str](), set[str]()  # a link may lead back

    def unreadable(error: OSError) -> None:
        ignored[Path(error.filename).relative_to(root)] = f"a folder that cannot be read: {error.strerror}"

    for place, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        walked.add(os.path.realpath(place))
        folders[:] = [name for name in folders if os.path.realpath(Path(place, name)) not in walked]
        here = Path(place).relative_to(root)
        if not folders and not names and here.suffix.lower() in SUFFIXES:
            ignored[here] = "an empty folder"
        for path in (here / name for name in names):
            if any(part.startswith(".") for part in path.parts):
                ignored[path] = "hidden"
            elif path.suffix.lower() not in SUFFIXES:
                ignored[path] = "its suffix is no image's"
            else:
                files.append(path)
    return files, ignored


@checked
class ImageFolder(Dataset[tuple[Tensor, int, str]]):
    """Cropped images as tensors; a file that cannot be read is reported, not raised.

    Args:
        folder: that the paths are relative to.
        images: (path, class id), as `find_images` gives them.
        size: of the crop.
        turn: pictures by the orientation in their EXIF data; ADM's preprocessing did not.

    Raises:
        ValueError: no size of a crop.
    """

    def __init__(self, folder: PathLike, images: Sequence[tuple[Path, int]], *, size: int, turn: bool = True) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.folder, self.images, self.size, self.turn = Path(folder), images, size, turn

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        """Image (3, size, size) uint8, class id, and what is wrong with the file ("" if nothing, else it is black)."""
        path, label = self.images[index]
        try:
            image = read_image(self.folder / path, self.size, turn=self.turn)
        except Exception as error:  # Pillow's for a broken file are of any kind
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), label, reason(error)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), label, ""


def reason(error: Exception) -> str:
    """Why a file cannot be read, in a few words."""
    return (
        str(error) if isinstance(error, ValueError | OSError) and str(error) else f"{type(error).__name__} {error}".strip()
    )


@checked
def to_unit(images: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1], as VAEs and pixel models expect."""
    return images.to(torch.float32) / 127.5 - 1


@checked
def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to uint8 in [0, 255], rounded and clamped."""
    return ((images.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@checked
def save_grid(images: Tensor, path: PathLike, *, columns: int | None = None) -> None:
    """Write (B, 3, H, W) uint8 images, or grey (B, 1, H, W) ones, as one PNG, row by row."""
    from PIL import Image

    images = images.expand(-1, 3, -1, -1)

    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    padded = torch.cat([images, images.new_zeros(rows * columns - len(images), *images.shape[1:])])
    grid = padded.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray(grid.cpu().numpy()).save(path, format="PNG")
