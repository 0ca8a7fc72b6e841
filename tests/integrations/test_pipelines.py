"""Path-Drop Guidance in unmodified pipelines and guiders of diffusers, on wrapped tiny transformers."""

from types import SimpleNamespace

import pytest
import torch
from architectures import CASES

import sprint
from sprint import StructuredDrop
from sprint.hosts.outputs import first_tensor

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
    with pytest.raises(RuntimeError, match="no unconditional prediction was seen"), path_drop_guidance(pipe.transformer):
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


# pipelines that run both branches in one batch


def sd3_pipeline():
    transformer, _ = CASES["sd3"]()
    pipe = diffusers.StableDiffusion3Pipeline(
        sprint.wrap(transformer, drop=StructuredDrop(0.75), init="xavier"),
        diffusers.FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, None, None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    call = {name: torch.randn(1, 5, 12, generator=noise) for name in ("prompt_embeds", "negative_prompt_embeds")}
    call |= {f"{name}pooled_prompt_embeds": torch.randn(1, 10, generator=noise) for name in ("", "negative_")}
    return pipe, call | {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent"}


def test_an_unmodified_pipeline_of_one_batch():
    pipe, call = sd3_pipeline()
    rows = []
    pipe.transformer.transformer_blocks[2].register_forward_hook(lambda m, a, output: rows.append(len(output[1])))
    generator = torch.Generator().manual_seed(1)
    with path_drop_guidance(pipe.transformer, weak_half="first"):
        guided = pipe(**call, guidance_scale=3.0, generator=generator).images
    assert rows == [1] * 3  # the middle saw the conditional rows only
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for sigma, following in zip(pipe.scheduler.sigmas[:-1], pipe.scheduler.sigmas[1:], strict=True):

        def velocity(prefix, x=x, sigma=sigma):
            text, pooled = call[f"{prefix}prompt_embeds"], call[f"{prefix}pooled_prompt_embeds"]
            return pipe.transformer(x, text, pooled, sigma[None] * 1000, return_dict=False)[0].detach()

        strong = velocity("")
        with sprint.path(pipe.transformer, "shallow"):
            weak = velocity("negative_")
        x = x + (following - sigma) * (weak + 3 * (strong - weak))
    torch.testing.assert_close(guided, x, rtol=1e-4, atol=1e-4)  # float32


def test_one_batch_without_guidance_is_an_error():
    pipe, call = sd3_pipeline()
    with (
        pytest.raises(RuntimeError, match="no unconditional prediction was seen"),
        path_drop_guidance(pipe.transformer, weak_half="first"),
    ):
        pipe(**call, guidance_scale=1.0)
    with pytest.raises(ValueError, match="no cache_context.*pass weak_half"), path_drop_guidance(pipe.transformer):
        pass
    with (
        pytest.raises(ValueError, match="weak_half must be 'first' or 'second'"),
        path_drop_guidance(pipe.transformer, weak_half="third"),
    ):
        pass


@pytest.mark.parametrize(
    "name",
    ["dit", "pixart", "flux", "chroma", "auraflow", "cogvideox", "wan", "hunyuan_video", "ltx", "prx", "lumina2_ragged"],
)
@pytest.mark.parametrize("half", ["first", "second"])
@torch.no_grad()
def test_half_a_batch_is_the_shallow_path_and_the_other_the_full(name, half):
    model, arguments = CASES[name]()
    sprint.wrap(model, drop=StructuredDrop(0.75), init="xavier")
    first = next(iter(arguments))
    arguments[first] = arguments[first][:1].expand_as(arguments[first]).clone()  # the same input twice
    full = first_tensor(model(**arguments))
    with sprint.path(model, "shallow"):
        shallow = first_tensor(model(**arguments))
    with path_drop_guidance(model, weak_half=half):
        both = first_tensor(model(**arguments))
    weak, strong = (0, 1) if half == "first" else (1, 0)
    torch.testing.assert_close(both[weak], shallow[weak], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[strong], full[strong], rtol=1e-4, atol=1e-5)


def test_an_unmodified_dit_pipeline():
    """Both branches in one batch, the conditional one first; a VAE decodes."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=6, sample_size=8
    ).eval()
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.1)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    ).eval()  # fmt: skip
    pipe = diffusers.DiTPipeline(sprint.wrap(transformer, init="xavier"), vae, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    rows = []
    pipe.transformer.transformer_blocks[2].register_forward_hook(lambda m, a, output: rows.append(len(output)))

    def images(**options):
        generator = torch.Generator().manual_seed(1)
        return pipe([3, 7], num_inference_steps=3, output_type="np", generator=generator, **options).images

    with path_drop_guidance(pipe.transformer, weak_half="second"):
        guided = images(guidance_scale=3.0)
    assert rows == [2] * 3
    plain = images(guidance_scale=3.0)
    assert rows == [2] * 3 + [4] * 3
    assert guided.shape == plain.shape == (2, 16, 16, 3)
    assert abs(guided - plain).max() > 1e-3


def test_an_unmodified_qwen_image_pipeline():
    """Two calls, packed latents, a shifted schedule."""
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=6, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    sprint.wrap(transformer, init="xavier")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.QwenImagePipeline(scheduler, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    prompt, negative = torch.randn(2, 1, 5, 12, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 5, dtype=torch.long)
    call = {
        "prompt_embeds": prompt, "prompt_embeds_mask": mask, "negative_prompt_embeds": negative,
        "negative_prompt_embeds_mask": mask, "height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent",
        "true_cfg_scale": 3.0,
    }  # fmt: skip
    calls = []
    transformer.transformer_blocks[2].register_forward_hook(lambda *_: calls.append(1))
    plain = pipe(**call, generator=torch.Generator().manual_seed(1)).images
    assert len(calls) == 6
    with path_drop_guidance(transformer):
        guided = pipe(**call, generator=torch.Generator().manual_seed(1)).images
    assert len(calls) == 6 + 3
    assert not guided.equal(plain)


def test_an_unmodified_pixart_pipeline():
    """Both branches in one batch, text by cross-attention."""
    transformer, _ = CASES["pixart"]()
    sprint.wrap(transformer, init="xavier")
    pipe = diffusers.PixArtSigmaPipeline(None, None, None, transformer, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    prompt, negative = torch.randn(2, 1, 5, 12, generator=torch.Generator().manual_seed(0))
    rows = []
    transformer.transformer_blocks[2].register_forward_hook(lambda m, a, output: rows.append(len(output)))
    with path_drop_guidance(transformer, weak_half="first"):
        images = pipe(
            None, None, prompt_embeds=prompt, negative_prompt_embeds=negative, prompt_attention_mask=torch.ones(1, 5),
            negative_prompt_attention_mask=torch.ones(1, 5), height=64, width=64, num_inference_steps=3,
            output_type="latent", use_resolution_binning=False, guidance_scale=3.0,
        ).images  # fmt: skip
    assert rows == [1] * 3
    assert images.isfinite().all()
