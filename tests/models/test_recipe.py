"""How a model was trained travels with its weights, and what contradicts it is refused."""

import json
from pathlib import Path

import pytest
import torch
from models import tiny
from safetensors import safe_open
from safetensors.torch import save_file

import sprint
from sprint.models import Recipe, SiT
from sprint.models.loading import load_model

RECIPE = Recipe(interpolant="cosine", time="uniform", latent_scale=1.5, vae="none", latent_side=8)


def saved(tmp_path, **metadata):
    model = tiny()
    model.recipe = RECIPE
    model.save(tmp_path / "model.safetensors")
    if metadata:
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            about = file.metadata() | metadata
        about = {name: text for name, text in about.items() if text}
        save_file(model.state_dict(), tmp_path / "model.safetensors", metadata=about)
    return tmp_path / "model.safetensors"


def test_a_recipe_is_saved_and_loaded(tmp_path):
    assert SiT.load(saved(tmp_path)).recipe == RECIPE
    assert tiny().recipe == Recipe()


def test_a_file_of_before_loads_without_one(tmp_path):
    assert SiT.load(saved(tmp_path, **{"sprint.recipe": ""})).recipe == Recipe()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"format": 3}), "a recipe of format 3, this version reads up to 2: update sprint"),
        (json.dumps({"format": 1, "moon": 3}), "a recipe with moon, unknown to this version"),
        ("{", "a damaged recipe"),
        ("[]", "a damaged recipe"),
        (json.dumps({"format": 1, "interpolant": "spiral"}), "unknown interpolant 'spiral'"),
    ],
)
def test_recipes_that_cannot_be_read(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        SiT.load(saved(tmp_path, **{"sprint.recipe": text}))


def test_samplers_and_losses_follow_it(tmp_path):
    model = SiT.load(saved(tmp_path)).eval()
    x, y, t = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0.3, 0.6])
    plain = tiny().eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        model.final_layer.linear.weight.normal_(std=0.1)
        plain.load_state_dict(model.state_dict())
    options = {"y": y, "t": t, "noise": torch.randn_like(x)}
    loss = sprint.FlowMatchingLoss()
    assert loss(model, x, **options).loss.equal(sprint.FlowMatchingLoss(interpolant="cosine")(plain, x, **options).loss)
    assert not loss(model, x, **options).loss.equal(loss(plain, x, **options).loss)
    for call in (
        lambda: sprint.sample(model, x, y=y, interpolant="linear"),
        lambda: sprint.FlowMatchingLoss(interpolant="linear")(model, x, y=y),
    ):
        with pytest.raises(ValueError, match="interpolant=.*[Ll]inear.*, but this model was trained with 'cosine': leave"):
            call()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"latent_scale": 0}, "latent_scale must be positive, got 0"),
        ({"latent_scale": float("inf")}, "latent_scale must be a finite number, got inf"),
        ({"latent_scale": True}, "latent_scale must be a finite number, got True"),
        ({"latent_scale": [1.0, -1.0]}, "latent_scale must be positive"),
        ({"latent_scale": []}, "latent_scale must be a finite number"),
        ({"latent_shift": float("nan")}, "latent_shift must be a finite number, got nan"),
        ({"latent_shift": "0"}, "latent_shift must be a finite number, got '0'"),
        ({"latent_side": 2.5}, "latent_side must be a whole number, at least 1, got 2.5"),
        ({"image_size": 0}, "image_size must be a whole number, at least 1, got 0"),
    ],
)
def test_numbers_that_cannot_be(said, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**said)


def test_files_of_earlier_formats_load():
    """Written by the first version that kept a recipe (train.py's model and its checkpoint), and by one before it."""
    recorded = Path(__file__).parents[1] / "recorded"
    wanted = Recipe(interpolant="cosine", time="lognormal", latent_scale=0.5, vae="stabilityai/sd-vae-ft-mse", latent_side=8)
    model, average = (load_model(recorded / f"format1_{name}.safetensors") for name in ("model", "training"))
    assert model.recipe == average.recipe == wanted
    x, t, y = torch.ones(1, 4, 8, 8), torch.full((1,), 0.5), torch.tensor([1])
    assert model(x, t, y).equal(average(x, t, y))
    assert model(x, t, y).count_nonzero() == 4 * 64  # it was trained for two steps


def test_it_travels_in_the_reference_layout_too(tmp_path):
    model = tiny()
    model.recipe = RECIPE
    model.to_reference(tmp_path / "reference.safetensors")
    assert SiT.from_reference(tmp_path / "reference.safetensors").recipe == RECIPE
    assert SiT.from_reference(model.to_reference()).recipe == Recipe()
