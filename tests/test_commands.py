"""`python -m sprint`: what a checkpoint holds, whether it is read right, and every layout there and back."""

import subprocess
import sys
from argparse import Namespace
from typing import NamedTuple

import pytest
import torch
from models import tiny
from safetensors.torch import load_file

import sprint
from sprint import commands


class Run(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(capsys):
    """Run a command in this process."""

    def run(*arguments):
        try:
            commands.main([*map(str, arguments)])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
            out, err = capsys.readouterr()
            return Run(code, out, err if isinstance(error.code, int) else str(error.code))
        return Run(0, *capsys.readouterr())

    return run


X, T, Y = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([1, 2])


def test_reference_and_back(tmp_path, command):
    model = tiny().eval()
    model.save(tmp_path / "ours.safetensors")
    theirs, again = tmp_path / "theirs.safetensors", tmp_path / "again.safetensors"
    assert command("convert", tmp_path / "ours.safetensors", theirs, "--target", "reference").returncode == 0
    run = command("convert", theirs, again, "--source", "reference")
    assert run.returncode == 0, run.stderr
    assert "reference to ours" in run.stdout
    assert sprint.SiT.load(again).eval()(X, T, Y).equal(model(X, T, Y))


def test_original_and_back(tmp_path, command):
    model = tiny(positions="sincos", qk_norm=False).eval()
    model.middle.fusion.init = "identity"
    model.middle.fusion.reset_parameters()
    model.save(tmp_path / "ours.safetensors")
    theirs, again = tmp_path / "theirs.safetensors", tmp_path / "again.safetensors"
    run = command("convert", tmp_path / "ours.safetensors", theirs, "--target", "sit", "--grid", 4)
    assert run.returncode == 0, run.stderr
    torch.save({"ema": load_file(theirs), "step": 3}, tmp_path / "theirs.pt")
    options = ("--source", "sit", "--heads", 2, "--classes", 10, "--encoder-depth", 1, "--decoder-depth", 1)
    run = command("convert", tmp_path / "theirs.pt", again, *options)
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(sprint.SiT.load(again).eval()(X, T, Y), model(X, T, Y), rtol=1e-4, atol=1e-5)  # float32


def test_refusals(tmp_path, command):
    tiny().save(tmp_path / "ours.safetensors")
    path = tmp_path / "ours.safetensors"
    assert "needs --heads" in command("convert", path, path, "--source", "sit").stderr
    assert "are both ours" in command("convert", path, path).stderr
    run = command("convert", path, tmp_path / "x.safetensors", "--target", "sit")
    assert "the original SiT has sincos positions" in run.stderr
    assert not (tmp_path / "x.safetensors").exists()
    assert "there is no checkpoint" in command("convert", "none.pt", path, "--source", "sit", "--heads", 2).stderr


def test_dit_and_back(tmp_path, command):
    model = tiny(positions="sincos", qk_norm=False, time_scale=1000.0, prediction="noise").eval()
    model.middle.fusion.init = "identity"
    model.middle.fusion.reset_parameters()
    model.save(tmp_path / "ours.safetensors")
    theirs, again = tmp_path / "theirs.safetensors", tmp_path / "again.safetensors"
    run = command("convert", tmp_path / "ours.safetensors", theirs, "--target", "sit", "--grid", 4)
    assert "predicts noise: a DiT predicts noise, a SiT v" in run.stderr
    assert command("convert", tmp_path / "ours.safetensors", theirs, "--target", "dit", "--grid", 4).returncode == 0
    options = ("--source", "dit", "--heads", 2, "--classes", 10, "--encoder-depth", 1, "--decoder-depth", 1)
    run = command("convert", theirs, again, *options)
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(sprint.SiT.load(again).eval()(X, T, Y), model(X, T, Y), rtol=1e-3, atol=1e-4)  # float32


def test_what_the_originals_training_scripts_save(tmp_path, command):
    """A dictionary of model, ema, opt and args, a Namespace; names as DistributedDataParallel and torch.compile make."""
    model = tiny(positions="sincos", qk_norm=False).eval()
    model.middle.fusion.init = "identity"
    model.middle.fusion.reset_parameters()
    model.save(tmp_path / "ours.safetensors")
    theirs, again, saved = (tmp_path / name for name in ("theirs.safetensors", "again.safetensors", "0400000.pt"))
    run = command("convert", tmp_path / "ours.safetensors", theirs, "--target", "sit", "--grid", 4)
    assert run.returncode == 0, run.stderr
    state = {f"module._orig_mod.{name}": tensor for name, tensor in load_file(theirs).items()}
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]}
    whole = {"model": state, "ema": state, "opt": optimizer, "args": Namespace(num_classes=10, model="SiT-S/2")}
    torch.save(whole, saved)
    options = ("--source", "sit", "--heads", 2, "--encoder-depth", 1, "--decoder-depth", 1)
    run = command("convert", saved, again, *options)
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(sprint.SiT.load(again).eval()(X, T, Y), model(X, T, Y), rtol=1e-4, atol=1e-5)
    run = command("convert", saved, again, *options, "--classes", 11)
    assert "was trained with num_classes=10: leave it out" in run.stderr
    torch.save({**whole, "args": Namespace(model="SiT-S/2")}, saved)
    assert "11 rows: pass num_classes=10 if" in command("convert", saved, again, *options).stderr
    torch.save({"epoch": 3, "model": "SiT"}, saved)
    assert "no dictionary of tensors under ema" in command("convert", saved, again, *options).stderr


