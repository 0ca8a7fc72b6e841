"""The reference's six configuration files, written here from a table of names and values: what each becomes, and runs."""

import copy
import sys

import numpy as np
import pytest
import small
import torch
import yaml
from models import tiny

from sprint.data.latents import write_index, write_shard

sys.path.insert(0, str(small.SCRIPTS))
reading, reference = pytest.importorskip("reading"), pytest.importorskip("reference_config")

TRAIN_256 = {
    "logging": {"output_dir": "exps", "project_name": "p", "exp_name": "e", "logging_dir": "logs", "report_to": "wandb"},
    "compile": {"enabled": True, "mode": "default", "backend": "inductor", "fullgraph": False, "dynamic": False},
    "model": {
        "arch": "SiT",
        "type": "XL",
        "network_config": {
            "context_size": 32, "patch_size": 2, "in_channels": 4, "num_classes": 1000, "class_dropout_prob": 0.1,
            "use_swiglu_large": True, "q_norm": "RMSNorm", "k_norm": "RMSNorm", "representation_align": False,
            "representation_depth": 8, "encoder_depth": 2, "middle_depth": 24, "decoder_depth": 2,
            "use_mask_restore": True, "cfg_mask_prob": 0.1, "residual_type": "concat_linear", "use_checkpoint": False,
        },
    },
    "dataset": {
        "data_dir": "data", "resolution": 256, "batch_size": 256, "num_workers": 4, "prefetch_factor": 2,
        "persistent_workers": True, "pin_memory": True,
    },
    "optimization": {
        "allow_tf32": True, "mixed_precision": "bf16", "epochs": 1400, "max_train_steps": 2000000, "resume_step": 1,
        "gradient_accumulation_steps": 1, "max_grad_norm": 1, "seed": 0, "learning_rate": "1e-4", "adam_beta1": 0.9,
        "adam_beta2": 0.999, "adam_weight_decay": 0, "adam_epsilon": "1e-8", "warmup_steps": 0,
        "adaptive_grad_clip": True, "clip_ema_decay": 0.99,
    },
    "loss": {
        "path_type": "linear", "prediction": "v", "weighting": "lognormal", "cfg_prob": 0.1, "enc_type": "None",
        "proj_coeff": 0.5, "mask_config": {"mask_ratio": 0.75, "mask_type": "structured_with_random_offset"},
    },
    "evaluation": {
        "checkpointing_steps": 10000, "checkpointing_steps_list": [1], "checkpoints_total_limit": 5, "ref_path": "ref",
        "sampling_steps": 5000, "eval_fid": False, "evaluation_steps": 10000, "evaluation_number_samples": 10000,
        "evaluation_batch_size": 50, "evaluation_num_steps": 50,
    },
}  # fmt: skip
OPTIONS_256 = {
    "model": "XL/2", "input_size": 32, "patch_size": 2, "in_channels": 4, "num_classes": 1000, "class_dropout_prob": 0.1,
    "qk_norm": True, "representation_align": False, "encoder_depth": 2, "middle_depth": 24, "decoder_depth": 2,
    "path_drop_prob": 0.1, "residual_type": "both", "activation_checkpointing": False, "data_dir": "data",
    "batch_size": 256, "num_workers": 4, "allow_tf32": True, "mixed_precision": "bf16", "max_train_steps": 2_000_000,
    "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "seed": 0, "learning_rate": 1e-4, "adam_beta1": 0.9,
    "adam_beta2": 0.999, "adam_weight_decay": 0.0, "adam_epsilon": 1e-8, "warmup_steps": 0, "path_type": "linear",
    "prediction": "v", "weighting": "lognormal", "mask_ratio": 0.75, "mask_type": "structured_with_random_offset",
    "checkpointing_steps": 10_000, "checkpoints_total_limit": 5, "sampling_steps": 5000, "output_dir": "exps",
    "exp_name": "e", "report_to": "wandb", "stages": "pretrain", "init_from": None, "representation_weight": 0.5,
}  # fmt: skip


def changed(content, **values):
    """A copy with values at dotted places; None takes a key away."""
    content = copy.deepcopy(content)
    for place, value in values.items():
        *sections, key = place.split("__")
        section = content
        for name in sections:
            section = section.setdefault(name, {})
        if value is None:
            section.pop(key)
        else:
            section[key] = value
    return content


