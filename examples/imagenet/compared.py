"""Images to compare, of a folder or an .npz file, read a batch at a time, and saved statistics of such."""

import os
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sprint.data.decode import opened, read_image
from sprint.data.images import SUFFIXES, reason

PARALLEL = 512
"""Images from which they are decoded by several processes."""


class Images:
    """Images of a folder or a file, all of one size; never all of them in memory.

    Args:
        source: folder, or .npz with arr_0 (N, H, W, 3) uint8.
        crop: of a folder's images, to this size.
        turn: a folder's images by their EXIF data.
        strict: refuse files that cannot be read, rather than leave them out.

    Raises:
        SystemExit: it holds no images, or other things.
    """

    def __init__(self, source: Path, crop: int | None = None, *, turn: bool = True, strict: bool = True) -> None:
        self.source, self.crop, self.turn, self.strict = source, crop, turn, strict
        self.files, self.left_out = list[Path](), dict[Path, str]()
        self.shape: tuple[int, ...] = ()
        if source.is_dir():
            for path in sorted(path for path in source.rglob("*") if path.is_symlink() or not path.is_dir()):
                hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
                if hidden or path.suffix.lower() not in SUFFIXES:
                    self.left_out[path] = "hidden" if hidden else "its suffix is no image's"
                else:
                    self.files.append(path)
            self.count = len(self.files)
        elif source.suffix == ".npz" and source.is_file():
            with _array(source, "arr_0") as (_, dtype, self.shape):
                if dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3 or not all(self.shape[1:]):
                    raise SystemExit(f"{source} holds {dtype} {self.shape}, expected images (N, H, W, 3), uint8 in [0, 255]")
            self.count = self.shape[0]
        else:
            raise SystemExit(f"{source} is neither a folder nor an .npz file")
        if not self.count:
            raise SystemExit(f"{source} holds no images")
        if self.count < 2:
            raise SystemExit(f"{source} holds one image: a distribution needs more")

    def __len__(self) -> int:
        return self.count

    def check(self) -> "Images":
        """Raise SystemExit if the files' headers tell of several sizes, or that one cannot be read: before any work."""
        first: tuple[Path, tuple[int, ...]] | None = None
        for path in self.files if self.crop is None else []:
            try:
                with opened(path) as image:
                    size = tuple(sorted(image.size)) if self.turn else image.size
            except Exception as error:  # Pillow's for a broken file are of any kind
                self._unreadable(path, reason(error))
                continue
            first = first or (path, size)
            self._same(first, (path, size))
        return self

    def batches(self, size: int) -> Iterator[Tensor]:
        """(B, 3, H, W) uint8, in order; what cannot be read is refused by name, or joins `left_out`."""
        yield from self._of_folder(size) if self.files else self._of_file(size)

    def _of_file(self, size: int) -> Iterator[Tensor]:
        row = int(np.prod(self.shape[1:]))
        with _array(self.source, "arr_0") as (file, _, _):
            for start in range(0, self.count, size):
                rows = min(size, self.count - start)
                data = file.read(rows * row)
                if len(data) < rows * row:
                    raise EOFError(f"it ends at image {start + len(data) // row} of {self.count}")
                array = np.frombuffer(data, np.uint8).reshape(rows, *self.shape[1:])
                yield torch.from_numpy(array.transpose(0, 3, 1, 2).copy())

    def _of_folder(self, size: int) -> Iterator[Tensor]:
        workers = min(4, os.cpu_count() or 1) if len(self.files) >= PARALLEL else 0
        first: tuple[Path, tuple[int, ...]] | None = None
        for batch in DataLoader(_Files(self), batch_size=size, num_workers=workers, collate_fn=list):
            good = list[Tensor]()
            for index, pixels, problem in batch:
                path = self.files[index]
                if problem:
                    self._unreadable(path, problem)
                    continue
                here = (path, (pixels.shape[2], pixels.shape[1]))
                first = first or here
                self._same(first, here)
                good.append(pixels)
            if good:
                yield torch.stack(good)

    def _unreadable(self, path: Path, problem: str) -> None:
        if self.strict:
            raise SystemExit(f"{path} cannot be read: {problem}")
        self.left_out[path] = problem

    def _same(self, one: tuple[Path, tuple[int, ...]], other: tuple[Path, tuple[int, ...]]) -> None:
        if one[1] != other[1]:
            examples = ", ".join(f"{path.name} {size[0]}x{size[1]}" for path, size in (one, other))
            raise SystemExit(f"images of several sizes ({examples}): give --crop for a reference, or images of one size")


