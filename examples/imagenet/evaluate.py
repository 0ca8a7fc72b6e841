"""FID, IS, KID, precision and recall, and FDD (DINOv2) of sampled images, through torch-fidelity.

    python examples/imagenet/evaluate.py --samples samples.npz --reference imagenet/train --crop 256 --metrics fid prc fdd
    python examples/imagenet/evaluate.py --samples samples --reference VIRTUAL_imagenet256_labeled.npz --metrics fid

Samples and reference are folders of images or .npz files with `arr_0`, as sample.py writes them. A reference may also be a
file of statistics with `mu` and `sigma`, as ADM's reference batches have them, for FID alone. torch-fidelity downloads its
feature networks at first use.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_fidelity
from errors import plain_errors
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_input_id_to_statistics, fid_statistics_to_metric
from torch_fidelity.utils import create_feature_extractor, resolve_feature_layer_for_metric

from sprint.checkpoint import write_text
from sprint.data.images import SUFFIXES, as_rgb, center_crop

INCEPTION, DINO = "inception-v3-compat", "dinov2-vit-l-14"
NAMES = {
    "frechet_inception_distance": "FID",
    "inception_score_mean": "IS",
    "inception_score_std": "IS, std",
    "kernel_inception_distance_mean": "KID",
    "kernel_inception_distance_std": "KID, std",
    "precision": "precision",
    "recall": "recall",
    "f_score": "F score",
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True, help="folder of images, or .npz with arr_0")
    parser.add_argument("--reference", type=Path, required=True, help="the same, or .npz with mu and sigma")
    parser.add_argument("--metrics", nargs="+", choices=["fid", "isc", "kid", "prc", "fdd"], default=["fid", "isc", "prc"])
    parser.add_argument("--inception", default=INCEPTION, help="torch-fidelity's extractor for all metrics but FDD")
    parser.add_argument("--dino", default=DINO, help="its extractor for FDD")
    parser.add_argument("--crop", type=int, help="crop reference images to this size, as prepare.py does")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path, help="where to write the numbers; by default beside the samples")
    args = parser.parse_args()
    if args.batch < 1 or (args.crop is not None and args.crop < 1):
        parser.error("--batch and --crop must be at least 1")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    return args


class Images(Dataset[Tensor]):
    """Images of a folder or a file, (3, H, W) uint8, all of one size.

    Args:
        source: folder, or .npz with arr_0 (N, H, W, 3).
        crop: of a folder's images, to this size.
    """

    def __init__(self, source: Path, crop: int | None = None) -> None:
        self.crop = crop
        if source.is_dir():
            self.files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
            self.array = None
        elif source.suffix == ".npz" and source.is_file():
            content = np.load(source, allow_pickle=False)
            if "arr_0" not in content:
                raise SystemExit(f"{source} has no arr_0 (it holds {', '.join(content)}): it is no file of images")
            self.files, self.array = [], content["arr_0"]
            if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[3] != 3:
                raise SystemExit(
                    f"{source} holds {self.array.dtype} {self.array.shape}, expected images (N, H, W, 3), uint8 in [0, 255]"
                )
        else:
            raise SystemExit(f"{source} is neither a folder nor an .npz file")
        if not len(self):
            raise SystemExit(f"{source} holds no images")
        if len(self) < 2:
            raise SystemExit(f"{source} holds one image: a distribution needs more")

    def __len__(self) -> int:
        return len(self.files) if self.array is None else len(self.array)

    def __getitem__(self, index: int) -> Tensor:
        array = self._read(self.files[index]) if self.array is None else self.array[index]
        return torch.from_numpy(array).permute(2, 0, 1).contiguous()

    def check(self) -> "Images":
        """Raise SystemExit if a file cannot be read or sizes differ: a worker of torch-fidelity would say it at length."""
        sizes: dict[tuple[int, int], Path] = {}
        for file in self.files if self.crop is None else []:
            try:
                with Image.open(file) as image:
                    sizes.setdefault(image.size, file)
            except OSError as error:
                raise SystemExit(f"{file} cannot be read: {error}") from error
        if len(sizes) > 1:
            examples = ", ".join(f"{path.name} {size[0]}x{size[1]}" for size, path in [*sizes.items()][:2])
            raise SystemExit(f"images of several sizes ({examples}): give --crop for a reference, or images of one size")
        return self

    def _read(self, file: Path) -> np.ndarray:
        with Image.open(file) as image:
            whole = as_rgb(image)
            return np.array(whole if self.crop is None else center_crop(whole, self.crop))


def statistics(source: Path, metrics: list[str]) -> dict[str, np.ndarray] | None:
    """Saved statistics, where a reference is a file of them and FID alone is asked for; else its images are taken."""
    if source.suffix != ".npz" or not source.is_file():
        return None
    content = np.load(source, allow_pickle=False)
    if "mu" not in content or ("arr_0" in content and metrics != ["fid"]):
        return None
    if metrics != ["fid"]:
        raise SystemExit(f"{source} holds statistics for FID alone: give images for {', '.join(metrics)}")
    return {name: content[name].astype(np.float64) for name in ("mu", "sigma")}


def moments(images: Images, extractor: str, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Mean and covariance of the features of an extractor."""
    layer = resolve_feature_layer_for_metric("fid", feature_extractor=extractor, **options)
    network = create_feature_extractor(extractor, [layer], **options)
    found = fid_input_id_to_statistics(1, network, layer, input1=images, **options)
    return {name: value.astype(np.float64) for name, value in found.items()}


