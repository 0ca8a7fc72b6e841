"""The whole way with the real scripts: images, latents, two-stage training with REPA, samples, a number, a sweep."""

import csv
import json
import runpy
import sys

import numpy as np
import pytest
import small
import yaml
from PIL import Image

pytest.importorskip("diffusers")
timm = pytest.importorskip("timm")
pytest.importorskip("test_evaluate")  # registers a small feature network

STEPS = ("rehearse", "prepare", "train", "sample", "evaluate")
TEACHER = "vit_tiny_patch16_224"


def here(monkeypatch, capsys, name, *arguments):
    """Run a script in this process, where the small feature network is known."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    monkeypatch.syspath_prepend(small.SCRIPTS)
    runpy.run_path(str(small.SCRIPTS / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_rehearsal_of_the_docs(tmp_path, monkeypatch, capsys):
    """Its commands as they stand there; a small feature network plays Inception."""
    text = (small.SCRIPTS.parents[1] / "docs" / "imagenet.md").read_text()
    section = text.split("## A rehearsal")[1].split("\n## ")[0].replace("\\\n", "")
    commands = [line.split() for line in section.splitlines() if line.startswith("    python ")]
    assert [command[1] for command in commands] == [f"{name}.py" for name in STEPS]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(small.SCRIPTS / "configs")
    for name, (_, _, *arguments) in zip(STEPS[:-1], commands, strict=False):
        run = small.script(name, *arguments)
        assert run.returncode == 0, run.stderr
        if name == "train":
            assert "loss=" in run.stderr
            assert "images/s=" in run.stderr
    here(monkeypatch, capsys, "evaluate", *commands[-1][2:], "--inception", "small-features")
    entries = [json.loads(line) for line in (tmp_path / "rehearsal" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert entries[3]["loss"] < entries[0]["loss"]
    assert Image.open(tmp_path / "rehearsal" / "run" / "samples" / "00000040.png").size == (256, 256)
    assert len(list((tmp_path / "rehearsal" / "samples").glob("*.png"))) == 40


def test_images_to_fid(tmp_path, monkeypatch, capsys):
    from safetensors.torch import save_file

    photographs, vae = small.images(tmp_path / "images", each=30), small.vae(tmp_path / "vae")
    weights = tmp_path / "teacher.safetensors"
    save_file(timm.create_model(TEACHER, num_classes=0, img_size=128).state_dict(), weights)
    latents, reference = tmp_path / "latents", tmp_path / "latents" / "images"
    run = small.script("prepare", "--images", photographs, "--vae", vae, "--size", 32, "--shard", 40, "--batch", 16,
                       "--workers", 0, "--layout", "repa", "--out", latents)  # fmt: skip
    assert run.returncode == 0, run.stderr

    config = tmp_path / "config.yaml"
    options = {
        "model": "S/2", "hidden_size": 32, "num_heads": 2, "encoder_depth": 1, "middle_depth": 2, "decoder_depth": 1,
        "num_classes": 3, "data_dir": str(latents), "input_size": 16, "num_workers": 0, "batch_size": 16,
        "max_train_steps": 14, "learning_rate": 3e-3, "ema_decay": 0.8, "mixed_precision": "no", "logging_steps": 2,
        "representation_align": True, "representation_depth": 3, "representation_encoder": TEACHER,
        "representation_weights": str(weights), "output_dir": str(tmp_path), "exp_name": "run", "report_to": "none",
        "stages": "both", "finetune": {"max_train_steps": 6, "batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 2},
    }  # fmt: skip
    config.write_text(yaml.safe_dump(options))
    run = small.script("train", "--config", config)
    assert run.returncode == 0, run.stderr
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in entries] == [0] * 7 + [1] * 3
    assert entries[6]["loss"] < entries[0]["loss"]
    assert entries[6]["repa"] < entries[0]["repa"]  # minus the cosine: the head turns towards the teacher

    sampling = (
        "--checkpoint",
        tmp_path / "run" / "model.safetensors",
        "--vae",
        vae,
        "--side",
        16,
        "--count",
        64,
        "--steps",
        4,
    )
    run = small.script("sample", *sampling, "--out", tmp_path / "samples", "--scale", 1.5)
    assert run.returncode == 0, run.stderr
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (64, 32, 32, 3)

    networks = ("--inception", "small-features", "--dino", "small-features")
    text = here(monkeypatch, capsys, "evaluate", "--samples", tmp_path / "samples.npz", "--reference", reference, *networks,
                "--metrics", "fid", "--json", tmp_path / "fid.json")  # fmt: skip
    found = json.loads((tmp_path / "fid.json").read_text())["FID"]
    assert found > 0
    assert f"{found:g}" in text

    sweep = (*sampling, "--out", tmp_path / "sweep", "--reference", reference, *networks, "--scales", 1, 1.5)
    text = here(monkeypatch, capsys, "sweep", *sweep)
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["guidance"], float(row["scale"])) for row in rows] == [("cfg", 1), ("cfg", 1.5), ("pdg", 1), ("pdg", 1.5)]
    assert float(rows[3]["fid"]) == pytest.approx(found, rel=1e-3)  # the very samples of above
    assert rows[0]["fid"] == rows[2]["fid"]  # a scale of 1 is no guidance
    assert Image.open(tmp_path / "sweep" / "sweep.png").size[0] > 1000
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("*.png") if path.parent.name != "sweep"}
    assert len(times) == 4 * 64
    here(monkeypatch, capsys, "sweep", *sweep, "--metrics", "fid")  # again: nothing is drawn anew
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
