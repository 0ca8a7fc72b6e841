"""evaluate.py with a small feature network: the Fréchet distance of the formula, from folders, files and statistics."""

import json
import runpy
import sys

import numpy as np
import pytest
import small
import torch
from PIL import Image

torch_fidelity = pytest.importorskip("torch_fidelity")


class SmallFeatures(torch_fidelity.FeatureExtractorBase):
    """Mean colours of four quarters, and logits."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return "pooled", "logits_unbiased"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits_unbiased" if metric == "isc" else "pooled"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, x):
        pooled = torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)
        features = {"pooled": pooled, "logits_unbiased": 5 * pooled[:, :3]}
        return tuple(features[name] for name in self.features_list)


torch_fidelity.register_feature_extractor("small-features", SmallFeatures)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    generator = np.random.default_rng(0)
    for name, shift in (("samples", 0), ("reference", 40)):
        (root / name).mkdir()
        images = generator.integers(0, 200, (30, 16, 16, 3), dtype=np.uint8)
        images = (images.astype(int) * generator.uniform(0.2, 1, (30, 1, 1, 3)) + shift).astype(np.uint8)
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / name / f"{i:06d}.png")
        np.savez(root / f"{name}.npz", arr_0=images)
    return root


def run(monkeypatch, capsys, *arguments):
    monkeypatch.syspath_prepend(small.SCRIPTS)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--inception", "small-features", "--dino", "small-features",
                                      *map(str, arguments)])  # fmt: skip
    runpy.run_path(str(small.SCRIPTS / "evaluate.py"), run_name="__main__")
    return capsys.readouterr().out


def frechet(folder):
    """|mu1 - mu2|² + tr(S1 + S2 - 2 (S1 S2)^½), by symmetric square roots."""
    stats = []
    for name in ("samples", "reference"):
        images = torch.from_numpy(np.load(folder / f"{name}.npz")["arr_0"]).permute(0, 3, 1, 2)
        features = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1).double().numpy()
        stats.append((features.mean(0), np.cov(features, rowvar=False)))
    (mu1, s1), (mu2, s2) = stats
    values, vectors = np.linalg.eigh(s1)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    return ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross, stats[1]


@pytest.mark.parametrize("suffix", ["", ".npz"])
def test_numbers(folder, suffix, monkeypatch, capsys, tmp_path):
    out = tmp_path / "numbers.json"
    text = run(monkeypatch, capsys, "--samples", folder / f"samples{suffix}", "--reference", folder / f"reference{suffix}",
               "--metrics", "fid", "fdd", "isc", "kid", "prc", "--json", out)  # fmt: skip
    found = json.loads(out.read_text())
    expected, _ = frechet(folder)
    assert found["FID"] == pytest.approx(expected, rel=1e-3)
    assert found["FDD"] == found["FID"]
    assert found["samples"] == 30
    assert {"IS", "KID", "precision", "recall"} <= found.keys()
    assert found["IS"] >= 1
    assert "FID" in text


def test_saved_statistics(folder, monkeypatch, capsys, tmp_path):
    expected, (mu, sigma) = frechet(folder)
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma)
    run(monkeypatch, capsys, "--samples", folder / "samples.npz", "--reference", tmp_path / "stats.npz", "--metrics", "fid")
    assert json.loads((folder / "samples.json").read_text())["FID"] == pytest.approx(expected, rel=1e-3)
    with pytest.raises(SystemExit, match="statistics for FID alone"):
        run(monkeypatch, capsys, "--samples", folder / "samples.npz", "--reference", tmp_path / "stats.npz")
    np.savez(tmp_path / "other.npz", mu=mu[:3], sigma=sigma[:3, :3])
    with pytest.raises(SystemExit, match="statistics have 3 features, small-features gives 12"):
        run(
            monkeypatch,
            capsys,
            "--samples",
            folder / "samples.npz",
            "--reference",
            tmp_path / "other.npz",
            "--metrics",
            "fid",
        )


def test_images_beside_statistics_serve_other_metrics(folder, monkeypatch, capsys, tmp_path):
    _, (mu, sigma) = frechet(folder)
    np.savez(tmp_path / "both.npz", mu=mu, sigma=sigma, arr_0=np.load(folder / "reference.npz")["arr_0"])
    out = tmp_path / "n.json"
    arguments = (
        "--samples",
        folder / "samples",
        "--reference",
        tmp_path / "both.npz",
        "--metrics",
        "fid",
        "kid",
        "--json",
        out,
    )
    run(monkeypatch, capsys, *arguments)
    assert {"FID", "KID"} <= json.loads(out.read_text()).keys()


def test_a_set_is_at_no_distance_from_itself(folder, monkeypatch, capsys, tmp_path):
    run(monkeypatch, capsys, "--samples", folder / "samples", "--reference", folder / "samples.npz", "--metrics", "fid",
        "--json", tmp_path / "n.json")  # fmt: skip
    assert json.loads((tmp_path / "n.json").read_text())["FID"] == pytest.approx(0, abs=1e-5)


def test_refusals(folder, monkeypatch, capsys, tmp_path):
    for samples, message in (("nothing", "neither a folder nor"), ("empty", "holds no images")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, capsys, "--samples", tmp_path / samples, "--reference", folder / "reference")
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((3, 8, 8, 3), dtype=np.float32))
    with pytest.raises(SystemExit, match=r"holds float32 \(3, 8, 8, 3\), expected images"):
        run(monkeypatch, capsys, "--samples", tmp_path / "floats.npz", "--reference", folder / "reference")
    (tmp_path / "mixed").mkdir()
    for side in (8, 9):
        Image.fromarray(np.zeros((side, side, 3), dtype=np.uint8)).save(tmp_path / "mixed" / f"{side}.png")
    with pytest.raises(SystemExit, match="images of several sizes .*give --crop for a reference"):
        run(monkeypatch, capsys, "--samples", folder / "samples", "--reference", tmp_path / "mixed")
    np.savez(tmp_path / "odd.npz", other=np.zeros(3))
    with pytest.raises(SystemExit, match="has no arr_0 .it holds other"):
        run(monkeypatch, capsys, "--samples", tmp_path / "odd.npz", "--reference", folder / "reference")


@pytest.fixture
def evaluated(folder, monkeypatch, capsys, tmp_path):
    """The script, as a function that returns its numbers, read as strict JSON."""

    def call(*arguments, samples="samples", reference="reference", out=tmp_path / "n.json"):
        run(monkeypatch, capsys, "--samples", folder / samples, "--reference", folder / reference, "--json", out, *arguments)
        return json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    return call


def few(folder, count, name):
    (folder / name).mkdir()
    for i in range(count):
        (folder / name / f"{i}.png").write_bytes((folder / "samples" / f"{i:06d}.png").read_bytes())


def test_each_metric_says_how_many_it_needs(folder, evaluated, capsys):
    few(folder, 3, "three")
    for metric, said in (
        ("isc", "isc of 3 samples: it needs 20, two for each of"),
        ("prc", "it needs 4, one and"),
    ):
        with pytest.raises(SystemExit, match=said):
            evaluated("--metrics", metric, samples="three")
    found = evaluated("--metrics", "fid", "kid", samples="three")
    assert "KID, std" not in found  # of one subset of three, drawn a hundred times over
    assert any("FID of 3 images in 12 features says little" in note for note in found["notes"])
    assert (found["samples"], found["reference images"]) == (3, 30)
    (folder / "small").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 4), (40 * i, 0, 9)).save(folder / "small" / f"{i}.png")
    found = evaluated("--metrics", "fid", samples="small")
    assert "the samples are 8x4 pixels, the reference 16x16: compare the same size" in found["notes"]
    with pytest.raises(SystemExit):
        evaluated("--metrics", "sfid")
    assert "mixed_6/conv, which torch-fidelity does not give" in capsys.readouterr().err


def test_odd_files_are_named(folder, evaluated, monkeypatch, capsys, tmp_path):
    few(folder, 8, "odd")
    (folder / "odd" / "._0.png").write_bytes(b"\0\5\26\7")
    (folder / "odd" / "notes.txt").write_text("")
    whole = evaluated("--metrics", "fid", reference="odd")
    (folder / "odd" / "zz.png").write_bytes((folder / "odd" / "0.png").read_bytes()[:200])
    capsys.readouterr()
    arguments = ("--samples", folder / "samples", "--reference", folder / "odd", "--metrics", "fid", "--json")
    run_out = tmp_path / "more.json"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--inception", "small-features", *map(str, (*arguments, run_out))])
    runpy.run_path(str(small.SCRIPTS / "evaluate.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert "3 files left out, such as 'zz.png' (" in said
    assert "'notes.txt' (its suffix is no image's), '._0.png' (hidden)" in said
    assert json.loads(run_out.read_text())["FID"] == whole["FID"]
    with pytest.raises(SystemExit, match=r"zz\.png cannot be read: .*truncated"):  # samples may not become fewer
        evaluated("--metrics", "fid", samples="odd")


def test_images_come_a_batch_at_a_time(folder, monkeypatch):
    monkeypatch.syspath_prepend(small.SCRIPTS)
    from compared import Images

    monkeypatch.setattr(np, "load", None)
    expected = [image for batch in Images(folder / "samples").batches(7) for image in batch]
    np.testing.assert_equal([batch.shape[0] for batch in Images(folder / "samples.npz").batches(7)], [7, 7, 7, 7, 2])
    found = [image for batch in Images(folder / "samples.npz").batches(7) for image in batch]
    assert torch.stack(found).equal(torch.stack(expected))


def test_damaged_files_of_images(folder, evaluated, tmp_path):
    bad = tmp_path / "bad.npz"
    content = bytearray((folder / "reference.npz").read_bytes())
    bad.write_bytes(content[:-500])
    with pytest.raises(SystemExit, match=r"bad.npz cannot be read: File is not a zip file"):
        evaluated(reference=bad)
    content[5000] ^= 1
    bad.write_bytes(content)
    with pytest.raises(SystemExit, match=r"bad.npz cannot be read: Bad CRC-32"):
        evaluated(reference=bad)
    np.save(tmp_path / "plain.npy", np.zeros(3))
    (tmp_path / "plain.npy").rename(bad)
    with pytest.raises(SystemExit, match="not a zip file"):
        evaluated(reference=bad)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sigma": None}, "has no sigma .it holds mu"),
        ({"mu": None}, "has no mu"),
        ({"mu": np.zeros((2, 12))}, r"holds mu float64 \(2, 12\)"),
        ({"sigma": np.eye(11)}, r"expected floats \(D,\) and \(D, D\)"),
        ({"mu": np.zeros(12, np.int64)}, "holds mu int64"),
        ({"mu": np.full(12, np.nan)}, "mu or sigma is not finite"),
        ({"sigma": np.triu(np.ones((12, 12)))}, "sigma is no covariance"),
        ({"sigma": -np.eye(12)}, "sigma is no covariance"),
        ({"network": "inception-v3-compat"}, "has features of inception-v3-compat, the samples' would be of small-features"),
        ({"count": 1}, "says that it is of 1 images"),
    ],
)
def test_saved_statistics_are_checked(folder, evaluated, tmp_path, change, said):
    _, (mu, sigma) = frechet(folder)
    content = {name: value for name, value in ({"mu": mu, "sigma": sigma} | change).items() if value is not None}
    np.savez(tmp_path / "stats.npz", **content)
    with pytest.raises(SystemExit, match=said):
        evaluated("--metrics", "fid", reference=tmp_path / "stats.npz")


def test_statistics_that_it_saves_are_read(evaluated, tmp_path):
    saved = tmp_path / "stats.npz"
    one = evaluated("--metrics", "fid", "fdd", "--save-statistics", saved)
    two = evaluated("--metrics", "fid", reference=saved)
    assert two["FID"] == pytest.approx(one["FID"], rel=1e-9)
    assert two["reference images"] == 30


def test_no_other_file_is_written_over(evaluated, tmp_path):
    other = tmp_path / "dataset.json"
    for content in ('{"labels": []}', "[1]", "no JSON"):
        other.write_text(content)
        with pytest.raises(SystemExit, match="was not written by evaluate.py"):
            evaluated("--metrics", "fid", out=other)
        assert other.read_text() == content


def test_features_that_overflow_are_no_number(evaluated, monkeypatch, tmp_path):
    monkeypatch.setattr(
        SmallFeatures, "forward", lambda self, x: tuple(x.float().flatten(1) / 0 for _ in self.features_list)
    )
    with pytest.raises(SystemExit, match="small-features gives numbers that are not finite from image 0 on"):
        evaluated("--metrics", "fid")
    assert not (tmp_path / "n.json").exists()
