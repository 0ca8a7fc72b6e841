"""Checkpoints from one layout to another: ours, the SPRINT authors' ("reference"), the originals of SiT, DiT and REPA.

    python examples/imagenet/convert.py SiT-XL-2-256.pt model.safetensors --source sit --heads 16
    python examples/imagenet/convert.py DiT-XL-2-256.pt model.safetensors --source dit --heads 16
    python examples/imagenet/convert.py model.safetensors reference.safetensors --target reference

A .pt file may hold the model, or what its training script saved: its "ema" is taken, its `args` tell the classes. Time
direction, sign and order of patches are turned where they differ. What is written is safetensors; a .pt file is read
without running code from it.
"""

import argparse
import pickle
from pathlib import Path

import torch
from errors import plain_errors
from weights import load

import sprint
from sprint.checkpoint import read_tensors, write_tensors
from sprint.models.original import from_original, to_original

LAYOUTS = ("ours", "reference", "sit", "dit", "repa")
ORIGINALS = ("sit", "dit", "repa")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--source", choices=LAYOUTS, default="ours")
    parser.add_argument("--target", choices=LAYOUTS[:-1], default="ours")
    parser.add_argument("--heads", type=int, help="of an original: 6, 12, 16, 16 for S, B, L, XL")
    parser.add_argument("--classes", type=int, help="of an original, if neither its args nor 1001 rows tell them")
    parser.add_argument("--encoder-depth", type=int, default=2, help="of an original")
    parser.add_argument("--decoder-depth", type=int, default=2, help="of an original")
    parser.add_argument("--grid", type=int, default=16, help="side of the token grid that an original stores")
    args = parser.parse_args()
    if args.source in ORIGINALS and args.heads is None:
        parser.error(f"--source {args.source} needs --heads, which no tensor tells")
    if args.source == args.target:
        parser.error(f"--source and --target are both {args.source}")
    return args


def tensors(path: Path) -> tuple[dict[str, torch.Tensor], int | None]:
    """A state dictionary, of a safetensors file or a .pt with the model, its "ema" or its "model"; its classes, if told."""
    if path.suffix not in (".pt", ".pth"):
        return read_tensors(path)[0], None
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # of DiT's, SiT's and REPA's scripts: plain values
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no checkpoint that torch reads without running its code ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dictionary, or one under ema or model")
    classes = getattr(content.get("args"), "num_classes", None)
    state = next((content[key] for key in ("ema", "model", "state_dict") if key in content), content)
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path} has no dictionary of tensors under ema, model or state_dict, it has {', '.join(content)}")
    return state, classes if isinstance(classes, int) else None


def main() -> None:
    args = parse()
    if args.source == "ours":
        model = load(args.input)
    elif args.source == "reference":
        model = sprint.SiT.from_reference(args.input)
    else:
        state, told = tensors(args.input)
        if None not in (told, args.classes) and told != args.classes:
            raise SystemExit(f"--classes {args.classes}, but {args.input} was trained with num_classes={told}: leave it out")
        model = from_original(
            state, kind=args.source, heads=args.heads, num_classes=args.classes or told, encoder_depth=args.encoder_depth,
            decoder_depth=args.decoder_depth,
        )  # fmt: skip
    if args.target == "ours":
        model.save(args.output)
    elif args.target == "reference":
        model.to_reference(args.output)
    elif args.target != ("dit" if model.config.prediction == "noise" else "sit"):
        raise SystemExit(f"{args.input} predicts {model.config.prediction}: a DiT predicts noise, a SiT v")
    else:
        write_tensors(args.output, to_original(model, grid=(args.grid, args.grid)))
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.output}: {count / 1e6:.1f} M parameters, {args.source} to {args.target}")


if __name__ == "__main__":
    with plain_errors():
        main()
