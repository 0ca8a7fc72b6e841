"""The examples run; the quickstart resumes to the same bits, and refuses a folder of another run."""

import os
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
