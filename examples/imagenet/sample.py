"""Images from a checkpoint: N of them over all processes, as PNG files and as the .npz that ADM's evaluator reads.

    accelerate launch examples/imagenet/sample.py --checkpoint model.safetensors --out samples --count 50000 \\
        --guidance pdg --scale 2.0 --solver sde --steps 250

Image i depends on --seed and i alone, not on the batch or the number of processes. Run the same command again after an
interruption, and it goes on. --config takes a sampling file of the SPRINT reference; what the command line says goes before.
"""

import argparse
import dataclasses
import io
import json
import math
import os
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import reference_config
import torch
from accelerate import PartialState
from errors import plain_errors
from PIL import Image
from reading import content
from tqdm.auto import tqdm
from weights import fingerprint, locate

import sprint
from sprint.checkpoint import write_bytes, write_text
from sprint.data.images import to_uint8
from sprint.data.vae import VAE, unscaled
from sprint.models.loading import load_model
from sprint.models.recipe import Recipe
from sprint.random import normal
from sprint.training.parallel import leave
from sprint.training.runs import FolderLock, sweep

VAE_NAME = "stabilityai/sd-vae-ft-mse"
GUIDANCE = ["none", "cfg", "pdg", "pdg-same"]


def options(description: str | None) -> argparse.ArgumentParser:
    """The command line, for this script and sweep.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of train.py, SiT.save or the authors (safetensors)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count", type=int, default=50_000)
    said = "; by default what the checkpoint says of its training"
    parser.add_argument("--side", type=int, help=f"of the latents, 32 for 256 px, 64 for 512 px{said}, or 32")
    parser.add_argument("--vae", help=f"hub name or local folder; none for pixel models{said}, or {VAE_NAME}")
    numbers: dict[str, Any] = {"type": float, "nargs": "+", "metavar": "NUMBER"}
    parser.add_argument("--latent-scale", **numbers, help=f"one or one per channel, of the training{said}, or the VAE's")
    parser.add_argument("--latent-shift", **numbers, help=f"likewise{said}, or the VAE's")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"))
    parser.add_argument("--solver", choices=["euler", "heun", "sde"], default="euler")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--interpolant", choices=["linear", "cosine", "ddpm"], help=f"of the training{said}, or linear")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of products (autocast)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def parse() -> argparse.Namespace:
    """The command line of this script."""
    parser = options(__doc__)
    parser.add_argument("--guidance", choices=GUIDANCE, default="pdg")
    parser.add_argument("--scale", type=float, default=3.0, help="the best one differs from model to model: see sweep.py")
    parser.add_argument("--config", type=Path, help="a sampling file of the SPRINT reference")
    first, _ = parser.parse_known_args()
    if first.config is not None:
        configured(first.config, parser)
    args = parser.parse_args()
    check(args, parser)
    if not math.isfinite(args.scale):
        parser.error(f"--scale must be a number, got {args.scale}")
    return args


def configured(path: Path, parser: argparse.ArgumentParser) -> None:
    """Take defaults from a file."""
    found = content(path)
    if not reference_config.is_sampling(found):
        raise SystemExit(f"{path} is no sampling file of the SPRINT reference: give it to train.py")
    with plain_errors(str(path)):
        options = reference_config.sampling(found)
        for action in parser._actions:
            if action.dest in options and callable(action.type) and action.nargs is None:
                options[action.dest] = action.type(options[action.dest])
            if action.choices is not None and options.get(action.dest, action.default) not in action.choices:
                raise ValueError(f"{action.dest} must be one of {', '.join(action.choices)}, got {options[action.dest]!r}")
    parser.set_defaults(**options)


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Numbers that cannot be, and what has no default."""
    for option in ("checkpoint", "out"):
        if getattr(args, option) is None:
            parser.error(f"the following arguments are required: --{option}")
    if min(args.count, args.batch, args.steps, 1 if args.side is None else args.side) < 1:
        parser.error("--count, --batch, --steps and --side must be at least 1")
    if args.seed < 0:
        parser.error(f"--seed must not be negative, got {args.seed}")
    if args.solver == "sde" and args.steps < 2:
        parser.error("--solver sde needs at least 2 --steps")
    low, high = args.interval
    if not 0 <= low <= high <= 1:
        parser.error(f"--interval must be 0 <= LOW <= HIGH <= 1, got {low} {high}")


