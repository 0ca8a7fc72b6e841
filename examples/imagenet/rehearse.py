"""Forty pictures and a VAE for a rehearsal of the whole pipeline, in minutes on a laptop (docs/imagenet.md).

    python examples/imagenet/rehearse.py --out rehearsal

Pictures of four classes are drawn: discs, stripes, checks, rings. The VAE is small and has random weights, so that samples
will be noise of the right shape. For pictures to look at, use a folder of your own and `--vae` of the hub.
"""

import argparse
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

CLASSES, EACH, SIDE = ("checks", "discs", "rings", "stripes"), 10, 96


def draw(kind: str, generator: np.random.Generator) -> Image.Image:
    """One picture, two colours and a pattern at a random place."""
    row, column = np.mgrid[0:SIDE, 0:SIDE] - generator.uniform(0.3, 0.7, (2, 1, 1)) * SIDE
    radius, period = np.hypot(row, column), generator.uniform(10, 30)
    pattern = {
        "checks": (row // period + column // period) % 2 < 1,
        "discs": radius < period,
        "rings": radius % period < period / 2,
        "stripes": (row + column) % period < period / 2,
    }[kind]
    colours = generator.integers(0, 256, (2, 3))
    return Image.fromarray(np.where(pattern[..., None], *colours).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("rehearsal"))
    folder = parser.parse_args().out
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    generator = np.random.default_rng(0)
    for kind in CLASSES:
        (folder / "images" / kind).mkdir(parents=True, exist_ok=True)
        for number in range(EACH):
            draw(kind, generator).save(folder / "images" / kind / f"{number}.png")
    torch.manual_seed(0)
    widths, network = (8, 8, 8, 8), cast(Any, AutoencoderKL)  # whose types are those of its defaults
    network(
        block_out_channels=widths, norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths), latent_channels=4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    print(f"{len(CLASSES) * EACH} pictures in {folder / 'images'}, a VAE in {folder / 'vae'}")


if __name__ == "__main__":
    main()
