"""FID, IS, KID, precision and recall, and FDD (DINOv2) of sampled images, through torch-fidelity.

    python examples/imagenet/evaluate.py --samples samples.npz --reference imagenet/train --crop 256 --metrics fid prc fdd
    python examples/imagenet/evaluate.py --samples samples --reference VIRTUAL_imagenet256_labeled.npz --metrics fid

Samples and reference are folders of images or .npz files with `arr_0`, as sample.py writes them, and are read a batch at a
time. A reference may also be a file of statistics with `mu` and `sigma`, as ADM's reference batches have them and
--save-statistics writes them, for FID alone. Files of the reference that cannot be read are left out and named; one of the
samples is refused. torch-fidelity downloads its feature networks at first use.
"""

import argparse
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compared import Images, say_left_out, statistics
from errors import plain_errors
from features import Gathered, gather
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from sprint.checkpoint import write_bytes, write_text

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


METRICS = ["fid", "isc", "kid", "prc", "fdd"]
PUBLISHED, SPLITS, SUBSET, NEIGHBOURS = 50_000, 10, 1000, 3
LEAST = {"fid": 2, "fdd": 2, "isc": 2 * SPLITS, "kid": 2, "prc": NEIGHBOURS + 1}
"""Images that a metric needs to be a number at all."""
WHY = {
    "fid": "for a covariance",
    "fdd": "for a covariance",
    "isc": f"two for each of its {SPLITS} parts",
    "kid": "for pairs within a subset",
    "prc": f"one and its {NEIGHBOURS} nearest neighbours",
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True, help="folder of images, or .npz with arr_0")
    parser.add_argument("--reference", type=Path, required=True, help="the same, or .npz with mu and sigma")
    parser.add_argument("--metrics", nargs="+", choices=[*METRICS, "sfid"], default=["fid", "isc", "prc"])
    parser.add_argument("--inception", default=INCEPTION, help="torch-fidelity's extractor for all metrics but FDD")
    parser.add_argument("--dino", default=DINO, help="its extractor for FDD")
    parser.add_argument("--crop", type=int, help="crop reference images to this size, as prepare.py does")
    parser.add_argument("--ignore-exif", action="store_true", help="do not turn images by their EXIF data, as in prepare.py")
    parser.add_argument("--save-statistics", type=Path, help=".npz for the reference's mu and sigma, a --reference for FID")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path, help="where to write the numbers; by default beside the samples")
    args = parser.parse_args()
    if args.batch < 1 or (args.crop is not None and args.crop < 1):
        parser.error("--batch and --crop must be at least 1")
    if "sfid" in args.metrics:
        parser.error(
            "sFID needs the map of Inception's layer mixed_6/conv, which torch-fidelity does not give: ADM's evaluator has "
            "it, and reads sample.py's .npz as it is"
        )
    args.metrics = list(dict.fromkeys(args.metrics))
    for name, path in (("--json", args.json), ("--save-statistics", args.save_statistics)):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{name} {path}: there is no folder {path.parent}")
    if args.save_statistics is not None:
        if "fid" not in args.metrics:
            parser.error("--save-statistics keeps what FID is made of: add fid to --metrics")
        if args.save_statistics.suffix != ".npz" or args.save_statistics.exists():
            parser.error(f"--save-statistics {args.save_statistics}: give a new file that ends in .npz")
    return args


