"""prepare.py: both layouts hold the VAE's moments of every readable image, whatever interrupts it."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import small
import torch
from PIL import Image

from sprint.data import LatentDataset, draw_latents
from sprint.data.images import ImageFolder, center_crop, find_images, to_unit

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    small.images(root / "images")
    (root / "images" / "class1" / "image03.jpg").write_bytes(b"\xff\xd8 this is no image")
    broken = root / "images" / "class2" / "image00.png"
    broken.write_bytes(broken.read_bytes()[:200])
    small.vae(root / "vae")
    return root


def prepare(folder, out, *more, **options):
    arguments = ("--images", folder / "images", "--vae", folder / "vae", "--size", 32, "--shard", 5, "--batch", 2)
    return small.script("prepare", *arguments, "--workers", 0, "--out", out, *more, **options)


def expected(folder):
    """Moments and labels of the readable images, one by one."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    images, *_ = find_images(folder / "images")
    moments, labels = [], []
    for pixels, label, problem in ImageFolder(folder / "images", images, size=32):
        if not problem:
            with torch.no_grad():
                posterior = vae.encode(to_unit(pixels[None])).latent_dist
            moments.append(torch.cat([posterior.mean, posterior.std], dim=1)[0])
            labels.append(label)
    return torch.stack(moments), labels


@pytest.mark.parametrize("layout", ["compact", "repa"])
def test_every_readable_image_is_there(folder, layout, tmp_path):
    run = prepare(folder, tmp_path / "out", "--layout", layout, "--dtype", "float32")
    assert run.returncode == 0, run.stderr
    assert "22 images of 3 classes prepared" in run.stdout
    assert "2 corrupt" in run.stdout
    listed = (tmp_path / "out" / "corrupt.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["class1/image03.jpg", "class2/image00.png"]
    dataset = LatentDataset(tmp_path / "out")
    moments, labels = expected(folder)
    assert len(dataset) == 22
    assert dataset.shape == (8, 16, 16)
    assert dataset.labels.tolist() == labels
    actual = torch.stack([dataset[i][0] for i in range(22)])
    torch.testing.assert_close(actual, moments, rtol=1e-4, atol=1e-5)  # float32, other batches
    assert draw_latents(actual).shape == (22, 4, 16, 16)
    if layout == "repa":
        names = json.loads((tmp_path / "out" / "vae-sd" / "dataset.json").read_text())["labels"]
        assert names[0] == ["00000/img-mean-std-00000000.npy", 0]
        assert np.load(tmp_path / "out" / "vae-sd" / names[0][0]).shape == (8, 16, 16)
        images = sorted((tmp_path / "out" / "images").rglob("*.png"))
        assert len(images) == 22  # as many as latents, in the same order: REPA's reader pairs them by rank
        assert Image.open(images[0]).size == (32, 32)
    else:
        assert json.loads((tmp_path / "out" / "index.json").read_text())["classes"] == ["class0", "class1", "class2"]


def test_sixteen_bits_are_the_default(folder, tmp_path):
    assert prepare(folder, tmp_path / "out").returncode == 0
    dataset = LatentDataset(tmp_path / "out")
    assert dataset[0][0].dtype == torch.float16
    torch.testing.assert_close(dataset[-1][0].float(), expected(folder)[0][-1], rtol=1e-3, atol=1e-3)  # float16
    loader = torch.utils.data.DataLoader(dataset, batch_size=11, num_workers=2)
    assert torch.cat([labels for _, labels in loader]).tolist() == dataset.labels.tolist()


@pytest.mark.slow
def test_two_processes(folder, tmp_path):
    assert prepare(folder, tmp_path / "one").returncode == 0
    run = prepare(folder, tmp_path / "two", processes=2)
    assert run.returncode == 0, run.stderr
    one, two = LatentDataset(tmp_path / "one"), LatentDataset(tmp_path / "two")
    assert one.labels.equal(two.labels)
    for (a, _), (b, _) in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)  # float16, other numbers of threads
    files = [sorted(path.name for path in (tmp_path / name).glob("*.safetensors")) for name in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_killed_and_run_again(folder, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(small.SCRIPTS / "prepare.py"), "--images", folder / "images", "--vae", folder / "vae",
               "--size", "32", "--shard", "2", "--batch", "1", "--workers", "0", "--out", out]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=small.ENVIRONMENT
    )
    while len(list(out.glob("parts/*.json"))) < 3 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.safetensors")}
    assert done
    assert not (out / "index.json").exists()
    with pytest.raises(FileNotFoundError, match="half-prepared"):
        LatentDataset(out)
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    recorded = [path for path in done if path.stat().st_mtime_ns == done[path]]
    assert len(recorded) >= 3  # what was whole was not made again
    assert LatentDataset(out).labels.tolist() == expected(folder)[1]


