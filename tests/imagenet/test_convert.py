"""convert.py: every layout there and back gives the same function."""

import small
import torch
from models import tiny
from safetensors.torch import load_file

import sprint

X, T, Y = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([1, 2])


def test_reference_and_back(tmp_path):
    model = tiny().eval()
    model.save(tmp_path / "ours.safetensors")
    theirs, again = tmp_path / "theirs.safetensors", tmp_path / "again.safetensors"
    assert small.script("convert", tmp_path / "ours.safetensors", theirs, "--target", "reference").returncode == 0
    run = small.script("convert", theirs, again, "--source", "reference")
    assert run.returncode == 0, run.stderr
    assert "reference to ours" in run.stdout
    assert sprint.SiT.load(again).eval()(X, T, Y).equal(model(X, T, Y))


def test_original_and_back(tmp_path):
    model = tiny(positions="sincos", qk_norm=False).eval()
    model.middle.fusion.init = "identity"
    model.middle.fusion.reset_parameters()
    model.save(tmp_path / "ours.safetensors")
    theirs, again = tmp_path / "theirs.safetensors", tmp_path / "again.safetensors"
    run = small.script("convert", tmp_path / "ours.safetensors", theirs, "--target", "sit", "--grid", 4)
    assert run.returncode == 0, run.stderr
    torch.save({"ema": load_file(theirs), "step": 3}, tmp_path / "theirs.pt")
    options = ("--source", "sit", "--heads", 2, "--classes", 10, "--encoder-depth", 1, "--decoder-depth", 1)
    run = small.script("convert", tmp_path / "theirs.pt", again, *options)
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(sprint.SiT.load(again).eval()(X, T, Y), model(X, T, Y), rtol=1e-4, atol=1e-5)  # float32


def test_refusals(tmp_path):
    tiny().save(tmp_path / "ours.safetensors")
    path = tmp_path / "ours.safetensors"
    assert "needs --heads" in small.script("convert", path, path, "--source", "sit").stderr
    assert "are both ours" in small.script("convert", path, path).stderr
    run = small.script("convert", path, tmp_path / "x.safetensors", "--target", "sit")
    assert "the original SiT has sincos positions" in run.stderr
    assert not (tmp_path / "x.safetensors").exists()
    assert "there is no checkpoint" in small.script("convert", "none.pt", path, "--source", "sit", "--heads", 2).stderr


def test_dit_and_back(tmp_path):
    model = tiny(positions="sincos", qk_norm=False, time_scale=1000.0, prediction="noise").eval()
    model.middle.fusion.init = "identity"
    model.middle.fusion.reset_parameters()
    model.save(tmp_path / "ours.safetensors")
    theirs, again = tmp_path / "theirs.safetensors", tmp_path / "again.safetensors"
    run = small.script("convert", tmp_path / "ours.safetensors", theirs, "--target", "sit", "--grid", 4)
    assert "predicts noise: a DiT predicts noise, a SiT v" in run.stderr
    assert small.script("convert", tmp_path / "ours.safetensors", theirs, "--target", "dit", "--grid", 4).returncode == 0
    options = ("--source", "dit", "--heads", 2, "--classes", 10, "--encoder-depth", 1, "--decoder-depth", 1)
    run = small.script("convert", theirs, again, *options)
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(sprint.SiT.load(again).eval()(X, T, Y), model(X, T, Y), rtol=1e-3, atol=1e-4)  # float32


def test_what_the_originals_training_scripts_save(tmp_path):
    """A dictionary of model, ema, opt and args, a Namespace; names as DistributedDataParallel and torch.compile make."""
    from argparse import Namespace

    model = tiny(positions="sincos", qk_norm=False).eval()
    model.middle.fusion.init = "identity"
    model.middle.fusion.reset_parameters()
    model.save(tmp_path / "ours.safetensors")
    theirs, again, saved = (tmp_path / name for name in ("theirs.safetensors", "again.safetensors", "0400000.pt"))
    run = small.script("convert", tmp_path / "ours.safetensors", theirs, "--target", "sit", "--grid", 4)
    assert run.returncode == 0, run.stderr
    state = {f"module._orig_mod.{name}": tensor for name, tensor in load_file(theirs).items()}
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]}
    whole = {"model": state, "ema": state, "opt": optimizer, "args": Namespace(num_classes=10, model="SiT-S/2")}
    torch.save(whole, saved)
    options = ("--source", "sit", "--heads", 2, "--encoder-depth", 1, "--decoder-depth", 1)
    run = small.script("convert", saved, again, *options)
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(sprint.SiT.load(again).eval()(X, T, Y), model(X, T, Y), rtol=1e-4, atol=1e-5)
    run = small.script("convert", saved, again, *options, "--classes", 11)
    assert "was trained with num_classes=10: leave it out" in run.stderr
    torch.save({**whole, "args": Namespace(model="SiT-S/2")}, saved)
    assert "11 rows: pass num_classes=10 if" in small.script("convert", saved, again, *options).stderr
    torch.save({"epoch": 3, "model": "SiT"}, saved)
    assert "no dictionary of tensors under ema" in small.script("convert", saved, again, *options).stderr
