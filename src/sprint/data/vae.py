"""The VAE of the latents, by its class in diffusers: what images become, and how they come back. Needs diffusers.

Diffusion models see `(z - shift) * scale` of a VAE's latent z; shift and scale are one number or one per channel.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprint.arguments import checked
from sprint.checkpoint import PathLike

KINDS = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderDC", "AutoencoderTiny")


@checked
class VAE(nn.Module):
    """Encodes images to moments of latents, and decodes latents.

    | class of diffusers | moments | scale and shift |
    |---|---|---|
    | `AutoencoderKL` (SD, SDXL, SD3, Flux) | mean and std | `scaling_factor`, `shift_factor`, or statistics per channel |
    | `AutoencoderKLFlux2` | mean and std of 2x2 patches | those of its batch norm, per channel |
    | `AutoencoderDC` | its latent, std 0 | `scaling_factor` |
    | `AutoencoderTiny` | its latent, std 0 | `scaling_factor` |

    Args:
        network: of one of these classes.

    Raises:
        ValueError: another class.

    Examples:
        >>> from diffusers import AutoencoderTiny
        >>> vae = VAE(AutoencoderTiny())
        >>> vae.channels, vae.factor, vae.scale, vae.shift
        (4, 8, 1.0, 0.0)
        >>> vae.moments(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.kind = type(network).__name__
        _check_kind(self.kind, "the VAE")
        self.network: Any = network
        self.patched = self.kind == "AutoencoderKLFlux2"
        """Channels hold 2x2 patches of the network's own latents."""
        self.channels: int = network.config.latent_channels * (4 if self.patched else 1)
        """Of the latents."""
        self.factor: int = _shrinks(network) * (2 if self.patched else 1)
        """By which sides shrink."""
        self.scale, self.shift = scaling(network)
        """Models see the latents less `shift`, times `scale`."""

    @classmethod
    def from_pretrained(cls, source: PathLike) -> "VAE":
        """Load one.

        Args:
            source: hub name or local folder, of the VAE or of a pipeline that has one in `vae/`.

        Raises:
            ImportError: diffusers is not installed.
            OSError: there is none of this name.
            ValueError: it is of a class that is not supported; said before its weights are read.
        """
        try:
            import diffusers
        except ImportError as error:
            raise ImportError("a VAE needs diffusers: pip install 'sprint-diffusion[diffusers]'") from error
        if Path(source).is_file():
            raise ValueError(f"{source} is a file, expected the folder of a VAE of diffusers, or its name on the hub")
        config, place = _config(source)
        kind = str(config.get("_class_name"))
        _check_kind(kind, str(source))
        return cls(getattr(diffusers, kind).from_pretrained(source, **place).eval().requires_grad_(False))

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Mean and std of the latents of images, not scaled.

        Args:
            images: (B, 3, H, W) in [-1, 1], sides divisible by `factor`.

        Returns:
            (B, 2 * channels, H / factor, W / factor).
        """
        encoded = self.network.encode(images)
        if hasattr(encoded, "latent_dist"):
            pair = (encoded.latent_dist.mean, encoded.latent_dist.std)
        else:
            latents = encoded[0] if isinstance(encoded, tuple) else next(iter(encoded.values()))
            pair = (latents, torch.zeros_like(latents))
        return torch.cat([F.pixel_unshuffle(part, 2) if self.patched else part for part in pair], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, scale: Any = None, shift: Any = None) -> Tensor:
        """Images of latents as a model sees them.

        Args:
            latents: (B, channels, H, W).
            scale: that they were multiplied with, by default the VAE's own.
            shift: that was taken off before, likewise.

        Returns:
            (B, 3, H * factor, W * factor), about [-1, 1].
        """
        z = unscaled(latents, self.scale if scale is None else scale, self.shift if shift is None else shift)
        return self.network.decode(F.pixel_shuffle(z, 2) if self.patched else z).sample


def scaling(network: Any) -> tuple[Any, Any]:
    """Scale and shift of a VAE's latents, one number or one per channel, from its configuration or its statistics.

    Raises:
        ValueError: it tells none.
    """
    config = network.config
    if type(network).__name__ == "AutoencoderKLFlux2":
        deviation = (network.bn.running_var.double() + config.batch_norm_eps).sqrt()
        return tuple((1 / deviation).tolist()), tuple(network.bn.running_mean.double().tolist())
    if not hasattr(config, "scaling_factor"):
        raise ValueError(f"{type(network).__name__} tells no scaling_factor, by which latents are decoded")
    scale, shift = float(config.scaling_factor), float(config.get("shift_factor") or 0.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return scale, shift
    return tuple(scale / one for one in std), tuple(one + shift for one in mean)


def scaled(z: Tensor, scale: Any, shift: Any) -> Tensor:
    """`(z - shift) * scale`, one number or one per channel of (B, C, H, W)."""
    return (z - per_channel(shift, z, "shift")) * per_channel(scale, z, "scale")


def unscaled(x: Tensor, scale: Any, shift: Any) -> Tensor:
    """The z of which x is `scaled`."""
    return x / per_channel(scale, x, "scale") + per_channel(shift, x, "shift")


def per_channel(value: float | Sequence[float], like: Tensor, name: str) -> Any:
    """A number as it is, numbers per channel as a tensor that fits (B, C, ...).

    Raises:
        ValueError: not one per channel.
    """
    if isinstance(value, int | float):
        return value
    if len(value) != like.shape[1]:
        raise ValueError(f"latent_{name} has {len(value)} numbers, the latents {like.shape[1]} channels: give one for each")
    shape = (-1, *[1] * (like.ndim - 2))
    return torch.tensor(value, device=like.device, dtype=torch.float64).to(like.dtype).view(shape)


def _check_kind(kind: str, source: str) -> None:
    if kind not in KINDS:
        raise ValueError(
            f"{source} is of class {kind}, which is not supported: {', '.join(KINDS)} are; encode the images yourself, and "
            "write the latents with sprint.data.latents.write_shard"
        )


def _config(source: PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """Of a VAE of any class, and where in `source` it is."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    places: list[dict[str, str]] = [{}, {"subfolder": "vae"}]
    for place in places:
        try:
            config: Any = AutoencoderKL.load_config(source, **place)  # pyright: ignore[reportArgumentType]
            return dict(config), place
        except OSError as error:
            if place:
                raise OSError(f"there is no VAE of diffusers at {source}, nor in its vae/ ({error})") from error
    raise AssertionError


def _shrinks(network: Any) -> int:
    """By how much sides shrink, as each class says it."""
    if hasattr(network, "spatial_compression_ratio"):
        return network.spatial_compression_ratio
    widths = network.config.get("block_out_channels") or network.config.encoder_block_out_channels
    return 2 ** (len(widths) - 1)
