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
    with pytest.raises(ValueError, match="num_inference_steps must be 1 or more, got 0"):
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