NO_CLIP = {"optimization__adaptive_grad_clip": None, "optimization__clip_ema_decay": None}
LARGE = {"model__network_config__context_size": 64, "dataset__resolution": 512}
LARGE |= {"model__network_config__use_checkpoint": True}
TUNED = {
    "dataset__batch_size": 1024, "optimization__max_train_steps": 200000, "optimization__warmup_steps": 5000,
    "optimization__finetune": True, "optimization__ckpt": "sprint_XL_imagenet256.safetensors",
    "loss__mask_config__mask_ratio": 0,
}  # fmt: skip
DENSE = {
    "batch_size": 1024, "max_train_steps": 200_000, "warmup_steps": 5000, "mask_ratio": 0.0,
    "init_from": "sprint_XL_imagenet256.safetensors",
}  # fmt: skip
SIZES_512 = {"input_size": 64, "activation_checkpointing": True}
FILES = {
    "256": (TRAIN_256, {}),
    "256_ft": (changed(TRAIN_256, **NO_CLIP, **TUNED, optimization__learning_rate="2e-4"), {**DENSE, "learning_rate": 2e-4}),
    "512": (changed(TRAIN_256, **NO_CLIP, **LARGE), SIZES_512),
    "512_ft": (
        changed(TRAIN_256, **NO_CLIP, **LARGE, **TUNED, optimization__learning_rate="1.5e-4"),
        {**SIZES_512, **DENSE, "learning_rate": 1.5e-4},
    ),
}
SAMPLE = {
    "resolution": 256, "name": "samples", "ckpt_path": "sprint_XL_imagenet256.safetensors", "seed": {"global_seed": 888},
    "precision": {"tf32": True}, "profile": {"enabled": False}, "compile": TRAIN_256["compile"], "model": TRAIN_256["model"],
    "sampling": {
        "per_proc_batch_size": 50, "num_fid_samples": 50000, "mode": "sde", "path_type": "linear", "prediction": "v",
        "num_steps": 250, "cfg_scale": 3.0, "guidance_low": 0, "guidance_high": 1, "path_drop_guidance": True,
    },
}  # fmt: skip


def read(content, tmp_path, *changes):
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return reading.read(file, list(changes))


@pytest.mark.parametrize("name", FILES)
def test_training_files_become_these_options(name, tmp_path, capsys):
    content, differ = FILES[name]
    found = read(content, tmp_path)
    for option, value in (OPTIONS_256 | differ).items():
        if option == "mask_type" and "init_from" in differ:
            continue
        assert getattr(found, option) == value, option
    said = capsys.readouterr().err
    assert "not used here: compile.enabled, compile.mode" in said
    assert "because TrainStep and CapturedModel compile blocks" in said
    first = found.schedule().pretrain
    assert (first.drop is None) == name.endswith("_ft")


def test_every_key_is_taken_or_said_not_to_be(tmp_path, capsys):
    keys = {key for content, _ in FILES.values() for key in reference._flat(content)}
    assert keys <= reference.TRAINING.keys()
    assert (
        read(FILES["256"][0], tmp_path, "batch_size=64", "exp_name=mine").batch_size == 64
    )  # our names on the command line
    aligned = {"model__network_config__representation_align": True, "loss__enc_type": "dinov2-vit-b"}
    found = read(changed(TRAIN_256, **aligned), tmp_path)
    assert found.teacher == "vit_base_patch14_dinov2.lvd142m"
    assert (found.representation_depth, found.representation_weight) == (8, 0.5)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimization__mixed_precision": "fp16"}, "optimization.mixed_precision: 'fp16' is not to be had here: float16"),
        ({"logging__report_to": "both"}, "logging.report_to: 'both' .* one of tensorboard, wandb, none"),
        ({"model__network_config__q_norm": "layernorm"}, "q_norm: 'layernorm' .* RMSNorm, or not at all"),
        ({"model__network_config__k_norm": "none"}, "k_norm gives qk_norm=False, another key True: give them one value"),
        (
            {"model__network_config__residual_type": "baseline"},
            "residual_type: 'baseline' .* SPRINT's fusion is concat_linear",
        ),
        ({"model__type": "H"}, "model.type: 'H' .* S, B, L or XL"),
        ({"model__network_config__use_mask_restore": False}, "use_mask_restore: False is not to be had"),
        ({"optimization__update_ema_with_model": True}, "update_ema_with_model: True is not to be had"),
        ({"loss__mask_config__mask_type": "structured_with_random_offset_3D"}, "is for videos"),
        ({"loss__cfg_prob": 0.2}, "loss.cfg_prob=0.2 and class_dropout_prob=0.1 are one option"),
        ({"dataset__resolution": 512}, "resolution=512, but context_size=32 is that of 256 px"),
        ({"optimization__finetune": True}, "finetune is true without a ckpt"),
        (
            {"optimization__learning_rat": 1},
            "unknown option 'optimization.learning_rat' .* did you mean optimization.learning",
        ),
        ({"optimization__learning_rate": "fast"}, "learning_rate.*Expected.*float.*fast"),
        ({"loss__prediction": "x"}, None),  # we have that one
    ],
)
def test_values_that_are_refused(change, message, tmp_path, capsys):
    if message is None:
        assert read(changed(TRAIN_256, **change), tmp_path).prediction == "x"
        return
    with pytest.raises(SystemExit, match=message):
        read(changed(TRAIN_256, **change), tmp_path)


