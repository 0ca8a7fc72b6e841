"""config.py, reading.py: the reference's names load, whatever is wrong is one clear error, and every option acts."""

import dataclasses
import re
import sys
import warnings

import pytest
import small

sys.path.insert(0, str(small.SCRIPTS))
config, reading = pytest.importorskip("config"), pytest.importorskip("reading")

FILES = sorted((small.SCRIPTS / "configs").glob("[0-9]*.yaml"))


def build(options=None, *changes):
    return reading.build(options or {}, list(changes))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_load_and_describe_the_papers_models(path):
    found = reading.read(path)
    sit = found.sit(channels=4, repa_dim=768 if found.representation_align else None)
    assert (sit.dim, sit.heads, sit.encoder_depth, sit.middle_depth, sit.decoder_depth) == (1152, 16, 2, 24, 2)
    first = found.schedule().pretrain
    assert (first.batch, first.lr) == (256, 1e-4)
    assert first.drop.ratio == 0.75
    both = reading.read(path, ["stages=both"]).schedule()
    assert both.finetune.batch == 1024
    assert both.finetune.lr == (2e-4 if "256" in path.stem else 1.5e-4)
    assert both.finetune.warmup == 5000
    assert both.finetune.steps == 200_000
    alone = reading.read(path, ["stages=finetune", "init_from=x"]).schedule()  # the same file serves
    assert alone.pretrain == both.finetune


def test_a_file_of_the_references_options_loads():
    """Its names, grouped in sections or not, with a parked option and numbers that YAML reads as text."""
    flat = {
        "hidden_size": 1152, "num_heads": 16, "patch_size": 2, "in_channels": 4, "input_size": 32, "mlp_ratio": 4.0,
        "encoder_depth": 2, "middle_depth": 24, "decoder_depth": 2, "num_classes": 1000, "mask_ratio": 0.75,
        "mask_type": "structured_with_random_offset", "residual_type": "both", "representation_align": False,
        "representation_depth": 4, "path_type": "linear", "weighting": "lognormal", "learning_rate": "1e-4",
    }  # fmt: skip
    names = ("mask_ratio", "mask_type")
    grouped = {"model": {k: v for k, v in flat.items() if k not in names}, "masking": {k: flat[k] for k in names}}
    assert build(flat) == build(grouped)
    assert build(flat).learning_rate == 1e-4
    assert build({"drop_ratio": 0.5, "mask-type": "random"}).drop().ratio == 0.5


