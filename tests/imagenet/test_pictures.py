"""Pictures of every kind become the right RGB, or are left out with a reason; none takes any amount of memory or time."""

import os
import struct
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sprint.data.images import ImageFolder, center_crop, find_images

RED = (255, 0, 0)


def read(path, size=16, **options):
    """Mean colour, or what is wrong."""
    pixels, _, problem = ImageFolder(path.parent, [(Path(path.name), 0)], size=size, **options)[0]
    return problem or tuple(pixels.float().mean((1, 2)).round().int().tolist())


def saved(folder, name, array, **options):
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(folder / name, **options)
    return folder / name


def tiff(bits, photometric, data):
    """Of 8x8 grey numbers, which Pillow cannot write."""
    tags = [(256, 8), (257, 8), (258, bits), (259, 1), (262, photometric), (273, 110), (277, 1), (279, len(data))]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in tags)
    return (head + bytes(4)).ljust(110, b"\0") + data


def wide_png(*, alpha=None):
    """8x8 of 16-bit colours, one of them transparent."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    colour = struct.pack(">3H", *[100 * 257] * 3)
    extra = b"" if alpha is None else chunk(b"tRNS", colour)
    rows = zlib.compress((b"\0" + colour * 8) * 8)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_transparency_is_laid_on_white(tmp_path):
    clear = np.dstack([np.full((8, 8, 3), RED, np.uint8), np.zeros((8, 8), np.uint8)])
    assert read(saved(tmp_path, "rgba.png", clear)) == (255, 255, 255)
    clear[..., 3] = 128
    assert read(saved(tmp_path, "half.png", clear)) == (255, 127, 127)
    grey = np.full((8, 8), 90, np.uint8)
    assert read(saved(tmp_path, "la.png", Image.fromarray(np.dstack([grey, 0 * grey])))) == (255, 255, 255)
    assert read(saved(tmp_path, "key.png", grey, transparency=90)) == (255, 255, 255)
    palette = Image.fromarray(clear[..., :3]).quantize(4)
    assert read(saved(tmp_path, "p.png", palette)) == RED
    assert read(saved(tmp_path, "clear.png", palette, transparency=bytes(4))) == (255, 255, 255)
    (tmp_path / "wide.png").write_bytes(wide_png(alpha=0))
    assert read(tmp_path / "wide.png") == (255, 255, 255)


def test_more_bits_are_scaled_or_refused(tmp_path):
    for name in ("grey16.png", "grey16.tif"):
        assert read(saved(tmp_path, name, np.full((8, 8), 100 * 257, np.uint16))) == (100, 100, 100)
    (tmp_path / "rgb16.png").write_bytes(wide_png())
    assert read(tmp_path / "rgb16.png") == (100, 100, 100)
    (tmp_path / "grey12.tif").write_bytes(tiff(12, 1, b"\xff" * 96))
    assert read(tmp_path / "grey12.tif") == (255, 255, 255)
    (tmp_path / "negative.tif").write_bytes(tiff(16, 0, b"\xff" * 128))  # white is 0
    assert read(tmp_path / "negative.tif") == (0, 0, 0)
    assert read(saved(tmp_path, "float.tif", np.full((8, 8), 0.5, np.float32))) == (128, 128, 128)
    assert read(saved(tmp_path, "int.tif", np.full((8, 8), 100 * 257, np.int32))) == (100, 100, 100)
    for name, value, kind in (
        ("f", 2.0, np.float32),
        ("n", np.nan, np.float32),
        ("i", 10**5, np.int32),
        ("m", -5, np.int32),
    ):
        assert "expected [0, " in read(saved(tmp_path, f"{name}.tif", np.full((8, 8), value, kind)))


def test_pictures_are_turned_as_a_viewer_does(tmp_path):
    pixels = np.zeros((48, 32, 3), np.uint8)
    pixels[8:24, :16] = RED  # the upper left of the crop
    upright = Image.fromarray(pixels)
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that undo it
    for orientation, way in back.items():
        stored = upright if way is None else upright.transpose(Image.Transpose(way))
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = saved(tmp_path, f"{orientation}.png", stored, exif=exif)
        found, _, problem = ImageFolder(tmp_path, [(Path(path.name), 0)], size=32)[0]
        assert not problem
        assert (found.permute(1, 2, 0).numpy() == pixels[8:40]).all(), orientation
    found = ImageFolder(tmp_path, [(Path("6.png"), 0)], size=32, turn=False)[0][0]
    assert not (found.permute(1, 2, 0).numpy() == pixels[8:40]).all()


def test_other_kinds(tmp_path):
    red, blue = Image.new("RGB", (20, 20), RED), Image.new("RGB", (20, 20), "blue")
    for name in ("x.gif", "x.png", "x.webp", "x.tif"):
        lossless = {"lossless": True} if name == "x.webp" else {}
        assert read(saved(tmp_path, name, red, save_all=True, append_images=[blue], **lossless)) == RED
    assert read(saved(tmp_path, "cmyk.tif", red.convert("CMYK"))) == RED
    assert read(saved(tmp_path, "really.png", red, format="BMP")) == RED
    for size in ((1, 5000), (100_000, 1), (3, 3), (1, 1)):
        assert read(saved(tmp_path, "shape.png", Image.new("RGB", size, RED))) == RED
    whole = saved(tmp_path, "whole.png", np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:900])
    assert "truncated" in read(tmp_path / "cut.png")


def test_what_is_no_picture_is_said(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "link.jpg").symlink_to("nowhere")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    (tmp_path / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    for name, said in (("pipe", "a pipe, socket or device"), ("empty", "an empty file"), ("link", "a link to no file"),
                       ("folder", "a folder"), ("phone", "HEIF .* pip install pillow-heif"),
                       ("program", "no picture of a kind that is read")):  # fmt: skip
        problem = read(tmp_path / f"{name}.jpg")
        with pytest.raises(ValueError, match=said):
            raise ValueError(problem)


def test_every_file_is_found_or_named_with_the_reason(tmp_path):
    for name in ("a/x.heic", "a/y.AVIF", "a/.z.png", "top.png", "a/notes.txt", "a/set.zip"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "d.jpg").mkdir()
    images, _, ignored = find_images(tmp_path)
    assert [str(path) for path, _ in images] == ["a/x.heic", "a/y.AVIF"]
    assert {str(path): why for path, why in ignored.items()} == {
        "a/.z.png": "hidden", "a/d.jpg": "an empty folder", "a/notes.txt": "its suffix is no image's",
        "a/set.zip": "its suffix is no image's", "top.png": "in no class folder",
    }  # fmt: skip
    with pytest.raises(FileNotFoundError, match="is a file, expected a folder: unpack it"):
        find_images(tmp_path / "a" / "set.zip")


def adm(image, size):
    """ADM's crop, as its paper's preprocessing is described."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    pixels = np.array(image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC))
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(375, 500), (701, 3001), (1503, 2001)])
def test_ordinary_pictures_are_cropped_as_adm_does(shape, tmp_path):
    colours = np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8)
    path = saved(tmp_path, "x.png", colours, compress_level=1)
    found = ImageFolder(tmp_path, [(Path(path.name), 0)], size=64)[0][0]
    assert (found.permute(1, 2, 0).numpy() == adm(Image.fromarray(colours), 64)).all()
    saved(tmp_path, "x.png", colours[..., 0], compress_level=1)  # must be converted, a band at a time
    grey = ImageFolder(tmp_path, [(Path(path.name), 0)], size=64)[0][0]
    assert np.abs(grey[0].numpy() - adm(Image.fromarray(colours[..., 0]), 64).astype(int)).max() <= 2