def test_a_ckpt_without_finetuning_is_said_not_to_be_used(tmp_path, capsys):
    content = changed(TRAIN_256, optimization__finetune=False, optimization__ckpt="x.safetensors")
    assert read(content, tmp_path).init_from is None
    assert "not used here: optimization.ckpt, because optimization.finetune is false" in capsys.readouterr().err


def test_sampling_files_become_these_options(capsys):
    expected = {
        "side": 32, "out": "samples", "checkpoint": "sprint_XL_imagenet256.safetensors", "seed": 888, "batch": 50,
        "count": 50000, "solver": "sde", "interpolant": "linear", "steps": 250, "scale": 3.0, "interval": [0.0, 1.0],
    }  # fmt: skip
    assert reference.sampling(SAMPLE) == expected | {"guidance": "pdg"}
    assert reference.sampling(changed(SAMPLE, sampling__path_drop_guidance=False)) == expected | {"guidance": "cfg"}
    off = reference.sampling(changed(SAMPLE, sampling__cfg_scale=1.0, sampling__mode="ode"))
    assert (off["guidance"], off["solver"]) == ("none", "euler")
    for change, message in (
        ({"sampling__cfg_scale": 0.5}, "must be 1"),
        ({"sampling__mode": "heun"}, "ode or sde"),
        ({"sampling__prediction": "x"}, "predict v"),
        ({"sampling__num_step": 3}, "unknown option 'sampling.num_step'"),
    ):
        with pytest.raises(ValueError, match=message):
            reference.sampling(changed(SAMPLE, **change))
    capsys.readouterr()


def test_files_in_the_wrong_place(tmp_path):
    with pytest.raises(SystemExit, match=r"a file for sampling: give it to sample.py"):
        read(SAMPLE, tmp_path)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(TRAIN_256, sort_keys=False))
    run = small.script("sample", "--config", tmp_path / "train.yaml")
    assert "is no sampling file of the SPRINT reference: give it to train.py" in run.stderr


def test_a_sampling_file_samples(tmp_path):
    tiny().to_reference(tmp_path / "weights.safetensors")
    small.vae(tmp_path / "vae")
    file = tmp_path / "sample.yaml"
    content = changed(SAMPLE, ckpt_path=str(tmp_path / "weights.safetensors"), name=str(tmp_path / "out"), resolution=64,
                      sampling__num_fid_samples=3, sampling__num_steps=3)  # fmt: skip
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    run = small.script("sample", "--config", file, "--vae", tmp_path / "vae", "--seed", 3)  # the command line goes before
    assert run.returncode == 0, run.stderr
    assert np.load(tmp_path / "out.npz")["arr_0"].shape == (3, 16, 16, 3)
    assert '"seed": "3"' in (tmp_path / "out" / "sampling.json").read_text()
    file.write_text(yaml.safe_dump(changed(SAMPLE, ckpt_path="sprint_XL_imagenet512.safetensors"), sort_keys=False))
    run = small.script("sample", "--config", file, environment={"HF_HUB_OFFLINE": "1"})
    assert "could not be fetched from snap-research/SPRINT" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_three_steps_of_each_training_file(name, tmp_path):
    moments = torch.randn(12, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    moments[:, 4:] = moments[:, 4:].abs() * 0.1
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data", 0, moments.half(), torch.arange(12) % 3)
    write_index(tmp_path / "data", (0,))
    content, _ = FILES[name]
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    sizes = ["hidden_size=32", "num_heads=2", "encoder_depth=1", "middle_depth=1", "decoder_depth=1", "input_size=8"]
    small_run = ["batch_size=4", "max_train_steps=3", "warmup_steps=0", "sampling_steps=0", "report_to=none",
                 "num_workers=0", f"data_dir={tmp_path / 'data'}", f"output_dir={tmp_path}", "num_classes=3",
                 "mixed_precision=no"]  # fmt: skip
    if name.endswith("_ft"):
        options = {"dim": 32, "heads": 2, "encoder_depth": 1, "middle_depth": 1, "decoder_depth": 1, "num_classes": 3}
        tiny(**options).to_reference(tmp_path / "start.safetensors")
        small_run.append(f"init_from={tmp_path / 'start.safetensors'}")
    run = small.script("train", "--config", tmp_path / "file.yaml", "--set", *sizes, *small_run)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "e" / "model.safetensors").exists()
    assert "not used here: compile.enabled" in run.stderr
