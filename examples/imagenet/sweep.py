"""FID and FDD over the guidance scale, for CFG and Path-Drop Guidance: a table, a CSV file and a plot.

    accelerate launch examples/imagenet/sweep.py --checkpoint runs/sprint/model.safetensors --out sweep --count 10000 \\
        --reference imagenet/train --crop 256 --guidance cfg pdg --scales 1 1.25 1.5 2 3 4

The best scale differs from model to model, and between CFG and PDG: never report one without the curve. Options of sampling
are those of sample.py. Run again after an interruption, it goes on.
"""

import argparse
import csv
import io
import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import evaluate
import sample
import torch
from accelerate import PartialState
from errors import plain_errors
from matplotlib.figure import Figure

from sprint.checkpoint import write_bytes, write_text

NAMES = {"none": "no guidance", "cfg": "CFG", "pdg": "PDG", "pdg-same": "PDG, same condition"}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = sample.options(__doc__)
    parser.add_argument("--reference", type=Path, required=True, help="folder of images, .npz of images, or of mu and sigma")
    parser.add_argument("--crop", type=int, help="crop reference images to this size, as prepare.py does")
    parser.add_argument("--ignore-exif", action="store_true", help="do not turn images by their EXIF data, as in prepare.py")
    parser.add_argument("--guidance", nargs="+", choices=sample.GUIDANCE[1:], default=["cfg", "pdg"])
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0, 1.25, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--metrics", nargs="+", choices=["fid", "fdd"], default=["fid", "fdd"])
    parser.add_argument("--inception", default=evaluate.INCEPTION, help="torch-fidelity's extractor for FID")
    parser.add_argument("--dino", default=evaluate.DINO, help="its extractor for FDD")
    args = parser.parse_args()
    sample.check(args, parser)
    args.scales = list(dict.fromkeys(args.scales))
    if not all(math.isfinite(scale) for scale in args.scales):
        parser.error(f"--scales must be numbers, got {args.scales}")
    return args


def sampling(args: argparse.Namespace, guidance: str, scale: float) -> argparse.Namespace:
    """Options of sample.py for one point of a curve."""
    names = vars(sample.options(None).parse_args(["--checkpoint", "x", "--out", "x"]))
    own = {name: getattr(args, name) for name in names}
    return argparse.Namespace(**{**own, "guidance": guidance, "scale": scale, "out": args.out / f"{guidance}-{scale:g}"})


class Reference:
    """What samples are compared with; its features are computed once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.saved = evaluate.statistics(args.reference, args.metrics, args.inception)
        turn = not args.ignore_exif
        self.images = None
        if self.saved is None:
            self.images = evaluate.Images(args.reference, args.crop, turn=turn, strict=False).check()
        self.options, self.known = evaluate.settings(args.batch), dict[str, Any]()

    def distance(self, samples: Path, extractor: str) -> float:
        """Fréchet distance of samples."""
        if extractor not in self.known:
            images = self.images
            self.known[extractor] = self.saved if images is None else evaluate.moments(images, extractor, self.options)
            if images is not None:
                evaluate.say_left_out(images)
        return evaluate.frechet(evaluate.Images(samples), self.known[extractor], extractor, self.options)


def plot(rows: list[dict[str, Any]], metrics: list[str]) -> bytes:
    """One panel per metric, one curve per guidance, its best point marked."""
    figure = Figure(figsize=(5 * len(metrics), 4), layout="tight")
    for number, metric in enumerate(metrics, start=1):
        axis = figure.add_subplot(1, len(metrics), number)
        for guidance in dict.fromkeys(row["guidance"] for row in rows):
            points = sorted((row["scale"], row[metric]) for row in rows if row["guidance"] == guidance)
            best = min(points, key=lambda point: point[1])
            (line,) = axis.plot(
                *zip(*points, strict=True), marker="o", label=f"{NAMES[guidance]}: {best[1]:.4g} at {best[0]:g}"
            )
            axis.plot(*best, marker="*", markersize=14, color=line.get_color())
        axis.set(xlabel="guidance scale", ylabel=metric.upper(), title=f"{rows[0]['samples']} samples")
        axis.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def write(out: Path, rows: list[dict[str, Any]], metrics: list[str]) -> None:
    """Table and plot of what is known so far."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "sweep.csv", text.getvalue())
    write_bytes(out / "sweep.png", plot(rows, metrics))


def main() -> None:
    args = parse()
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=2))  # the others wait for the numbers
    args.out.mkdir(parents=True, exist_ok=True)
    reference = Reference(args) if state.is_main_process else None
    model, vae = sample.build(args, state.device or torch.device("cpu"))
    rows: list[dict[str, Any]] = []
    for guidance in args.guidance:
        for scale in args.scales:
            point = sampling(args, guidance, scale)
            packed = sample.generate(point, model, vae, state)
            if reference is None:
                continue
            file = args.out / f"{point.out.name}.point.json"
            known = json.loads(file.read_text()) if file.exists() else {}
            judged = {name: str(getattr(args, name)) for name in ("reference", "crop", "ignore_exif", "inception", "dino")}
            said = {"samples": args.count, "drawn": sample.about(point), **judged}
            if not said.items() <= known.items():
                known = {"guidance": guidance, "scale": scale, **said}
            for metric, extractor in (("fid", args.inception), ("fdd", args.dino)):
                if metric in args.metrics and metric not in known:
                    known[metric] = reference.distance(packed, extractor)
            write_text(file, json.dumps(known))
            rows.append({name: known[name] for name in ("guidance", "scale", "samples", *args.metrics)})
            write(args.out, rows, args.metrics)
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()))
    if state.is_main_process:
        print(f"written to {args.out / 'sweep.csv'} and {args.out / 'sweep.png'}")


if __name__ == "__main__":
    with plain_errors():
        main()
