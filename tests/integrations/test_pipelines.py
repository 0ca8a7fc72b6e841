"""Path-Drop Guidance in unmodified pipelines and guiders of diffusers, on wrapped tiny transformers."""

from types import SimpleNamespace

import pytest
import torch
from architectures import CASES

import sprint
from sprint import StructuredDrop
from sprint.hosts.check import first_tensor

diffusers = pytest.importorskip("diffusers")

from sprint.diffusers import PathDropGuidance, path_drop_guidance  # noqa: E402


@pytest.fixture
def wan():
    """A Wan pipeline with a wrapped transformer, and the arguments of a call."""
    transformer, _ = CASES["wan"]()
    sprint.wrap(transformer, drop=StructuredDrop(0.75), init="xavier")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.WanPipeline(None, None, None, scheduler, transformer)
    pipe.set_progress_bar_config(disable=True)
    prompt, negative = torch.randn(2, 1, 5, 12, generator=torch.Generator().manual_seed(0))
    call = {
        "prompt_embeds": prompt,
        "negative_prompt_embeds": negative,
        "height": 64,
        "width": 64,
        "num_frames": 5,
        "num_inference_steps": 3,
        "output_type": "latent",
    }
    return pipe, call


def run(pipe, call, **options):
    return pipe(**call, generator=torch.Generator().manual_seed(1), **options).frames


def middle_calls(transformer):
    calls = []
    for block in transformer.blocks[2:4]:
        block.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_an_unmodified_pipeline_of_two_calls(wan):
    pipe, call = wan
    plain = run(pipe, call, guidance_scale=3.0)
    calls = middle_calls(pipe.transformer)
    with path_drop_guidance(pipe.transformer):
        guided = run(pipe, call, guidance_scale=3.0)
    assert len(calls) == 3 * 2  # three steps, two middle blocks, the conditional branch only
    assert not guided.equal(plain)
    assert run(pipe, call, guidance_scale=3.0).equal(plain)  # and off again
    assert len(calls) == 3 * 2 + 3 * 4


def test_the_pipeline_computes_path_drop_guidance(wan):
    """The same trajectory with our own guidance and Euler steps on the scheduler's times."""
    pipe, call = wan
    with path_drop_guidance(pipe.transformer):
        expected = run(pipe, call, guidance_scale=3.0)
    latents = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(1))

    def velocity(x, t, prompt):
        return pipe.transformer(x, t * 1000, prompt, return_dict=False)[0]

    x = latents
    for sigma, following in zip(pipe.scheduler.sigmas[:-1], pipe.scheduler.sigmas[1:], strict=True):
        strong = velocity(x, sigma[None], call["prompt_embeds"])
        with sprint.path(pipe.transformer, "shallow"):
            weak = velocity(x, sigma[None], call["negative_prompt_embeds"])
        x = x + (following - sigma) * (weak + 3 * (strong - weak)).detach()
    torch.testing.assert_close(expected, x, rtol=1e-4, atol=1e-4)  # float32


def test_guidance_that_does_nothing_is_an_error(wan):
    pipe, call = wan
    with pytest.raises(RuntimeError, match="announced no unconditional call"), path_drop_guidance(pipe.transformer):
        run(pipe, call, guidance_scale=1.0)
    assert "cache_context" not in pipe.transformer.__dict__


def test_only_wrapped_transformers_of_diffusers():
    plain, _ = CASES["wan"]()
    with pytest.raises(ValueError, match="is not wrapped"), path_drop_guidance(plain):
        pass
    vit, _ = CASES["timm_vit"]()
    with pytest.raises(ValueError, match="VisionTransformer has no cache_context"), path_drop_guidance(sprint.wrap(vit)):
        pass


@torch.no_grad()
def test_guider_of_modular_pipelines(tmp_path):
    """The calls that a modular denoising block makes, by hand."""
    transformer, arguments = CASES["sd3"]()
    sprint.wrap(transformer, drop=StructuredDrop(0.75), init="xavier")
    text = arguments.pop("encoder_hidden_states")
    other = torch.zeros_like(text)
    PathDropGuidance(guidance_scale=3.0).save_pretrained(tmp_path)
    guider = PathDropGuidance.from_pretrained(tmp_path)
    guider.set_state(step=0, num_inference_steps=2, timestep=torch.tensor(500))
    batches = []
    for name, condition in (("pred_cond", text), ("pred_uncond", other)):
        guider.prepare_models(transformer)
        prediction = first_tensor(transformer(encoder_hidden_states=condition, **arguments))
        guider.cleanup_models(transformer)
        batches.append(SimpleNamespace(noise_pred=prediction, **{guider._identifier_key: name}))
    guided = guider(batches).pred
    strong = first_tensor(transformer(encoder_hidden_states=text, **arguments))
    with sprint.path(transformer, "shallow"):
        weak = first_tensor(transformer(encoder_hidden_states=other, **arguments))
    torch.testing.assert_close(guided, weak + 3 * (strong - weak))
    assert transformer.sprint.route[0] == "full"


@torch.no_grad()
def test_guider_outside_its_interval_takes_the_full_path():
    transformer, arguments = CASES["dit"]()
    sprint.wrap(transformer, drop=StructuredDrop(0.75), init="xavier")
    guider = PathDropGuidance(guidance_scale=3.0, start=0.5)
    guider.set_state(step=0, num_inference_steps=2, timestep=torch.tensor(500))
    guider.prepare_models(transformer)
    assert transformer.sprint.route[0] == "full"
    assert guider.num_conditions == 1
    guider.cleanup_models(transformer)
    assert first_tensor(transformer(**arguments)).isfinite().all()
