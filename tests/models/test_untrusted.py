"""Files that lie: whatever a checkpoint, a state or an index says, it is one ValueError, and soon."""

import json
import time

import pytest
import torch
from models import tiny
from safetensors.torch import load_file, save_file

from sprint import load_state
from sprint.data import LatentDataset
from sprint.data.latents import write_index, write_shard
from sprint.models import SiT, load_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    model = tiny()
    model.save(path)
    return load_file(path), json.loads(json.dumps({"dim": 32} | vars(model.config)))


HUGE = 10**9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"middle_depth": HUGE}, "blocks of middle.blocks, and its configuration says 1000000000"),
        ({"encoder_depth": 0}, "blocks of encoder, and its configuration says 0"),
        ({"dim": HUGE * 4}, "does not fit this SiT|cannot be built"),
        ({"mlp_ratio": 1e308}, "cannot be built"),
        ({"dim": "32"}, "cannot be read: dim of SiTConfig must be a whole number, got the text '32'"),
        ({"heads": None}, "cannot be read: heads of SiTConfig"),
        ({"heads": 0}, "cannot be read: heads must be at least 1"),
        ({"label_drop": float("nan")}, "cannot be read: label_drop of SiTConfig must be a number"),
        ({"moon": 3, "sun": 1}, "cannot be read: the options moon, sun are unknown to this version: update sprint"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_configurations(saved, tmp_path, change, message):
    tensors, config = saved
    save_file(tensors, tmp_path / "model.safetensors", metadata={"sprint.config": json.dumps({**config, **change})})
    begun = time.perf_counter()
    for load in (SiT.load, load_model):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "model.safetensors")
    assert time.perf_counter() - begun < 60  # not for ever


@pytest.mark.parametrize("text", ["{", "[]", "3", "null", "[" * 100_000, '{"dim": 32}', "{}"], ids=lambda text: text[:9])
def test_configurations_that_are_none(saved, tmp_path, text):
    save_file(saved[0], tmp_path / "model.safetensors", metadata={"sprint.config": text})
    with pytest.raises(ValueError, match="holds a configuration that cannot be read"):
        SiT.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", "3", "{}", '{"tensor": "x"}', '{"dict": 3}', '{"moon": 1}', "[" * 100_000])
def test_states(tmp_path, text):
    save_file({"a": torch.zeros(1)}, tmp_path / "state.safetensors", metadata={"sprint.state": text})
    with pytest.raises(ValueError, match="holds a damaged training state"):
        load_state(tmp_path / "state.safetensors")


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("middle_blocks.100000000.attn.qkv.weight", {}, "blocks of middle.blocks, which are not numbered from 0 on"),
        (f"middle_blocks.{'9' * 5000}.attn.qkv.weight", {}, "does not fit this SiT: unexpected|not numbered"),
        (None, {"config": "{"}, "holds options that cannot be read"),
        (None, {"config": '{"patch_size": "many"}'}, "holds options that cannot be read"),
        (None, {"config": '{"patch_size": 0}'}, "no multiple of 0"),
        (None, {"config": '{"patch_size": 1e999}'}, "holds options that cannot be read"),
    ],
)
def test_reference_files(tmp_path, name, metadata, message):
    from sprint.models import reference

    tensors = tiny().to_reference()
    if name is not None:
        tensors[name] = torch.zeros(1)
    said = {reference._CONFIG: metadata["config"]} if metadata else {}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata=said)
    with pytest.raises(ValueError, match=message):
        SiT.from_reference(tmp_path / "theirs.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"shards": [{"file": "../shard-00000.safetensors", "count": 4}]},
            "lists '../shard-00000.safetensors', which",
        ),
        ({"shards": [{"file": "/etc/passwd", "count": 4}]}, "lists '/etc/passwd', which is no file of its folder"),
        ({"shards": [{"file": 3, "count": 4}]}, "lists 3, which is no file"),
        ({"shards": [{"file": "shard-00000.safetensors", "count": -4}]}, "no positive whole numbers"),
        ({"shards": [{"file": "shard-00000.safetensors", "count": True}]}, "no positive whole numbers"),
        ({"shards": 3}, "is no index of a dataset"),
        ({"shape": None}, "is no index of a dataset"),
        ({"shape": [2, 2]}, "no positive whole numbers"),
        ({"shards": [{"file": "shard-00000.safetensors", "count": 5}]}, r"holds \(4, 4, 2, 2\), index.json lists \(5,"),
    ],
)
def test_indexes(tmp_path, change, message):
    folder = tmp_path / "data"
    folder.mkdir()
    write_shard(folder, 0, torch.zeros(4, 4, 2, 2), torch.zeros(4, dtype=torch.int64))
    index = write_index(folder, [0])
    (tmp_path / "shard-00000.safetensors").write_bytes((folder / "shard-00000.safetensors").read_bytes())
    (folder / "index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(ValueError, match=message):
        LatentDataset(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(ValueError, match="is no index of a dataset"):
        LatentDataset(folder)


@pytest.mark.parametrize("said", [{"interpolant": ["a"]}, {"vae": 7}, {"time": {}}, {"latent_scale": "1"}])
def test_recipes(saved, tmp_path, said):
    about = {"sprint.config": json.dumps(saved[1]), "sprint.recipe": json.dumps({"format": 2, **said})}
    save_file(saved[0], tmp_path / "model.safetensors", metadata=about)
    with pytest.raises(ValueError, match="damaged recipe|latent_scale must be a finite number"):
        SiT.load(tmp_path / "model.safetensors")


def test_a_pickle_of_nothing(tmp_path):
    from sprint import commands

    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(SystemExit, match="is no checkpoint that torch reads without running its code"):
        commands.main(["convert", str(tmp_path / "junk.pt"), str(tmp_path / "o"), "--source", "sit", "--heads", "2"])