def test_the_module_is_a_program():
    run = subprocess.run([sys.executable, "-m", "sprint", "--help"], capture_output=True, text=True, check=False)
    assert run.returncode == 0
    assert all(name in run.stdout for name in ("cost", "info", "verify", "convert"))


def test_cost(command):
    run = command("cost", "S/2", "--pixels", 208, "--batch", 4, "--hardware", "A100")
    assert run.stdout.startswith("SiT 384x12")
    assert "A100" in run.stdout
    assert "kept: 42 of 169 tokens" in run.stdout
    assert "--pixels must be at least 16, got 8" in command("cost", "S/2", "--pixels", 8).stderr


def test_info_says_kind_sizes_and_what_is_unusual(tmp_path, command):
    model = tiny(label_drop=0.2)
    model.save(tmp_path / "ours.safetensors")
    model.to_reference(tmp_path / "theirs.safetensors")
    said = command("info", tmp_path / "ours.safetensors").stdout
    assert "SiT.save's" in said
    assert f"of a size of its own, {sum(p.numel() for p in model.parameters()):,} parameters, torch.float32" in said
    assert "label_drop = 0.2  (usually 0.1)" in said
    assert "in the layout of the SPRINT authors" in command("info", tmp_path / "theirs.safetensors").stdout
    assert "there is no" in command("info", tmp_path / "none.safetensors").stderr
    (tmp_path / "text.safetensors").write_text("no tensors")
    assert "is not a whole safetensors file" in command("info", tmp_path / "text.safetensors").stderr


def test_verify_tells_trained_weights_from_others(tmp_path, command):
    """A model that gives its noise back, as every trained one does at t = 1, and what a wrong reading makes of it."""
    model = tiny()
    file = tmp_path / "model.safetensors"
    model.save(file)
    assert "does not follow the noise: these weights are untrained, or read wrongly" in command("verify", file).stderr
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(150):
        x = torch.randn(16, 4, 8, 8, generator=generator)
        loss = (model(x, torch.ones(16), model.null_condition(16)) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save(file)
    said = command("verify", file)
    assert said.returncode == 0, said.stderr
    assert "its prediction follows the noise" in said.stdout
    with torch.no_grad():
        model.final_layer.linear.weight.copy_(
            model.final_layer.linear.weight.unflatten(0, (4, 4)).transpose(0, 1).flatten(0, 1)
        )
        model.save(file)  # patches as (position, channel)
    assert "does not follow the noise" in command("verify", file).stderr
    with torch.no_grad():
        model.final_layer.linear.weight[0, 0] = float("nan")
    model.save(file)
    assert "not finite, in final_layer.linear.weight: it is damaged" in command("verify", file).stderr


def test_a_released_file_that_cannot_be_fetched(monkeypatch, command):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("info", "verify"):
        message = command(name, "sprint_XL_imagenet256.safetensors").stderr
        assert "could not be fetched from snap-research/SPRINT on the Hugging Face hub" in message


def test_a_released_file_is_fetched_by_its_name(monkeypatch, tmp_path, command):
    tiny().to_reference(tmp_path / "cached.safetensors")
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        return str(tmp_path / "cached.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    said = command("info", "weights/sprint_XL_REPA_imagenet256.safetensors").stdout
    assert "in the layout of the SPRINT authors" in said
    assert {*asked} == {("snap-research/SPRINT", "sprint_XL_REPA_imagenet256.safetensors")}
