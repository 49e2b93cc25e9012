"""What the steps are fed with: encoded once, read back, the same for every process."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from lora_trainer.errors import UserError
from lora_trainer.training.source import ahead
from tests.training.fakes import FakeModel, Recorder, Run, configuration


def captions(run: Run, epoch: int = 0) -> list[str]:
    return [
        caption
        for position in range(run.source.steps_per_epoch)
        for batch in run.source.micro_batches(epoch, position)
        for caption in batch.captions
    ]


def test_every_picture_is_encoded_once_and_the_parts_are_released(tmp_path):
    config = configuration(tmp_path)
    first = Run(config)
    assert sum(first.model.encoded_batches) == 5 and set(first.model.encoded_batches) == {1}
    assert len(first.model.encoded_captions) == 6, "five captions and the empty one"
    assert first.model.released == {"vae", "text_encoders"}
    second = Run(config)
    assert not second.model.encoded_batches and not second.model.encoded_captions, "all of it was cached"
    assert second.recorder.phases == [("latents", 5, 5), ("captions", 6, 6)]


def test_a_damaged_file_is_made_again_and_one_lost_while_training_is_named(tmp_path):
    config = configuration(tmp_path)
    run = Run(config)
    files = sorted((tmp_path / "out" / "cache").rglob("*.cache"))
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-3])
    assert Run(config).recorder.phases.count(("latents", 5, 5)) + 1
    assert files[0].read_bytes() == whole
    for file in files:
        file.unlink()
    with pytest.raises(UserError) as error:
        run.source.micro_batches(0, 0)
    assert "damaged or removed" in error.value.message and error.value.field == "cache_dir"
    assert error.value.code == 1, "it may be started again"


def test_another_model_or_precision_or_caption_is_another_entry(tmp_path):
    config = configuration(tmp_path)
    Run(config)
    model = FakeModel()
    model.vae_key = "another"
    run = Run(config, model)
    assert len(run.model.encoded_batches) == 5 and not run.model.encoded_captions
    model = FakeModel()
    model.text_key = "another"
    run = Run(config, model)
    assert not run.model.encoded_batches and len(run.model.encoded_captions) == 6
    (tmp_path / "data" / "0.txt").write_text("something else")
    run = Run(config)
    assert run.model.encoded_captions == ["something else"]


def test_flips_and_random_crops_are_ready_when_they_are_needed(tmp_path):
    flips = Run(configuration(tmp_path / "flip", flip=True, epochs=6))
    assert len(flips.model.encoded_batches) == 10 and "vae" in flips.model.released
    flips.trainer.run()
    crops = Run(configuration(tmp_path / "crop", random_crop=True, epochs=3))
    assert not crops.model.encoded_batches and "vae" not in crops.model.released
    crops.trainer.run()
    assert len(crops.model.encoded_batches) >= 5


def test_latents_are_those_of_the_picture(tmp_path):
    run = Run(configuration(tmp_path, batch_size=1, gradient_accumulation_steps=1))
    items = [item for batch in run.plan.epoch(0) for item in batch]
    for position, item in enumerate(items):
        (batch,) = run.source.micro_batches(0, position)
        with Image.open(run.dataset.samples[item.sample].path) as image:
            if image.size != item.bucket:
                continue
            pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 127.5 - 1
        means = pixels.reshape(item.bucket[1] // 8, 8, item.bucket[0] // 8, 8, 3).mean((1, 3)).transpose(2, 0, 1)
        np.testing.assert_allclose(batch.moments[0, :3].numpy(), means, atol=1e-5)


def test_caption_dropout_tag_dropout_and_shuffling_depend_on_seed_epoch_and_place_alone(tmp_path):
    settings = {"caption_dropout": 0.4, "shuffle_tags": True, "tag_dropout": 0.3, "repeats": 8}
    one = Run(configuration(tmp_path, **settings))
    other = Run(dataclasses.replace(one.config, batch_size=1, gradient_accumulation_steps=3))
    assert captions(one) == captions(Run(one.config)) != captions(one, 1)
    assert len(captions(other)) == len(captions(one)) == 40
    drawn = captions(one) + captions(one, 1)
    assert 0.2 < sum(caption == "" for caption in drawn) / len(drawn) < 0.6
    assert all(caption.startswith("thing") for caption in drawn if caption), "the bold part is kept first"
    assert len({caption for caption in drawn if caption.startswith("thing 0")}) > 2
    assert not one.source.caches_prompts and not one.model.encoded_captions, "encoded in the step"


def test_dropped_captions_are_read_from_the_cache_too(tmp_path):
    run = Run(configuration(tmp_path, caption_dropout=1.0))
    (empty,) = {row.context.sum().item() for b in run.source.micro_batches(0, 0) for row in [b.conditioning[0]]}
    assert captions(run) == [""] * 5
    fresh = FakeModel().encode_prompts([""])
    assert empty == pytest.approx(fresh.context.sum().item())


def test_regularization_pictures_have_their_own_weight_and_no_trigger_word(tmp_path):
    from tests.training.fakes import draw_pictures

    reg = draw_pictures(tmp_path / "reg", 3)
    for path in reg.glob("*.txt"):
        path.write_text("a plain one")
    run = Run(configuration(tmp_path, reg_data_dir=str(reg), prior_loss_weight=0.25, trigger_word="zwx"))
    rows = [
        (caption, weight)
        for position in range(run.source.steps_per_epoch)
        for batch in run.source.micro_batches(0, position)
        for caption, weight in zip(batch.captions, batch.weights.tolist())
    ]
    assert len(rows) == 10
    assert all((weight == 0.25) == (caption == "a plain one") for caption, weight in rows)
    assert all(caption.startswith("zwx") for caption, weight in rows if weight == 1)


def test_masks_come_with_the_latents(tmp_path):
    config = configuration(tmp_path, use_masks=True, batch_size=1, gradient_accumulation_steps=1)
    data = tmp_path / "data"
    with Image.open(data / "0.png") as image:
        mask = Image.new("L", image.size, 0)
        mask.paste(255, (0, 0, image.width // 2, image.height))
    mask.save(data / "0.mask.png")
    run = Run(config)
    masks = {}
    for position, (item,) in enumerate(run.plan.epoch(0)):
        (batch,) = run.source.micro_batches(0, position)
        masks[run.dataset.samples[item.sample].path.name] = batch.mask
    assert masks["1.png"].eq(1).all()
    half = masks["0.png"]
    assert half.shape == (1, 1, 8, 8) and half[..., :4].eq(1).all() and half[..., 4:].eq(0).all()


def test_sdxl_gets_its_sizes_and_others_none(tmp_path):
    run = Run(configuration(tmp_path), FakeModel("sdxl"))
    batches = run.source.micro_batches(0, 0)
    first = run.plan.epoch(0)[0]
    assert batches[0].time_ids.tolist() == [list(item.time_ids) for item in first]
    assert Run(configuration(tmp_path)).source.micro_batches(0, 0)[0].time_ids is None


class FullDevice(FakeModel):
    def encode_images(self, pixels):
        assert len(pixels) == 1
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def test_a_picture_that_does_not_fit_is_an_error_about_the_resolution(tmp_path):
    with pytest.raises(UserError) as error:
        Run(configuration(tmp_path), FullDevice())
    assert error.value.field == "resolution"


def test_preparing_can_be_stopped_and_goes_on_where_it_was(tmp_path):
    run = Run(configuration(tmp_path))
    for file in (tmp_path / "out" / "cache").rglob("*.cache"):
        file.unlink()
    run.model.released.clear()

    class StopsAfterTwo(Recorder):
        def on_phase(self, name, done, total):
            super().on_phase(name, done, total)
            if done == 2:
                run.commands.stop()

    assert not run.source.prepare(run.turns, StopsAfterTwo(), run.commands)
    assert Run(run.config).recorder.phases[0] == ("latents", 2, 5)


def test_reading_ahead_keeps_the_order_and_the_errors():
    assert list(ahead(lambda value: value * 2, range(5))) == [0, 2, 4, 6, 8]
    assert list(ahead(str, [])) == []

    def fails(value):
        if value == 2:
            raise UserError("no")
        return value

    values = ahead(fails, range(4))
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(UserError):
        next(values)


def test_a_caption_that_is_cut_at_its_end_is_said(tmp_path):
    config = configuration(tmp_path, max_token_length=75)
    assert not Run(config).recorder.warnings
    longest = sorted((tmp_path / "data").glob("*.txt"))[1]
    longest.write_text(" ".join(["word"] * 76), encoding="utf-8")
    (warning,) = Run(config).recorder.warnings
    assert "1 captions are longer than max_token_length (75 tokens)" in warning and longest.stem in warning


def test_words_behind_a_secondary_separator_stay_together(tmp_path):
    config = configuration(tmp_path, shuffle_tags=True, tag_dropout=0.3, secondary_separator=";;;", epochs=6)
    for path in (tmp_path / "data").glob("*.txt"):
        path.write_text("one;;;two, three, four, five", encoding="utf-8")
    seen = [caption.split(", ") for epoch in range(6) for caption in captions(Run(config), epoch)]
    together = [parts.index("two") - parts.index("one") for parts in seen if "one" in parts]
    assert set(together) == {1} and any("one" not in parts and "two" not in parts for parts in seen)
    assert len({tuple(parts) for parts in seen}) > 5
