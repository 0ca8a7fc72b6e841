"""Every tensor recorded from the reference implementation is reproduced in float64 to 1e-6 relative (tests/recorded)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sprint
from sprint import ClassifierFreeGuidance, PathDropGuidance, SiT, TokenSubset

FILES = {name: Path(__file__).parents[1] / "recorded" / f"reference_{name}.safetensors" for name in ("tiny", "tiny_repa")}
GUIDANCES = {
    "none": None,
    "cfg": ClassifierFreeGuidance(3.0),
    "pdg": PathDropGuidance(3.0),
    "cfg_interval": ClassifierFreeGuidance(3.0, interval=(0.3, 0.8)),
}
TRAJECTORIES = [
    *(f"out.ode.{guidance}" for guidance in GUIDANCES),
    *(f"out.sde.{interpolant}.{guidance}" for interpolant in ("linear", "cosine") for guidance in ("none", "cfg", "pdg")),
]
PREDICTIONS = ["out.dense", "out.sparse", "out.pdg_cond", "out.pdg_uncond", "out.cfg_uncond"]


@pytest.fixture(scope="module")
def tiny():
    return SiT.from_reference(FILES["tiny"]).double().eval(), load_file(FILES["tiny"])


@pytest.fixture(scope="module")
def tiny_repa():
    return SiT.from_reference(FILES["tiny_repa"]).double().eval(), load_file(FILES["tiny_repa"])


def assert_reproduced(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype == torch.float64
    assert ((actual - expected).abs().max() / expected.abs().max()).item() < 1e-6


def test_no_recorded_tensor_is_left_out(tiny, tiny_repa):
    assert {name for name in tiny[1] if name.startswith("out.")} == {*PREDICTIONS, *TRAJECTORIES}
    assert {name for name in tiny_repa[1] if name.startswith("out.")} == {
        "out.dense",
        "out.sparse",
        "out.dense_repa",
        "out.sparse_repa",
    }


@pytest.mark.parametrize("name", PREDICTIONS)
@torch.no_grad()
def test_predictions(tiny, name):
    model, recorded = tiny
    x, t, y = (recorded[f"in.{part}"] for part in "xty")
    options = {
        "out.dense": {"y": y},
        "out.sparse": {"y": y, "subset": TokenSubset.from_keep(recorded["in.ids_keep"], 64)},
        "out.pdg_cond": {"y": y},
        "out.pdg_uncond": {"y": model.null_condition(2), "path": "shallow"},
        "out.cfg_uncond": {"y": model.null_condition(2)},
    }
    assert_reproduced(model(x, t, **options[name]), recorded[name])


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectories(tiny, name):
    model, recorded = tiny
    _, kind, *interpolant, guidance = name.split(".")
    images = sprint.sample(
        model,
        recorded["in.latents"],
        y=recorded["in.y"],
        guidance=GUIDANCES[guidance],
        steps=6,
        solver={"ode": "euler", "sde": "sde"}[kind],
        interpolant=interpolant[0] if interpolant else "linear",
        generator=torch.Generator().manual_seed(18),
    )
    assert_reproduced(images, recorded[name])


@torch.no_grad()
def test_repa_features_and_velocities(tiny_repa):
    model, recorded = tiny_repa
    x, t, y = (recorded[f"in.{part}"] for part in "xty")
    subset = TokenSubset.from_keep(recorded["in.ids_keep"], 16)
    dense, sparse = model(x, t, y, repa=True), model(x, t, y, subset=subset, repa=True)
    for actual, name in ((dense.v, "dense"), (dense.repa, "dense_repa"), (sparse.v, "sparse")):
        assert_reproduced(actual, recorded[f"out.{name}"])
    assert_reproduced(sparse.repa, recorded["out.sparse_repa"])
    assert sparse.repa_subset is subset


def test_recorded_indices_agree_with_restore(tiny):
    """The reference restores with the inverse permutation of (kept, dropped); ours scatters."""
    recorded = tiny[1]
    keep, remove, back = (recorded[f"in.ids_{name}"] for name in ("keep", "remove", "restore"))
    tokens = torch.arange(128.0).reshape(2, 64, 1)
    order = torch.cat([keep, remove], dim=1)
    assert order.gather(1, back).equal(torch.arange(64).expand(2, -1))
    subset = TokenSubset.from_keep(keep, 64)
    padded = torch.cat([subset.gather(tokens), torch.full((2, 64 - keep.shape[1], 1), -1.0)], dim=1)
    expected = padded.gather(1, back.unsqueeze(-1))
    assert subset.restore(subset.gather(tokens), torch.full((1, 1, 1), -1.0)).equal(expected)


@pytest.mark.parametrize("name", FILES)
def test_checkpoints_go_to_ours_and_back_unchanged(name, tmp_path):
    recorded = {key.removeprefix("model."): value for key, value in load_file(FILES[name]).items() if key[:6] == "model."}
    model = SiT.from_reference(FILES[name])
    written = model.to_reference(tmp_path / "reference.safetensors")
    assert written.keys() == recorded.keys()
    assert all(written[key].equal(recorded[key]) for key in recorded)
    again = SiT.from_reference(tmp_path / "reference.safetensors")
    assert again.config == model.config
    assert all(again.state_dict()[key].equal(value) for key, value in model.state_dict().items())


def test_wrong_weights_are_not_reproduced(tiny):
    """The comparison can fail: one changed middle weight moves the dense output, and not the shallow one."""
    recorded = tiny[1]
    x, t, y = (recorded[f"in.{part}"] for part in "xty")
    model = SiT.from_reference(FILES["tiny"]).double().eval()
    with torch.no_grad():
        model.get_parameter("middle.blocks.0.mlp.fc1.bias").add_(1e-3)
        assert_reproduced(model(x, t, model.null_condition(2), path="shallow"), recorded["out.pdg_uncond"])
        with pytest.raises(AssertionError):
            assert_reproduced(model(x, t, y), recorded["out.dense"])
