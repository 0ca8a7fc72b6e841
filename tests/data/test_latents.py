"""Latent datasets: written whole, read lazily, refused when they are not what they say."""

import json

import pytest
import torch

from sprint.data import LatentDataset, draw_latents
from sprint.data.latents import shard_name, write_index, write_repa, write_repa_labels, write_shard


def shards(folder, counts=(3, 2)):
    generator = torch.Generator().manual_seed(0)
    moments = [torch.randn(n, 8, 4, 4, generator=generator) for n in counts]
    for number, part in enumerate(moments):
        write_shard(folder, number, part, torch.arange(len(part)) + 10 * number)
    return torch.cat(moments)


def test_shards_are_read_back(tmp_path):
    moments = shards(tmp_path)
    write_index(tmp_path, range(2), about={"size": 32})
    dataset = LatentDataset(tmp_path)
    assert len(dataset) == 5
    assert dataset.labels.tolist() == [0, 1, 2, 10, 11]
    for i in range(-5, 5):
        found, label = dataset[i]
        assert found.equal(moments[i])
        assert label == dataset.labels[i]
    with pytest.raises(IndexError, match="index 5 of a dataset of 5"):
        dataset[5]


def test_latents_are_drawn_from_the_posterior():
    mean, std = torch.full((1, 2, 64, 64), 3.0), torch.full((1, 2, 64, 64), 0.5)
    latents = draw_latents(torch.cat([mean, std], dim=1).half(), scale=2.0, generator=torch.Generator().manual_seed(0))
    assert latents.dtype == torch.float32
    assert latents.mean().item() == pytest.approx(6.0, abs=0.05)
    assert latents.std().item() == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ValueError, match="mean and std"):
        draw_latents(torch.zeros(1, 3, 2, 2))


def test_half_prepared_and_damaged_datasets(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        LatentDataset(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no prepared latents"):
        LatentDataset(tmp_path)
    shards(tmp_path)
    with pytest.raises(FileNotFoundError, match="half-prepared"):
        LatentDataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="has not finished"):
        write_index(tmp_path, range(3))
    write_index(tmp_path, range(2))
    path = tmp_path / shard_name(1)
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(ValueError, match="not a whole shard"):
        LatentDataset(tmp_path)
    write_shard(tmp_path, 1, torch.zeros(7, 8, 4, 4), torch.zeros(7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"holds \(7, 8, 4, 4\), index.json lists \(2, 8, 4, 4\)"):
        LatentDataset(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is missing, which index.json lists"):
        LatentDataset(tmp_path)
    with pytest.raises(ValueError, match="3 moments, 2 labels"):
        write_shard(tmp_path, 0, torch.zeros(3, 8, 4, 4), torch.zeros(2, dtype=torch.int64))


def test_repas_layout(tmp_path):
    names = [write_repa(tmp_path, i, b"png", torch.full((8, 4, 4), float(i))) for i in range(3)]
    with pytest.raises(FileNotFoundError, match="half-prepared"):
        LatentDataset(tmp_path)
    write_repa_labels(tmp_path, list(zip(names, [5, 6, 7], strict=True)))
    dataset = LatentDataset(tmp_path)
    assert [(float(m.mean()), label) for m, label in dataset] == [(0.0, 5), (1.0, 6), (2.0, 7)]
    assert json.loads((tmp_path / "images" / "dataset.json").read_text())["labels"][0] == ["00000/img00000000.png", 5]
    (tmp_path / "vae-sd" / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match="1 files that .* are missing, such as 00000/img-mean-std-00000001.npy"):
        LatentDataset(tmp_path)
