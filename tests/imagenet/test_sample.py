"""sample.py: image i is the same in any batch and any number of processes; runs go on; the .npz is ADM's."""

import numpy as np
import pytest
import small
import torch
from models import tiny
from PIL import Image

import sprint
from sprint.data.images import to_uint8
from sprint.random import normal

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sampling")
    tiny().save(root / "model.safetensors")
    tiny().to_reference(root / "reference.safetensors")
    small.vae(root / "vae")
    return root


def sample(folder, out, *more, checkpoint="model.safetensors", **options):
    arguments = ("--checkpoint", folder / checkpoint, "--vae", folder / "vae", "--out", out, "--side", 8, "--steps", 3)
    return small.script("sample", *arguments, "--count", 7, *more, **options)


def images(out):
    return np.stack([np.array(Image.open(out / f"{i:06d}.png")) for i in range(7)])


def close(one, other) -> bool:
    """Other batches round differently: an image may differ by one step of 255."""
    return np.abs(one.astype(int) - other.astype(int)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["euler", "sde"])
def test_images_do_not_depend_on_the_batch_or_the_processes(folder, solver, tmp_path):
    for name, batch, processes in (("one", 7, 1), ("two", 3, 2)):
        run = sample(folder, tmp_path / name, "--batch", batch, "--solver", solver, processes=processes)
        assert run.returncode == 0, run.stderr
        assert "7 images in" in run.stdout
    one, two = images(tmp_path / "one"), images(tmp_path / "two")
    assert close(one, two)
    assert not close(one[0], one[1])
    packed = np.load(tmp_path / "one.npz")["arr_0"]
    assert packed.dtype == np.uint8
    assert (packed == one).all()


def test_images_are_those_of_the_library(folder, tmp_path):
    from diffusers import AutoencoderKL

    options = ("--guidance", "cfg", "--scale", 1.5, "--interval", 0.1, 0.9, "--seed", 3)
    assert sample(folder, tmp_path / "out", *options, checkpoint="reference.safetensors").returncode == 0
    streams = [torch.Generator().manual_seed((3 * 0x9E3779B1 + i) % 2**32) for i in range(7)]
    noise = normal((7, 4, 8, 8), generator=streams)
    latents = sprint.sample(
        tiny().eval(), noise, y=torch.arange(7), steps=3, guidance=sprint.ClassifierFreeGuidance(1.5, interval=(0.1, 0.9))
    )
    with torch.no_grad():
        expected = to_uint8(AutoencoderKL.from_pretrained(folder / "vae").eval().decode(latents / 0.18215).sample)
    assert close(images(tmp_path / "out"), expected.permute(0, 2, 3, 1).numpy())


@pytest.mark.slow
def test_a_run_goes_on_and_grows(folder, tmp_path):
    out = tmp_path / "out"
    assert sample(folder, out, "--count", 4).returncode == 0
    times = [(out / f"{i:06d}.png").stat().st_mtime_ns for i in range(4)]
    (out / "000002.png").unlink()
    assert sample(folder, out).returncode == 0
    again = [(out / f"{i:06d}.png").stat().st_mtime_ns for i in range(4)]
    assert [a == b for a, b in zip(times, again, strict=True)] == [True, True, False, True]
    assert sample(folder, tmp_path / "whole").returncode == 0
    assert close(images(out), images(tmp_path / "whole"))
    assert "holds samples with seed 0, now 1" in sample(folder, out, "--seed", 1).stderr
    tiny(label_drop=0.2).save(folder / "other.safetensors")
    other, model = folder / "other.safetensors", folder / "model.safetensors"
    kept = model.read_bytes()
    model.write_bytes(other.read_bytes())  # another model under the same name
    try:
        assert "holds samples with weights" in sample(folder, out).stderr
    finally:
        model.write_bytes(kept)


@pytest.mark.slow
def test_seeds_give_other_images(folder, tmp_path):
    for seed in (0, 1):
        assert sample(folder, tmp_path / str(seed), "--seed", seed, "--count", 2).returncode == 0
    one, other = (np.load(tmp_path / f"{seed}.npz")["arr_0"] for seed in (0, 1))
    assert not close(one, other)


def test_refusals(folder, tmp_path):
    assert "there is no checkpoint at" in sample(folder, tmp_path, checkpoint="nothing.safetensors").stderr
    torch.save({"model": torch.zeros(1)}, folder / "pickle.pt")
    assert "is a pickle" in sample(folder, tmp_path, checkpoint="pickle.pt").stderr
    for options, message in (
        (("--interval", 0.9, 0.1), "--interval must be 0 <= LOW <= HIGH <= 1"),
        (("--scale", "nan"), "--scale must be a number"),
        (("--solver", "sde", "--steps", 1), "needs at least 2 --steps"),
        (("--side", 7), "--side 7 does not split into patches of 2"),
        (("--vae", "none"), "4 channels are no picture"),
    ):
        run = sample(folder, tmp_path, *options)
        assert message in run.stderr, options
        assert "Traceback" not in run.stderr, options


def test_a_folder_is_of_one_process_while_it_is_filled_and_packed(folder, tmp_path):
    from sprint.training.runs import FolderLock

    out = tmp_path / "out"
    assert sample(folder, out).returncode == 0
    (out / ".000003.png.x.tmp").write_bytes(b"left by a killed process")
    lock = FolderLock(out, "is sampling into")
    before = (tmp_path / "out.npz").stat().st_mtime_ns
    assert "another process is sampling into" in sample(folder, out).stderr
    assert (tmp_path / "out.npz").stat().st_mtime_ns == before
    del lock
    assert sample(folder, out).returncode == 0
    assert np.load(tmp_path / "out.npz")["arr_0"].tobytes() == images(out).tobytes()
    assert not list(out.glob(".*.tmp"))


def test_samples_that_are_not_finite_are_no_pictures(folder, tmp_path):
    model = tiny()
    model.final_layer.linear.bias.data[0] = float("nan")
    model.save(tmp_path / "nan.safetensors")
    run = sample(folder, tmp_path / "out", checkpoint=tmp_path / "nan.safetensors")
    assert run.returncode == 1
    assert "is not finite, and none" in run.stderr
    assert not list(tmp_path.rglob("*.png"))
    assert not (tmp_path / "out.npz").exists()


def test_what_the_checkpoint_says_of_its_training_is_used_and_not_contradicted(folder, tmp_path):
    from sprint.models import Recipe

    model = tiny()
    model.recipe = Recipe(interpolant="cosine", latent_scale=1.5, vae=str(folder / "vae"), latent_side=8)
    model.save(tmp_path / "model.safetensors")
    options = ("--checkpoint", tmp_path / "model.safetensors", "--count", 2, "--steps", 2)
    run = small.script("sample", *options, "--out", tmp_path / "told")
    assert run.returncode == 0, run.stderr
    explicit = ("--vae", folder / "vae", "--side", 8, "--latent-scale", 1.5, "--interpolant", "cosine")
    tiny().save(tmp_path / "plain.safetensors")
    run = small.script(
        "sample", "--checkpoint", tmp_path / "plain.safetensors", *options[2:], *explicit, "--out", tmp_path / "own"
    )
    assert run.returncode == 0, run.stderr
    for image in ("000000.png", "000001.png"):
        assert (tmp_path / "told" / image).read_bytes() == (tmp_path / "own" / image).read_bytes()
    run = small.script("sample", *options, "--latent-scale", 0.18215, "--out", tmp_path / "other")
    assert "--latent-scale 0.18215, but" in run.stderr
    assert "was trained with 1.5: leave it out" in run.stderr
    assert not (tmp_path / "other").exists()
