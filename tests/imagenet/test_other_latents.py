"""Latents of other VAEs, files of earlier versions and of other trainings: what they say is used, and not contradicted."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import small
import torch
import yaml

import sprint
from sprint.data.latents import write_index, write_shard
from sprint.models import Recipe

pytest.importorskip("accelerate")
diffusers = pytest.importorskip("diffusers")
sys.path.insert(0, str(small.SCRIPTS))
import config as options_of  # noqa: E402
import run as runs  # noqa: E402
import train  # noqa: E402

RECORDED = Path(__file__).parents[1] / "recorded"
SMALL = {
    "model": "S/2", "hidden_size": 16, "num_heads": 2, "encoder_depth": 1, "middle_depth": 1, "decoder_depth": 1,
    "num_classes": 2, "mlp_ratio": 1.0, "num_workers": 0, "batch_size": 8, "mixed_precision": "no", "report_to": "none",
    "exp_name": "run",
}  # fmt: skip


def trained(folder, latents, **more):
    """Run train.py in a folder."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "data_dir": str(latents), "output_dir": str(folder), **more}))
    return small.script("train", "--config", file)


def latents(folder, **about):
    """32 random ones, which the recorded training state knows."""
    folder.mkdir()
    moments = torch.randn(32, 8, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    write_shard(folder, 0, moments, torch.arange(32) % 2)
    write_index(folder, [0], about=about)
    return folder


def test_statistics_of_a_vae_go_from_the_images_to_the_samples(tmp_path):
    """Flux 2's kind: per channel, kept with the latents, in the checkpoint, and taken off before decoding."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 8), norm_num_groups=2, down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    vae.bn.running_mean += torch.randn(8)
    vae.bn.running_var += torch.rand(8)
    vae.save_pretrained(tmp_path / "vae")
    small.images(tmp_path / "images", classes=2, each=8)
    common = ("--images", tmp_path / "images", "--vae", tmp_path / "vae", "--workers", 0, "--out", tmp_path / "latents")
    run = small.script("prepare", *common, "--size", 30)
    assert "--size 30 is not divisible by 4, by which this VAE shrinks images" in run.stderr
    run = small.script("prepare", *common, "--size", 32)
    assert run.returncode == 0, run.stderr
    index = json.loads((tmp_path / "latents" / "index.json").read_text())
    assert index["vae_class"] == "AutoencoderKLFlux2"
    torch.testing.assert_close(torch.tensor(index["latent_shift"]), vae.bn.running_mean)
    assert len(index["latent_scale"]) == index["shape"][0] // 2 == 8

    run = trained(tmp_path, tmp_path / "latents", max_train_steps=2, sampling_steps=2)
    assert run.returncode == 0, run.stderr
    recipe = sprint.SiT.load(tmp_path / "run" / "model.safetensors").recipe
    assert recipe.vae == str(tmp_path / "vae")
    assert (recipe.latent_scale, recipe.latent_shift) == (tuple(index["latent_scale"]), tuple(index["latent_shift"]))
    assert (recipe.latent_side, recipe.image_size) == (8, 32)

    sampling = ("--checkpoint", tmp_path / "run" / "model.safetensors", "--count", 2, "--steps", 2)
    run = small.script("sample", *sampling, "--out", tmp_path / "samples")
    assert run.returncode == 0, run.stderr
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (2, 32, 32, 3)
    run = small.script("sample", *sampling, "--out", tmp_path / "other", "--latent-shift", 0)
    assert "--latent-shift 0.0, but" in run.stderr
    assert "leave it out" in run.stderr


def test_what_the_latents_say_is_taken_and_not_contradicted(tmp_path):
    Config = options_of.Config
    plain = train.settled(Config(), sprint.data.LatentDataset(latents(tmp_path / "plain")))
    assert (plain.latent_scale, plain.latent_shift, plain.vae) == (0.18215, 0.0, "stabilityai/sd-vae-ft-mse")
    data = sprint.data.LatentDataset(latents(tmp_path / "sd3", latent_scale=1.5, latent_shift=0.06, vae="sd3"))
    found = train.settled(Config(vae="moved"), data)
    assert (found.latent_scale, found.latent_shift, found.vae) == (1.5, 0.06, "moved")
    assert train.settled(Config(latent_scale=1.5), data) == train.settled(Config(), data)
    with pytest.raises(ValueError, match="latent_scale=0.18215, but .* was prepared with 1.5: leave latent_scale out"):
        train.settled(Config(latent_scale=0.18215), data)
    with pytest.raises(ValueError, match="latent_shift has 3 numbers, the latents 4 channels"):
        train.settled(Config(latent_shift=[0.0] * 3), sprint.data.LatentDataset(tmp_path / "plain"))


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """Its checkpoint knows neither shift nor the averages' warm-up."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(RECORDED / "format1_training.safetensors", tmp_path / "run" / "checkpoints" / "00000002.safetensors")
    about = {"vae": "stabilityai/sd-vae-ft-mse", "size": 64}
    run = trained(tmp_path, latents(tmp_path / "latents", **about), path_type="cosine", latent_scale=0.5, max_train_steps=3)
    assert run.returncode == 0, run.stderr
    assert "from step 2 on" in run.stdout
    recipe = sprint.SiT.load(tmp_path / "run" / "model.safetensors").recipe
    assert (recipe.interpolant, recipe.latent_scale, recipe.latent_shift, recipe.image_size) == ("cosine", 0.5, 0.0, 64)
    run = trained(tmp_path, tmp_path / "latents", path_type="cosine", latent_scale=0.5, latent_shift=1.0, max_train_steps=3)
    assert "is a run with latent_shift=0.0, now 1.0" in run.stderr


def test_weights_of_other_latents_are_no_start(tmp_path):
    sizes = {"dim": 16, "heads": 2, "encoder_depth": 1, "middle_depth": 1, "decoder_depth": 1, "num_classes": 2}
    model = sprint.SiT(sprint.SiTConfig(**sizes, mlp_ratio=1.0))
    for said, message in (
        ({"interpolant": "cosine"}, "interpolant='cosine', here 'linear'"),
        ({"latent_scale": 1.5}, "latent_scale=1.5, here 0.5"),
        ({"latent_shift": [0.1] * 4}, r"latent_shift=\(0.1, .*here 0.0"),
    ):
        model.recipe = Recipe(**said)
        model.save(tmp_path / "model.safetensors")
        settled = options_of.Config(latent_scale=0.5, latent_shift=0.0)
        with pytest.raises(ValueError, match=rf"init_from=.* was trained with {message}: set the options to its own"):
            runs.begin_from(str(tmp_path / "model.safetensors"), model, settled)


def test_averages_warm_up_as_those_of_diffusers():
    torch.manual_seed(0)
    model, ema = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    ema.load_state_dict(model.state_dict())
    from diffusers.training_utils import EMAModel

    theirs, ours = EMAModel(model.parameters(), decay=0.5), runs.Warmed(ema, 0.5, 0)
    decays = []
    for _ in range(12):
        model.weight.data += torch.randn(2, 3)
        theirs.step(model.parameters())
        ours.update_parameters(model)
        decays.append(theirs.cur_decay_value)
    torch.testing.assert_close(ema.weight.data, theirs.shadow_params[0])
    assert decays[0] < decays[1] < decays[-1] == 0.5
    again = runs.Warmed(ema, 0.9999, 89)
    before, model.weight.data = ema.weight.detach().clone(), ema.weight + 1
    again.update_parameters(model)
    torch.testing.assert_close(ema.weight, before + 1 - 90 / 99)


def test_what_will_not_fit_is_said_before_the_run(tmp_path, monkeypatch, capsys):
    """Each stage by its own batch and path; on a machine of any size nothing is said where all fits."""
    assert train.memory(torch.device("cpu")) > 2**28
    sit = sprint.SiTConfig(dim=16, heads=2, encoder_depth=1, middle_depth=1, decoder_depth=1, num_classes=2)
    c = options_of.Config(stages="both", batch_size=8, finetune=options_of.Finetune(batch_size=64))
    model = sprint.SiT(sit)
    run = runs.Run(c, sit, model, model, torch.optim.SGD(model.parameters()), "", None, "")
    order, schedule = sprint.training.DataOrder(64, seed=0), c.schedule()
    ends = ((0, c.max_train_steps), (c.max_train_steps, schedule.steps))
    plans = [sprint.training.Batches(order, schedule, *each, share=(0, 1), accumulate=1) for each in ends]
    small_batch, large_batch = (
        sprint.cost(model, grid=(4, 4), drop=c.drop(), batch=batch).memory(path)
        for batch, path in ((8, "sparse"), (64, "full"))
    )
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())  # of the average
    for there, warned in ((math.inf, []), (large_batch + weights - 1, [400_000]), (small_batch, [0, 400_000])):
        monkeypatch.setattr(train, "memory", lambda device, there=there: there)
        train.introduce(run, 0, plans, (4, 4))
        text = capsys.readouterr().out
        assert [int(line.split()[3]) for line in text.splitlines() if line.startswith("WARNING: steps from")] == warned