def complete(args: argparse.Namespace, recipe: Recipe) -> None:
    """Options that were left out, from how the model was trained.

    Raises:
        ValueError: an option contradicts that.
    """
    usual = {"side": 32, "vae": VAE_NAME, "latent_scale": None, "latent_shift": None, "interpolant": "linear"}
    said = {**dataclasses.asdict(recipe), "side": recipe.latent_side}
    for name, default in usual.items():
        given = getattr(args, name)
        if isinstance(given, list):
            given = given[0] if len(given) == 1 else tuple(given)
        if name not in ("side", "vae") and None not in (given, said[name]) and given != said[name]:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {given}, but {args.checkpoint} was trained with {said[name]}: leave it out")
        setattr(args, name, given if given is not None else default if said[name] is None else said[name])


def guidance(args: argparse.Namespace) -> Any:
    """What the command line asks for."""
    interval = tuple(args.interval)
    if args.guidance == "none":
        return None
    if args.guidance == "cfg":
        return sprint.ClassifierFreeGuidance(args.scale, interval=interval)
    return sprint.PathDropGuidance(args.scale, interval=interval, weak="same" if args.guidance == "pdg-same" else "null")


def about(args: argparse.Namespace) -> dict[str, str]:
    """All that decides what image i is."""
    ignored = ("out", "count", "batch", "config")
    return {
        **{name: str(value) for name, value in vars(args).items() if name not in ignored},
        "weights": fingerprint(args.checkpoint),
    }


def agree(args: argparse.Namespace) -> None:
    """Take up an earlier run's folder only if it was for the same images; their number may grow."""
    wanted = about(args)
    file = args.out / "sampling.json"
    if not file.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(wanted, indent=1))
    elif (found := json.loads(file.read_text())) != wanted:
        differ = [f"{key} {found.get(key)}, now {wanted[key]}" for key in wanted if found.get(key) != wanted[key]]
        raise SystemExit(f"{args.out} holds samples with {'; '.join(differ)}: use the same options, or another --out")


def name(args: argparse.Namespace, index: int) -> Path:
    """File of an image."""
    return args.out / f"{index:06d}.png"


def image_seed(seed: int, index: int) -> int:
    """Of one image; images, and seeds, differ in the 32 bits that torch's generators on the CPU take of it."""
    return (seed * 0x9E3779B1 + index) % 2**32


@torch.no_grad()
def draw(model: Any, vae: Any, numbers: list[int], args: argparse.Namespace, device: Any) -> torch.Tensor:
    """Images by number, (B, 3, H, W) uint8; classes in turn, so that any thousand images has all of them."""
    streams = [torch.Generator().manual_seed(image_seed(args.seed, i)) for i in numbers]
    config = model.module.config
    noise = normal((len(numbers), config.in_channels, args.side, args.side), device=device, generator=streams)
    y = None if config.num_classes is None else torch.tensor([i % config.num_classes for i in numbers], device=device)
    latents = sprint.sample(
        model, noise, y=y, guidance=guidance(args), solver=args.solver, steps=args.steps, interpolant=args.interpolant,
        prediction=config.prediction, generator=streams,
    )  # fmt: skip
    scaling = {"scale": args.latent_scale, "shift": args.latent_shift}
    latents = unscaled(latents, **scaling) if vae is None else vae.decode(latents, **scaling)
    if not latents.isfinite().all():
        raise ValueError(
            f"image {numbers[0]} or one of the {len(numbers)} drawn with it is not finite, and none is written: "
            "weights, --latent-scale or --dtype do not fit"
        )
    return to_uint8(latents).expand(-1, 3, -1, -1).cpu()  # grey ones too


def packed(args: argparse.Namespace) -> Path:
    """File of all images."""
    return args.out.parent / f"{args.out.name}.npz"


