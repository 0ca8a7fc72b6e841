"""Images on disk: a folder in ImageNet's layout, read, cropped as ADM does, and scaled to [-1, 1]. Needs Pillow."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sprint.arguments import checked
from sprint.checkpoint import PathLike

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Found(NamedTuple):
    """What `find_images` found; paths are relative to the folder."""

    images: list[tuple[Path, int]]
    """Path and class id."""
    classes: list[str]
    """Names, by id."""
    ignored: list[Path]
    """Files that are taken for no images: of other kinds, in no class folder, or hidden."""


@checked
def find_images(folder: PathLike) -> Found:
    """All images of a folder with one subfolder per class (ImageNet's layout), in a fixed order.

    Args:
        folder: classes are its subfolders, numbered in alphabetical order; hidden ones are none. Links are followed.

    Returns:
        Images, classes, and the files that were left out.

    Raises:
        FileNotFoundError: no such folder, no class folders, or no images in them.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    label = {name: number for number, name in enumerate(classes)}
    found: list[tuple[Path, int]] = []
    ignored: list[Path] = []
    walked: set[str] = set()  # a link may lead back
    for folder_path, folders, names in os.walk(root, followlinks=True):
        walked.add(os.path.realpath(folder_path))
        folders[:] = [name for name in folders if os.path.realpath(Path(folder_path, name)) not in walked]
        for name in names:
            path = Path(folder_path, name).relative_to(root)
            parts = path.as_posix().split("/")
            wanted = len(parts) > 1 and parts[0] in label and path.suffix.lower() in SUFFIXES
            if wanted and not any(part.startswith(".") for part in parts):
                found.append((path, label[parts[0]]))
            else:
                ignored.append(path)
    found.sort(key=lambda image: (image[1], image[0]))
    if not found:
        raise FileNotFoundError(
            f"{root} holds no images in class folders, expected {root}/CLASS/NAME with one of {', '.join(SUFFIXES)}"
        )
    return Found(found, classes, sorted(ignored))


def as_rgb(image: "Image.Image") -> "Image.Image":
    """In 8-bit RGB; 16-bit grey is scaled, which Pillow's own conversion clips to white."""
    from PIL import Image

    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def center_crop(image: "Image.Image", size: int) -> "Image.Image":
    """Scale the shorter side to `size` and cut out the middle, as ADM's preprocessing does (arXiv 2105.05233).

    Halved with a box filter while twice as large, then resized bicubically: this is the crop behind published ImageNet FIDs.
    """
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


@checked
class ImageFolder(Dataset[tuple[Tensor, int, str]]):
    """Cropped images as tensors; a file that cannot be read is reported, not raised.

    Args:
        folder: that the paths are relative to.
        images: (path, class id), as `find_images` gives them.
        size: of the crop.
    """

    def __init__(self, folder: PathLike, images: Sequence[tuple[Path, int]], *, size: int) -> None:
        self.folder, self.images, self.size = Path(folder), images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        """Image (3, size, size) uint8, class id, and what is wrong with the file ("" if nothing, else it is black)."""
        from PIL import Image

        path, label = self.images[index]
        try:
            with Image.open(self.folder / path) as file:
                image = center_crop(as_rgb(file), self.size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), label, f"{type(error).__name__}: {error}"
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), label, ""


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
