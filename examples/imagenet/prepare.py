"""Images to latents of a VAE: the moments of each image's posterior, on all GPUs, resumable.

    accelerate launch examples/imagenet/prepare.py --images imagenet/train --out latents256 --size 256
    python examples/imagenet/prepare.py ... --layout repa            # the files of REPA's preprocessing
    python examples/imagenet/prepare.py ... --teacher vit_base_patch14_dinov2.lvd142m    # with REPA's features, cached

Work is cut into parts of `--shard` images, written whole or not at all: run the same command again after an interruption,
and it goes on. Files that cannot be read are listed in corrupt.txt, with the reason, and left out; files that are no
images, or in no class folder, in ignored.txt. How each kind of picture is read: sprint.data.decode.
"""

import argparse
import hashlib
import io
import json
from collections import Counter
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
from sprint.data.latents import shard_name, write_index, write_repa, write_repa_labels, write_shard
from sprint.data.teacher import Teacher
from sprint.data.vae import VAE
from sprint.training.parallel import leave

STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with one subfolder per class, or a dataset.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=256, help="side of the square crop")
    parser.add_argument(
        "--vae", default="stabilityai/sd-vae-ft-mse", help="hub name or local folder, of a VAE or a pipeline"
    )
    parser.add_argument("--ignore-exif", action="store_true", help="do not turn pictures by their EXIF data; ADM did not")
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
    if args.out.resolve().is_relative_to(args.images.resolve()):
        parser.error(f"--out {args.out} lies in --images {args.images}, where it would become a class: choose another")
    if args.teacher and args.layout == "repa":
        parser.error("--layout repa keeps the images, from which training asks the teacher: leave --teacher out")
    if args.teacher_weights and not args.teacher:
        parser.error("--teacher-weights without --teacher has no effect")
    return args


def plan(args: argparse.Namespace, images: list[tuple[Path, int]], vae: VAE) -> dict[str, Any]:
    """What decides the content of the parts; a folder of another plan is refused."""
    names = hashlib.sha256("\n".join(f"{printable(path)} {label}" for path, label in images).encode()).hexdigest()
    decide = ("size", "vae", "layout", "dtype", "shard", "teacher", "patch", "ignore_exif")
    weights = hashlib.sha256()
    for tensor in vae.state_dict().values():
        weights.update(tensor.cpu().float().numpy().tobytes())
    options = {name: getattr(args, name) for name in decide}
    return {"images": len(images), "names": names, "weights": weights.hexdigest()[:16], **options}


def printable(text: object) -> str:
    """A file's name, or what is wrong with it, as one line of UTF-8, whatever its bytes are."""
    escaped = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped)


