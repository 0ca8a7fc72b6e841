"""Latents on disk: the moments of a VAE's posterior, one pair (mean, std) per image, in two layouts.

    compact     index.json, shard-00000.safetensors, ...        a few large files of 16-bit moments
    REPA        images/, vae-sd/*/*.npy, vae-sd/dataset.json    one small file per image, float32 (arXiv 2410.06940)

`LatentDataset` reads both. Training draws a new latent from the moments each time: `draw_latents`. For REPA a dataset also
gives what the teacher needs, images (REPA's layout), or what it said, features (compact layout, if they were prepared).
"""

import hashlib
import io
import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from sprint.arguments import checked
from sprint.checkpoint import PathLike, write_bytes, write_tensors, write_text
from sprint.data.labels import read_labels
from sprint.data.vae import scaled
from sprint.random import normal

SCALE = 0.18215  # of SD-VAE latents, to unit variance

INDEX = "index.json"
ABOUT = "about.json"  # what the index says beside shapes and shards, in REPA's layout


@checked
def draw_latents(
    moments: Tensor,
    *,
    scale: float | Sequence[float] = SCALE,
    shift: float | Sequence[float] = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw from the posterior: `scale (mean + std ε - shift)`.

    Args:
        moments: mean and std along axis 1, (B, 2C, H, W).
        scale: of the latents, one number or one per channel.
        shift: likewise; VAEs of diffusers tell both (`sprint.data.VAE`).
        generator: for ε.

    Returns:
        (B, C, H, W), at least float32.

    Examples:
        >>> draw_latents(torch.zeros(1, 8, 2, 2)).shape
        torch.Size([1, 4, 2, 2])
    """
    if moments.ndim != 4 or moments.shape[1] % 2:
        raise ValueError(f"moments must be (B, 2C, H, W), mean and std, got {tuple(moments.shape)}")
    mean, std = moments.to(torch.promote_types(moments.dtype, torch.float32)).chunk(2, dim=1)
    noise = normal(mean.shape, device=mean.device, dtype=mean.dtype, generator=generator)
    return scaled(mean + std * noise, scale, shift)


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


@checked
def write_shard(
    folder: PathLike,
    number: int,
    moments: Tensor,
    labels: Tensor,
    *,
    features: Tensor | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one shard of the compact layout, atomically: it is whole, or it is not there.

    Args:
        folder: of the dataset.
        number: of the shard.
        moments: (n, 2C, H, W), of the dtype to store.
        labels: (n,) int64.
        features: of a teacher, (n, N, D), of the dtype to store.
        metadata: text kept in the file.
    """
    tensors = {"moments": moments, "labels": labels} | ({} if features is None else {"features": features})
    if len({len(tensor) for tensor in tensors.values()}) > 1:
        counts = ", ".join(f"{len(tensor)} {name}" for name, tensor in tensors.items())
        raise ValueError(f"a shard of {counts}: give one of each per image")
    write_tensors(Path(folder) / shard_name(number), tensors, metadata)


@checked
def write_index(folder: PathLike, numbers: Iterable[int], *, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write the index of a finished dataset, which is what makes it one.

    Args:
        folder: with its shards.
        numbers: of the shards it consists of.
        about: kept in the index (what made it).

    Raises:
        FileNotFoundError: a shard is missing.
    """
    shards: list[dict[str, Any]] = []
    shape: tuple[int, ...] = ()
    for number in numbers:
        path = Path(folder) / shard_name(number)
        if not path.is_file():
            raise FileNotFoundError(f"shard {path} is missing: the preparation has not finished, run it again")
        shape, _ = _look(path)
        shards.append({"file": path.name, "count": shape[0]})
    index = {"shape": list(shape[1:]), "shards": shards, **(about or {})}
    write_text(Path(folder) / INDEX, json.dumps(index, indent=1))
    return index


@checked
def write_repa(folder: PathLike, number: int, image: bytes | None, moments: Tensor) -> str:
    """Write one image of REPA's layout: `images/00000/img00000012.png`, `vae-sd/00000/img-mean-std-00000012.npy`.

    Args:
        folder: of the dataset.
        number: of the image.
        image: PNG file, or None to leave images out.
        moments: (2C, H, W).

    Returns:
        The name under which `vae-sd/dataset.json` lists its label.
    """
    root, text = Path(folder), f"{number:08d}"
    name = f"{text[:5]}/img-mean-std-{text}.npy"
    (root / "vae-sd" / text[:5]).mkdir(parents=True, exist_ok=True)
    if image is not None:
        (root / "images" / text[:5]).mkdir(parents=True, exist_ok=True)
        write_bytes(root / "images" / text[:5] / f"img{text}.png", image)
    array = io.BytesIO()
    np.save(array, moments.float().cpu().numpy())
    write_bytes(root / "vae-sd" / name, array.getvalue())
    return name


@checked
def write_repa_labels(
    folder: PathLike, labels: Sequence[tuple[str, int]], *, about: Mapping[str, Any] | None = None
) -> None:
    """Write the labels of REPA's layout, by the names that `write_repa` returned; images by their own names.

    Args:
        folder: of the dataset.
        labels: by name.
        about: kept beside it (what made it).
    """
    write_text(Path(folder) / ABOUT, json.dumps(dict(about or {}), indent=1))
    pairs = [[name, label] for name, label in labels]
    write_text(Path(folder) / "vae-sd" / "dataset.json", json.dumps({"labels": pairs}))
    if (Path(folder) / "images").is_dir():
        images = [[name.replace("img-mean-std-", "img").replace(".npy", ".png"), label] for name, label in labels]
        write_text(Path(folder) / "images" / "dataset.json", json.dumps({"labels": images}))


@checked
class LatentDataset(Dataset[tuple[Tensor, ...]]):
    """Moments and labels of a prepared dataset, of either layout.

    Args:
        folder: of the dataset.
        aligned: also give what REPA aligns with, as the third item: images (3, H, W) uint8 for a teacher (REPA's layout), or
            the teacher's features (N, D) (compact layout).

    Raises:
        FileNotFoundError: nothing was prepared there, or only half, or nothing to align with.
        ValueError: files that do not fit each other.
    """

    def __init__(self, folder: PathLike, *, aligned: bool = False) -> None:
        self.folder, self.aligned = Path(folder), aligned
        self.shape: tuple[int, ...]
        """(2C, H, W)."""
        if (self.folder / INDEX).is_file():
            self._read: _Shards | _Files = _Shards(self.folder)
        elif (self.folder / "vae-sd" / "dataset.json").is_file():
            self._read = _Files(self.folder)
        else:
            raise FileNotFoundError(_nothing(self.folder))
        if not len(self._read):
            raise ValueError(f"the dataset at {self.folder} is empty")
        self.shape = self._read.shape
        self.labels = self._read.labels
        """(n,) int64, of all images."""
        self.teacher = self._read.teacher
        """Name of the teacher whose features were prepared, if any."""
        self.about: dict[str, Any] = self._read.about
        """What was kept of how it was made: "vae", "latent_scale", "latent_shift", "size" and more."""
        if aligned:
            self._read.check_aligned()

    @property
    def fingerprint(self) -> str:
        """Tells this dataset from another: a hash of its shape, all labels and some of its moments."""
        found = hashlib.sha256(f"{self.shape}".encode())
        found.update(self.labels.numpy().tobytes())
        for index in sorted({*range(0, len(self), max(1, len(self) // 16)), len(self) - 1}):
            found.update(self._read.moments(index).float().numpy().tobytes())
        return found.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._read)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Moments (2C, H, W) as stored, the label (int64 scalar), and what to align with if it was asked for."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a dataset of {len(self)} images")
        index %= len(self)
        pair = self._read.moments(index), self.labels[index]
        return (*pair, self._read.companion(index)) if self.aligned else pair


class _Shards:
    """The compact layout; files are opened in the process that reads them, so that data loaders may fork."""

    def __init__(self, folder: Path) -> None:
        self.folder, index = folder, _index(folder / INDEX)
        self.shards: list[dict[str, Any]] = index["shards"]
        self.ends = list(accumulate(shard["count"] for shard in self.shards))
        self.shape = tuple(index["shape"])
        self.teacher: str | None = index.get("teacher")
        self.about = {name: value for name, value in index.items() if name not in ("shape", "shards")}
        self.open: dict[int, Any] = {}
        labels = []
        for shard in self.shards:
            path = folder / shard["file"]
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, which {INDEX} lists: copy it, or prepare the dataset again")
            shape, own = _look(path)
            if shape != (shard["count"], *self.shape):
                raise ValueError(f"{path} holds {shape}, {INDEX} lists {(shard['count'], *self.shape)}: prepare it again")
            labels.append(own)
        self.labels = torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def moments(self, index: int) -> Tensor:
        return self._row("moments", index)

    def companion(self, index: int) -> Tensor:
        return self._row("features", index)

    def check_aligned(self) -> None:
        if self.teacher is None:
            raise FileNotFoundError(
                f"{self.folder} holds no teacher's features: prepare it with --teacher, or with --layout repa, which keeps "
                "images"
            )

    def _row(self, name: str, index: int) -> Tensor:
        number = bisect_right(self.ends, index)
        if number not in self.open:
            self.open[number] = safe_open(self.folder / self.shards[number]["file"], framework="pt")
        return self.open[number].get_slice(name)[index - (self.ends[number - 1] if number else 0)]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"open": {}}


def _index(path: Path) -> dict[str, Any]:
    """What an index holds, if it is one: shards with their names, all in its folder, and counts."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        counts = [*index["shape"], *(shard["count"] for shard in index["shards"])]
        names = [shard["file"] for shard in index["shards"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no index of a dataset ({type(error).__name__}: {error}): prepare it again") from error
    if odd := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(f"{path} lists {odd[0]!r}, which is no file of its folder: it is not one that prepare.py wrote")
    if len(index["shape"]) != 3 or not all(type(count) is int and count > 0 for count in counts):
        raise ValueError(f"{path} lists shapes or counts that are no positive whole numbers: prepare the dataset again")
    return index


class _Files:
    """REPA's layout; images and latents are paired by their rank in order of name, as REPA's reader does."""

    teacher = None

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder / "vae-sd", list[Path]()
        file = folder / ABOUT
        self.about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        by_name = read_labels(self.folder / "dataset.json", gaps=True)
        self.names = sorted(by_name)
        self.labels = torch.tensor([by_name[name] for name in self.names], dtype=torch.int64)
        present = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.npy")}
        if missing := sorted(set(self.names) - present):
            raise FileNotFoundError(
                f"{len(missing)} files that {self.folder / 'dataset.json'} lists are missing, such as {missing[0]}: the "
                "preparation has not finished, or the copy is not whole"
            )
        if unlisted := sorted(present - set(self.names)):
            raise ValueError(
                f"{self.folder / 'dataset.json'} lists no label of {len(unlisted)} files, such as {unlisted[0]}: give each "
                "one, or take the files away"
            )
        self.shape = tuple(self.moments(0).shape) if self.names else ()

    def __len__(self) -> int:
        return len(self.names)

    def moments(self, index: int) -> Tensor:
        array = np.load(self.folder / self.names[index], allow_pickle=False)
        return torch.from_numpy(array.reshape(array.shape[-3:]))

    def companion(self, index: int) -> Tensor:
        from PIL import Image

        with Image.open(self.images[index]) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()

    def check_aligned(self) -> None:
        folder = self.folder.parent / "images"
        self.images = sorted(path for path in folder.rglob("*") if path.suffix == ".png")
        if len(self.images) != len(self):
            raise FileNotFoundError(
                f"{folder} holds {len(self.images)} images for {len(self)} latents: REPA needs them all: copy them"
            )


def _look(path: Path) -> tuple[tuple[int, ...], Tensor]:
    """Shape of the moments of a shard, and its labels."""
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice("moments").get_shape()), file.get_tensor("labels")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a whole shard ({error}): delete it and prepare the dataset again") from error


def _nothing(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}"
    if next(folder.glob("shard-*.safetensors"), None) is not None or (folder / "vae-sd").is_dir():
        return f"{folder} is half-prepared (it has no {INDEX} or vae-sd/dataset.json): run the preparation again, it goes on"
    return f"{folder} holds no prepared latents (no {INDEX}, no vae-sd/dataset.json): run the preparation first"
