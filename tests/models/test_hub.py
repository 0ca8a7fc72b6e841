"""SiT as a folder and on the hub: written, read back, pushed (to a folder that plays the hub), and what is refused."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from models import tiny

import sprint
from sprint.models import Recipe

hub = pytest.importorskip("huggingface_hub")


def model():
    made = tiny()
    made.recipe = Recipe(interpolant="cosine", latent_scale=[1.0, 0.5, 2.0, 1.0], vae="none")
    return made


def same(one, other) -> bool:
    state = other.state_dict()
    return one.config == other.config and one.recipe == other.recipe and all(
        tensor.equal(state[name]) for name, tensor in one.state_dict().items()
    )  # fmt: skip


def test_a_folder_holds_weights_options_and_a_card(tmp_path):
    saved = model()
    saved.save_pretrained(tmp_path / "new" / "folder", license="apache-2.0")
    assert same(saved, sprint.SiT.from_pretrained(tmp_path / "new" / "folder"))
    assert same(saved, sprint.SiT.from_pretrained(tmp_path / "new" / "folder" / "model.safetensors"))
    text = (tmp_path / "new" / "folder" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "sprint-diffusion"
    for said in ("2510.21986", "| `interpolant` | cosine |", "| `latent_scale` | 4 numbers, see config.json |"):
        assert said in text


def test_a_card_that_was_edited_stays(tmp_path):
    saved = model()
    saved.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    saved.recipe = Recipe()
    saved.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert sprint.SiT.from_pretrained(tmp_path).recipe == Recipe()
    with pytest.raises(ValueError, match=r"README.md is there already and says its own license: edit it, or leave"):
        saved.save_pretrained(tmp_path, license="mit")


class Hub:
    """Repositories are folders; what HfApi and hf_hub_download do of it."""

    root: Path

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, name, *, private, exist_ok):
        assert exist_ok
        (self.root / name).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=name)

    def file_exists(self, name, file):
        return (self.root / name / file).exists()

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, commit_message):
        for file in Path(folder_path).iterdir():
            if file.name not in (ignore_patterns or ()):
                shutil.copy(file, self.root / repo_id)
        return f"https://hub/{repo_id}"

    @classmethod
    def download(cls, name, file, *, revision=None, token=None):
        if not (cls.root / name / file).is_file():
            raise hub.errors.LocalEntryNotFoundError("offline")
        return str(cls.root / name / file)


def test_pushed_and_fetched_again(tmp_path, monkeypatch):
    Hub.root = tmp_path
    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(hub, "hf_hub_download", Hub.download)
    saved = model()
    assert saved.push_to_hub("me/mine", license="mit", private=True) == "https://hub/me/mine"
    assert same(saved, sprint.SiT.from_pretrained("me/mine"))
    card = tmp_path / "me" / "mine" / "README.md"
    assert 'sprint.SiT.from_pretrained("me/mine")' in card.read_text()
    card.write_text("edited there")
    saved.final_layer.linear.bias.data += 1
    saved.push_to_hub("me/mine")
    assert card.read_text() == "edited there"
    assert same(saved, sprint.SiT.from_pretrained("me/mine"))
    with pytest.raises(ValueError, match="me/mine has a README.md that says its own license"):
        saved.push_to_hub("me/mine", license="mit")


@pytest.mark.parametrize(
    ("source", "message"),
    [("me/none", "there is no folder me/none, and .*owner/name"), ("a/b/c/d", "there is no folder a/b/c/d")],
)
def test_what_is_not_there(tmp_path, monkeypatch, source, message):
    Hub.root = tmp_path
    if source == "me/none":
        monkeypatch.setattr(hub, "hf_hub_download", Hub.download)
    with pytest.raises(FileNotFoundError, match=message):
        sprint.SiT.from_pretrained(source)
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors: expected a folder that SiT.save_pretrained"):
        sprint.SiT.from_pretrained(tmp_path)
    torch.save({}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is a pickle"):
        sprint.SiT.from_pretrained(tmp_path)


def test_a_folder_is_a_checkpoint_everywhere(tmp_path, capsys):
    from sprint import commands
    from sprint.models import load_model

    saved = model()
    saved.save_pretrained(tmp_path / "folder")
    assert same(saved, load_model(tmp_path / "folder"))
    commands.main(["info", str(tmp_path / "folder")])
    assert "trained with interpolant = 'cosine'" in capsys.readouterr().out
