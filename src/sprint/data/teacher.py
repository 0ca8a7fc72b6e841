"""Frozen teachers for REPA (arXiv 2410.06940): a vision transformer of timm gives one feature per token of the model's grid.

Needs timm. DINOv2-B, REPA's and SPRINT's teacher, is "vit_base_patch14_dinov2.lvd142m".
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprint.arguments import checked

DINOV2_B = "vit_base_patch14_dinov2.lvd142m"


@checked
class Teacher(nn.Module):
    """Patch features of images, in the grid of the model that they teach.

    Images are resized so that the teacher has one patch for each token (256 px images and 16x16 tokens: 224 px for patches
    of 14), and normalised as the teacher was trained. Class and register tokens are left out.

    Args:
        name: any vision transformer of timm.
        grid: token grid of the model, (rows, columns).
        weights: file to load instead of timm's own pretrained weights (safetensors, or a state dictionary).
        pretrained: load timm's weights from the hub, unless `weights` is given.

    Examples:
        >>> teacher = Teacher("vit_tiny_patch16_224", (2, 2), pretrained=False)
        >>> teacher(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape
        torch.Size([1, 4, 192])
    """

    def __init__(
        self,
        name: str = DINOV2_B,
        grid: tuple[int, int] = (16, 16),
        *,
        weights: str | Path | None = None,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        try:
            import timm
            from timm.data.config import resolve_model_data_config
        except ImportError as error:
            raise ImportError("a teacher needs timm: pip install 'sprint-diffusion[timm]'") from error
        if not timm.is_model(name):
            known = timm.list_models("vit_*dinov2*", pretrained=True)
            raise ValueError(f"timm has no model {name!r}: choose a vision transformer such as {', '.join(known[:3])}")
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"there are no teacher weights at {weights}")
        with torch.device("meta"):
            patch = getattr(getattr(timm.create_model(name), "patch_embed", None), "patch_size", None)
        if patch is None:
            raise ValueError(f"{name} has no patches of one size: choose a vision transformer (timm.list_models('vit_*'))")
        self.size = (grid[0] * patch[0], grid[1] * patch[1])
        self.grid = grid
        # As pretrained weights, a file goes through timm's own conversion, which resizes the positions to this grid.
        options: dict[str, Any] = {"pretrained": pretrained or weights is not None}
        if weights is not None:
            options["pretrained_cfg_overlay"] = {"file": str(weights)}
        try:
            self.network: Any = timm.create_model(name, num_classes=0, img_size=self.size, **options).eval()
        except Exception as error:  # of timm, of unpickling, of a state dictionary that does not fit
            if weights is None:
                raise
            raise ValueError(f"{weights} holds no weights of {name} ({type(error).__name__}: {error})") from error
        self.network.requires_grad_(False)
        self.dim: int = self.network.num_features
        """Width of the features, the model's `repa_dim`."""
        config = resolve_model_data_config(self.network)
        self.mean = nn.Buffer(torch.tensor(config["mean"]).view(3, 1, 1), persistent=False)
        self.std = nn.Buffer(torch.tensor(config["std"]).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "Teacher":
        """A teacher stays in `eval()`."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: (B, 3, H, W), uint8 in [0, 255].

        Returns:
            (B, rows * columns, D), row-major.

        Raises:
            TypeError: images are not uint8.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8 in [0, 255], got {images.dtype}")
        x = F.interpolate(images.float(), self.size, mode="bicubic", antialias=True).clamp(0, 255)
        tokens = self.network.forward_features((x / 255 - self.mean) / self.std)
        return tokens[:, self.network.num_prefix_tokens :]
