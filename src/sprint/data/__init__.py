"""What a model learns from: folders of images, latents in shards, and a teacher's features for REPA.

Pillow, timm and diffusers are imported where they are used.
"""

from sprint.data.images import ImageFolder, center_crop, find_images, save_grid, to_uint8
from sprint.data.latents import LatentDataset, draw_latents
from sprint.data.teacher import Teacher
from sprint.data.vae import VAE

__all__ = [
    "VAE",
    "ImageFolder",
    "LatentDataset",
    "Teacher",
    "center_crop",
    "draw_latents",
    "find_images",
    "save_grid",
    "to_uint8",
]