def pack(args: argparse.Namespace) -> Path:
    """All images in one file, as ADM's evaluator reads them: arr_0, (N, H, W, 3) uint8; image by image."""
    target, whole = packed(args), args.out / ".packing.tmp"  # in the folder that this process holds
    header = {"descr": "|u1", "fortran_order": False, "shape": (args.count, *np.array(Image.open(name(args, 0))).shape)}
    try:
        with zipfile.ZipFile(whole, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for i in tqdm(range(args.count), desc="packing"):
                file.write(np.array(Image.open(name(args, i))).tobytes())
        os.replace(whole, target)
    except OSError as error:
        whole.unlink(missing_ok=True)
        raise OSError(f"{target} could not be written ({error}): make room, and run the same command again") from error
    return target


def build(args: argparse.Namespace, device: torch.device) -> tuple[sprint.CapturedModel, VAE | None]:
    """The model, and the VAE unless its images are pixels."""
    sit = load_model(args.checkpoint, device=device).eval()
    complete(args, sit.recipe)
    if args.side % sit.config.patch_size:
        raise SystemExit(f"--side {args.side} does not split into patches of {sit.config.patch_size}")
    if args.vae == "none":
        if sit.config.in_channels not in (1, 3):
            raise SystemExit(
                f"--vae none, but {sit.config.in_channels} channels are no picture: name the VAE of the latents"
            )
        vae, own = None, (1.0, 0.0)
    else:
        vae = VAE.from_pretrained(args.vae).to(device)
        if vae.channels != sit.config.in_channels:
            raise SystemExit(f"--vae {args.vae} has {vae.channels} channels, the model {sit.config.in_channels}")
        own = vae.scale, vae.shift
        said = sit.recipe.latent_scale, sit.recipe.latent_shift
        if sit.recipe.vae not in (None, args.vae) and any(s not in (None, o) for s, o in zip(said, own, strict=True)):
            raise SystemExit(
                f"--vae {args.vae} has scale and shift {own}, but {args.checkpoint} was trained with {said}, on latents of "
                f"{sit.recipe.vae}: name that one"
            )
        size = args.side * vae.factor
        if sit.recipe.image_size not in (None, size) and args.side == sit.recipe.latent_side:
            raise SystemExit(
                f"--vae {args.vae} makes images of {size} from latents of {args.side}, but {args.checkpoint} was trained on "
                f"images of {sit.recipe.image_size}: it is another VAE"
            )
    args.latent_scale = own[0] if args.latent_scale is None else args.latent_scale
    args.latent_shift = own[1] if args.latent_shift is None else args.latent_shift
    return sprint.CapturedModel(sit, autocast=torch.bfloat16 if args.dtype == "bfloat16" else None), vae


def generate(args: argparse.Namespace, model: Any, vae: Any, state: PartialState) -> Path:
    """Draw what is missing, over all processes; returns the file that the main process packed."""
    guidance(args)
    lock = None
    if state.is_main_process:
        args.out.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(args.out, "is sampling into")
        agree(args)
        sweep(args.out)
    state.wait_for_everyone()
    missing = [i for i in range(args.count) if not name(args, i).exists()]
    state.wait_for_everyone()  # all have looked before anyone writes
    mine = missing[state.process_index :: state.num_processes]
    batches = [mine[first : first + args.batch] for first in range(0, len(mine), args.batch)]
    for numbers in tqdm(batches, desc="batches", disable=not state.is_main_process):
        for index, image in zip(numbers, draw(model, vae, numbers, args, state.device), strict=True):
            file = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="PNG")
            write_bytes(name(args, index), file.getvalue())
    state.wait_for_everyone()
    file = pack(args) if lock else packed(args)
    del lock
    return file


def main() -> None:
    args = parse()
    args.checkpoint = locate(args.checkpoint)
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6))  # one packs what all drew
    model, vae = build(args, state.device or torch.device("cpu"))
    path = generate(args, model, vae, state)
    if state.is_main_process:
        print(f"{args.count} images in {args.out} and {path}")
    leave()


if __name__ == "__main__":
    with plain_errors():
        main()
