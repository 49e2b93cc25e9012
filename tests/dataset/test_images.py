from __future__ import annotations

import io
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from lora_trainer.dataset import images
from lora_trainer.dataset.images import flatten, load_mask, load_pixels, load_view, measure, open_image, resize
from lora_trainer.dataset.samples import Sample, View
from lora_trainer.errors import UserError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def two_colors(size: tuple[int, int] = (40, 20), left=RED, right=BLUE) -> Image.Image:
    image = Image.new("RGB", size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def near(actual, expected, tolerance: int = 3) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(actual, expected))


def save(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def whole(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The pixels of a picture as (H, W, 3) in 0…255, through ``load_pixels``."""
    pixels = load_pixels(path, size, size, (0, 0))
    assert pixels.shape == (3, size[1], size[0]) and str(pixels.dtype) == "torch.float32" and pixels.is_contiguous()
    return np.rint((pixels.numpy().transpose(1, 2, 0) + 1) * 127.5)


# --- formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "gif", "tiff", "avif"])
def test_every_format_even_under_a_wrong_name(tmp_path, ending):
    if ending == "avif" and "AVIF" not in images._formats():
        pytest.skip("this Pillow has no AVIF")
    path = save(two_colors(), tmp_path / f"a.{ending}")
    wrong = path.rename(tmp_path / ("a.PNG" if ending != "png" else "a.JPG"))
    assert measure(wrong)[0] == (40, 20)
    image = open_image(wrong)
    assert image.mode == "RGB" and image.size == (40, 20)
    assert near(image.getpixel((4, 10)), RED, 12) and near(image.getpixel((35, 10)), BLUE, 12)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
def test_exif_orientation(tmp_path, orientation, ending):
    # The corners of the upright picture; each stored form is what a camera held that way writes.
    upright = Image.new("RGB", (48, 32), WHITE)
    upright.paste(RED, (0, 0, 24, 16))
    upright.paste(BLUE, (24, 16, 48, 32))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # inverse of images._TRANSPOSES, by number
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(stored, tmp_path / f"a.{ending}", exif=exif.tobytes())
    assert measure(path)[0] == (48, 32)
    image = open_image(path)
    assert image.size == (48, 32)
    corners = [image.getpixel(place) for place in ((4, 4), (44, 4), (4, 28), (44, 28))]
    assert all(near(corner, color, 12) for corner, color in zip(corners, (RED, WHITE, WHITE, BLUE)))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_exif_data_do_not_matter(tmp_path):
    path = save(two_colors(), tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\x01\x02")
    assert measure(path)[0] == open_image(path).size == (40, 20)


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_an_animation_is_its_first_frame(tmp_path, ending):
    frames = [Image.new("RGB", (20, 20), color) for color in (RED, GREEN, BLUE)]
    path = save(frames[0], tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], duration=50)
    assert Image.open(path).n_frames == 3
    assert near(open_image(path).getpixel((9, 9)), RED, 12)


def test_alpha_is_composited_over_white_before_resizing(tmp_path):
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))  # the hidden color is black
    image.paste((255, 0, 0, 255), (0, 0, 20, 20))
    image.putpixel((39, 19), (0, 0, 0, 51))
    path = save(image, tmp_path / "a.png")
    assert open_image(path).mode == "RGBA"
    pixels = whole(path, (40, 20))
    assert tuple(pixels[10, 5]) == RED and tuple(pixels[10, 30]) == WHITE and tuple(pixels[19, 39]) == (204, 204, 204)
    small = whole(path, (8, 4))
    assert tuple(small[1, 6]) == WHITE, "black from under the transparency leaked in"


def test_palettes_with_transparency(tmp_path):
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.paste(1, (0, 0, 10, 20))
    one = save(palette, tmp_path / "one.png", transparency=0)
    per_entry = save(palette, tmp_path / "entry.png", transparency=bytes([0, 255]))
    gif = save(palette, tmp_path / "a.gif", transparency=0)
    color_key = save(two_colors((20, 20), RED, (0, 0, 0)), tmp_path / "key.png", transparency=(0, 0, 0))
    for path in (one, per_entry, gif, color_key):
        pixels = whole(path, (20, 20))
        assert tuple(pixels[5, 3]) == RED and tuple(pixels[5, 15]) == WHITE, path
    opaque = save(palette, tmp_path / "opaque.png")
    assert open_image(opaque).mode == "RGB" and tuple(whole(opaque, (20, 20))[5, 15]) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I", "F", "I;16"])
def test_every_mode_of_a_tiff_ends_as_rgb(tmp_path, mode):
    source = Image.new("L", (20, 20), 200)
    if mode == "I;16":
        image = Image.fromarray(np.full((20, 20), 200 * 257, np.uint16))
    elif mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(source.convert("RGB"), ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
    elif mode == "1":
        image = Image.new("1", (20, 20), 1)
    else:
        image = source.convert(mode)
    expected = 255 if mode == "1" else 200
    path = save(image, tmp_path / "a.tiff")
    assert np.allclose(whole(path, (20, 20)), expected, atol=2)


def test_sixteen_bit_and_float_grey_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 400).reshape(20, 20)
    expected = np.rint(ramp / 257)
    pictures = {
        "u16.png": Image.fromarray(ramp.astype(np.uint16)),
        "u16.tiff": Image.fromarray(ramp.astype(np.uint16)),
        "i32.tiff": Image.fromarray(ramp.astype(np.int32)),
        "f32.tiff": Image.fromarray((ramp / 65535).astype(np.float32)),
        "f255.tiff": Image.fromarray((ramp / 257).astype(np.float32)),
    }
    for name, image in pictures.items():
        pixels = whole(save(image, tmp_path / name), (20, 20))
        assert np.abs(pixels[..., 0] - expected).max() <= 1, name
        assert (pixels[..., 0] == pixels[..., 2]).all()
    dark = save(Image.fromarray(np.full((20, 20), 200, np.uint16)), tmp_path / "dark.png")
    assert whole(dark, (20, 20)).max() <= 1, "a dark 16-bit picture is dark, whatever Pillow calls its mode"
    odd = np.full((20, 20), 0.5, np.float32)
    odd[0, :3] = np.nan, np.inf, -5
    assert tuple(whole(save(Image.fromarray(odd), tmp_path / "nan.tiff"), (20, 20))[0, :4, 0]) == (0, 0, 0, 128)


def test_cmyk_jpeg(tmp_path):
    path = save(two_colors().convert("CMYK"), tmp_path / "a.jpg", quality=95)
    assert measure(path)[0] == (40, 20)
    assert near(whole(path, (40, 20))[10, 5], RED, 12)


def swapped_profile() -> bytes:
    """An RGB profile whose red and blue primaries are exchanged: red numbers show blue."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = data.replace(b"rXYZ", b"tmp!", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"tmp!", b"bXYZ", 1)
    return data.replace("sRGB".encode("utf-16-be"), "TEST".encode("utf-16-be"))


def test_icc_profiles_become_srgb(tmp_path):
    image = two_colors()
    swapped = save(image, tmp_path / "swapped.png", icc_profile=swapped_profile())
    assert near(open_image(swapped).getpixel((4, 4)), BLUE) and near(open_image(swapped).getpixel((35, 4)), RED)
    alpha = image.convert("RGBA")
    alpha.putpixel((0, 0), (0, 0, 0, 0))
    with_alpha = open_image(save(alpha, tmp_path / "alpha.png", icc_profile=swapped_profile()))
    assert near(with_alpha.getpixel((4, 4)), (*BLUE, 255)) and with_alpha.getpixel((0, 0))[3] == 0
    rotated = Image.Exif()
    rotated[0x0112] = 3
    turned = open_image(save(image, tmp_path / "turned.png", icc_profile=swapped_profile(), exif=rotated.tobytes()))
    assert near(turned.getpixel((4, 4)), RED), "the profile survives the rotation"


def test_unusable_or_identical_profiles_leave_the_numbers_alone(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in (("srgb", srgb), ("broken", b"not a profile"), ("cut", swapped_profile()[:200])):
        path = save(two_colors(), tmp_path / f"{name}.png", icc_profile=profile)
        assert open_image(path).getpixel((4, 4)) == RED, name
    grey = save(Image.new("L", (20, 20), 99), tmp_path / "grey.png", icc_profile=swapped_profile())
    assert open_image(grey).getpixel((4, 4)) == (99, 99, 99), "an RGB profile on a grey picture"


# --- pixels -----------------------------------------------------------------------------------------------------


def test_scale_crop_and_flip(tmp_path):
    values = np.arange(40 * 20, dtype=np.uint8).reshape(20, 40)
    path = save(Image.fromarray(values), tmp_path / "a.png")
    straight = load_pixels(path, (40, 20), (16, 8), (5, 3)).numpy()
    assert np.array_equal(straight[0], values[3:11, 5:21].astype(np.float32) / np.float32(127.5) - 1)
    flipped = load_pixels(path, (40, 20), (16, 8), (5, 3), flip=True).numpy()
    assert np.array_equal(flipped, straight[:, :, ::-1])
    assert straight.min() >= -1 and straight.max() <= 1


def test_a_smaller_picture_at_its_place_goes_on_as_its_borders(tmp_path):
    values = np.arange(16 * 8, dtype=np.uint8).reshape(8, 16)
    path = save(Image.fromarray(values), tmp_path / "a.png")
    pixels = (load_pixels(path, (16, 8), (16, 8), (0, 0), place=(6, 1, 8, 4)).numpy()[0] + 1) * 127.5
    small = values.reshape(4, 2, 8, 2).mean((1, 3))  # each 2×2
    assert np.abs(pixels[1:5, 6:14] - small).max() <= 0.51
    assert np.array_equal(pixels[1:5, :7], np.repeat(pixels[1:5, 6:7], 7, axis=1))
    assert np.array_equal(pixels[5:], np.repeat(pixels[4:5], 3, axis=0)) and np.array_equal(pixels[0], pixels[1])


def test_area_filter_down_and_lanczos_up():
    checker = np.indices((32, 32)).sum(0) % 2 * 255
    image = Image.fromarray(checker.astype(np.uint8))
    assert set(np.unique(np.asarray(resize(image, (16, 16))))) <= {127, 128}  # the mean of each 2×2
    edge = Image.fromarray(np.repeat([[0, 200]], 2, axis=0).astype(np.uint8)).resize((16, 16), Image.Resampling.NEAREST)
    assert np.asarray(resize(edge, (64, 64))).max() > 200, "Lanczos overshoots at an edge"
    assert resize(image, (32, 32)) is image


def test_flatten_over_a_grey_level():
    image = Image.new("RGBA", (2, 2), (255, 255, 255, 0))
    assert flatten(image).getpixel((0, 0)) == WHITE and flatten(image, 0).getpixel((0, 0)) == (0, 0, 0)


# --- masks ------------------------------------------------------------------------------------------------------


def item(bucket=(32, 16), scaled=(40, 20), crop=(8, 2), flip=False) -> View:
    return View(0, bucket, scaled, crop, flip, ())


def sample(path: Path, mask: Path | None = None) -> Sample:
    return Sample(str(path), path.name, "x", (40, 20), "0" * 64, mask_path=mask)


def test_mask_file_goes_through_the_same_view(tmp_path):
    path = save(two_colors(), tmp_path / "a.png")
    mask = Image.new("L", (80, 40), 0)  # twice the picture's size: stretched over it
    mask.paste(255, (0, 0, 40, 40))
    visit = sample(path, save(mask, tmp_path / "a.mask.png"))
    # 40×20, cropped from x = 8: white up to x = 20, that is 12 of 32 pixels: one cell and a half.
    found = load_mask(visit, item(), (4, 2))
    assert found.shape == (1, 2, 4) and str(found.dtype) == "torch.float32"
    assert found[0, 0].tolist() == pytest.approx([1, 0.5, 0, 0], abs=0.01)
    assert load_mask(visit, item(flip=True), (4, 2))[0, 1].tolist() == pytest.approx([0, 0, 0.5, 1], abs=0.01)


def test_mask_from_alpha_or_none(tmp_path):
    image = two_colors().convert("RGBA")
    image.paste((0, 0, 0, 0), (20, 0, 40, 20))
    found = load_mask(sample(save(image, tmp_path / "a.png")), item(), (4, 2))
    assert found[0, 0].tolist() == pytest.approx([1, 0.5, 0, 0], abs=0.01)
    assert load_mask(sample(save(two_colors(), tmp_path / "b.png")), item(), (4, 2)) is None


def test_a_mask_painted_on_transparency_is_black_where_nothing_is_painted(tmp_path):
    mask = Image.new("RGBA", (40, 20), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 20, 20))
    visit = sample(save(two_colors(), tmp_path / "a.png"), save(mask, tmp_path / "a.mask.png"))
    assert load_mask(visit, item(), (4, 2))[0, 0].tolist() == pytest.approx([1, 0.5, 0, 0], abs=0.01)


def test_load_view_is_load_pixels_of_its_view(tmp_path):
    path = save(two_colors(), tmp_path / "a.png")
    visit = item(flip=True)
    assert load_view(sample(path), visit).equal(load_pixels(path, (40, 20), (32, 16), (8, 2), True))


# --- what cannot be used ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
def test_truncated_pictures_are_found_even_if_the_host_tolerates_them(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path = save(noise, tmp_path / f"a.{ending}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for function in (measure, open_image):
        with pytest.raises(UserError, match=rf"a\.{ending} "):
            function(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True, "the host's switch is as it was"


def test_the_hosts_switch_is_restored_after_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = save(two_colors((200, 200)), tmp_path / "a.png")
    threads = [threading.Thread(target=lambda: [measure(path) for _ in range(10)]) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True and images._truncation_users == 0


@pytest.mark.parametrize("host_limit", [None, 1000, Image.MAX_IMAGE_PIXELS])
def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path, monkeypatch, host_limit):
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 14000, 14000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x") + chunk(b"IEND", b""))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", host_limit)
    for function in (measure, open_image):
        with pytest.raises(UserError, match=r"bomb\.png is too large"):
            function(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"hello", "no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\x89PNG\r\n\x1a\n", "damaged|no picture"),
        (b"\xff\xd8\xff\xe0", "damaged|no picture"),
    ],
)
def test_files_that_are_no_pictures(tmp_path, data, reason):
    path = tmp_path / "a b 中.png"
    path.write_bytes(data)
    for function in (measure, open_image):
        with pytest.raises(UserError, match=rf"a b 中\.png .*({reason})"):
            function(path)


def test_missing_file_folder_and_too_large_file(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be read"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(UserError, match="cannot be read"):
        open_image(tmp_path)
    sparse = tmp_path / "sparse.png"
    with open(sparse, "wb") as handle:
        handle.truncate(images.MAX_FILE_BYTES + 1)
    with pytest.raises(UserError, match="larger than 1 GiB"):
        open_image(sparse)


@pytest.mark.parametrize(
    ("size", "reason"),
    [((1, 1), "too small"), ((15, 100), "too small"), ((20000, 20), "aspect"), ((20, 20000), "aspect")],
)
def test_sizes_that_teach_nothing(tmp_path, size, reason):
    with pytest.raises(UserError, match=reason):
        measure(save(Image.new("L", size), tmp_path / "a.png"))


@pytest.mark.parametrize("size", [(16, 16), (16, 256), (320, 20)])
def test_sizes_at_the_limit_are_used(tmp_path, size):
    assert measure(save(Image.new("L", size), tmp_path / "a.png"))[0] == size


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_hundreds_of_damaged_pictures_end_in_pixels_or_in_a_named_reason(tmp_path):
    rng = random.Random(0)
    colors = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    source = Image.fromarray(colors).resize((96, 72), Image.Resampling.BICUBIC)
    kinds = [
        ("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("BMP", {}), ("GIF", {}),
        ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
    ]  # fmt: skip
    read = refused = 0
    path = tmp_path / "damaged.png"
    for file_format, options in kinds:
        buffer = io.BytesIO()
        source.save(buffer, file_format, **options)
        for _ in range(60):
            data = bytearray(buffer.getvalue())
            if rng.random() < 0.3:
                del data[rng.randrange(len(data)) :]
            for _ in range(rng.choice([0, 1, 1, 4, 20])):
                reach = len(data) if rng.random() < 0.5 else min(200, len(data))
                if reach:
                    data[rng.randrange(reach)] = rng.randrange(256)
            path.write_bytes(data)
            try:
                size, _ = measure(path)
            except UserError as error:
                assert "damaged.png" in error.message
                refused += 1
                continue
            # What the scan lets through can be trained on.
            assert open_image(path).size == size
            read += 1
    assert read > 50 and refused > 100
