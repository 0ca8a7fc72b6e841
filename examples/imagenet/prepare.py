"""Images to latents of a VAE: the moments of each image's posterior, on all GPUs, resumable.

    accelerate launch examples/imagenet/prepare.py --images imagenet/train --out latents256 --size 256
    python examples/imagenet/prepare.py ... --layout repa            # the files of REPA's preprocessing
    python examples/imagenet/prepare.py ... --teacher vit_base_patch14_dinov2.lvd142m    # with REPA's features, cached

Work is cut into parts of `--shard` images, written whole or not at all: run the same command again after an interruption,
and it goes on. Files that cannot be read are listed in corrupt.txt, with the reason, and left out; files that are no
images, or in no class folder, in ignored.txt.
"""

import argparse
import hashlib
import io
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from errors import plain_errors
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from sprint.checkpoint import write_text
from sprint.data.images import ImageFolder, find_images, to_unit
from sprint.data.latents import write_index, write_repa, write_repa_labels, write_shard
from sprint.data.teacher import Teacher
from sprint.data.vae import VAE
from sprint.training.parallel import leave

STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with one subfolder per class")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=256, help="side of the square crop")
    parser.add_argument(
        "--vae", default="stabilityai/sd-vae-ft-mse", help="hub name or local folder, of a VAE or a pipeline"
    )
    parser.add_argument("--layout", choices=["compact", "repa"], default="compact")
    parser.add_argument("--dtype", choices=STORED, default="float16", help="of stored moments (compact layout)")
    parser.add_argument("--teacher", help="timm model whose features to keep for REPA (compact layout)")
    parser.add_argument("--teacher-weights", type=Path, help="its file, instead of timm's hub")
    parser.add_argument("--patch", type=int, default=2, help="patch size of the model that the teacher teaches")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--shard", type=int, default=4096, help="images per part")
    parser.add_argument("--workers", type=int, default=4, help="processes that decode images, per GPU")
    args = parser.parse_args()
    if min(args.size, args.batch, args.shard) < 1 or args.workers < 0:
        parser.error("--size, --batch and --shard must be at least 1, --workers at least 0")
    if args.teacher and args.layout == "repa":
        parser.error("--layout repa keeps the images, from which training asks the teacher: leave --teacher out")
    if args.teacher_weights and not args.teacher:
        parser.error("--teacher-weights without --teacher has no effect")
    return args


def plan(args: argparse.Namespace, images: list[tuple[Path, int]]) -> dict[str, Any]:
    """What decides the content of the parts; a folder of another plan is refused."""
    names = hashlib.sha256("\n".join(f"{printable(path)} {label}" for path, label in images).encode()).hexdigest()
    options = {name: getattr(args, name) for name in ("size", "vae", "layout", "dtype", "shard", "teacher", "patch")}
    return {"images": len(images), "names": names, **options}