@pytest.mark.slow
def test_refusals(folder, tmp_path):
    assert "there is no folder" in small.script("prepare", "--images", "nowhere", "--out", tmp_path).stderr
    (tmp_path / "empty" / "class0").mkdir(parents=True)
    assert "holds no images" in small.script("prepare", "--images", tmp_path / "empty", "--out", tmp_path).stderr
    assert prepare(folder, tmp_path / "out").returncode == 0
    other = prepare(folder, tmp_path / "out", "--dtype", "float32")
    assert "was begun with dtype 'float16', now 'float32'" in other.stderr
    assert "not divisible by 2" in prepare(folder, tmp_path / "odd", "--size", 33).stderr
    assert "1 parts for 2 processes" in prepare(folder, tmp_path / "many", "--shard", 100, processes=2).stderr


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["compact", "repa"])
def test_what_is_lost_is_made_again(folder, layout, tmp_path):
    assert prepare(folder, tmp_path, "--layout", layout).returncode == 0
    before = [moments for moments, _ in LatentDataset(tmp_path)]
    files = sorted(tmp_path.rglob("shard-*" if layout == "compact" else "img-mean-std-*"))
    files[-1].unlink()
    times = [file.stat().st_mtime_ns for file in files[:5] if file.exists()]
    run = prepare(folder, tmp_path, "--layout", layout)
    assert run.returncode == 0, run.stderr
    assert all(a.equal(b) for a, (b, _) in zip(before, LatentDataset(tmp_path), strict=True))
    assert [file.stat().st_mtime_ns for file in files[: len(times)]][:4] == times[:4]  # and nothing else


def test_center_crop():
    gradient = torch.arange(200, dtype=torch.uint8).expand(100, 200)
    image = Image.fromarray(gradient.numpy())
    cropped = np.array(center_crop(image, 50)).astype(float)
    assert cropped.shape == (50, 50)
    assert cropped.mean() == pytest.approx(99.5, abs=1)  # the middle
    assert center_crop(Image.new("RGB", (37, 300)), 64).size == (64, 64)


@pytest.mark.slow
def test_features_of_a_teacher_are_kept(folder, tmp_path):
    """REPA from features equals REPA from images, up to the numbers' storage."""
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    from sprint.data.teacher import Teacher

    name, weights = "vit_tiny_patch16_224", tmp_path / "vit.safetensors"
    save_file(timm.create_model(name, num_classes=0, img_size=128).state_dict(), weights)
    options = ("--teacher", name, "--teacher-weights", weights, "--dtype", "float32")
    run = prepare(folder, tmp_path / "features", *options)
    assert run.returncode == 0, run.stderr
    assert prepare(folder, tmp_path / "images", "--layout", "repa").returncode == 0
    cached, images = (LatentDataset(tmp_path / kind, aligned=True) for kind in ("features", "images"))
    assert cached.teacher == name
    assert len(cached) == len(images) == 22
    teacher = Teacher(name, (8, 8), weights=weights)
    for i in (0, 9, 21):
        assert cached[i][1] == images[i][1]
        torch.testing.assert_close(cached[i][2], teacher(images[i][2][None])[0], rtol=1e-3, atol=1e-3)  # float32, batches
    assert "leave --teacher out" in prepare(folder, tmp_path / "x", "--layout", "repa", "--teacher", name).stderr
    plain = tmp_path / "plain"
    assert prepare(folder, plain).returncode == 0
    with pytest.raises(FileNotFoundError, match="holds no teacher's features: prepare it with --teacher"):
        LatentDataset(plain, aligned=True)
    next((tmp_path / "images" / "images").rglob("*.png")).unlink()
    with pytest.raises(FileNotFoundError, match="holds 21 images for 22 latents"):
        LatentDataset(tmp_path / "images", aligned=True)


