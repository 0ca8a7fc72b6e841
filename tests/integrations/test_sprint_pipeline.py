"""SprintPipeline: our Euler sampler's images, guidance, a VAE, and a fresh process that loads it."""

import subprocess
import sys

import pytest
import torch
from architectures import CASES
from models import tiny

import sprint
from sprint import ClassifierFreeGuidance, PathDropGuidance, StructuredDrop

diffusers = pytest.importorskip("diffusers")

from sprint.diffusers.pipeline import SprintPipeline  # noqa: E402

Y = torch.tensor([1, 2, 3])
NOISE = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def pipeline(transformer=None, **parts) -> SprintPipeline:
    pipe = SprintPipeline(transformer or tiny().eval(), diffusers.FlowMatchEulerDiscreteScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wrapped_dit():
    model, _ = CASES["dit"]()
    model = sprint.wrap(model, drop=StructuredDrop(0.75), init="xavier")
    return sprint.Velocity(model, prediction="v", interpolant="linear", time=1000)  # trained so, not as it was pretrained


@pytest.mark.parametrize(
    "guidance", [None, ClassifierFreeGuidance(2.0), PathDropGuidance(2.0), PathDropGuidance(2.0, weak="same")]
)
def test_images_are_those_of_our_euler_sampler(guidance):
    pipe = pipeline()
    images = pipe(Y, size=(8, 8), latents=NOISE, guidance=guidance, num_inference_steps=7, output_type="latent")
    expected = sprint.sample(pipe.transformer, NOISE, y=Y, guidance=guidance, steps=7)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)  # float32 against a float64 state


def test_a_wrapped_transformer_skips_its_middle_for_the_weak_branch():
    transformer, calls = wrapped_dit(), []
    transformer.model.transformer_blocks[2].register_forward_hook(lambda *_: calls.append(1))
    images = pipeline(transformer)(Y, size=(8, 8), latents=NOISE, guidance=PathDropGuidance(2.0), num_inference_steps=4)
    assert len(calls) == 4
    assert images.shape == NOISE.shape
    assert 0 <= images.min() <= images.max() <= 1


def test_a_vae_decodes():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, down_block_types=["DownEncoderBlock2D"] * 2,
                                  up_block_types=["UpDecoderBlock2D"] * 2).eval()  # fmt: skip
    pipe = pipeline(vae=vae)
    latents = pipe(Y, size=(8, 8), latents=NOISE, num_inference_steps=2, output_type="latent")
    images = pipe(Y, size=(8, 8), latents=NOISE, num_inference_steps=2)
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))
    assert pipe(Y, size=(8, 8), num_inference_steps=1, output_type="pil")[0].size == (16, 16)


def test_generator_decides_the_noise():
    one, two, other = (
        pipeline()(Y, size=(8, 8), generator=torch.Generator().manual_seed(seed), num_inference_steps=2)
        for seed in (0, 0, 1)
    )
    assert one.equal(two)
    assert not one.equal(other)


@pytest.mark.parametrize("kind", ["sit", "wrapped"])
def test_a_fresh_process_loads_what_was_saved(kind, tmp_path):
    pipe = pipeline(tiny().eval() if kind == "sit" else wrapped_dit())
    pipe.save_pretrained(tmp_path / "pipe")
    call = "(torch.tensor([1, 2, 3]), size=(8, 8), generator=torch.Generator().manual_seed(0), num_inference_steps=2)"
    script = (
        "import sys, torch\nfrom sprint.diffusers.pipeline import SprintPipeline\n"
        f"pipe = SprintPipeline.from_pretrained(sys.argv[1] + '/pipe')\ntorch.save(pipe{call}, sys.argv[1] + '/images.pt')"
    )
    run = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    expected = pipe(Y, size=(8, 8), generator=torch.Generator().manual_seed(0), num_inference_steps=2)
    torch.testing.assert_close(torch.load(tmp_path / "images.pt"), expected)


