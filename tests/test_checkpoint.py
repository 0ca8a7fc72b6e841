"""Checkpoints: exact round trips, whole or not at all, and every broken file named."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from models import TINY
from safetensors.torch import load_file, save_file

from sprint import SiT, SiTConfig, checkpoint, load_state, save_state

CONFIG = SiTConfig(**TINY)
REFERENCE = Path(__file__).parent / "recorded" / "reference_tiny_repa.safetensors"


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_save_and_load_are_exact(tmp_path, dtype):
    model = SiT(CONFIG).to(dtype)
    model.save(tmp_path / "model.safetensors")
    loaded = SiT.load(tmp_path / "model.safetensors")
    assert loaded.config == CONFIG
    assert loaded.x_embedder.proj.weight.dtype == dtype
    assert same(weights(loaded), weights(model))
    assert loaded.middle.fusion.mask_token.requires_grad == model.middle.fusion.mask_token.requires_grad


def test_loaded_models_train(tmp_path):
    SiT(CONFIG).save(tmp_path / "model.safetensors")
    model = SiT.load(tmp_path / "model.safetensors")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = weights(model)
    model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert not same(weights(model), before)


def test_files_are_readable_as_others_are(tmp_path):
    SiT(CONFIG).save(tmp_path / "model.safetensors")
    (tmp_path / "other").write_text("")
    modes = [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("model.safetensors", "other")]
    assert modes[0] == modes[1]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    model = SiT(CONFIG)
    model.save(path)
    before = path.read_bytes()

    def full_disk(tensors, target, metadata=None):
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        SiT(CONFIG).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # nothing half-written stays behind


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_truncated_files(tmp_path, cut):
    path = tmp_path / "model.safetensors"
    SiT(CONFIG).save(path)
    path.write_bytes(path.read_bytes()[:cut])
    size = path.stat().st_size
    for load in (SiT.load, SiT.from_reference):
        with pytest.raises(ValueError, match=f"not a whole safetensors file .*{size} bytes: copy or download it again"):
            load(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickles_are_named_and_never_read(tmp_path, new_format):
    path = tmp_path / "model.pt"
    torch.save(SiT(CONFIG).state_dict(), path, _use_new_zipfile_serialization=new_format)
    for load in (SiT.load, SiT.from_reference, load_state):
        with pytest.raises(ValueError, match=r"is a pickle \(torch.save\), expected safetensors"):
            load(path)


@pytest.mark.parametrize("low", [0x80, 0x50])
def test_a_header_may_start_with_any_byte(tmp_path, low):
    """The first byte of a file is that of its header's length, here a pickle's or a zip archive's own first one."""
    path, model = tmp_path / "model.safetensors", SiT(CONFIG)
    model.save(path)
    metadata = {"sprint.config": json.dumps(CONFIG.__dict__)}
    for padding in range(0, 512, 8):
        save_file(model.state_dict(), path, metadata={**metadata, "padding": "x" * padding})
        if path.read_bytes()[0] == low:
            break
    assert path.read_bytes()[0] == low
    assert same(weights(SiT.load(path)), weights(model))


def test_missing_files(tmp_path):
    for load in (SiT.load, SiT.from_reference, load_state):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
            load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="it is a folder, add a file name"):
        SiT(CONFIG).save(tmp_path)
    with pytest.raises(ValueError, match="the folder .*none does not exist, create it first"):
        SiT(CONFIG).save(tmp_path / "none" / "model.safetensors")


def test_files_of_another_kind(tmp_path):
    ours, state = tmp_path / "ours.safetensors", tmp_path / "state.safetensors"
    SiT(CONFIG).save(ours)
    save_state(state, {"step": 1})
    with pytest.raises(ValueError, match=r"holds no SiT configuration.*use SiT.from_reference\(path\)"):
        SiT.load(REFERENCE)
    with pytest.raises(ValueError, match="holds no SiT configuration"):
        SiT.load(state)
    with pytest.raises(ValueError, match=r"holds no SPRINT model under the prefix ''.*load with SiT.load"):
        SiT.from_reference(ours)
    with pytest.raises(ValueError, match="holds no training state"):
        load_state(ours)


def test_a_checkpoint_of_another_size_leaves_the_model_as_it_was():
    model = SiT(CONFIG)
    before = weights(model)
    larger = SiT(SiTConfig(**{**TINY, "dim": 32}))
    with pytest.raises(ValueError, match=r"has shape \(32, 16\), expected \(16, 16\).*and \d+ more: build the model with"):
        checkpoint.load_weights(model, larger.state_dict())
    deeper = SiT(SiTConfig(**{**TINY, "middle_depth": 3}))
    with pytest.raises(ValueError, match=r"unexpected middle.blocks.2"):
        checkpoint.load_weights(model, deeper.state_dict())
    with pytest.raises(ValueError, match="missing x_embedder.proj.weight"):
        checkpoint.load_weights(model, {})
    assert same(weights(model), before)