def frechet(samples: Images, reference: dict[str, np.ndarray], extractor: str, options: dict[str, Any]) -> float:
    """Fréchet distance in the features of an extractor."""
    found = moments(samples, extractor, options)
    if reference["mu"].shape != found["mu"].shape:
        raise SystemExit(f"the statistics have {len(reference['mu'])} features, {extractor} gives {len(found['mu'])}")
    return fid_statistics_to_metric(found, reference, False)[KEY_METRIC_FID]


def settings(batch: int) -> dict[str, Any]:
    """For torch-fidelity."""
    return {"cuda": torch.cuda.is_available(), "batch_size": batch, "verbose": False, "save_cpu_ram": False}


def evaluate(args: argparse.Namespace) -> dict[str, float]:
    """The numbers asked for, by name."""
    samples, saved = Images(args.samples).check(), statistics(args.reference, args.metrics)
    others = [metric for metric in args.metrics if metric not in ("fid", "fdd")]
    reference = Images(args.reference, args.crop).check() if saved is None else None
    options = settings(args.batch)
    found: dict[str, float] = {"samples": len(samples)}
    for metric, extractor in (("fid", args.inception), ("fdd", args.dino)):
        if metric in args.metrics:
            wanted = saved if reference is None else moments(reference, extractor, options)
            assert wanted is not None
            found[metric.upper()] = frechet(samples, wanted, extractor, options)
    if others and reference is not None:
        count = min(len(samples), len(reference))
        metrics = torch_fidelity.calculate_metrics(
            input1=samples, input2=reference, feature_extractor=args.inception, kid_subset_size=min(1000, count),
            **dict.fromkeys(others, True), **options,
        )  # fmt: skip
        found |= {NAMES.get(str(name), str(name)): float(value) for name, value in metrics.items()}
    return found


def main() -> None:
    args = parse()
    found = evaluate(args)
    target = args.json or args.samples.parent / f"{args.samples.name.removesuffix('.npz')}.json"
    write_text(target, json.dumps({**found, "samples from": str(args.samples), "reference": str(args.reference)}, indent=1))
    for name, value in found.items():
        print(f"{name:<12}{value:g}")
    print(f"written to {target}")


if __name__ == "__main__":
    with plain_errors():
        main()