CHILD = """
import resource, sys
from pathlib import Path
from sprint.data.images import ImageFolder
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[2:]:
    pixels, _, problem = ImageFolder(sys.argv[1], [(Path(name), 0)], size=64)[0]
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, pixels.float().mean().item(), problem)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it counts in other units")
def test_memory_is_bounded(tmp_path):
    big = Image.new("L", (14000, 14000), 100)  # 187 MiB
    saved(tmp_path, "big.jpg", big)
    saved(tmp_path, "big.png", big, compress_level=1)
    saved(tmp_path, "long.png", Image.new("L", (200_000, 1), 100))
    # by way of a shell: a child begins with the peak of the process that starts it
    command = f'{sys.executable} -c "$0" {tmp_path} big.jpg big.png long.png; true'
    run = subprocess.run(["/bin/sh", "-c", command, CHILD], capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=2) for line in run.stdout.splitlines()]
    assert max(int(mebibytes) for mebibytes, *_ in lines) < 100
    assert [round(float(mean)) for _, mean, *_ in lines] == [100, 0, 100]
    assert "make it smaller" in lines[1][2]


def test_center_crop_of_a_line():
    assert center_crop(Image.new("RGB", (1, 10**6)), 64).size == (64, 64)


def test_a_plugin_for_heic_is_taken_up(tmp_path, monkeypatch):
    calls = []
    plugin = types.SimpleNamespace(register_heif_opener=lambda: calls.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    assert read(saved(tmp_path, "x.png", Image.new("RGB", (9, 9), RED))) == RED
    assert calls
