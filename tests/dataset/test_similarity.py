"""Copies that were changed a little are found, whatever was done to them; different pictures are not."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageEnhance, ImageOps

from lora_trainer.dataset import near
from lora_trainer.dataset.checks import check_folder
from lora_trainer.dataset.inspection import inspect
from lora_trainer.dataset.layouts import Layouts
from lora_trainer.dataset.similarity import alike_earlier, find_pairs
from tests.pictures import draw_dataset

COUNT = 25


def scene(seed: int, width=320, height=240) -> Image.Image:
    """A picture with the statistics of a photograph: noise at all scales (1/f), some colored shapes, some light."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]) + 1 / width
    channels = []
    common = rng.normal(size=(height, width))
    for _ in range(3):
        spectrum = np.fft.fft2(common + 0.5 * rng.normal(size=(height, width))) / frequency**1.2
        channel = np.fft.ifft2(spectrum).real
        channels.append((channel - channel.mean()) / channel.std())
    pixels = 120 + 45 * np.stack(channels, axis=-1)
    for _ in range(4):
        left, top = rng.integers(0, width - 80), rng.integers(0, height - 80)
        pixels[top : top + 60, left : left + 70] += rng.normal(size=3) * 50
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def cropped(image, share):
    margin_x, margin_y = (round(side * (1 - share) / 2) for side in image.size)
    return image.crop((margin_x, margin_y, image.width - margin_x, image.height - margin_y))