def agree(out: Path, wanted: dict[str, Any] | None) -> None:
    """Take up an earlier run's folder only if it was for the same job, and no folder of anything else."""
    file = out / "plan.json"
    found = json.loads(file.read_text()) if file.exists() else None
    if found is None and (not out.exists() or (out.is_dir() and not any(out.iterdir()))):
        return
    if not isinstance(found, dict) or "names" not in found:
        raise SystemExit(f"{out} holds what prepare.py did not make: choose another --out, or empty it")
    if wanted is not None and found != wanted:
        differ = [f"{key} {found.get(key)!r}, now {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
        raise SystemExit(f"{out} was begun with {'; '.join(differ)}: use the same options, or another --out")


def prepare_part(
    number: int, args: argparse.Namespace, images: list[tuple[Path, int]], *, vae: VAE, teacher: Any, device: Any
) -> None:
    """Encode one part and write it; its record comes last."""
    first = number * args.shard
    mine = images[first : first + args.shard]
    pictures = ImageFolder(args.images, mine, size=args.size, turn=not args.ignore_exif)
    loader = DataLoader(pictures, batch_size=args.batch, num_workers=args.workers)
    moments, features, kept, corrupt, at = [], [], [], [], 0
    for pixels, labels, problems in loader:
        good = [i for i, problem in enumerate(problems) if not problem]
        corrupt += [[printable(mine[at + i][0]), printable(problem)] for i, problem in enumerate(problems) if problem]
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


def whole(args: argparse.Namespace, number: int) -> bool:
    """Whether a part was done, and what its record tells of is still there."""
    if not (file := record(args.out, number)).exists():
        return False
    labels = json.loads(file.read_text())["labels"]
    names = [f"vae-sd/{name}" for name, _ in labels] if args.layout == "repa" else [shard_name(number)] * bool(labels)
    return all((args.out / name).is_file() for name in names)


def finish(args: argparse.Namespace, parts: int, classes: list[str], vae: VAE) -> None:
    """Write what makes the folder a dataset."""
    records = [json.loads(record(args.out, number).read_text()) for number in range(parts)]
    corrupt = [entry for part in records for entry in part["corrupt"]]
    write_text(args.out / "corrupt.txt", "".join(f"{path}\t{problem}\n" for path, problem in corrupt))
    counts = Counter(label for part in records for _, label in part["labels"])
    if not counts:
        path, problem = corrupt[0]
        raise SystemExit(
            f"none of {len(corrupt)} files could be read, such as {path} ({problem}): see {args.out / 'corrupt.txt'}. "
            f"Delete {args.out} before you try again"
        )
    about = {
        "classes": classes, "size": args.size, "teacher": args.teacher, "corrupt": corrupt, "vae": args.vae,
        "vae_class": vae.kind, "latent_scale": vae.scale, "latent_shift": vae.shift,
    }  # fmt: skip
    if args.layout == "repa":
        write_repa_labels(args.out, [(name, label) for part in records for name, label in part["labels"]], about=about)
    else:
        numbers = [number for number, part in enumerate(records) if part["labels"]]
        write_index(args.out, numbers, about=about)
    ignored = len((args.out / "ignored.txt").read_text(encoding="utf-8").splitlines())
    print(
        f"{counts.total()} images of {len(classes)} classes prepared in {args.out}, {len(corrupt)} corrupt (corrupt.txt), "
        f"{ignored} other files (ignored.txt)"
    )
    if bare := [name for number, name in enumerate(classes) if number not in counts]:
        print(f"{len(bare)} classes without an image: {', '.join(map(printable, bare[:5]))}{', ...' if bare[5:] else ''}")


def main() -> None:
    args = parse()
    patience = timedelta(hours=6)  # processes with few images wait for those with many
    state = PartialState(
        cpu=not torch.cuda.is_available(), timeout=patience
    )  # else accelerate takes several CPU processes for one each
    images, classes, ignored = find_images(args.images)
    if state.is_main_process:
        agree(args.out, None)  # before anything is loaded
    vae = VAE.from_pretrained(args.vae).to(state.device)
    if args.size % vae.factor:
        raise SystemExit(f"--size {args.size} is not divisible by {vae.factor}, by which this VAE shrinks images")
    if args.size // vae.factor % args.patch:
        raise SystemExit(
            f"--size {args.size} gives latents {args.size // vae.factor} wide, which do not split into patches of "
            f"{args.patch}: another --size, or the --patch of the model"
        )
    wanted = plan(args, images, vae)
    if state.is_main_process:
        agree(args.out, wanted)
    parts = -(-len(images) // args.shard)
    if parts < state.num_processes:
        raise SystemExit(f"{parts} parts for {state.num_processes} processes: choose a smaller --shard, or fewer processes")
    teacher = None
    if args.teacher:
        side = args.size // vae.factor // args.patch
        teacher = Teacher(args.teacher, (side, side), weights=args.teacher_weights).to(state.device)
    if state.is_main_process:  # only now: a mistake in the options must not bind the folder
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(args.out / "plan.json", json.dumps(wanted, indent=1))
        (args.out / "parts").mkdir(exist_ok=True)
        lines = (f"{printable(path)}\t{printable(why)}\n" for path, why in ignored.items())
        write_text(args.out / "ignored.txt", "".join(lines))
    state.wait_for_everyone()
    mine = [n for n in range(parts) if n % state.num_processes == state.process_index and not whole(args, n)]
    for number in tqdm(mine, desc="parts", disable=not state.is_main_process):
        prepare_part(number, args, images, vae=vae, teacher=teacher, device=state.device)
    state.wait_for_everyone()
    if state.is_main_process:
        finish(args, parts, classes, vae)
    leave()


if __name__ == "__main__":
    with plain_errors():
        main()
