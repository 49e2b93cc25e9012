"""From a picture file to pixels: every format, orientation, color model and depth ends as sRGB.

The recipe is the one of kohya's trainer: EXIF rotation, area filter down and Lanczos up, crop, x/127.5 - 1.
"""

from __future__ import annotations

import hashlib
import io
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageFile

from lora_trainer import plugins
from lora_trainer.dataset.picture_edits import UNTOUCHED, PictureEdit
from lora_trainer.dataset.samples import Place, Sample, Size, View
from lora_trainer.dataset.smaller import bordered
from lora_trainer.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_EXTENSIONS = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif",
)  # fmt: skip
MAX_PIXELS = 178_956_970
"""Pillow's own limit against decompression bombs: 2 × (1 GiB / 4 / 3) pixels."""
MAX_FILE_BYTES = 1 << 30
MIN_SIDE = 16
"""A picture with a shorter side in pixels teaches nothing but its own upscaling."""
MAX_ASPECT = 16
"""Longest side by shortest side; beyond it a crop shows next to nothing of the picture."""

_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
_SRGB_PROFILES = ("sRGB IEC61966-2.1", "sRGB built-in", "sRGB")  # nothing to convert
_ORIENTATION_TAG = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(path: Path) -> Image.Image:
    """The picture as sRGB: mode RGB, or RGBA where it has transparency; rotated as its EXIF data say; first frame.

    Raises:
        UserError: the file cannot be read as a picture; the message names it and says why.
    """
    with reading(path) as (image, _):
        image.load()
        return to_srgb(rotate(image), image.format)


def measure(path: Path) -> tuple[tuple[int, int], str]:
    """((width, height) after EXIF rotation, SHA-256 of the file), after decoding the file to its end.

    A JPEG is decoded at an eighth of its size, which still reads all of its data: a truncated one is found at a third
    of the cost.

    Raises:
        UserError: the picture is damaged, too small, too long or too large to train on.
    """
    with reading(path) as (image, data):
        size = image.size
        drafted = image.format in ("JPEG", "MPO") and image.draft("L", (1, 1)) is not None
        image.load()
        width, height = size if drafted else image.size
        if exif_orientation(image) >= 5:
            width, height = height, width
    check_size(path, (width, height))
    return (width, height), hashlib.sha256(data).hexdigest()


def check_size(path: Path, size: tuple[int, int]) -> None:
    """Raises ``UserError`` for a picture that is too small or too long to train on; ``size`` is (width, height)."""
    width, height = size
    short, long = sorted(size)
    if short < MIN_SIDE:
        raise UserError(
            f"{path.name} is too small: {width}×{height} pixels; the shorter side needs {MIN_SIDE} or more."
        )
    if long > MAX_ASPECT * short:
        raise UserError(
            f"{path.name} has too extreme an aspect ratio: {width}×{height} pixels, more than {MAX_ASPECT}:1."
        )


@contextmanager
def reading(path: Path) -> Iterator[tuple[Image.Image, bytes]]:
    """(the opened, not yet decoded picture; the file's bytes). Inside, truncated data are refused, and whatever a
    decoder stumbles over becomes a ``UserError`` that names the file."""
    data = _read(path)
    with _decoding(path), _refusing_truncation():
        yield _open(path, data), data


def flatten(image: Image.Image, color: int = 255) -> Image.Image:
    """RGB(A) -> RGB, transparency composited over a grey level (white), so that no hidden color shows."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    background = Image.new("RGBA", image.size, (color, color, color, 255))
    return Image.alpha_composite(background, image).convert("RGB")


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Area filter down, Lanczos up; ``size`` is (width, height)."""
    if image.size == size:
        return image
    smaller = size[0] * size[1] <= image.width * image.height
    return image.resize(size, Image.Resampling.BOX if smaller else Image.Resampling.LANCZOS)


def load_pixels(
    path: Path,
    scaled: tuple[int, int],
    bucket: tuple[int, int],
    crop: tuple[int, int],
    flip: bool = False,
    edit: PictureEdit = UNTOUCHED,
    change: Callable[[Image.Image], Image.Image] = lambda image: image,
    place: Place | None = None,
) -> Tensor:
    """Pixels (3, H, W) float32 in [-1, 1] of a picture: turned and cropped as ``edit`` says, resized to ``scaled``,
    cropped to ``bucket``, mirrored, shown at ``place`` alone, then changed.

    ``scaled`` and ``bucket`` are (width, height), ``crop`` is (left, top) in the resized picture.

    Raises:
        UserError: the file cannot be read as a picture.
    """
    import torch

    image = change(_view(edit.apply(flatten(open_image(path))), scaled, bucket, crop, flip, place))
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0
    return torch.from_numpy(np.ascontiguousarray(pixels))


def load_view(sample: Sample, view: View, augmentations: Sequence[str] = ()) -> Tensor:
    """Pixels (3, H, W) float32 in [-1, 1] of one view of a picture, changed by plug-ins of these names."""
    return load_pixels(
        sample.path,
        view.scaled,
        view.bucket,
        view.crop,
        view.flip,
        sample.edit,
        lambda image: _augmented(image, augmentations, view.augmentation),
        view.place,
    )


def _augmented(image: Image.Image, names: Sequence[str], seed: str | None) -> Image.Image:
    """Raises UserError when an augmentation gives no picture of the same size."""
    for name in names:
        size = image.size
        image = plugins.need("augmentation", name, "augmentations")(image, random.Random(f"{seed}:{name}"))
        if not isinstance(image, Image.Image) or image.size != size or image.mode != "RGB":
            raise UserError(
                f"The augmentation {name} must give an RGB picture of {size[0]}×{size[1]}.", field="augmentations"
            )
    return image


