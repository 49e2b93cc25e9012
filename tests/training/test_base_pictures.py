"""``preserve_pictures``: what is preserved is shown as pictures that the base draws."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.dataset.cache import TensorCache
from lora_trainer.dataset.captions import parse
from lora_trainer.dataset.folder import scan
from lora_trainer.dataset.unnamed import WORDS, other_captions
from lora_trainer.errors import UserError
from lora_trainer.models.base import NoiseSchedule
from lora_trainer.training import preview
from lora_trainer.training.base_pictures import EMPTY_SHARE, GUIDANCE, STEPS
from lora_trainer.training.callbacks import TrainCommands
from lora_trainer.training.inputs import BatchSource
from lora_trainer.training.precision import Precision
from lora_trainer.training.preview import sample
from lora_trainer.training.ranks import ALONE
from lora_trainer.training.run_captions import RunCaptions
from tests.adapters.layers import randomize
from tests.training.fakes import FakeModel, Recorder, Run, Turns, configuration, draw_pictures

DRAWN = {"preserve": 0.5, "preserve_pictures": 4, "preserve_words": ["disc", "box"], "batch_size": 4, "dropout": 0.0,
         "gradient_accumulation_steps": 1}  # fmt: skip


ALPHAS = FakeModel().schedule.alphas_cumprod


def drawing(folder, model=None, **settings):
    config = configuration(folder, **{**DRAWN, **settings})
    draw_pictures(folder / "data", sizes=((64, 64), (96, 32)))
    return Run(config, model)


def rows_of(run, epochs=6):
    """(caption, preserved, moments) of every picture that some epochs show."""
    for epoch in range(epochs):
        for place in range(run.source.steps_per_epoch):
            for batch in run.source.micro_batches(epoch, place):
                kept = [False] * len(batch) if batch.preserved is None else batch.preserved.tolist()
                yield from zip(batch.captions, kept, batch.moments)


def moments_of(run):
    return [run.source.cache.get(picture.key)["moments"] for picture in run.source.base_pictures.all]


def remake(run, cache, ranks=ALONE):
    """A source like that of ``run``, on another cache."""
    cache = TensorCache(cache)
    source = BatchSource(run.config, FakeModel(), run.dataset, run.plan, cache, run.precision, ranks=ranks)
    source.base_pictures.bare = nullcontext
    return source


def test_other_things_take_turns_in_the_place_of_what_is_learned():
    captions = [parse(f"a **thing {number}** in {place}") for number, place in enumerate(("snow", "sand"))]
    found = other_captions(captions, "", 0, ["disc", "box", "ring"], 12)
    assert Counter(text.split()[1] for text in found) == {"disc": 4, "box": 4, "ring": 4}
    assert Counter(text.split()[3] for text in found) == {"snow": 6, "sand": 6}
    assert found == other_captions(captions, "", 0, ["disc", "box", "ring"], 12)
    ordinary = other_captions(captions, "", 0, [], len(WORDS))
    assert sorted(text.split()[1] for text in ordinary) == sorted(WORDS)
    assert other_captions([parse("a zwx")], "zwx", 0, ["dog"], 2) == ["a dog", "a dog"]
    assert other_captions([parse("in snow")], "zwx", 0, ["dog"], 1) == ["dog, in snow"], "as the trigger word"
    assert other_captions([parse("")], "zwx", 0, ["dog"], 1) == ["dog"]


def test_captions_that_do_not_say_what_is_learned_are_left_out():
    captions = [parse("a picture"), parse("a **thing**")]
    assert set(other_captions(captions, "", 0, ["dog", "cat"], 4)) == {"a dog", "a cat"}
    assert other_captions(captions[:1], "", 0, ["dog"], 2) == ["", ""]


def test_they_are_written_as_captions_of_the_run_are(tmp_path):
    run = drawing(tmp_path)
    for path in (tmp_path / "data").glob("*.txt"):
        path.write_text(r"a **thing** \(old\);;;on a table")
    settings = {"secondary_separator": ";;;", "weighted_captions": True}
    captions = RunCaptions(dataclasses.replace(run.config, **settings), scan(run.config)).unnamed
    assert set(captions) == {"", r"a disc \(old\), on a table", r"a box \(old\), on a table"}


def test_what_is_preserved_is_shown_as_a_picture_of_its_caption_and_size(tmp_path):
    run = drawing(tmp_path, preserve_pictures=6)
    pictures = run.source.base_pictures.all
    assert Counter(one.size for one in pictures) == {(64, 64): 4, (96, 32): 2}, "as often as pictures have this size"
    assert len({one.key for one in pictures}) == len(pictures)
    drawn = {tuple(moments.flatten()[:8].tolist()): one for one, moments in zip(pictures, moments_of(run))}
    rows = list(rows_of(run, 60))
    kept = [row for row in rows if row[1]]
    for caption, _, moments in kept:
        picture = drawn[tuple(moments.flatten()[:8].tolist())]
        assert caption in ("", picture.caption) and tuple(reversed(moments.shape[1:])) == tuple(
            side // 8 for side in picture.size
        )
    assert sum(caption == "" for caption, _, _ in kept) / len(kept) == pytest.approx(EMPTY_SHARE, abs=0.06)
    assert {caption.split(",")[0] for caption, _, _ in kept} == {"", "disc", "box"}


def test_what_is_learned_is_shown_as_without_it(tmp_path):
    settings = {"shuffle_tags": True, "caption_dropout": 0.2}
    plain, some = (rows_of(drawing(tmp_path, **settings, preserve=share), 5) for share in (0.0, 0.5))
    for (caption, never, moments), (other, preserved, shown) in zip(plain, some, strict=True):
        assert not never and torch.equal(moments, shown) != preserved
        assert preserved or caption == other
    assert drawing(tmp_path / "none", preserve=0.0).source.base_pictures is None


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_picture_is_what_a_preview_with_the_same_noise_shows(tmp_path, monkeypatch, prediction_type):
    run = drawing(tmp_path, FakeModel(prediction_type=prediction_type))
    picture, model = run.source.base_pictures.all[-1], FakeModel(prediction_type=prediction_type)
    shown = []
    model.decode_latents = lambda latents: shown.append(latents) or torch.zeros(1, 3, 8, 8)
    generator_for = preview.generator_for
    monkeypatch.setattr(
        preview, "generator_for", lambda seed, purpose: generator_for(seed, "base picture", picture.number)
    )
    width, height = picture.size
    sample(model, picture.caption, width=width, height=height, steps=STEPS, cfg=GUIDANCE, seed=run.config.seed)
    again = model.sample_latents(moments_of(run)[-1][None], torch.Generator().manual_seed(1))
    torch.testing.assert_close(again, shown[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"train_text_encoder": True}], ids=str)
def test_the_base_draws_them_without_the_adapters(tmp_path, settings):
    run = drawing(tmp_path / "run", **settings)
    source = remake(run, tmp_path / "again")
    adapters = AdapterSet.build(source.model.lora_targets(), run.config)
    randomize(adapters, deviation=0.5)

    def drawn():
        source.cache = source.base_pictures._cache = TensorCache(tmp_path / f"{len(source.model.encoded_captions)}")
        assert source.prepare(Turns(), Recorder(), TrainCommands())
        return [source.cache.get(one.key)["moments"] for one in source.base_pictures.all]

    with adapters:
        changed = drawn()
        source.model.released.clear()
        source.base_pictures.bare = partial(adapters.enabled, False)
        alone = drawn()
        assert all(adapter.active for _, adapter in adapters.items())
    assert all(torch.equal(one, other) for one, other in zip(alone, moments_of(run)))
    assert not any(torch.equal(one, other) for one, other in zip(changed, alone))


def test_they_are_drawn_once_and_the_same_again_where_one_is_lost(tmp_path):
    run = drawing(tmp_path)
    before, pictures = moments_of(run), run.source.base_pictures
    assert ("known", 4, 4) in run.recorder.phases and not pictures.missing
    run.source.cache.path(pictures.all[2].key).unlink()
    second = drawing(tmp_path)
    assert [phase for phase in second.recorder.phases if phase[0] == "known"] == [("known", 3, 4), ("known", 4, 4)]
    assert all(torch.equal(one, other) for one, other in zip(before, moments_of(second)))
    others = drawing(tmp_path, seed=1).source.base_pictures.all
    assert not {one.key for one in others} & {one.key for one in pictures.all}


def test_a_step_is_tried_before_they_are_drawn(tmp_path):
    run = drawing(tmp_path)
    assert not remake(run, tmp_path / "out" / "cache").worth_trying()
    run.source.cache.path(run.source.base_pictures.all[0].key).unlink()
    source = remake(run, tmp_path / "out" / "cache")
    assert source.worth_trying()
    batch = source.trial_batch(0, Turns(), TrainCommands())
    assert batch.preserved is None


def test_a_stop_is_heard_between_two_and_what_was_drawn_stays(tmp_path):
    run = drawing(tmp_path)
    source, commands, turns = remake(run, tmp_path / "again"), TrainCommands(), Turns()

    class Stopping(Recorder):
        def on_phase(self, name, done, total):
            super().on_phase(name, done, total)
            if (name, done) == ("known", 2):
                commands.stop_and_save()

    recorder = Stopping()
    assert not source.prepare(turns, recorder, commands)
    assert recorder.phases[-1] == ("known", 2, 4)
    assert [one.key in source.cache for one in source.base_pictures.all] == [True, True, False, False]


def test_pictures_that_do_not_fit_end_with_a_sentence_and_room_is_made_first(tmp_path):
    run = drawing(tmp_path)
    source, asked = remake(run, tmp_path / "again"), []
    predict = source.model.predict
    enough = [float("inf")]

    def short(*arguments):
        if len(asked) < enough[0]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return predict(*arguments)

    source.model.predict = short
    source.base_pictures._make_room = lambda: asked.append(True)
    with pytest.raises(UserError, match="cannot draw a picture of 64×64") as found:
        source.prepare(Turns(), Recorder(), TrainCommands())
    assert found.value.field == "preserve_pictures" and asked
    asked.clear()
    enough[0] = 1
    source.model.released.clear()
    assert source.prepare(Turns(), Recorder(), TrainCommands()) and len(asked) == 1


def test_a_picture_that_is_not_finite_is_refused_and_not_kept(tmp_path):
    run = drawing(tmp_path)
    source = remake(run, tmp_path / "again")
    predict = source.model.predict
    source.model.predict = lambda *arguments: predict(*arguments) * float("inf")
    with pytest.raises(UserError, match=r"picture of \"disc.* not finite") as found:
        source.prepare(Turns(), Recorder(), TrainCommands())
    assert found.value.field == "preserve_pictures"
    assert not any(one.key in source.cache for one in source.base_pictures.all)


@pytest.mark.parametrize(
    "changes",
    [
        {"network_key": "other"}, {"text_key": "other"}, {"schedule": NoiseSchedule(ALPHAS, "v_prediction")},
        {"schedule": NoiseSchedule(ALPHAS**2, "epsilon")}, {"seed": 1}, {"max_token_length": 75},
        {"weighted_captions": True}, {"base_precision": "fp8"}, {"mixed_precision": "bf16"},
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_a_picture_changes_its_name(tmp_path, changes):
    run = drawing(tmp_path)
    of_model = {name: value for name, value in changes.items() if hasattr(run.model, name)}
    settings = {name: value for name, value in changes.items() if name not in of_model}
    config = dataclasses.replace(run.config, **settings)
    precision = Precision(torch.device("cpu"), torch.float32, torch.bfloat16 if "mixed_precision" in changes else None)
    cache, model = run.source.cache, FakeModel()
    vars(model).update(of_model)
    other = BatchSource(config, model, run.dataset, run.plan, cache, precision).base_pictures
    assert not {one.key for one in other.all} & {one.key for one in run.source.base_pictures.all}


def test_a_model_without_guidance_shows_none_with_the_empty_caption(tmp_path):
    run = drawing(tmp_path)
    pictures, rng = run.source.base_pictures, random.Random(0)
    assert any(pictures.choose((64, 64), rng)[1] == "" for _ in range(100))
    pictures._takes_negative = False
    assert all(pictures.choose((64, 64), rng)[1] for _ in range(100))


def test_sdxl_is_told_of_their_size(tmp_path):
    run = drawing(tmp_path, FakeModel("sdxl"))
    sizes = {tuple(row) for told in run.model.time_ids if told is not None for row in told.tolist()}
    assert sizes == {(64, 64, 0, 0, 64, 64), (32, 96, 0, 0, 32, 96)}
    run.model.time_ids.clear()
    for place in range(run.source.steps_per_epoch):
        (batch,) = run.source.micro_batches(0, place)
        width, height = batch.moments.shape[-1] * 8, batch.moments.shape[-2] * 8
        for kept, told in zip(batch.preserved.tolist(), batch.time_ids.tolist()):
            assert not kept or told == [height, width, 0, 0, height, width]


def test_regularization_pictures_of_another_size_get_none(tmp_path):
    reg = draw_pictures(tmp_path / "reg", 2, sizes=((32, 128),))
    run = drawing(tmp_path, reg_data_dir=str(reg))
    assert {one.size for one in run.source.base_pictures.all} == {(64, 64), (96, 32)}
    assert any(view.bucket == (32, 128) for batch in run.plan.epoch(0) for view in batch)
    assert len(list(rows_of(run, 2))) == 20


def test_a_size_that_is_seldom_shown_has_one_as_well(tmp_path):
    pictures = drawing(tmp_path, preserve_pictures=1).source.base_pictures
    assert Counter(one.size for one in pictures.all) == {(64, 64): 1, (96, 32): 1}
    assert pictures.choose((96, 32), random.Random(0))[0].size == (96, 32)


def test_captions_that_vary_are_encoded_as_the_cache_has_them(tmp_path):
    kept, varying = drawing(tmp_path / "kept"), drawing(tmp_path / "varying", shuffle_tags=True)
    assert kept.source.caches_prompts and not varying.source.caches_prompts
    assert [one.key for one in kept.source.base_pictures.all] == [one.key for one in varying.source.base_pictures.all]
    assert all(torch.equal(one, other) for one, other in zip(moments_of(kept), moments_of(varying)))


def test_a_slow_picture_is_no_process_that_hangs(tmp_path):
    class Watched(type(ALONE)):
        inside = False

        @contextmanager
        def unhurried(self, seconds=None):
            self.inside = True
            yield
            self.inside = False

    run, ranks = drawing(tmp_path), Watched()
    source, drawn = remake(run, tmp_path / "again", ranks), []
    predict = source.model.predict
    source.model.predict = lambda *arguments: drawn.append(ranks.inside) or predict(*arguments)
    assert source.prepare(Turns(), Recorder(), TrainCommands())
    assert len(drawn) == 4 * STEPS and all(drawn)
