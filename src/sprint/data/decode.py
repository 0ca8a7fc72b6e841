"""One picture file of any kind as 8-bit RGB, in bounded memory, or the reason why not. Needs Pillow.

| a file with | becomes |
|---|---|
| an orientation (EXIF) | turned as a viewer shows it, unless that is switched off |
| transparency, of a palette or a colour too | laid on white |
| 16 bits (or the 12 of a TIFF) | scaled to 8, rounded |
| floats | scaled where all lie in [0, 1], as the convention is; else refused |
| 32-bit integers | taken for 16 bits where they fit; else refused |
| CMYK, LAB, YCbCr, palettes | RGB by Pillow's conversion; colour profiles are not applied |
| several frames or pages | the first one |
| a misleading name | read by its content |
"""

import math
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "TGA", "QOI")
"""That are read, where Pillow has them: no format that runs programs (EPS) or draws (PDF, WMF)."""
LIMIT = 2**29
"""Bytes that a decoded picture may take."""
BIG = 2**24
"""Pixels from which a JPEG file is decoded at a fraction of its size, of at least four times the crop. Smaller ones are read
in full and halved, exactly as ADM does."""
BAND = 2**20
"""Pixels that are converted to RGB at a time."""
LONG = 8
"""A picture more than so many times longer than wide is cut to that, about its middle, before it is scaled."""