class _Files(Dataset[tuple[int, Tensor, str]]):
    """Images of a folder, by index, and what is wrong with them."""

    def __init__(self, images: Images) -> None:
        self.files, self.crop, self.turn = images.files, images.crop, images.turn

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Tensor, str]:
        try:
            image = read_image(self.files[index], self.crop, turn=self.turn)
        except Exception as error:  # Pillow's for a broken file are of any kind
            return index, torch.zeros(0), reason(error)
        return index, torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), ""


def say_left_out(images: Images) -> None:
    """Name files that were not compared, those that cannot be read first."""
    if images.left_out:
        named = [f"{path.name!r} ({why})" for path, why in reversed(images.left_out.items())][:5]
        print(f"{images.source}: {len(images.left_out)} files left out, such as {', '.join(named)}", file=sys.stderr)


def statistics(source: Path, metrics: list[str], extractor: str) -> dict[str, np.ndarray] | None:
    """Saved statistics, where a reference is a file of them and FID alone is asked for; else its images are taken.

    Args:
        source: .npz with `mu` (D,) and `sigma` (D, D), and if it says them the `network` and the `count` of its images.
        metrics: that are asked for.
        extractor: with which they will be compared.

    Raises:
        SystemExit: numbers that are no mean and covariance, or of another network.
    """
    if source.suffix != ".npz" or not source.is_file():
        return None
    with _readable(source), zipfile.ZipFile(source) as file:
        names = {name.removesuffix(".npy") for name in file.namelist()}
    if not {"mu", "sigma"} & names or ("arr_0" in names and metrics != ["fid"]):
        return None
    if metrics != ["fid"]:
        raise SystemExit(f"{source} holds statistics for FID alone: give images for {', '.join(metrics)}")
    if missing := {"mu", "sigma"} - names:
        raise SystemExit(f"{source} has no {missing.pop()} (it holds {', '.join(sorted(names))}), expected mu and sigma")
    with _readable(source), np.load(source, allow_pickle=False) as content:
        found = {name: content[name] for name in ("mu", "sigma", "network", "count") if name in names}
    mu, sigma = found["mu"], found["sigma"]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or {mu.dtype.kind, sigma.dtype.kind} != {"f"}:
        raise SystemExit(
            f"{source} holds mu {mu.dtype} {mu.shape} and sigma {sigma.dtype} {sigma.shape}, expected floats (D,) and (D, D)"
        )
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise SystemExit(f"{source}: mu or sigma is not finite")
    largest = np.abs(sigma).max()
    if np.abs(sigma - sigma.T).max() > 1e-4 * largest or np.linalg.eigvalsh(sigma).min() < -1e-4 * largest:
        raise SystemExit(f"{source}: sigma is no covariance, it must be symmetric, with no negative eigenvalue")
    if "network" in found and str(found["network"]) != extractor:
        raise SystemExit(f"{source} has features of {found['network']}, the samples' would be of {extractor}: take the same")
    if "count" in found and (found["count"].shape != () or not found["count"] > 1):
        raise SystemExit(f"{source} says that it is of {found['count']} images: statistics need two or more")
    return {"mu": mu, "sigma": sigma} | ({"count": found["count"]} if "count" in found else {})


@contextmanager
def _readable(source: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, OSError, NotImplementedError) as error:
        raise SystemExit(f"{source} cannot be read: {error}") from error


@contextmanager
def _array(source: Path, name: str) -> Iterator[tuple[IO[bytes], Any, tuple[int, ...]]]:
    """An array of an .npz file, at its first number: file, dtype and shape."""
    with _readable(source), zipfile.ZipFile(source) as archive:
        if f"{name}.npy" not in archive.namelist():
            holds = ", ".join(entry.removesuffix(".npy") for entry in archive.namelist())
            raise SystemExit(f"{source} has no {name} (it holds {holds}): it is no file of images")
        with archive.open(f"{name}.npy") as file:
            readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            version = np.lib.format.read_magic(file)
            if version not in readers:
                raise ValueError(f"{name} is stored in format {version}, expected 1.0 or 2.0: save it with numpy again")
            shape, transposed, dtype = readers[version](file)
            if transposed:
                raise ValueError(f"{name} is stored by columns: save np.ascontiguousarray of it")
            yield file, dtype, shape