CHANGES = {
    "brightened by 15 %": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "darkened by 20 %": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "mirrored": ImageOps.mirror,
    "mirrored and brightened": lambda image: ImageEnhance.Brightness(ImageOps.mirror(image)).enhance(1.15),
    "cropped to 95 %": lambda image: cropped(image, 0.95),
    "cropped to 90 %": lambda image: cropped(image, 0.9),
    "turned by 1°": lambda image: cropped(image.rotate(1, Image.Resampling.BICUBIC), 0.97),
    "turned by -2°": lambda image: cropped(image.rotate(-2, Image.Resampling.BICUBIC), 0.94),
    "smaller": lambda image: image.resize((240, 180), Image.Resampling.LANCZOS),
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(COUNT):
        scene(number).save(folder / f"{number:02}.png")
    return folder, [inspect(path) for path in sorted(folder.glob("*.png"))]


def test_different_pictures_are_no_copies(photographs):
    assert [pair for pair in find_pairs(photographs[1]) if pair.kind != "similar"] == []


@pytest.mark.parametrize("change", CHANGES)
def test_every_changed_copy_is_found(photographs, tmp_path, change):
    folder, pictures = photographs
    for path in sorted(folder.glob("*.png")):
        CHANGES[change](Image.open(path)).save(tmp_path / path.name)
    copies = [inspect(path) for path in sorted(tmp_path.glob("*.png"))]
    pairs = {pair.second: pair for pair in find_pairs([*pictures, *copies])}
    found = [number for number in range(COUNT) if pairs.get(COUNT + number) is not None]
    assert found == list(range(COUNT))
    assert all(pairs[COUNT + number].first == number for number in range(COUNT))
    assert {pair.kind for pair in pairs.values()} <= {"changed-copy", "near-duplicate"}


def part(left, top, right, bottom):
    """A crop to this part of a picture, in shares of its sides."""
    return lambda image: image.crop(
        (round(image.width * left), round(image.height * top), round(image.width * right), round(image.height * bottom))
    )


OTHER_CHANGES = {
    "5 % off the left": part(0.05, 0, 1, 1),
    "5 % off the top": part(0, 0.05, 1, 1),
    "a corner off, 95 %": part(0, 0, 0.95, 0.95),
    "the other corner off, 97 %": part(0.03, 0.03, 1, 1),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "grey and mirrored": lambda image: ImageOps.mirror(image).convert("L").convert("RGB"),
    "upside down": lambda image: image.rotate(180),
    "a quarter turn": lambda image: image.rotate(90, expand=True),
    "a quarter turn back": lambda image: image.rotate(-90, expand=True),
    "flipped": ImageOps.flip,
    "upside down, 5 % off": lambda image: part(0.05, 0, 1, 1)(image.rotate(180)),
}


@pytest.mark.parametrize("turn_around", [False, True])
def test_crops_off_the_middle_other_orientations_and_grey_copies_are_found(photographs, tmp_path, turn_around):
    """Each change of a picture of its own, all in one set; the copy may come before its original."""
    originals = photographs[1][: len(OTHER_CHANGES)]
    copies = []
    for number, change in enumerate(OTHER_CHANGES.values()):
        change(scene(number)).save(tmp_path / "copy.png")
        copies.append(inspect(tmp_path / "copy.png"))
    count = len(copies)
    pairs = find_pairs([*copies, *originals] if turn_around else [*originals, *copies])
    found = {(pair.first, pair.second - count) for pair in pairs if pair.kind == "changed-copy"}
    assert found == {(number, number) for number in range(count)}


def test_a_drawing_in_another_place_or_upside_down_is_another(tmp_path):
    drawing = Image.new("RGB", (256, 256), "white")
    drawing.paste((200, 30, 30), (60, 40, 110, 150))
    for number, other in enumerate([drawing, drawing.rotate(180), ImageChops.offset(drawing, 9, 5)]):
        other.save(tmp_path / f"{number}.png")
    pictures = [inspect(path) for path in sorted(tmp_path.glob("*.png"))]
    assert all(picture.is_flat for picture in pictures)
    assert [pair for pair in find_pairs(pictures) if pair.kind == "changed-copy"] == []


def test_a_changed_copy_is_a_warning_with_both_names(tmp_path):
    scene(1).save(tmp_path / "a.png")
    CHANGES["turned by 1°"](scene(1)).save(tmp_path / "b.png")
    (finding,) = [one for one in check_folder(tmp_path, trigger_word="zwx").findings if one.kind == "changed-copy"]
    assert finding.severity == "warning" and set(finding.files) == {"a.png", "b.png"}


def test_drawings_in_other_colors_are_no_copies(tmp_path):
    draw_dataset(tmp_path, 8)
    kinds = {pair.kind for pair in find_pairs([inspect(path) for path in sorted(tmp_path.glob("*.png"))])}
    assert "changed-copy" not in kinds


@pytest.fixture(scope="module")
def mixed(photographs, tmp_path_factory):
    """Photographs, changed copies, flat drawings on white paper and even areas, in no order."""
    folder = tmp_path_factory.mktemp("mixed")
    for number, change in enumerate(CHANGES.values()):
        change(scene(number)).save(folder / f"copy{number}.png")
    draw_dataset(folder, 12)
    for level in (100, 101, 130):
        Image.new("RGB", (64, 64), (level, 100, 100)).save(folder / f"even{level}.png")
    pictures = [*photographs[1], *(inspect(path) for path in sorted(folder.glob("*.png")))]
    return [pictures[place] for place in np.random.default_rng(0).permutation(len(pictures))]


@pytest.mark.parametrize(("block", "across"), [(512, 8192), (7, 5)])
def test_no_pair_is_missed_that_a_look_at_all_pairs_finds(mixed, monkeypatch, block, across):
    monkeypatch.setattr(near, "_BLOCK", block)
    monkeypatch.setattr(near, "_ACROSS", across)
    bits = np.unpackbits(np.stack([picture.phash for picture in mixed]), axis=1).astype(int)
    small = np.stack([picture.thumbnail for picture in mixed]).reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4))
    larger = np.stack([picture.larger for picture in mixed]).astype(float).reshape(-1, 8, 8, 8, 8, 3).mean(axis=(2, 4))

    def rows(pixels):
        centered = pixels.reshape(len(pixels), -1) - pixels.mean(axis=(1, 2, 3))[:, None]
        lengths = np.linalg.norm(centered, axis=1, keepdims=True)
        return centered / np.where(lengths > 1e-3 * 192**0.5, lengths, np.inf)

    plain, mirrored = rows(larger), rows(larger[:, :, ::-1])
    wanted_alike, wanted_likely = [], []
    for second in range(len(mixed)):
        apart = np.abs(small[:second] - small[second]).mean(axis=(1, 2, 3))
        close = ((bits[:second] != bits[second]).sum(axis=1) <= 8) | (apart < 1)
        wanted_alike.append((second, np.flatnonzero(close).tolist()))
        values = np.maximum(plain[:second] @ plain[second], mirrored[:second] @ plain[second])
        order = np.argsort(-values, kind="stable")[:12]
        wanted_likely.append([int(first) for first in order if values[first] > 0.75])
    assert [(second, firsts.tolist()) for second, firsts in alike_earlier(mixed)] == wanted_alike
    assert [firsts.tolist() for firsts in Layouts(mixed).likely()] == wanted_likely
    assert sum(len(firsts) for _, firsts in wanted_alike) > 9 and sum(map(len, wanted_likely)) > 9