# the reference's layout


def test_reference_sizes_come_from_the_tensors_alone():
    told = SiT.from_reference(REFERENCE).config
    tensors = load_file(REFERENCE)
    inferred = SiT.from_reference(tensors, repa_depth=told.repa_depth).config
    assert inferred == told
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    assert SiT.from_reference(bare).config.repa_dim == told.repa_dim


def test_state_dictionaries_are_copied():
    tensors = SiT(CONFIG).to_reference()
    model = SiT.from_reference(tensors)
    torch.nn.init.zeros_(model.x_embedder.proj.weight)
    assert tensors["x_embedder.proj.weight"].count_nonzero() > 0


def test_several_models_in_one_file(tmp_path):
    model, ema = SiT(CONFIG), SiT(CONFIG)
    both = {
        f"{name}.{key}": value
        for name, part in (("model", model), ("ema", ema))
        for key, value in part.to_reference().items()
    }
    save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match=r"several models, under the prefixes \['ema.', 'model.'\]: choose one"):
        SiT.from_reference(tmp_path / "both.safetensors")
    loaded = SiT.from_reference(tmp_path / "both.safetensors", prefix="ema.")
    assert same(weights(loaded), weights(ema))


@pytest.mark.parametrize(("patch_size", "channels"), [(2, 4), (4, 1), (1, 16)])
def test_patch_size_is_an_argument_for_tensors(patch_size, channels):
    tensors = SiT(CONFIG).to_reference()
    config = SiT.from_reference(tensors, patch_size=patch_size).config
    assert (config.patch_size, config.in_channels) == (patch_size, channels)
    with pytest.raises(ValueError, match="patch vectors of 16 values, no multiple of 3²: pass patch_size"):
        SiT.from_reference(tensors, patch_size=3)


def test_reference_with_tensors_missing_or_too_many():
    tensors = SiT(CONFIG).to_reference()
    lacking = {name: tensor for name, tensor in tensors.items() if name != "middle_blocks.1.attn.proj.bias"}
    with pytest.raises(ValueError, match=r"missing middle.blocks.1.attn.proj.bias"):
        SiT.from_reference(lacking)
    with pytest.raises(ValueError, match="unexpected pos_embed"):
        SiT.from_reference({**tensors, "pos_embed": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"has no tensor y_embedder.embedding_table.weight"):
        SiT.from_reference({name: tensor for name, tensor in tensors.items() if "y_embedder" not in name})


def test_what_the_reference_layout_cannot_express(tmp_path):
    for options in ({"num_classes": None}, {"sources": "deep"}):
        model = SiT(SiTConfig(**{**TINY, **options}))
        with pytest.raises(ValueError, match="use SiT.save"):
            model.to_reference(tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


# training states


def test_a_training_state_comes_back_as_it_was(tmp_path):
    model = SiT(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "nested": [1, 2.5, None, True, "text", (1, torch.tensor(3, dtype=torch.int16)), {"a.b": torch.ones(1)}],
        "clash": {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}},
        "not finite": float("inf"),
    }
    save_state(tmp_path / "run.safetensors", state)
    loaded = load_state(tmp_path / "run.safetensors")
    assert same(loaded["model"], state["model"])
    assert loaded["random"].equal(state["random"])
    assert loaded["nested"][:5] == state["nested"][:5]
    assert loaded["nested"][5][1].dtype == torch.int16
    assert (loaded["clash"]["a.b"].item(), loaded["clash"]["a"]["b"].item()) == (1, 0)
    assert loaded["not finite"] == float("inf")
    fresh = torch.optim.AdamW(SiT(CONFIG).parameters())
    fresh.load_state_dict(loaded["optimizer"])
    for index, entry in optimizer.state_dict()["state"].items():
        assert same(fresh.state_dict()["state"][index], entry)


def test_states_that_cannot_be_written(tmp_path):
    path = tmp_path / "run.safetensors"
    save_state(path, {"step": 1})
    with pytest.raises(TypeError, match="state.model is a SiT"):
        save_state(path, {"model": SiT(CONFIG)})
    with pytest.raises(TypeError, match="state has keys that are neither text nor integers"):
        save_state(path, {1.5: 1})
    assert load_state(path) == {"step": 1}


def test_states_hold_no_code(tmp_path):
    save_state(tmp_path / "run.safetensors", {"step": 1, "x": torch.ones(1)})
    raw = (tmp_path / "run.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert "sprint.state" in json.loads(raw[8 : 8 + length])["__metadata__"]