def printable(path: Path) -> str:
    """A file's name as UTF-8 text, whatever its bytes are."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def agree(out: Path, wanted: dict[str, Any]) -> None:
    """Take up an earlier run's folder only if it was for the same job."""
    file = out / "plan.json"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(wanted, indent=1))
    elif (found := json.loads(file.read_text())) != wanted:
        differ = [f"{key} {found.get(key)!r}, now {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
        raise SystemExit(f"{out} was begun with {'; '.join(differ)}: use the same options, or another --out")


def prepare_part(
    number: int, args: argparse.Namespace, images: list[tuple[Path, int]], *, vae: VAE, teacher: Any, device: Any
) -> None:
    """Encode one part and write it; its record comes last."""
    first = number * args.shard
    mine = images[first : first + args.shard]
    loader = DataLoader(ImageFolder(args.images, mine, size=args.size), batch_size=args.batch, num_workers=args.workers)
    moments, features, kept, corrupt, at = [], [], [], [], 0
    for pixels, labels, problems in loader:
        good = [i for i, problem in enumerate(problems) if not problem]
        corrupt += [[printable(mine[at + i][0]), problem] for i, problem in enumerate(problems) if problem]
        if good:
            encoded = vae.moments(to_unit(pixels[good].to(device))).cpu()
            if args.layout == "repa":
                for i, one in zip(good, encoded, strict=True):
                    kept.append([write_repa(args.out, first + at + i, png(pixels[i]), one), int(labels[i])])
            else:
                moments.append(encoded.to(STORED[args.dtype]))
                if teacher is not None:
                    features.append(teacher(pixels[good].to(device)).cpu().to(STORED[args.dtype]))
                kept += [[None, int(labels[i])] for i in good]
        at += len(pixels)
    if args.layout == "compact" and kept:
        labels = torch.tensor([label for _, label in kept])
        write_shard(args.out, number, torch.cat(moments), labels, features=torch.cat(features) if features else None)
    write_text(record(args.out, number), json.dumps({"labels": kept, "corrupt": corrupt}))


def png(pixels: torch.Tensor) -> bytes:
    """A (3, H, W) uint8 image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="PNG")
    return file.getvalue()


def record(out: Path, number: int) -> Path:
    """Where a part says that it is whole."""
    return out / "parts" / f"{number:05d}.json"


def finish(args: argparse.Namespace, parts: int, classes: list[str], vae: VAE) -> None:
    """Write what makes the folder a dataset."""
    records = [json.loads(record(args.out, number).read_text()) for number in range(parts)]
    corrupt = [entry for part in records for entry in part["corrupt"]]
    about = {
        "classes": classes, "size": args.size, "teacher": args.teacher, "corrupt": corrupt, "vae": args.vae,
        "vae_class": vae.kind, "latent_scale": vae.scale, "latent_shift": vae.shift,
    }  # fmt: skip
    if args.layout == "repa":
        write_repa_labels(args.out, [(name, label) for part in records for name, label in part["labels"]], about=about)
    else:
        numbers = [number for number, part in enumerate(records) if part["labels"]]
        write_index(args.out, numbers, about=about)
    write_text(args.out / "corrupt.txt", "".join(f"{path}\t{problem}\n" for path, problem in corrupt))
    count = sum(len(part["labels"]) for part in records)
    ignored = len((args.out / "ignored.txt").read_text(encoding="utf-8").splitlines())
    print(
        f"{count} images of {len(classes)} classes prepared in {args.out}, {len(corrupt)} corrupt (corrupt.txt), "
        f"{ignored} other files (ignored.txt)"
    )


def main() -> None:
    args = parse()
    patience = timedelta(hours=6)  # processes with few images wait for those with many
    state = PartialState(
        cpu=not torch.cuda.is_available(), timeout=patience
    )  # else accelerate takes several CPU processes for one each
    images, classes, ignored = find_images(args.images)
    parts = -(-len(images) // args.shard)
    if parts < state.num_processes:
        raise SystemExit(f"{parts} parts for {state.num_processes} processes: choose a smaller --shard, or fewer processes")
    vae = VAE.from_pretrained(args.vae).to(state.device)
    if args.size % vae.factor:
        raise SystemExit(f"--size {args.size} is not divisible by {vae.factor}, by which this VAE shrinks images")
    teacher = None
    if args.teacher:
        side = args.size // vae.factor // args.patch
        teacher = Teacher(args.teacher, (side, side), weights=args.teacher_weights).to(state.device)
    if state.is_main_process:  # only now: a mistake in the options must not bind the folder
        agree(args.out, plan(args, images))
        (args.out / "parts").mkdir(exist_ok=True)
        write_text(args.out / "ignored.txt", "".join(f"{printable(path)}\n" for path in ignored))
    state.wait_for_everyone()
    mine = [n for n in range(parts) if n % state.num_processes == state.process_index and not record(args.out, n).exists()]
    for number in tqdm(mine, desc="parts", disable=not state.is_main_process):
        prepare_part(number, args, images, vae=vae, teacher=teacher, device=state.device)
    state.wait_for_everyone()
    if state.is_main_process:
        finish(args, parts, classes, vae)
    leave()


if __name__ == "__main__":
    with plain_errors():
        main()
