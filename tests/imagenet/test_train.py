"""train.py: the run of a plain loop, killed and resumed to the same bits, on one process and two, with and without REPA."""

import copy
import json
import math
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import small
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import sprint
from sprint.data.latents import write_index, write_shard
from sprint.training.order import DataOrder, seed_of

pytest.importorskip("accelerate")

OPTIONS = {
    "model": "S/2", "hidden_size": 32, "num_heads": 2, "encoder_depth": 1, "middle_depth": 2, "decoder_depth": 1,
    "num_classes": 3, "num_workers": 0, "max_train_steps": 12, "batch_size": 8, "learning_rate": 1e-3,
    "mixed_precision": "no", "allow_tf32": False, "ema_decay": 0.9, "checkpointing_steps": 4, "logging_steps": 3,
    "report_to": "none", "stages": "both",
    "finetune": {"max_train_steps": 8, "batch_size": 16, "learning_rate": 2e-3, "warmup_steps": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("latents"))


def prepared(folder, *, broken=None, teacher=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    moments = torch.randn(20, 8, 8, 8, generator=generator)
    moments[:, 4:] = moments[:, 4:].abs() * 0.1
    if broken is not None:
        moments[broken] = math.nan
    features = torch.randn(20, 16, 6, generator=generator) if teacher else None
    for number, rows in enumerate((slice(0, 12), slice(12, 20))):
        own = None if features is None else features[rows]
        write_shard(folder, number, moments[rows].half(), (torch.arange(20) % 3)[rows], features=own)
    write_index(folder, (0, 1), about={"teacher": teacher})
    return folder


def configured(out, latents, **options):
    """Command line for a run in `out`."""
    out.mkdir(exist_ok=True)
    file = out / "config.yaml"
    file.write_text(
        yaml.safe_dump({**OPTIONS, "data_dir": str(latents), "output_dir": str(out), "exp_name": "run", **options})
    )
    return ("--config", file)


def train(out, latents, *, processes=1, **options):
    return small.script("train", *configured(out, latents, **options), processes=processes)


def metrics(out):
    entries = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "images_per_s"} for entry in entries]


def same(one, other) -> bool:
    a, b = (load_file(out / "run" / "model.safetensors") for out in (one, other))
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(latents, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run = train(out, latents)
    assert run.returncode == 0, run.stderr
    assert "FLOPs: sparse 1." in run.stdout  # what it will save is said first
    return out


def test_the_run_is_that_of_a_plain_loop(latents, whole):
    """Data order, draws, both stages with their batches and rates, clip and average, written out."""
    data, order = sprint.data.LatentDataset(latents), DataOrder(20, seed=0)
    torch.manual_seed(seed_of(0))
    sizes = {"dim": 32, "heads": 2, "encoder_depth": 1, "middle_depth": 2, "decoder_depth": 1, "num_classes": 3}
    model = sprint.SiT(sprint.SiTConfig(**sizes)).train()
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    loss, seen, losses = sprint.FlowMatchingLoss(), 0, []
    for step in range(20):
        sparse = step < 12
        batch = 8 if sparse else 16
        optimizer.param_groups[0]["lr"] = 1e-3 if sparse else 2e-3 * min(1, (step - 12 + 1) / 2)
        rows = [data[i] for i in order.take(seen, batch)]
        moments, labels = torch.stack([row[0] for row in rows]).float(), torch.stack([row[1] for row in rows])
        torch.manual_seed(seed_of(0, step + 1, 0, 0))
        latent = 0.18215 * (moments[:, :4] + moments[:, 4:] * torch.randn(batch, 4, 8, 8))
        value = loss(model, latent, y=labels, drop=sprint.StructuredDrop(0.75) if sparse else None).loss
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
            average.data.lerp_(parameter.data, 0.1)
        losses.append(value.item())
        seen += batch
    written = load_file(whole / "run" / "model.safetensors")
    for name, expected in ema.state_dict().items():
        torch.testing.assert_close(written[name], expected, rtol=1e-4, atol=1e-6, msg=name)  # float32
    entries = metrics(whole)
    assert [entry["step"] for entry in entries] == [3, 6, 9, 12, 15, 18]
    assert [entry["stage"] for entry in entries] == [0, 0, 0, 0, 1, 1]
    for entry in entries:
        last = entry["step"]
        assert entry["loss"] == pytest.approx(sum(losses[last - 3 : last]) / 3, rel=1e-4)
    assert sorted(path.name for path in (whole / "run" / "checkpoints").iterdir()) == [
        "00000012.safetensors", "00000016.safetensors", "00000020.safetensors"
    ]  # fmt: skip


def interrupted(command, ready, limit=600.0) -> bool:
    """Start a command and kill it when `ready` says so; False if it ended before, well."""
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=small.ENVIRONMENT
    )
    end = time.monotonic() + limit
    while process.poll() is None and time.monotonic() < end:
        if ready():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.001)
    assert process.poll() == 0, "neither ready nor done" if process.poll() is None else "refused, or failed"
    return False


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bits(latents, whole, tmp_path):
    """With workers, which outlive the killed process by some seconds and must not keep the folder from the next."""
    command = [sys.executable, small.SCRIPTS / "train.py", *configured(tmp_path, latents, num_workers=2)]
    folder, chance = tmp_path / "run" / "checkpoints", random.Random(0)
    kills = 0
    for attempt in range(4):
        before = {path.name for path in folder.glob("*.safetensors")}
        pause = chance.uniform(0, 0.15)

        def ready(*, before=before, pause=pause, during_a_save=attempt % 2 == 0) -> bool:
            if during_a_save:
                return next(folder.glob(".*.tmp"), None) is not None
            if {path.name for path in folder.glob("*.safetensors")} <= before:
                return False
            time.sleep(pause)
            return True

        kills += interrupted(command, ready)
    assert kills >= 2
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, env=small.ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    assert same(tmp_path, whole)
    assert metrics(tmp_path) == metrics(whole)
    assert not list(folder.glob(".*.tmp"))


