"""The examples run; the quickstart resumes to the same bits, and refuses a folder of another run."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sprint

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # two threads wait for each other where other work takes the cores


def test_quickstart_draws_a_picture(tmp_path):
    run = subprocess.run(
        [sys.executable, SCRIPT, "--steps", "3", "--out", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "samples.png").stat().st_size > 10_000
    costs = dict(line.split(": ") for line in run.stdout.splitlines() if "MFLOPs" in line)
    flops = {name: int(cost.split("image, ")[1].split()[0]) for name, cost in costs.items()}
    cfg, pdg = flops["dense, CFG 2.0"], flops["dense, PDG 2.0"]
    assert pdg / cfg == pytest.approx(8 / 12, abs=0.02)  # 6 + 2 blocks instead of 6 + 6


@pytest.mark.slow
def test_quickstart_resumes_where_it_was(tmp_path, monkeypatch):
    quickstart = runpy.run_path(str(SCRIPT))
    train, save_state = quickstart["train"], sprint.save_state

    whole = train(60, 0, tmp_path / "whole", "cpu")

    def save_and_stop(path, state):
        save_state(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(sprint, "save_state", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(60, 0, tmp_path / "halves", "cpu")
    monkeypatch.undo()
    assert sprint.load_state(tmp_path / "halves" / "run.safetensors")["step"] == 25
    resumed = train(60, 0, tmp_path / "halves", "cpu")
    for (name, expected), actual in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, msg=f"{name} differs after resuming")

    with pytest.raises(SystemExit, match="belongs to a run with"):
        train(60, 1, tmp_path / "halves", "cpu")


@pytest.mark.parametrize("name", ["wrap_plain_dit", "wrap_diffusers_dit"])
def test_wrapping_examples_run(name):
    run = subprocess.run(
        [sys.executable, SCRIPT.with_name(f"{name}.py")], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert run.returncode == 0, run.stderr
    assert "step 9" in run.stdout
    assert "shallow path skips the middle" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("name", "says"), [("lora_sd3", "loaded: largest difference 0e+00"), ("pdg_pipeline", "PDG: ")])
def test_diffusers_examples_run(name, says):
    run = subprocess.run(
        [sys.executable, SCRIPT.with_name(f"{name}.py")], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert run.returncode == 0, run.stderr
    assert says in run.stdout


@pytest.mark.slow
def test_accelerate_loop_goes_on_where_it_was(tmp_path):
    command = [sys.executable, SCRIPT.with_name("accelerate_loop.py"), "--out", tmp_path, "--mixed_precision", "bf16"]
    for steps, says in (("6", "step 6: loss"), ("8", "goes on at step 6\nstep 7: loss")):
        run = subprocess.run([*command, "--steps", steps], capture_output=True, text=True, check=False, env=ENVIRONMENT)
        assert run.returncode == 0, run.stderr
        assert says in run.stdout
        assert "the same weights" in run.stdout


@pytest.mark.slow
def test_lightning_module_goes_on_where_it_was(tmp_path):
    command = [sys.executable, SCRIPT.with_name("lightning_module.py"), "--out", tmp_path]
    for epochs, says in (("2", "stopped: `max_epochs=2`"), ("3", "Restored all states from the checkpoint")):
        run = subprocess.run([*command, "--epochs", epochs], capture_output=True, text=True, check=False, env=ENVIRONMENT)
        assert run.returncode == 0, run.stderr
        assert says in run.stdout + run.stderr
        assert "the same weights" in run.stdout


def test_patches_of_trainers_are_those_of_the_docs():
    shown = (SCRIPT.parents[1] / "docs" / "trainers.md").read_text()
    for name in ("sd3", "flux"):
        lines = SCRIPT.with_name("trainers").joinpath(f"{name}_lora.patch").read_text().splitlines()
        changed = [line for line in lines if line.startswith(("+", "-")) and line[:3] not in ("+++", "---")]
        assert 0 < len(changed) <= 8
        for line in changed:
            assert re.search(f"^{re.escape(line[0])} *{re.escape(line[1:].strip())}$", shown, flags=re.MULTILINE), line