def load_mask(sample: Sample, view: View, size: Size) -> Tensor | None:
    """Where to learn, (1, h, w) float32 in [0, 1], area-resized to ``size`` (w, h); None for everywhere.

    From ``<image>.mask.png`` (stretched over the picture, if its size differs), else from the picture's transparency.

    Raises:
        UserError: the mask or the picture cannot be read.
    """
    import torch

    if sample.mask_path is not None:
        mask = flatten(open_image(sample.mask_path), color=0).convert("L")
    else:
        image = open_image(sample.path)
        if image.mode != "RGBA":
            return None
        mask = image.getchannel("A")
    mask = _view(sample.edit.apply(mask), view.scaled, view.bucket, view.crop, view.flip, view.place)
    mask = mask.resize(size, Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(mask, dtype=np.float32)[None] / 255.0)


def _view(
    image: Image.Image, scaled: Size, bucket: Size, crop: tuple[int, int], flip: bool, place: Place | None
) -> Image.Image:
    left, top = crop
    image = resize(image, scaled).crop((left, top, left + bucket[0], top + bucket[1]))
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
    return image if place is None else bordered(resize(image, place[2:]), place, bucket)


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size == 0:
            raise UserError(f"{path.name} is empty (0 bytes).")
        if size > MAX_FILE_BYTES:
            raise UserError(f"{path.name} is larger than 1 GiB; that is no picture to train on.")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path.name} cannot be read ({error.strerror or error}).") from error


def _open(path: Path, data: bytes) -> Image.Image:
    try:
        # Only formats of pictures: Pillow's EPS reader would start a program on what it is given.
        image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.UnidentifiedImageError:
        if data[4:12] in (b"ftypavif", b"ftypavis"):
            message = (
                f"{path.name} is an AVIF picture, which this Pillow cannot read; "
                "install pillow 11.3 or pillow-avif-plugin."
            )
        elif data[4:11] in (b"ftyphei", b"ftyphev", b"ftypmif"):
            message = f"{path.name} is a HEIC picture, which cannot be read; convert it to PNG or JPEG."
        else:
            message = f"{path.name} is no picture that can be read (damaged, or another kind of file)."
        raise UserError(message) from None
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width}×{image.height}"
        raise UserError(f"{path.name} is too large: {size} pixels, more than {MAX_PIXELS // 10**6} million.")
    return image


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    if "AVIF" not in Image.OPEN:
        # An optional plugin that registers itself; without it AVIF files are skipped with the reason.
        with suppress(ImportError):
            import pillow_avif  # noqa: F401
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{path.name} is too large: more than {MAX_PIXELS // 10**6} million pixels.") from error
    # Pillow's decoders answer damaged data with whatever goes wrong inside them (OSError, SyntaxError, struct.error,
    # IndexError, MemoryError …); for the user they all mean that this file cannot be used.
    except Exception as error:
        raise UserError(f"{path.name} is damaged and cannot be decoded ({error or type(error).__name__}).") from error


_truncation_lock = threading.Lock()
_truncation_users = 0
_truncation_before = False


@contextmanager
def _refusing_truncation() -> Iterator[None]:
    # Pillow has one switch for the process, and programs that we live in turn it on: half a picture, grey below,
    # would then be learned without a word. The first thread in turns it off, the last one out restores it.
    global _truncation_users, _truncation_before
    with _truncation_lock:
        if _truncation_users == 0:
            _truncation_before = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _truncation_users += 1
    try:
        yield
    finally:
        with _truncation_lock:
            _truncation_users -= 1
            if _truncation_users == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _truncation_before


def exif_orientation(image: Image.Image) -> int:
    """EXIF orientation 1…8 that a loaded image still needs; 1 where the data are missing or damaged."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself while it loads them; older versions keep the tag all the same
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001  as in _decoding; damaged EXIF data do not make a picture unusable
        return 1
    return value if value in _TRANSPOSES else 1


def rotate(image: Image.Image) -> Image.Image:
    """A loaded picture turned as its EXIF data say."""
    orientation = exif_orientation(image)
    if orientation == 1:
        return image
    rotated = image.transpose(_TRANSPOSES[orientation])
    rotated.info.update(image.info)  # the color profile and the transparent color
    return rotated


def to_srgb(image: Image.Image, file_format: str | None) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scale_depth(image, file_format).convert("RGB")
    if image.mode == "LAB":
        return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), _srgb(), outputMode="RGB")
    transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    if transparent or (image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA"):
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        if alpha.getextrema()[0] == 255:
            return _apply_profile(image.convert("RGB"), profile)
        colors = _apply_profile(image.convert("RGB"), profile)
        colors.putalpha(alpha)
        return colors
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    return _apply_profile(image, profile)


def _apply_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if ImageCms.getProfileDescription(source).strip() not in _SRGB_PROFILES:
                return ImageCms.profileToProfile(image, source, _srgb(), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # a damaged profile, or one of another color model: the plain numbers are the best there is
    return image.convert("RGB")


def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _scale_depth(image: Image.Image, file_format: str | None) -> Image.Image:
    """16-bit, 32-bit and float grey -> L. ``Image.convert`` would clip everything above 255 to white."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    peak = float(values.max(initial=0.0))
    if image.mode.startswith("I;16") or file_format == "PNG":  # older Pillow opens a 16-bit PNG as mode I
        white = 65535.0
    elif image.mode == "F" and peak <= 1.0:
        white = 1.0
    else:
        white = 255.0 if peak <= 255 else 65535.0 if peak <= 65535 else peak
    return Image.fromarray(np.clip(values * (255.0 / white) + 0.5, 0, 255).astype(np.uint8))
