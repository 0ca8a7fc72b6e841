"""REPA teachers of timm: one feature per token, of the image as the teacher knows it."""

import pytest
import torch

from sprint.data.teacher import DINOV2_B, Teacher

timm = pytest.importorskip("timm")
NAME = "vit_tiny_patch16_224"


def teacher(grid=(2, 3), **options):
    torch.manual_seed(0)
    return Teacher(NAME, grid, pretrained=False, **options)


def test_features_are_those_of_the_network_on_the_normalised_image():
    found = teacher()
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)  # of the teacher's own size: nothing is resized
    mean, std = torch.tensor(found.network.default_cfg["mean"]), torch.tensor(found.network.default_cfg["std"])
    x = (images.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    expected = found.network.forward_features(x.float())[:, 1:]  # without the class token
    torch.testing.assert_close(found(images), expected, rtol=1e-4, atol=1e-4)  # float32
    assert found(images).shape == (2, 6, 192)
    assert found.dim == 192


def test_rows_and_columns_are_the_models():
    """A token's feature follows its place: another picture in one corner changes that corner's feature most."""
    found = teacher((4, 4))
    images = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    other = images.clone()
    other[:, :, 192:, :64] = 255 - other[:, :, 192:, :64]  # last row, first column
    change = (found(images) - found(other)).norm(dim=-1)[0]
    assert change.argmax() == 12


def test_it_is_frozen_and_stays_in_eval():
    found = teacher().train()
    assert not found.network.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert not found(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).requires_grad
    assert "mean" not in found.state_dict()


@pytest.mark.parametrize("options", [{"num_classes": 0, "img_size": (32, 48)}, {}])
def test_weights_from_a_file(tmp_path, options):
    """Also of the size and with the head that the network was trained with: positions are resized to this grid."""
    from safetensors.torch import save_file

    source = timm.create_model(NAME, **options)
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    found = Teacher(NAME, (2, 3), weights=tmp_path / "vit.safetensors")
    assert found.network.patch_embed.proj.weight.equal(source.patch_embed.proj.weight)
    assert found.network.pos_embed.shape[1] == 2 * 3 + 1


def test_dinov2_has_a_patch_for_each_token():
    with torch.device("meta"):
        found = Teacher(DINOV2_B, (16, 16), pretrained=False)
    assert found.size == (224, 224)
    assert found.dim == 768


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="timm has no model 'dino': choose a vision transformer such as vit_"):
        Teacher("dino")
    with pytest.raises(ValueError, match="resnet18 has no patches of one size"):
        Teacher("resnet18", pretrained=False)
    with pytest.raises(FileNotFoundError, match="there are no teacher weights at"):
        Teacher(NAME, weights=tmp_path / "none.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=f"garbage.safetensors holds no weights of {NAME}"):
        Teacher(NAME, weights=tmp_path / "garbage.safetensors")
    with pytest.raises(TypeError, match="images must be uint8"):
        teacher()(torch.zeros(1, 3, 32, 32))