def test_a_list_of_labels_and_a_transformer_that_was_replaced():
    pipe = pipeline(wrapped_dit())
    before = pipe([1, 2, 3], size=(8, 8), latents=NOISE, num_inference_steps=2)
    assert before.equal(pipe(Y, size=(8, 8), latents=NOISE, num_inference_steps=2))
    pipe.transformer = sprint.wrap(CASES["dit"]()[0], init="xavier").eval()
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.1)
    assert not before.equal(pipe(Y, size=(8, 8), latents=NOISE, num_inference_steps=2))


def test_dtype_and_device_of_our_model(tmp_path):
    pipe = pipeline().to("cpu", torch.bfloat16)
    assert (pipe.device, pipe.dtype, pipe.transformer.dtype) == (torch.device("cpu"), torch.bfloat16, torch.bfloat16)
    assert pipe(Y, size=(8, 8), num_inference_steps=1, output_type="latent").dtype == torch.bfloat16
    pipeline().save_pretrained(tmp_path)
    loaded = SprintPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.transformer.dtype == torch.bfloat16
    assert SprintPipeline.from_pretrained(tmp_path).transformer.dtype == torch.float32


def test_bad_input(tmp_path):
    pipe = pipeline()
    with pytest.raises(ValueError, match="num_inference_steps must be a whole number, at least 1, got 0"):
        pipe(Y, size=(8, 8), num_inference_steps=0)
    with pytest.raises(ValueError, match=r"labels must be \(B,\) int64 class ids, or a list .*, got \(3,\) torch.float32"):
        pipe(Y.float(), size=(8, 8))
    with pytest.raises(ValueError, match=r"labels must be .* got \['cat'\]"):
        pipe(["cat"], size=(8, 8))
    with pytest.raises(ValueError, match="2 generators for 3 samples"):
        pipe(Y, size=(8, 8), generator=[torch.Generator(), torch.Generator()])
    with pytest.raises(ValueError, match="not known what Linear predicts"):
        SprintPipeline(torch.nn.Linear(1, 1), diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="unknown output_type 'np': choose one of pt, latent, pil"):
        pipe(Y, size=(8, 8), output_type="np")
    with pytest.raises(FileNotFoundError, match="has no model_index.json"):
        SprintPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    with pytest.raises(ValueError, match="holds a DiTPipeline, expected a SprintPipeline"):
        SprintPipeline.from_pretrained(tmp_path)


DDPM = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}
SAID = {"prediction": "v", "interpolant": "ddpm", "time": 1000}


def dit():
    return CASES["dit"]()[0].eval()


def lora(model, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["to_q"]), **options).eval()


def compiled(model):
    return torch.compile(model, backend="eager")


def of_dit(transformer):
    pipe = SprintPipeline(transformer, diffusers.DDIMScheduler(**DDPM))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe):
    return pipe([1, 2, 3], size=(8, 8), latents=NOISE, num_inference_steps=2, output_type="latent")


@pytest.mark.parametrize("change", [compiled, lora, lambda _: sprint.wrap(dit()), lambda model: lora(model, mixed=True)])
def test_a_replaced_transformer_of_the_same_model_keeps_the_options(change):
    expected = latents_of(of_dit(sprint.Velocity(dit(), **SAID)))
    pipe = of_dit(sprint.Velocity(dit(), **SAID))
    pipe.transformer = change(pipe.transformer)
    assert latents_of(pipe).equal(expected)
    assert latents_of(of_dit(sprint.Velocity(change(dit()), **SAID))).equal(expected)


def test_a_replaced_transformer_of_another_class_is_refused_or_says_its_own():
    pipe = of_dit(sprint.Velocity(dit(), **SAID))
    other = CASES["pixart"]()[0].eval()
    pipe.transformer = other
    with pytest.raises(ValueError, match=r"made of a DiTTransformer2DModel with .*\(prediction, interpolant, time\)"):
        latents_of(pipe)
    pipe.transformer = velocity = sprint.Velocity(other, **SAID)
    assert pipe.model is velocity
    assert pipe.transformer is other
    pipe.transformer = model = tiny().eval()
    assert pipe.model is model