def test_pixels_are_not_scaled_and_come_back(tmp_path, monkeypatch):
    """A model without a VAE sees the pictures as they are, and any scale that it was trained with is undone."""
    data = sprint.data.LatentDataset(latents(tmp_path / "pixels"))
    found = train.settled(options_of.Config(vae="none"), data)
    assert (found.latent_scale, found.latent_shift, found.vae) == (1.0, 0.0, "none")
    assert train.settled(options_of.Config(vae="none", latent_scale=0.5), data).latent_scale == 0.5
    import sample

    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    monkeypatch.setattr(sample.sprint, "sample", lambda *_, **__: (pixels - 0.25) * 0.5)
    args = sample.options(None).parse_args([])
    args.side, args.latent_scale, args.latent_shift, args.guidance = 8, 0.5, 0.25, "none"
    model = sprint.CapturedModel(sprint.SiT.preset("S/2", middle_depth=1, in_channels=3, num_classes=2).eval())
    assert sample.draw(model, None, [0, 1], args, "cpu").equal(sprint.data.to_uint8(pixels))


def kl(folder, **numbers):
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4,
        up_block_types=["UpDecoderBlock2D"] * 2, **numbers,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_a_vae_that_is_not_the_latents_is_refused(tmp_path):
    """In training, and in sampling; one without a recipe beside it is decoded by its own numbers."""
    own, other = kl(tmp_path / "own", scaling_factor=0.5, shift_factor=0.3), kl(tmp_path / "other", scaling_factor=0.13025)
    data = sprint.data.LatentDataset(latents(tmp_path / "data", vae=str(own), latent_scale=0.5, latent_shift=0.3))
    for vae, steps in ((other, 0), (other, 5)):
        found = train.settled(options_of.Config(vae=str(vae), sampling_steps=steps), data)
        with pytest.raises(ValueError, match="has latent_scale=0.13025 .* and these latents 0.5 and 0.3"):
            train.build_vae(found, data, torch.device("cpu"))
    assert train.build_vae(train.settled(options_of.Config(), data), data, torch.device("cpu")) is None

    import sample

    model = sprint.SiT.preset("S/2", middle_depth=1, num_classes=2)
    for recipe, vae, message in (
        (Recipe(vae=str(own), latent_scale=0.5, latent_shift=0.3), other, "name that one"),
        (Recipe(vae=str(own), latent_scale=0.5, latent_shift=0.3), own, None),
        (Recipe(), own, None),
    ):
        model.recipe = recipe
        model.save(tmp_path / "model.safetensors")
        args = sample.options(None).parse_args(["--side", "8", "--vae", str(vae)])
        args.checkpoint = tmp_path / "model.safetensors"
        if message:
            with pytest.raises(SystemExit, match=message):
                sample.build(args, torch.device("cpu"))
        else:
            sample.build(args, torch.device("cpu"))
            assert (args.latent_scale, args.latent_shift) == (0.5, 0.3)