def test_every_option_is_read_by_the_script():
    """An option that nothing reads would have no effect."""
    sources = "".join((small.SCRIPTS / name).read_text() for name in ("config.py", "run.py", "train.py"))
    for kind, owner in ((config.Config, "(self|config)"), (config.Finetune, r"self\.finetune")):
        for field in dataclasses.fields(kind):
            assert re.search(rf"{owner}\.{field.name}\b", sources), field.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ration": 0.5}, "unknown option 'mask_ration' of train.py: did you mean mask_ratio"),
        ({"finetune": {"learnin_rate": 1}}, "unknown option 'learnin_rate' of the section finetune"),
        ({"representation_depth": 4}, "representation_depth has no effect with representation_align=False"),
        ({"mask_ratio": 0, "mask_type": "random"}, "mask_type has no effect with mask_ratio=0"),
        ({"residual_type": "shallow", "path_drop_prob": 0.2}, "path_drop_prob has no effect with residual_type='shallow'"),
        ({"guidance_scale": 3.0}, "guidance_scale has no effect with sampling_steps=0"),
        ({"mask_ratio": "much"}, "mask_ratio.*Expected.*float.*much"),
        ({"batch_size": True}, "batch_size.*Expected.*int.*True"),
        ({"batch_size": 1.5}, "batch_size.*Expected.*int.*1.5"),
        ({"mask_type": "block"}, "mask_type.*Expected.*'random', 'structured_with_random_offset'.*block"),
        ({"mask_ratio": 1.0}, r"share of tokens dropped, in \[0, 1\), got 1.0"),
        ({"num_heads": 7}, "dim=1152 does not split into 7 heads"),
        ({"model": "XXL/2"}, "unknown model 'XXL/2': choose one of S/2"),
        ({"stages": "finetune"}, "give init_from=checkpoint"),
        ({"warmup_steps": 10, "max_train_steps": 5}, "warmup must be 0 to 5"),
        ({"a": {"seed": 1}, "seed": 2}, "unknown option 'a'|seed is given twice, as 1 and as 2"),
        ({"representation_align": True, "representation_depth": 1}, "representation_depth=1 taps no block"),
        ({"representation_align": True, "representation_depth": 40}, "repa_depth must be 1 to 28"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ({"path_drop_prob": 2}, "path_drop_prob must be a probability"),
        ({"checkpointing_steps": 0}, "checkpointing_steps must be at least 1"),
        ({"sampling_steps": -1}, "sampling_steps must be 0 or more"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"max_train_steps": float("inf")}, "max_train_steps.*Expected.*int.*inf"),
        ({"seed": None}, "seed has no value"),
        ({"finetune": {"warmup_steps": None}}, "warmup_steps has no value"),
        ({"latent_scale": "x"}, "latent_scale.*float.*list"),
        ({"finetune": 3}, "finetune is a section of options, got 3"),
        ({"finetune": {1: 3}}, "unknown option '1' of the section finetune"),
    ],
)
def test_what_is_wrong_is_said(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build(options)


def test_numbers_as_people_write_them():
    found = build({"max_train_steps": "4e5", "batch_size": 6.4e1, "learning_rate": 1, "latent_scale": [1, 0.5]}, "seed=1e3")
    assert (found.max_train_steps, found.batch_size, found.learning_rate, found.seed) == (400_000, 64, 1.0, 1000)
    assert found.latent_scale == [1.0, 0.5]


def test_the_command_line_takes_every_option_and_tells_them(tmp_path, capsys):
    """The file, then --set, then options by name; --help has all of them with their defaults."""
    file = tmp_path / "own.yaml"
    file.write_text("seed: 1\nbatch_size: 8\nstages: both\nfinetune:\n  warmup_steps: 3\n")
    named = ["--config", str(file), "--set", "batch_size=16", "lr=1e-3", "--seed=3", "--finetune.batch_size", "4"]
    found, path = reading.parse("Train.", named)
    assert (path, found.seed, found.batch_size, found.learning_rate) == (file, 3, 16, 1e-3)
    assert (found.finetune.batch_size, found.finetune.warmup_steps, found.stages) == (4, 3, "both")
    with pytest.raises(SystemExit):
        reading.parse("Train.", [*named, "--batch_sise", "3"])
    assert "unrecognized arguments: --batch_sise" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        reading.parse("Train.", ["--help"])
    text = capsys.readouterr().out
    for kind, section in ((config.Config, "--"), (config.Finetune, "--finetune.")):
        for field in dataclasses.fields(kind):
            assert f"{section}{field.name}" in text
    assert "of the null condition in training (type: float, default: 0.1)" in " ".join(text.split())


def test_changes_from_the_command_line(tmp_path):
    found = build({}, "learning_rate=3e-4", "finetune.max_train_steps=7000", "stages=both", "mask-ratio=0.5")
    assert (found.learning_rate, found.mask_ratio) == (3e-4, 0.5)
    assert found.schedule().finetune.steps == 7000
    with pytest.raises(ValueError, match="--set takes name=value, got 'seed'"):
        build({}, "seed")
    assert build({}, "mixed_precision=no").mixed_precision == "no"  # which YAML reads as False
    with pytest.raises(ValueError, match="is no YAML value"):
        build({}, "exp_name=@x")
    (tmp_path / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    with pytest.raises(SystemExit, match="seed given twice in one section"):
        reading.read(tmp_path / "twice.yaml")
    with pytest.raises(SystemExit, match="there is no configuration at"):
        reading.read(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(SystemExit, match="is no YAML"):
        reading.read(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(SystemExit, match="must hold options by name, got list"):
        reading.read(tmp_path / "list.yaml")


def test_a_size_that_is_not_its_names_is_said():
    with pytest.warns(UserWarning, match=r"model=S/2 with middle_depth=4 \(its own is 8\): a size of its own"):
        build({"model": "S/2", "middle_depth": 4, "hidden_size": 384})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build({"middle_depth": 4})  # no name was given
        build({"model": "XL/2", "middle_depth": 24})
