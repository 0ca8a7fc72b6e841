"""Our guider in a modular pipeline of diffusers, the pipeline unmodified."""

import pytest
import torch
from architectures import CASES

import sprint

diffusers = pytest.importorskip("diffusers")
steps = pytest.importorskip("diffusers.modular_pipelines.wan.denoise")

from diffusers.modular_pipelines import SequentialPipelineBlocks  # noqa: E402
from diffusers.modular_pipelines.wan.before_denoise import WanSetTimestepsStep  # noqa: E402

from sprint.diffusers import PathDropGuidance  # noqa: E402


class Denoise(SequentialPipelineBlocks):
    """The denoising part of the Wan pipeline: text embeddings and noise in, latents out."""

    model_name = "wan"
    block_classes = (WanSetTimestepsStep, steps.WanDenoiseStep)
    block_names = ("set_timesteps", "denoise")


@pytest.mark.parametrize("guider", [diffusers.ClassifierFreeGuidance, PathDropGuidance])
def test_guider_in_a_modular_pipeline(guider):
    transformer, arguments = CASES["wan"]()
    sprint.wrap(transformer, init="xavier")
    calls = []
    transformer.blocks[2].register_forward_hook(lambda *_: calls.append(1))
    pipe = Denoise().init_pipeline()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe.update_components(transformer=transformer, scheduler=scheduler, guider=guider(guidance_scale=3.0))
    pipe.set_progress_bar_config(disable=True)
    text = arguments["encoder_hidden_states"]
    noise = arguments["hidden_states"]
    latents = pipe(
        latents=noise, dtype=torch.float32, prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text),
        num_inference_steps=3, output="latents",
    )  # fmt: skip

    shallow = guider is PathDropGuidance
    assert len(calls) == (3 if shallow else 6)

    def velocity(sigma, condition, path):
        with torch.no_grad(), sprint.path(transformer, path):
            return transformer(x, sigma.expand(2) * 1000, condition, return_dict=False)[0]

    x = noise
    for sigma, following in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        strong = velocity(sigma, text, "full")
        weak = velocity(sigma, torch.zeros_like(text), "shallow" if shallow else "full")
        x = x + (following - sigma) * (weak + 3 * (strong - weak))
    torch.testing.assert_close(latents, x, rtol=1e-4, atol=1e-4)  # float32
