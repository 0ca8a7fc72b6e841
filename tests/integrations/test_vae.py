"""sprint.data.VAE: each class against the lines of diffusers' own pipelines, and what is not supported."""

import pytest
import torch
import torch.nn.functional as F

diffusers = pytest.importorskip("diffusers")

from sprint.data.latents import draw_latents  # noqa: E402
from sprint.data.vae import KINDS, VAE, scaled, unscaled  # noqa: E402

BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
SMALL = {**BLOCKS, "block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 4}
MADE = {
    "sd": lambda: diffusers.AutoencoderKL(**SMALL),
    "sd3": lambda: diffusers.AutoencoderKL(**SMALL, scaling_factor=1.5305, shift_factor=0.0609),
    "sdxl": lambda: diffusers.AutoencoderKL(
        **SMALL, scaling_factor=0.13, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 3.0]
    ),
    "flux2": lambda: diffusers.AutoencoderKLFlux2(**SMALL),
    "dc": lambda: diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_out_channels=(4, 8), decoder_block_out_channels=(4, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_block_types="ResBlock",
        decoder_block_types="ResBlock", encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41407,
    ),
    "tiny": lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4
    ),
}  # fmt: skip
CHANNELS_AND_FACTOR = {"sd": (4, 2), "sd3": (4, 2), "sdxl": (4, 2), "flux2": (16, 4), "dc": (4, 2), "tiny": (4, 8)}


def make(name):
    torch.manual_seed(0)
    network = MADE[name]()
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    if name == "flux2":
        network.bn.running_mean += torch.randn(16)
        network.bn.running_var += torch.rand(16)
    return network.eval()


def by_hand(name, network, images):
    """Mean latents as the model sees them, and images of latents, by diffusers' pipelines."""
    c = network.config
    if name == "flux2":
        mean = network.bn.running_mean.view(1, -1, 1, 1)
        std = (network.bn.running_var.view(1, -1, 1, 1) + c.batch_norm_eps).sqrt()
        z = diffusers.Flux2Pipeline._patchify_latents(network.encode(images).latent_dist.mean)
        x = (z - mean) / std
        return x, network.decode(diffusers.Flux2Pipeline._unpatchify_latents(x * std + mean)).sample
    if name in ("dc", "tiny"):
        z = network.encode(images)[0]
        return z * c.scaling_factor, network.decode(z).sample
    z = network.encode(images).latent_dist.mean
    if name == "sdxl":
        mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in (c.latents_mean, c.latents_std))
        x = (z - mean) * c.scaling_factor / std  # StableDiffusionXLPipeline decodes x * std / scaling_factor + mean
        return x, network.decode(x * std / c.scaling_factor + mean).sample
    shift = c.shift_factor or 0.0
    x = (z - shift) * c.scaling_factor
    return x, network.decode(x / c.scaling_factor + shift).sample


@pytest.mark.parametrize("name", MADE)
def test_each_class_as_diffusers_pipelines_have_it(name, tmp_path):
    network = make(name)
    network.save_pretrained(tmp_path / "pipeline" / "vae")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents, decoded = by_hand(name, network, images)
    for source in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        vae = VAE.from_pretrained(source)
        assert (vae.channels, vae.factor) == CHANNELS_AND_FACTOR[name]
        mean, std = vae.moments(images).chunk(2, dim=1)
        assert mean.shape == (2, vae.channels, 32 // vae.factor, 32 // vae.factor)
        torch.testing.assert_close(scaled(mean, vae.scale, vae.shift), latents, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vae.decode(latents), decoded, rtol=1e-4, atol=1e-4)
        assert (std > 0).all() if vae.kind.startswith("AutoencoderKL") else (std == 0).all()


def test_std_of_patches_is_that_of_their_own_latents():
    vae = VAE(make("flux2"))
    images = torch.rand(1, 3, 16, 16)
    std = vae.network.encode(images).latent_dist.std
    assert vae.moments(images).chunk(2, dim=1)[1].equal(F.pixel_unshuffle(std, 2))


def test_numbers_per_channel():
    """Drawn, scaled and back; not one per channel is refused."""
    moments = torch.randn(2, 6, 4, 4)
    moments[:, 3:] = 0
    scale, shift = [1.0, 2.0, 0.5], (0.0, 1.0, -1.0)
    drawn = draw_latents(moments, scale=scale, shift=shift)
    torch.testing.assert_close(drawn[:, 1], (moments[:, 1] - 1) * 2)
    torch.testing.assert_close(unscaled(drawn, scale, shift), moments[:, :3])
    with pytest.raises(ValueError, match="latent_shift has 2 numbers, the latents 3 channels"):
        draw_latents(moments, shift=[1.0, 2.0])


def test_others_are_refused_before_their_weights_are_read(tmp_path):
    assert all(hasattr(diffusers, kind) for kind in KINDS)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    with pytest.raises(ValueError, match="is of class AutoencoderKLWan, which is not supported: AutoencoderKL, "):
        VAE.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="there is no VAE of diffusers at .*none, nor in its vae/"):
        VAE.from_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="the VAE is of class Linear"):
        VAE(torch.nn.Linear(2, 2))