def test_what_others_hold_is_called_through_them():
    velocity = sprint.Velocity(dit(), **SAID)
    expected = latents_of(of_dit(velocity))
    assert latents_of(of_dit(compiled(velocity))).equal(expected)
    assert latents_of(of_dit(sprint.CapturedModel(velocity))).equal(expected)
    pipe = SprintPipeline(compiled(tiny().eval()), diffusers.FlowMatchEulerDiscreteScheduler())
    assert pipe(Y, size=(8, 8), num_inference_steps=1).shape == (3, 4, 8, 8)


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    pipe = of_dit(sprint.Velocity(compiled(dit()), **SAID))
    pipe.save_pretrained(tmp_path / "compiled")
    loaded = SprintPipeline.from_pretrained(tmp_path / "compiled")
    loaded.set_progress_bar_config(disable=True)
    assert latents_of(loaded).equal(latents_of(pipe))
    with pytest.raises(ValueError, match="the transformer has adapters of PEFT, .*merge_and_unload"):
        of_dit(sprint.Velocity(lora(dit()), **SAID)).save_pretrained(tmp_path / "adapters")
    own = sprint.Velocity(torch.nn.Linear(1, 1), prediction="v", interpolant="ddpm")
    with pytest.raises(ValueError, match="the transformer is a Linear, which is no class of diffusers"):
        of_dit(own).save_pretrained(tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_class_ids_and_sides_that_a_hosted_model_has_not():
    velocity = sprint.Velocity(dit())
    for y in (torch.tensor([1, 2, 5000]), {"class_labels": torch.tensor([1, 2, -1])}):
        with pytest.raises(ValueError, match="y holds class ids from .*, expected 0 to 999 .or 1000, the null class"):
            sprint.sample(velocity, NOISE, y=y, steps=1)
    with pytest.raises(ValueError, match=r"y must be \(B,\) int64 class ids, got \(3,\) torch.float32"):
        velocity(NOISE, torch.rand(3), torch.rand(3))
    with pytest.raises(ValueError, match="give x sides that its patch size divides"):
        velocity(NOISE[..., :7], torch.rand(3), Y)
    flux, arguments = CASES["flux"]()
    y = {name: arguments[name] for name in ("encoder_hidden_states", "pooled_projections")}
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\) with even H and W.*got \(2, 1, 7, 8\)"):
        sprint.Velocity(flux)(torch.randn(2, 1, 7, 8), torch.rand(2), y)


@pytest.mark.parametrize("kind", ["LCMScheduler", "TCDScheduler"])
def test_schedulers_of_distilled_models_warn(kind):
    scheduler = getattr(diffusers, kind)(**DDPM)
    with pytest.warns(UserWarning, match=f"{kind} is for models that were distilled for it"):
        sprint.sample(sprint.Velocity(dit()), NOISE, y=Y, solver=scheduler, steps=2)


def test_schedulers_of_stages_are_refused():
    with pytest.raises(ValueError, match="HeliosScheduler goes through stages of several resolutions"):
        sprint.sample(lambda x, t: x, NOISE, solver=diffusers.HeliosScheduler())


def test_latents_are_decoded_by_what_the_model_was_trained_with():
    """Its recipe goes before the VAE's own numbers; half a recipe is filled from them."""
    from sprint.models import Recipe

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, down_block_types=["DownEncoderBlock2D"] * 2,
                                  up_block_types=["UpDecoderBlock2D"] * 2).eval()  # fmt: skip
    model = tiny().eval()
    pipe = pipeline(model, vae=vae)
    options = {"size": (8, 8), "num_inference_steps": 2, "latents": torch.randn(2, 4, 8, 8)}
    latents = pipe([1, 2], output_type="latent", **options)
    own, shift = vae.config.scaling_factor, torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1)
    for recipe, z in (
        (Recipe(), latents / own),
        (Recipe(latent_scale=0.5), latents / 0.5),
        (Recipe(latent_scale=0.5, latent_shift=[0.1, 0.2, 0.3, 0.4]), latents / 0.5 + shift),
    ):
        model.recipe = recipe
        with torch.no_grad():
            expected = (vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(pipe([1, 2], **options), expected, rtol=1e-4, atol=1e-4)