def test_the_final_model_is_written_again(latents, whole, tmp_path):
    """Killed after the last checkpoint and before the model was written."""
    shutil.copytree(whole / "run", tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    assert train(tmp_path, latents).returncode == 0
    assert same(tmp_path, whole)
    run = train(tmp_path, latents, stages="both", finetune={**OPTIONS["finetune"], "max_train_steps": 4})
    assert "20 steps done, now 16 in all" in run.stderr


def test_a_run_is_of_one_process_and_one_dataset(latents, whole, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    run = sprint.training.RunFolder(tmp_path / "run")
    run.lock()
    assert "another process is training in" in train(tmp_path, latents).stderr
    del run
    (tmp_path / "data").mkdir()
    other = prepared(tmp_path / "data", seed=1)
    assert "other latents than those in" in train(tmp_path, other).stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_asked_to_end_it_saves_and_goes_on_with_the_same_bits(latents, whole, processes, tmp_path):
    """SIGTERM, which schedulers send before they kill, with workers; a damaged line of the log is left out, with a word."""
    arguments = configured(tmp_path, latents, num_workers=2, checkpointing_steps=1000, logging_steps=1)
    command = [str(part) for part in (*small.launch(processes), small.SCRIPTS / "train.py", *arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=small.ENVIRONMENT)
    log = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode != 0, "it was done before it was asked"
    assert "asked to end (SIGTERM): step" in out, err
    (saved,) = (tmp_path / "run" / "checkpoints").glob("*.safetensors")
    assert 0 < int(saved.stem) < 20
    assert processes == 1 or int(saved.stem) % 10 == 0
    log.write_text(log.read_text() + '{"step": 1')
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=small.ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    assert f"from step {int(saved.stem)} on" in run.stdout
    assert "is damaged, and left out" in run.stdout
    assert processes == 2 or same(tmp_path, whole)


def test_a_broken_checkpoint_is_passed_over(latents, whole, tmp_path):
    assert train(tmp_path, latents).returncode == 0
    newest = tmp_path / "run" / "checkpoints" / "00000020.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    (tmp_path / "run" / "model.safetensors").unlink()
    run = train(tmp_path, latents)
    assert run.returncode == 0, run.stderr
    assert "going back to the one before" in run.stderr
    assert "from step 16 on" in run.stdout
    assert same(tmp_path, whole)
    assert metrics(tmp_path) == metrics(whole)


@pytest.mark.slow
def test_a_model_without_its_middle_trains_on_two_processes(latents, tmp_path):
    options = {"residual_type": "shallow", "stages": "pretrain", "max_train_steps": 3}
    run = train(tmp_path, latents, processes=2, **options)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_stop_go_on_and_sample(latents, parallel, tmp_path):
    if parallel == "fsdp" and torch.__version__ < "2.8":
        pytest.skip("FSDP2 over gloo sums gradients here instead of averaging them, those of a plain model too")
    pytest.importorskip("diffusers")
    one, two, vae = tmp_path / "one", tmp_path / "two", small.vae(tmp_path / "vae")
    options = {"parallel": parallel, "gradient_accumulation_steps": 2, "activation_checkpointing": True}
    run = train(one, latents, processes=2, **options)
    assert run.returncode == 0, run.stderr
    assert train(two, latents, processes=2, **options, max_train_steps=7, stages="pretrain").returncode == 0
    (two / "run" / "model.safetensors").unlink()
    refused = train(two, latents, processes=2, **options)
    assert refused.returncode != 0
    assert "stages='pretrain', now 'both'" in refused.stderr
    three = tmp_path / "three"
    command = [*small.launch(2), small.SCRIPTS / "train.py", *configured(three, latents, **options)]
    folder = three / "run" / "checkpoints"
    assert interrupted(command, (folder / "00000008.safetensors").exists)
    run = train(three, latents, processes=2, **options)
    assert run.returncode == 0, run.stderr
    assert "from step" in run.stdout
    assert same(one, three)
    assert metrics(one) == metrics(three)
    sampled = small.script(
        "sample", "--checkpoint", one / "run" / "checkpoints" / "00000020.safetensors", "--out", tmp_path / "samples",
        "--count", 3, "--side", 8, "--vae", vae, "--steps", 2, processes=2,
    )  # fmt: skip
    assert sampled.returncode == 0, sampled.stderr
    assert len(list((tmp_path / "samples").glob("*.png"))) == 3


@pytest.mark.slow
def test_ddp_and_fsdp_train_the_same_model(latents, tmp_path):
    if torch.__version__ < "2.8":
        pytest.skip("FSDP2 over gloo sums gradients here instead of averaging them, those of a plain model too")
    found = []
    pytest.importorskip("diffusers")
    grids = {"sampling_steps": 2, "vae": str(small.vae(tmp_path / "vae")), "checkpointing_steps": 12}
    for parallel in ("ddp", "fsdp"):
        run = train(tmp_path / parallel, latents, processes=2, parallel=parallel, **grids)
        assert run.returncode == 0, run.stderr
        assert "view tensor" not in run.stderr
        found.append(load_file(tmp_path / parallel / "run" / "model.safetensors"))
    pictures = [sorted((tmp_path / parallel / "run" / "samples").iterdir()) for parallel in ("ddp", "fsdp")]
    assert [path.name for path in pictures[0]] == [f"{step:08d}.png" for step in range(2, 22, 2)]
    for one, other in zip(*pictures, strict=True):
        apart = np.abs(np.array(Image.open(one)).astype(int) - np.array(Image.open(other)).astype(int))
        assert apart.max() <= 1, one.name  # rounded to other sides
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)  # float32


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    order = DataOrder(20, seed=0)
    broken = order.take(7 * 8, 8)[0]  # first seen again in step 8 at the latest
    first = next(step for step in range(20) if broken in order.take(step * 8, 8))
    (tmp_path / "data").mkdir()
    data = prepared(tmp_path / "data", broken=broken)
    run = train(tmp_path, data, checkpointing_steps=1, logging_steps=1, checkpoints_total_limit=1)
    assert run.returncode == 1
    assert f"before step {first + 1} not finite" in run.stderr
    assert "lower learning_rate" in run.stderr
    assert "Traceback" not in run.stderr
    kept = list((tmp_path / "run" / "checkpoints").glob("*.safetensors"))
    assert [path.stem for path in kept] == ([f"{first:08d}"] if first else [])
    for path in kept:
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_keeps_the_last_good_state(latents, tmp_path):
    """A limit on the size of files stands for the full disk."""
    assert train(tmp_path, latents, stages="pretrain", max_train_steps=4).returncode == 0
    before = (tmp_path / "run" / "checkpoints" / "00000004.safetensors").read_bytes()
    command = [sys.executable, small.SCRIPTS / "train.py", *configured(tmp_path, latents, stages="pretrain")]
    limit = len(before) // 2
    run = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, env=small.ENVIRONMENT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert run.returncode == 1
    assert "step 8 could not be saved" in run.stderr
    assert "older checkpoints are whole" in run.stderr
    assert "Traceback" not in run.stderr
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["00000004.safetensors"]
    assert (folder / "00000004.safetensors").read_bytes() == before


def test_repa_with_prepared_features(tmp_path):
    (tmp_path / "data").mkdir()
    data = prepared(tmp_path / "data", teacher="some_vit")
    options = {
        "representation_align": True,
        "representation_encoder": "some_vit",
        "representation_depth": 3,
        "stages": "pretrain",
    }
    run = train(tmp_path, data, **options)
    assert run.returncode == 0, run.stderr
    model = sprint.SiT.load(tmp_path / "run" / "model.safetensors")
    assert (model.config.repa_dim, model.config.repa_depth) == (6, 2)
    assert all(-1 <= entry["repa"] <= 1 for entry in metrics(tmp_path))
    other = train(tmp_path / "other", data, **{**options, "representation_encoder": "another_vit"})
    assert "holds features of some_vit, but representation_encoder=another_vit" in other.stderr


def test_finetuning_starts_from_a_checkpoint(latents, whole, tmp_path):
    start = whole / "run" / "model.safetensors"
    finetune = {"max_train_steps": 1, "learning_rate": 1e-12, "warmup_steps": 0, "batch_size": 4}
    run = train(tmp_path, latents, stages="finetune", init_from=str(start), finetune=finetune)
    assert run.returncode == 0, run.stderr
    before, after = (load_file(path) for path in (start, tmp_path / "run" / "model.safetensors"))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6, msg=name)
    run = train(tmp_path / "other", latents, stages="finetune", init_from=str(start), finetune=finetune, hidden_size=64)
    assert "is another model, with dim=32, here 64" in run.stderr
    run = train(tmp_path / "third", latents, stages="finetune", init_from=str(start), finetune=finetune, positions="sincos")
    assert "is another model, with positions='rope', here 'sincos'" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_converted_sit_starts_a_run(latents, tmp_path):
    """With the identity as its fusion: the first dense loss is the original's."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "heads": 2, "encoder_depth": 1, "middle_depth": 2, "decoder_depth": 1, "num_classes": 3}
    model = sprint.SiT(sprint.SiTConfig(**sizes, positions="sincos", qk_norm=False))
    model.middle.fusion.init = "identity"
    model.middle.fusion.reset_parameters()
    model.save(tmp_path / "sit.safetensors")
    options = {"positions": "sincos", "qk_norm": False, "init_from": str(tmp_path / "sit.safetensors")}
    run = train(tmp_path, latents, **options, stages="pretrain", max_train_steps=1, checkpointing_steps=1)
    assert run.returncode == 0, run.stderr
    trained = sprint.SiT.load(tmp_path / "run" / "model.safetensors")
    assert (trained.config.positions, trained.config.qk_norm) == ("sincos", False)
    torch.testing.assert_close(trained.middle.fusion.proj.weight, model.middle.fusion.proj.weight, rtol=0, atol=1e-2)


def test_a_grid_of_samples_while_training(latents, tmp_path):
    pytest.importorskip("diffusers")
    vae = small.vae(tmp_path / "vae")
    options = {"stages": "pretrain", "max_train_steps": 2, "sampling_steps": 2, "vae": str(vae), "report_to": "tensorboard"}
    run = train(tmp_path, latents, **options)
    assert run.returncode == 0, run.stderr
    assert Image.open(tmp_path / "run" / "samples" / "00000002.png").size == (64, 64)
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_dir": "nowhere"}, "there is no folder nowhere"),
        ({"input_size": 32}, "input_size=32, but the latents in .* are 8 wide"),
        ({"in_channels": 16}, "in_channels=16, but the latents in .* have 4"),
        ({"num_classes": 2}, "has class 2, but num_classes=2"),
        ({"batch_size": 7}, "a batch of 7 images does not split into 1 processes of 2 calls"),
        (
            {"representation_align": True, "representation_depth": 3},
            "holds no teacher's features: prepare it with --teacher",
        ),
        ({"sampling_steps": 1, "vae": "none"}, "4 channels are no picture"),
        ({"finetune": {"batch_size": 3, "max_train_steps": 8, "warmup_steps": 2}}, "a batch of 3 images does not split"),
        ({"report_to": "wandb"}, "report_to=wandb is not installed"),
        ({"init_from": "none.safetensors"}, "there is no checkpoint at none.safetensors"),
    ],
)
def test_refused_before_anything_is_trained(options, message, latents, tmp_path, monkeypatch):
    """In this process, to be quick."""
    arguments = configured(tmp_path, latents, **{"gradient_accumulation_steps": 2, **options})
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    monkeypatch.syspath_prepend(small.SCRIPTS)
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(small.SCRIPTS / "train.py"), run_name="__main__")
    assert not list(tmp_path.rglob("*.safetensors"))