def read_image(path: str | os.PathLike[str], size: int | None = None, *, turn: bool = True) -> "Image.Image":
    """A picture in 8-bit RGB.

    Args:
        path: of the file.
        size: of a square crop (`center_crop`); None leaves the picture as it is.
        turn: by the orientation in its EXIF data. ADM's preprocessing did not.

    Raises:
        ValueError, OSError: what is wrong with the file; Pillow's plugins raise others for broken ones.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd data in files; what cannot be read is an error
        with opened(path) as image:
            if size is not None:
                _decode_small(image, 4 * size)
            _check_size(image)
            image.load()
            found = as_rgb(image) if size is None else _rgb_halved(image, size)
            way = _orientation(image) if turn else None
        found = found if way is None else found.transpose(way)
    return found if size is None else center_crop(found, size)


def as_rgb(image: "Image.Image") -> "Image.Image":
    """In 8-bit RGB, what is transparent laid on white; numbers of more bits are scaled, which Pillow's conversion clips.

    Raises:
        ValueError: numbers outside of [0, 1] (floats) or [0, 65535] (integers).
    """
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB")
    of_palette = image.palette is not None and image.palette.mode.endswith("A")
    if image.mode.endswith(("A", "a")) or "transparency" in image.info or of_palette:
        own = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", own.size, "white"), own).convert("RGB")
    return image.convert("RGB")


def center_crop(image: "Image.Image", size: int) -> "Image.Image":
    """Scale the shorter side to `size` and cut out the middle, as ADM's preprocessing does (arXiv 2105.05233).

    Halved with a box filter while twice as large, then resized bicubically: this is the crop behind published ImageNet FIDs.
    """
    from PIL.Image import Resampling

    image = _cut(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


@contextmanager
def opened(path: str | os.PathLike[str]) -> "Iterator[Image.Image]":
    """An image of which only the header was read."""
    from PIL import Image, JpegImagePlugin

    try:
        about = os.stat(path)
    except FileNotFoundError as error:
        raise OSError("a link to no file" if Path(path).is_symlink() else "there is no such file") from error
    except OSError as error:
        raise OSError(error.strerror) from error
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{'a folder' if stat.S_ISDIR(about.st_mode) else 'a pipe, socket or device'}, not a file")
    if not about.st_size:
        raise ValueError("an empty file")
    try:
        image = Image.open(path, formats=_formats())
    except Image.DecompressionBombError:
        try:
            image = JpegImagePlugin.JpegImageFile(path)  # which may be decoded at an eighth of its size
        except SyntaxError:
            raise ValueError(f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels: make it smaller") from None
    except Image.UnidentifiedImageError:
        raise ValueError(_unknown(path)) from None
    with image:
        if image.format == "TIFF":
            tags = getattr(image, "tag_v2", {})
            image.info["bits"] = min(tags.get(258, (16,))[0], 16)
            image.info["inverted"] = tags.get(262) == 0
        yield image


def _orientation(image: "Image.Image") -> "Image.Transpose | None":
    """How a viewer turns it."""
    from PIL.Image import Transpose

    ways = [
        Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE,
        Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90,
    ]  # fmt: skip
    try:
        number = int(image.getexif().get(0x0112, 1))
    except Exception:  # broken data about a picture that is whole: Pillow's errors for it are of any kind
        return None
    return ways[number - 2] if 2 <= number <= 8 else None


def _formats() -> list[str]:
    from PIL import Image

    try:
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]

        register_heif_opener()
    except ImportError:
        pass
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _unknown(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp":
        brand = head[8:].decode("ascii", "replace")
        return f"a HEIF file ({brand}), which Pillow cannot read alone: pip install pillow-heif, or convert it"
    return "no picture of a kind that is read (" + ", ".join(name for name in _formats() if name != "DIB") + ")"


def _decode_small(image: "Image.Image", least: int) -> None:
    """Have a big JPEG file decoded at 1/2, 1/4 or 1/8, its shorter side still at least `least`."""
    if image.width * image.height > BIG and image.format in ("JPEG", "MPO") and min(image.size) >= 2 * least:
        whole, shorter = image.size, min(image.size)
        image.draft(image.mode, (whole[0] * least // shorter, whole[1] * least // shorter))
        image.info["whole"] = whole


def _check_size(image: "Image.Image") -> None:
    """Before its pixels are read."""
    mode = image.mode
    pixel = 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;") else 4
    takes = image.width * image.height * pixel
    width, height = image.info.get("whole", image.size)
    if image.info.get("progressive"):  # libjpeg keeps its coefficients, 16 bits each
        takes += width * height * 2 * len(image.getbands())
    if takes > LIMIT:
        raise ValueError(
            f"{width}x{height} pixels take {takes / 2**20:.0f} MiB to decode, more than {LIMIT / 2**20:.0f}: make it smaller"
        )


def _cut(image: "Image.Image") -> "Image.Image":
    """The middle of a picture that is much longer than wide: scaling it whole could take any amount of memory."""
    most = LONG * min(image.size)
    if max(image.size) <= most:
        return image
    width, height = min(image.width, most), min(image.height, most)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _rgb_halved(image: "Image.Image", size: int) -> "Image.Image":
    """In RGB; a large one halved as `center_crop` begins, a band at a time."""
    from PIL import Image

    image = _cut(image)
    enough = BIG if image.mode == "RGB" else BAND  # which needs no conversion; bands may differ in a last bit
    if min(image.size) < 2 * size or image.width * image.height <= enough:
        return as_rgb(image)
    found = Image.new("RGB", (image.width // 2, image.height // 2))
    step, rows = image.height / found.height, max(1, BAND // image.width // 2)
    for top in range(0, found.height, rows):
        bottom = min(top + rows, found.height)
        first, last = math.floor(top * step), min(math.ceil(bottom * step), image.height)
        band = as_rgb(image.crop((0, first, image.width, last)))
        box = (0, top * step - first, image.width, min(bottom * step, image.height) - first)
        found.paste(band.resize((found.width, bottom - top), Image.Resampling.BOX, box=box), (0, top))
    return found


def _eight_bits(image: "Image.Image") -> "Image.Image":
    """Grey of more than 8 bits."""
    from PIL import Image

    values = np.asarray(image)
    floats = image.mode == "F"
    white = 1.0 if floats else float(2 ** image.info.get("bits", 16) - 1)
    if not ((values >= 0) & (values <= white)).all():
        kind, low, high = "floats" if floats else "integers", values.min(), values.max()
        raise ValueError(f"{kind} from {low} to {high}, expected [0, {white:g}]: scale them")
    scaled = values.astype(np.float32) / np.float32(white)
    if image.info.get("inverted"):
        scaled = 1 - scaled
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # one level is transparent
        scaled[values == clear] = 1
    return Image.fromarray((scaled * 255).round().astype(np.uint8))
