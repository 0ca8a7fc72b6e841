"""The command line: `python -m sprint cost | info | verify | convert`.

A mistake of the user is one line, and SPRINT_TRACEBACK=1 shows where it came from.
"""

import argparse
import dataclasses
import os
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sprint.checkpoint import read_tensors, write_tensors
from sprint.costs.hardware import KNOWN
from sprint.costs.predict import cost
from sprint.middle.drop import StructuredDrop
from sprint.models import released
from sprint.models.config import PRESETS
from sprint.models.loading import load_model
from sprint.models.original import from_original, to_original
from sprint.models.sit import SiT
from sprint.random import normal

LAYOUTS = ("ours", "reference", "sit", "dit", "repa")
ORIGINALS = ("sit", "dit", "repa")
FOLLOWS = (
    0.5  # the cosine of a trained velocity at t = 1 with its noise is larger by far, of one that is read wrongly smaller
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: of the command line; by default those of the process.

    Raises:
        SystemExit: a mistake in them, or in a file.
    """
    args = _parser().parse_args(arguments)
    try:
        args.command(args)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("SPRINT_TRACEBACK"):
            raise
        raise SystemExit(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sprint", description="SPRINT: diffusion transformers for less.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Any, name: str) -> argparse.ArgumentParser:
        text = function.__doc__
        made = commands.add_parser(
            name, help=text.splitlines()[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        made.set_defaults(command=function)
        return made

    costs = command(_cost, "cost")
    costs.add_argument("preset", choices=sorted(PRESETS), help="size of the model")
    costs.add_argument("--pixels", type=int, default=256, help="side of the images; latents are an eighth of it")
    costs.add_argument("--batch", type=int, default=32)
    costs.add_argument("--ratio", type=float, default=0.75, help="share of tokens dropped")
    costs.add_argument("--hardware", choices=[*KNOWN, "this machine"], default="H100")
    for function, name in ((_info, "info"), (_verify, "verify")):
        made = command(function, name)
        made.add_argument("checkpoint", type=Path, help="a file, or the name of a released one")
    converts = command(_convert, "convert")
    converts.add_argument("input", type=Path)
    converts.add_argument("output", type=Path)
    converts.add_argument("--source", choices=LAYOUTS, default="ours")
    converts.add_argument("--target", choices=LAYOUTS[:-1], default="ours")
    converts.add_argument("--heads", type=int, help="of an original: 6, 12, 16, 16 for S, B, L, XL")
    converts.add_argument("--classes", type=int, help="of an original, if neither its args nor 1001 rows tell them")
    converts.add_argument("--encoder-depth", type=int, default=2, help="of an original")
    converts.add_argument("--decoder-depth", type=int, default=2, help="of an original")
    converts.add_argument("--grid", type=int, default=16, help="side of the token grid that an original stores")
    return parser


def _cost(args: argparse.Namespace) -> None:
    """What a preset costs on each path, and whether dropping tokens will pay."""
    side = args.pixels // 16
    if side < 1:
        raise ValueError(f"--pixels must be at least 16, got {args.pixels}")
    drop, grid = StructuredDrop(args.ratio), (side, side)
    print(cost(args.preset, grid=grid, batch=args.batch, drop=drop, hardware=args.hardware))
    print(f"  kept: {drop.num_kept(grid)} of {side * side} tokens")


def _info(args: argparse.Namespace) -> None:
    """What a checkpoint holds: its kind, its sizes and its options."""
    path = Path(released.locate(args.checkpoint))
    _, metadata = read_tensors(path)
    kinds = {"sprint.state": "a checkpoint of train.py, with its average", "sprint.config": "SiT.save's"}
    kind = next((said for key, said in kinds.items() if key in metadata), "in the layout of the SPRINT authors")
    print(f"{path}: {kind}, {path.stat().st_size / 2**20:.1f} MiB")
    _describe(load_model(path))


def _describe(model: SiT) -> None:
    config = model.config
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    like = [name for name, sizes in PRESETS.items() if sizes._asdict().items() <= dataclasses.asdict(config).items()]
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"  {like[0] if like else 'of a size of its own'}, {count:,} parameters, {next(model.parameters()).dtype}")
    for name, value in dataclasses.asdict(config).items():
        print(f"  {name} = {value!r}{'' if usual[name] in (value, dataclasses.MISSING) else f'  (usually {usual[name]!r})'}")
    for name, value in dataclasses.asdict(model.recipe).items():
        if value is not None:
            print(f"  trained with {name} = {value!r}")


@torch.no_grad()
def _verify(args: argparse.Namespace) -> None:
    """Whether weights are read right: sizes, finite numbers, and what the model says of a fixed input.

    At t = 1 its input is noise alone, and a trained velocity is that noise less the mean of the data: their cosine is near
    1. With tensors in the wrong places, patches or time in the wrong order, or random weights, it is near 0. It takes a
    minute for XL/2 on a CPU.
    """
    model = load_model(args.checkpoint).eval().float()
    print(f"{args.checkpoint}: read")
    if Path(args.checkpoint).name in released.FILES:
        print(f"  released at {released.REPOSITORY} on the Hugging Face hub, under the licence there, which is not ours")
    _describe(model)
    if broken := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise ValueError(f"{args.checkpoint} has numbers that are not finite, in {', '.join(broken[:3])}: it is damaged")
    c = model.config
    side = 16 * c.patch_size if c.in_channels != 4 else 32
    x = normal((2, c.in_channels, side, side), generator=torch.Generator().manual_seed(0))
    y = None if c.num_classes is None and c.cond_dim is None else model.null_condition(2)
    cosines: dict[str, Tensor] = {}
    for path in ("full", "shallow"):
        v = model(x, torch.ones(2), y, path=path)
        cosines[path] = torch.nn.functional.cosine_similarity(v.flatten(1), x.flatten(1)).mean()
        print(f"  {path} path at t = 1, noise of seed 0: mean {v.mean():.5f}, deviation {v.std():.5f}, ", end="")
        print(f"cosine with the noise {cosines[path]:.4f}")
    if c.prediction == "x":
        print("  it predicts x, which says nothing at t = 1: sizes and numbers are right, the rest was not tried")
    elif cosines["full"] < FOLLOWS:
        raise ValueError(
            "the prediction does not follow the noise: these weights are untrained, or read wrongly (another patch_size, "
            "kind, prediction or direction of time)"
        )
    else:
        print("  its prediction follows the noise, as that of a trained model that is read right")


def _convert(args: argparse.Namespace) -> None:
    """A checkpoint from one layout to another: ours, the SPRINT authors' ("reference"), SiT's, DiT's, REPA's.

    python -m sprint convert SiT-XL-2-256.pt model.safetensors --source sit --heads 16
    python -m sprint convert model.safetensors reference.safetensors --target reference

    A .pt file may hold the model, or what its training script saved: its "ema" is taken, its `args` tell the classes. Time
    direction, sign and order of patches are turned where they differ. What is written is safetensors; a .pt file is read
    without running code from it.
    """
    if args.source in ORIGINALS and args.heads is None:
        raise ValueError(f"--source {args.source} needs --heads, which no tensor tells")
    if args.source == args.target:
        raise ValueError(f"--source and --target are both {args.source}")
    if args.source == "ours":
        model = load_model(args.input)
    elif args.source == "reference":
        model = SiT.from_reference(args.input)
    else:
        state, told = _original(args.input)
        if None not in (told, args.classes) and told != args.classes:
            raise ValueError(f"--classes {args.classes}, but {args.input} was trained with num_classes={told}: leave it out")
        model = from_original(
            state, kind=args.source, heads=args.heads, num_classes=args.classes or told, encoder_depth=args.encoder_depth,
            decoder_depth=args.decoder_depth,
        )  # fmt: skip
    if args.target == "ours":
        model.save(args.output)
    elif args.target == "reference":
        model.to_reference(args.output)
    elif args.target != ("dit" if model.config.prediction == "noise" else "sit"):
        raise ValueError(f"{args.input} predicts {model.config.prediction}: a DiT predicts noise, a SiT v")
    else:
        write_tensors(args.output, to_original(model, grid=(args.grid, args.grid)))
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.output}: {count / 1e6:.1f} M parameters, {args.source} to {args.target}")


def _original(path: Path) -> tuple[dict[str, Tensor], int | None]:
    """A state dictionary, of a safetensors file or a .pt with the model, its "ema" or its "model"; its classes, if told."""
    if path.suffix not in (".pt", ".pth"):
        return read_tensors(path)[0], None
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # of DiT's, SiT's and REPA's scripts: plain values
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, struct.error) as error:
        raise ValueError(f"{path} is no checkpoint that torch reads without running its code ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dictionary, or one under ema or model")
    classes = getattr(content.get("args"), "num_classes", None)
    state = next((content[key] for key in ("ema", "model", "state_dict") if key in content), content)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} has no dictionary of tensors under ema, model or state_dict, it has {', '.join(content)}")
    return state, classes if isinstance(classes, int) else None
