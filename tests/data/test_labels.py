"""A dataset.json labels all pictures of a folder and nothing else, or it is said what is wrong."""

import json

import pytest
import torch

from sprint.data import LatentDataset
from sprint.data.images import find_images
from sprint.data.labels import read_labels
from sprint.data.latents import write_repa, write_repa_labels

GOOD = [["00000/a.png", 1], ["00000/b.png", 0], ["c.png", 1]]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "00000").mkdir()
    for name, _ in GOOD:
        (tmp_path / name).touch()
    return tmp_path


def write(folder, labels):
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def test_it_goes_before_the_folders(folder):
    write(folder, GOOD)
    images, classes, ignored = find_images(folder)
    assert [(path.as_posix(), label) for path, label in images] == [("00000/b.png", 0), ("00000/a.png", 1), ("c.png", 1)]
    assert classes == ["0", "1"]
    assert not ignored


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (None, "null for its labels"),
        ([], "holds no labels"),
        ({"a": 1}, "holds no labels"),
        ([*GOOD[:2], "c.png"], "1 entries are no pair"),
        ([*GOOD[:2], ["../c.png", 1]], r"no pair of a relative name and a class, such as .*\.\./c.png"),
        ([*GOOD[:2], ["c.png", None]], "1 names have no class, expected an integer from 0, such as .*c.png"),
        ([*GOOD[:2], ["c.png", -1]], "names have no class"),
        ([*GOOD[:2], ["c.png", 1.7]], "names have no class"),
        ([*GOOD[:2], ["c.png", 1.0]], "names have no class"),
        ([*GOOD[:2], ["c.png", True]], "names have no class"),
        ([*GOOD[:2], ["c.png", "1"]], "names have no class"),
        ([*GOOD, ["c.png", 0]], "1 names are there twice, such as .c.png"),
        ([*GOOD, ["d.png", 0]], "1 names have no file.*d.png"),
        (GOOD[:2], "1 files have no label, such as .c.png"),
        ([*GOOD[:2], ["c.png", 10**12]], "only 3 of them have files .the first without is 2"),
    ],
)
def test_refusals(folder, labels, said):
    write(folder, labels)
    with pytest.raises(ValueError, match=said):
        find_images(folder)


def test_no_json(folder):
    (folder / "dataset.json").write_text('{"labels": [')
    with pytest.raises(ValueError, match=r"dataset.json is no JSON"):
        find_images(folder)
    write(folder, [["a", 5]])
    assert read_labels(folder / "dataset.json", ["a"], gaps=True) == {"a": 5}


@pytest.mark.parametrize("label", [1.7, None, -1, "1", True])
def test_labels_of_latents_are_checked_too(tmp_path, label):
    name = write_repa(tmp_path, 0, None, torch.zeros(2, 1, 1))
    (tmp_path / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": [[name, label]]}))
    with pytest.raises(ValueError, match="1 names have no class"):
        LatentDataset(tmp_path)


def test_latents_without_a_label_do_not_vanish(tmp_path):
    names = [write_repa(tmp_path, i, None, torch.zeros(2, 1, 1)) for i in range(2)]
    write_repa_labels(tmp_path, [(names[0], 3)])
    with pytest.raises(ValueError, match="lists no label of 1 files, such as 00000/img-mean-std-00000001.npy"):
        LatentDataset(tmp_path)