def moments(images: Images, extractor: str, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Mean and covariance of the features of an extractor, and of how many images."""
    found = gather(images, extractor, ["fid"], options).statistics
    assert found is not None
    return found


def distance(samples: dict[str, np.ndarray], reference: dict[str, np.ndarray], extractor: str) -> float:
    """Fréchet distance of means and covariances."""
    if reference["mu"].shape != samples["mu"].shape:
        raise SystemExit(f"the statistics have {len(reference['mu'])} features, {extractor} gives {len(samples['mu'])}")
    return finite("the Fréchet distance", fid_statistics_to_metric(samples, reference, False)[KEY_METRIC_FID])


def frechet(samples: Images, reference: dict[str, np.ndarray], extractor: str, options: dict[str, Any]) -> float:
    """Fréchet distance in the features of an extractor."""
    return distance(moments(samples, extractor, options), reference, extractor)


def finite(name: str, value: float) -> float:
    """A number that JSON has."""
    if not math.isfinite(value):
        raise SystemExit(f"{name} came out as {value}: the features overflow, or the covariance is degenerate")
    return float(value)


def enough(metrics: list[str], samples: int, reference: int | None) -> None:
    """Raise SystemExit if there are too few images for a metric."""
    for metric in metrics:
        sets = {"samples": samples} | ({} if reference is None or metric == "isc" else {"reference images": reference})
        for name, count in sets.items():
            if count < LEAST[metric]:
                raise SystemExit(f"{metric} of {count} {name}: it needs {LEAST[metric]}, {WHY[metric]}")


def remarks(metrics: list[str], samples: int, reference: int | None, features: int) -> list[str]:
    """What must be known of numbers of few images."""
    found = list[str]()
    count = samples if reference is None else min(samples, reference)
    for metric in [metric for metric in ("fid", "fdd") if metric in metrics and count < PUBLISHED]:
        found.append(f"{metric.upper()} of {count} images is too high, about as 1 / N: compare it with others of as many")
        if metric == "fid" and count <= features:
            found.append(f"FID of {count} images in {features} features says little: give more images than features")
    if "isc" in metrics and samples < PUBLISHED:
        found.append(f"IS of {samples} images in {SPLITS} parts is too low: published ones are of {PUBLISHED}")
    if "kid" in metrics and count <= SUBSET:
        found.append(f"KID of one subset of {count}, not of 100 of {SUBSET}: without a deviation")
    if "prc" in metrics and count < 10_000:
        found.append(f"precision and recall of {count} images change with N: published ones are of 10000 or more")
    return found


def settings(batch: int) -> dict[str, Any]:
    """For torch-fidelity."""
    return {"cuda": torch.cuda.is_available(), "batch_size": batch, "verbose": False}


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """The numbers asked for, by name."""
    samples = Images(args.samples, turn=not args.ignore_exif).check()
    saved, images = statistics(args.reference, args.metrics, args.inception), None
    if saved is None:
        images = Images(args.reference, args.crop, turn=not args.ignore_exif, strict=False).check()
    enough(args.metrics, len(samples), None if images is None else len(images))
    options, found, notes = settings(args.batch), dict[str, Any](), list[str]()
    for extractor, metrics in ((args.inception, [m for m in args.metrics if m != "fdd"]), (args.dino, ["fdd"])):
        if not set(metrics) & set(args.metrics):
            continue
        kinds = ["fid" if metric == "fdd" else metric for metric in metrics]
        theirs = Gathered(int(saved.get("count", 0)), statistics=saved) if saved is not None else None
        if images is not None and kinds != ["isc"]:
            theirs = gather(images, extractor, [kind for kind in kinds if kind != "isc"], options)
            enough(metrics, len(samples), theirs.count)
        ours = gather(samples, extractor, kinds, options)
        found |= {"samples": ours.count} | ({"reference images": theirs.count} if theirs and theirs.count else {})
        found |= numbers(metrics, ours, theirs, extractor)
        known = theirs.count if theirs and theirs.count else None
        notes += remarks(metrics, ours.count, known, 0 if ours.statistics is None else len(ours.statistics["mu"]))
        if theirs and theirs.size and theirs.size != ours.size:
            notes.append(
                f"the samples are {sides(ours.size)} pixels, the reference {sides(theirs.size)}: compare the same size"
            )
        if args.save_statistics and "fid" in metrics and theirs and theirs.statistics:
            file = io.BytesIO()
            mu, sigma, count = (theirs.statistics[name] for name in ("mu", "sigma", "count"))
            np.savez(file, mu=mu, sigma=sigma, count=count, network=np.array(extractor))
            write_bytes(args.save_statistics, file.getvalue())
    for one in [samples, *([] if images is None else [images])]:
        say_left_out(one)
    return found | ({"notes": list(dict.fromkeys(notes))} if notes else {})


def sides(size: tuple[int, ...]) -> str:
    """Height and width as words."""
    return "x".join(map(str, reversed(size)))


def numbers(metrics: list[str], ours: Gathered, theirs: Gathered | None, extractor: str) -> dict[str, float]:
    """Of the samples against the reference, by name."""
    found: dict[str, float] = {}
    for metric in metrics:
        if metric == "isc":
            found |= isc_features_to_metric(ours.features["isc"], SPLITS)
            continue
        assert theirs is not None
        if metric in ("fid", "fdd"):
            assert ours.statistics is not None
            assert theirs.statistics is not None
            found[metric.upper()] = distance(ours.statistics, theirs.statistics, extractor)
        elif metric == "kid":
            size = min(SUBSET, ours.count, theirs.count)
            several = size < min(ours.count, theirs.count)
            subsets = {"kid_subset_size": size, "kid_subsets": 100 if several else 1}
            said = kid_features_to_metric(ours.features["kid"], theirs.features["kid"], verbose=False, **subsets)
            found |= said if several else {KEY_METRIC_KID_MEAN: said[KEY_METRIC_KID_MEAN]}
        else:
            found |= prc_features_to_metric(
                ours.features["prc"], theirs.features["prc"], prc_batch_size=1000, save_cpu_ram=True, verbose=False
            )
    return {NAMES.get(name, name): finite(NAMES.get(name, name), value) for name, value in found.items()}


def target(args: argparse.Namespace) -> Path:
    """Where the numbers go; a file that holds something else is not written over."""
    path = args.json or args.samples.parent / f"{args.samples.name.removesuffix('.npz')}.json"
    if path.exists():
        try:
            ours = "samples from" in json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, TypeError):
            ours = False
        if not ours:
            raise SystemExit(f"{path} is there and was not written by evaluate.py: give --json another name")
    return path


def main() -> None:
    args = parse()
    path = target(args)
    found = evaluate(args)
    about = {"samples from": str(args.samples), "reference": str(args.reference)}
    write_text(path, json.dumps({**found, **about}, indent=1, allow_nan=False))
    for note in found.pop("notes", []):
        print(f"note: {note}")
    for name, value in found.items():
        print(f"{name:<18}{value:g}")
    print(f"written to {path}")


if __name__ == "__main__":
    with plain_errors():
        main()
