"""Small real things for the ImageNet scripts: a folder of images, a random VAE."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "examples" / "imagenet"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # such small work is slower on two threads


def images(folder: Path, *, classes: int = 3, each: int = 8, side: int = 40) -> Path:
    """Photographs of noise with a colour per class, of several sizes and kinds."""
    generator = torch.Generator().manual_seed(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(each):
            size = (side + 7 * i, side + 3 * (each - i), 3)
            pixels = torch.randint(0, 120, size, generator=generator, dtype=torch.uint8)
            pixels[..., label % 3] += 100
            suffix = ("png", "jpg")[i % 2]
            Image.fromarray(pixels.numpy()).save(folder / f"class{label}" / f"image{i:02d}.{suffix}")
    return folder


def vae(folder: Path) -> Path:
    """A random AutoencoderKL that shrinks images by 2."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4,
    )  # fmt: skip
    model.save_pretrained(folder)
    return folder


def launch(processes: int) -> list[str]:
    """Start of a command line for one process or several, which meet on a port that is free."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(several if processes > 1 else [])]


def script(
    name: str, *arguments: object, processes: int = 1, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts, on the CPU, in one process or several."""
    command = [*launch(processes), str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT | (environment or {}))