def test_odd_files(tmp_path):
    """Every file is an image of a class, or is named: 16-bit grey is scaled, hidden folders are no classes."""
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    (root / "b" / "deep").mkdir(parents=True)
    (root / ".hidden").mkdir()
    Image.fromarray(np.full((8, 8), 257 * 100, dtype=np.uint16)).save(root / "a" / "grey16.png")
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(root / "b" / "deep" / "x.TIFF")
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(root / "outside.png")
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(root / ".hidden" / "y.png")
    (root / "a" / "notes.txt").write_text("")
    (root / "a" / "back").symlink_to(root)  # a circle
    images, classes, ignored = find_images(root)
    assert classes == ["a", "b"]
    assert [(str(path), label) for path, label in images] == [("a/grey16.png", 0), ("b/deep/x.TIFF", 1)]
    assert [str(path) for path in ignored] == [".hidden/y.png", "a/notes.txt", "outside.png"]
    pixels, _, problem = ImageFolder(root, images, size=8)[0]
    assert not problem
    assert (pixels == 100).all()


@pytest.mark.slow
def test_a_mistake_does_not_bind_the_folder(folder, tmp_path):
    run = prepare(folder, tmp_path / "out", "--size", 33)
    assert "--size 33 is not divisible by 2" in run.stderr
    assert "Traceback" not in prepare(folder, tmp_path / "out", "--vae", tmp_path / "none").stderr
    assert prepare(folder, tmp_path / "out").returncode == 0


def test_nothing_but_its_own_folder_is_written_to(folder, tmp_path):
    """Refused before the VAE is looked for."""
    (tmp_path / "thesis.txt").write_text("mine")
    run = prepare(folder, tmp_path, "--vae", "nowhere")
    assert "holds what prepare.py did not make: choose another --out" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert "where it would become a class" in prepare(folder, folder / "images" / "out").stderr
    (tmp_path / "thesis.txt").rename(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{}")
    assert "holds what prepare.py did not make" in prepare(folder, tmp_path).stderr


@pytest.mark.slow
def test_what_is_left_out_is_listed_with_the_reason(folder, tmp_path):
    images = tmp_path / "images"
    for name in ("a/pipe.jpg", "b/two\nlines.png"):
        (images / name).parent.mkdir(parents=True)
    os.mkfifo(images / "a" / "pipe.jpg")
    (images / "b" / "two\nlines.png").touch()
    (images / "b" / "notes.txt").touch()
    out = tmp_path / "out"
    run = prepare(folder, out, "--images", images)
    assert run.returncode == 1
    assert "none of 2 files could be read, such as a/pipe.jpg (a pipe, socket or device, not a file)" in run.stderr
    assert not (out / "index.json").exists()
    Image.new("L", (40, 30), 7).save(images / "b" / "good.png")
    run = prepare(folder, tmp_path / "again", "--images", images)
    assert run.returncode == 0, run.stderr
    assert "1 images of 2 classes prepared" in run.stdout
    assert "2 corrupt (corrupt.txt), 1 other files (ignored.txt)" in run.stdout
    assert "1 classes without an image: a" in run.stdout
    listed = (tmp_path / "again" / "corrupt.txt").read_text().splitlines()
    assert listed == ["a/pipe.jpg\ta pipe, socket or device, not a file", "b/two\\nlines.png\tan empty file"]
    assert (tmp_path / "again" / "ignored.txt").read_text() == "b/notes.txt\tits suffix is no image's\n"


def test_another_vae_in_the_place_of_the_first_is_refused(folder, tmp_path):
    """By its weights; and a size that no model could be trained on."""
    import shutil

    from diffusers import AutoencoderKL

    place = shutil.copytree(folder / "vae", tmp_path / "vae")
    arguments = ("--images", folder / "images", "--vae", place, "--shard", 50, "--workers", 0, "--out", tmp_path / "out")
    run = small.script("prepare", *arguments, "--size", 30)
    assert "--size 30 gives latents 15 wide, which do not split into patches of 2" in run.stderr
    assert small.script("prepare", *arguments, "--size", 32).returncode == 0
    other = AutoencoderKL.from_pretrained(place)
    other.decoder.conv_out.bias.data += 1
    other.save_pretrained(place)
    run = small.script("prepare", *arguments, "--size", 32)
    assert "was begun with weights" in run.stderr
