"""``preserve``: for captions that do not name what is learned, the base's own prediction is the target."""

from __future__ import annotations

import pytest
import torch

from lora_trainer.training.objectives.base import generator_for
from tests.adapters.layers import randomize
from tests.training.fakes import FakeModel, Run, configuration


def preserving(folder, model=None, **settings):
    defaults = {"preserve": 0.5, "trigger_word": "zwx", "gradient_accumulation_steps": 1, "dropout": 0.0}
    return Run(configuration(folder, **{"batch_size": 4, **defaults, **settings}), model)


def largest(run):
    batches = [batch for place in range(run.source.steps_per_epoch) for batch in run.source.micro_batches(0, place)]
    return max(batches, key=len)


def rows_of(run, epochs=40):
    """(caption, preserved, weight) of every picture that some epochs show."""
    for epoch in range(epochs):
        for place in range(run.source.steps_per_epoch):
            for batch in run.source.micro_batches(epoch, place):
                kept = [False] * len(batch) if batch.preserved is None else batch.preserved.tolist()
                yield from zip(batch.captions, kept, batch.weights.tolist())


def test_the_preserved_captions_do_not_name_what_is_learned(tmp_path):
    rows = list(rows_of(preserving(tmp_path, preserve=0.3)))
    kept = [caption for caption, preserved, _ in rows if preserved]
    assert len(kept) / len(rows) == pytest.approx(0.3, abs=0.05)
    assert "" in kept and "red, blue, calm" in kept and len(set(kept)) > 10
    assert not any("thing" in caption or "zwx" in caption for caption in kept)
    assert all("thing" in caption and "zwx" in caption for caption, preserved, _ in rows if not preserved)


def test_the_other_pictures_are_trained_as_without_it_and_regularization_pictures_are_left_alone(tmp_path):
    from tests.training.fakes import draw_pictures

    reg = draw_pictures(tmp_path / "reg", 3)
    for path in reg.glob("*.txt"):
        path.write_text("a plain one")
    settings = {"reg_data_dir": str(reg), "shuffle_tags": True, "caption_dropout": 0.2, "tag_dropout": 0.2}
    settings["prior_loss_weight"] = 0.25
    plain = rows_of(preserving(tmp_path, preserve=0.0, **settings), 5)
    some = rows_of(preserving(tmp_path, preserve=0.4, **settings), 5)
    differ = 0
    for (caption, never, weight), (other, preserved, same_weight) in zip(plain, some, strict=True):
        assert weight == same_weight and not never and not (preserved and weight == 0.25)
        assert caption == other or preserved
        differ += preserved
    assert differ


def test_words_that_are_given_take_the_place_of_what_is_learned(tmp_path):
    run = preserving(tmp_path, preserve_words=["disc", "a tall box"])
    captions = {caption for caption, preserved, _ in rows_of(run) if preserved}
    assert {"disc, red, blue, calm", "a tall box, red, blue, calm", "red, blue, calm", ""} == captions


def test_captions_that_do_not_say_what_is_learned_leave_the_empty_one(tmp_path):
    config = configuration(tmp_path, preserve=0.5)
    for path in (tmp_path / "data").glob("*.txt"):
        path.write_text("a red thing")
    run = Run(config)
    assert {caption for caption, preserved, _ in rows_of(run, 4) if preserved} == {""}
    assert any("only what the empty caption gives" in warning for warning in run.recorder.warnings)
    assert not preserving(tmp_path / "named").recorder.warnings


@pytest.mark.parametrize("settings", [{}, {"train_text_encoder": True}, {"loss": "huber", "use_masks": True}], ids=str)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_distance_from_the_base_on_the_same_noise(tmp_path, prediction_type, settings):
    run = preserving(tmp_path, FakeModel(prediction_type=prediction_type), **settings)
    objective, batch = run.trainer.train_step.objective, largest(run)
    if batch.mask is not None:
        batch.mask.zero_()  # outside of masks nothing is learned, but everything is kept
    kept = batch.preserved
    assert kept.sum() == 2
    drawn = objective.draw(batch, generator_for(0, "draw"))
    untouched = objective.inputs(drawn)
    base = objective.predict(untouched).detach()
    randomize(run.adapters, deviation=0.2)
    inputs = objective.inputs(drawn)
    torch.testing.assert_close(inputs.base_pred[kept], base[kept])
    now = objective.predict(inputs)
    errors = (now - base)[kept].square().mean(dim=(1, 2, 3)) * objective._weight[drawn.timesteps[kept]]
    assert errors.min() > 0
    single = [objective.loss(objective.inputs(drawn[row : row + 1])) for row in kept.nonzero().flatten().tolist()]
    torch.testing.assert_close(torch.stack(single), errors, rtol=1e-4, atol=1e-7)
    others = [objective.loss(objective.inputs(drawn[row : row + 1])) for row in (~kept).nonzero().flatten().tolist()]
    torch.testing.assert_close(objective.loss(inputs), errors.sum() + sum(others), rtol=1e-4, atol=1e-7)
    assert all(adapter.active for _, adapter in run.adapters.items()), "switched off within the step alone"


@pytest.mark.parametrize("text", [False, True])
def test_new_adapters_have_nothing_to_keep_and_the_base_gets_no_gradient(tmp_path, text):
    run = preserving(tmp_path, preserve=0.9, train_text_encoder=text, batch_size=2)
    objective = run.trainer.train_step.objective
    batches = [batch for place in range(3) for batch in run.source.micro_batches(0, place)]
    batch = next(batch for batch in batches if batch.preserved.all())
    inputs = objective.inputs(objective.draw(batch, generator_for(0, "draw")))
    assert objective.loss(inputs).item() == pytest.approx(0, abs=1e-12) and not inputs.base_pred.requires_grad
    randomize(run.adapters, deviation=0.2)
    objective.loss(objective.inputs(objective.draw(batch, generator_for(0, "draw")))).backward()
    learned = {target.part for target, adapter in run.adapters.items() if adapter.lora_up.grad.any()}
    assert learned == ({"unet", "text_encoder"} if text else {"unet"})


def test_it_holds_the_base_where_it_was_not_to_learn(tmp_path):
    """The same run with and without it: what both say to captions without the core, against the base."""

    def moved(preserve):
        run = preserving(tmp_path / str(preserve), preserve=preserve, epochs=8, batch_size=2, learning_rate=1e-2)
        untouched = FakeModel()
        run.trainer.run()
        generator = generator_for(0, "look")
        noisy, timesteps = torch.randn(8, 4, 8, 8, generator=generator), torch.arange(50, 1000, 120)
        conditioning = untouched.encode_prompts(["red, blue, calm"] * 8)
        after, before = (model.predict(noisy, timesteps, conditioning, None) for model in (run.model, untouched))
        return (after - before).square().mean().item()

    assert moved(0.5) < 0.5 * moved(0.0)