def test_a_fingerprint_is_of_the_content(tmp_path):
    """safetensors orders what is said beside the tensors as it likes."""
    import weights
    from safetensors.torch import save_file

    tensors, prints = {"a": torch.arange(9.0), "b": torch.ones(2)}, set()
    for i in range(8):
        save_file(tensors, tmp_path / f"{i}.safetensors", metadata={name: name for name in "abcdefgh"})
        prints.add(weights.fingerprint(tmp_path / f"{i}.safetensors"))
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(8)}) > 1
    assert len(prints) == 1
    save_file({**tensors, "b": torch.zeros(2)}, tmp_path / "c.safetensors", metadata={name: name for name in "abcdefgh"})
    assert weights.fingerprint(tmp_path / "c.safetensors") not in prints


def test_the_switch_of_stages_does_not_move_behind_a_run(tmp_path):
    options = {"path_type": "cosine", "latent_scale": 0.5, "stages": "both"}
    latents(tmp_path / "latents")
    tuned = {"max_train_steps": 2, "warmup_steps": 0, "batch_size": 8, "learning_rate": 1e-4}
    assert trained(tmp_path, tmp_path / "latents", max_train_steps=2, finetune=tuned, **options).returncode == 0
    run = trained(tmp_path, tmp_path / "latents", max_train_steps=4, finetune=tuned, **options)
    assert "is a run with max_train_steps=2, now 4, after its second stage began" in run.stderr
    more = {**tuned, "max_train_steps": 3}
    assert trained(tmp_path, tmp_path / "latents", max_train_steps=2, finetune=more, **options).returncode == 0
