"""The losses and targets of learning a change, against the formulas in NumPy and float64."""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import TrainConfig, from_mapping
from lora_trainer.config.changes import filled
from lora_trainer.devices import torch_version
from lora_trainer.models.base import Conditioning
from lora_trainer.models.schedule import rescale_zero_terminal_snr
from lora_trainer.run import file_lender
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.change_inputs import WordSource, kept_prompts
from lora_trainer.training.forecast import work_on_batch
from lora_trainer.training.objectives.base import generator_for
from lora_trainer.training.objectives.change import DENOISING_CFG, PairBatch, PairObjective, WordDraws, WordObjective
from lora_trainer.training.objectives.pictures import Batch
from lora_trainer.training.precision import Precision
from lora_trainer.training.step import TrainingStep
from tests.adapters.layers import randomize
from tests.flux import tiny_flux
from tests.training.fakes import CONTEXT, FakeModel, Turns

PRECISION = Precision(torch.device("cpu"), torch.float32, None)
SIDE = 64
ALPHAS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def prepared(prediction_type="epsilon", **settings):
    """A model with adapters that change something."""
    model = FakeModel(prediction_type=prediction_type)
    config = TrainConfig(**{"lora_rank": 2, "target_modules": ["attention"], "learning_rate": 1e-9, **settings})
    adapters = AdapterSet.build(model.lora_targets(), config)
    randomize(adapters)
    return model, config, adapters


def base_of(model, adapters):
    """The bare network, in float64: predict(latents, timesteps, prompt)."""

    def predict(latents, timesteps, prompt):
        context = model.encode_prompts([prompt]).context.expand(len(latents), -1, -1)
        with torch.no_grad(), adapters.enabled(False):
            return model.predict(torch.tensor(latents).float(), torch.tensor(timesteps), Conditioning(context), None)

    return lambda *arguments: predict(*arguments).double().numpy()


def words(model, config, step=0):
    source = WordSource(config, model, (SIDE, SIDE), PRECISION, keep_model_parts=True)
    assert source.prepare(Turns(), TrainCallbacks(), TrainCommands())
    return source.micro_batches(0, step)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("kind", ["replace", "beyond", "slide"])
def test_the_target_of_words(prediction_type, step, kind):
    prompts = {"original_prompt": "a circle", "target_prompt": "a square"}
    if kind == "slide":
        prompts = {"original_prompt": "a disc", "positive_prompt": "old", "negative_prompt": "new", "guidance": 2.5}
    elif kind == "beyond":
        prompts["guidance"] = 2
    model, config, adapters = prepared(
        prediction_type, both_ways=True, batch_size=3, protected_prompts=["a ring", "a star"], min_timestep=200,
        max_timestep=800, **prompts,
    )  # fmt: skip
    with adapters:
        bare = partial(adapters.enabled, False)
        objective = WordObjective(config, model, model.encode_prompts, bare, adapters.multiplied)
        change, kept = words(model, config, step)
        assert (change.strength, kept.strength) == ((1, 1) if step == 0 else (-1, -1))
        drawn = objective.draw(change, generator_for(1, "x"))
        noise, timesteps = drawn.noise.double().numpy(), drawn.timesteps.numpy()
        assert noise.shape == (3, 4, 8, 8) and np.all((timesteps >= 200) & (timesteps <= 800))
        base = base_of(model, adapters)
        if kind != "slide":
            student, wanted = ("a circle", "a square") if step == 0 else ("a square", "a circle")
            target = base(noise, timesteps, wanted)
            if kind == "beyond":
                target = target + (target - base(noise, timesteps, student))
        else:
            student, sign = "a disc", 1 if step == 0 else -1
            target = base(noise, timesteps, "a disc")
            target = target + sign * 2.5 * (base(noise, timesteps, "old") - base(noise, timesteps, "new"))
        inputs = objective.inputs(drawn)
        assert np.abs(inputs.target.double().numpy() - target).max() < 1e-5
        adapters.multiplier = inputs.strength
        context = model.encode_prompts([student]).context.expand(3, -1, -1)
        seen = model.predict(drawn.noise, drawn.timesteps, Conditioning(context), None).detach().double().numpy()
        wanted_loss = ((seen - target) ** 2).mean((1, 2, 3)).sum()
        assert objective.loss(inputs).item() == pytest.approx(wanted_loss, rel=1e-5)
        # Protected prompts, and the empty one, are answered as the base does.
        drawn = objective.draw(kept, generator_for(1, "x"))
        inputs = objective.inputs(drawn)
        first = 3 * step
        for row in range(3):
            prompt = ["", "a ring", "a star"][(first + row) % 3]
            one = base(drawn.noise[row : row + 1].numpy(), drawn.timesteps[row : row + 1].numpy(), prompt)
            assert np.abs(inputs.target[row].double().numpy() - one[0]).max() < 1e-5
            same = model.encode_prompts([prompt]).context
            assert torch.allclose(inputs.conditioning.context[row], same[0])


def test_prompts_stand_in_templates():
    """One is drawn for each picture, the same for student and teacher; what was drawn depends on the step alone."""
    templates = ["a photo of {} by day", "{} at night", "two pictures: {}, {}"]
    model, config, _ = prepared(
        original_prompt="a disc", target_prompt="", protected_prompts=["a ring"], prompt_templates=templates,
        batch_size=4,
    )  # fmt: skip

    def which(conditioning, prompt):
        """The place of each row's template."""
        known = [model.encode_prompts([one.replace("{}", prompt)]).context[0] for one in templates]
        return [next(at for at, one in enumerate(known) if torch.equal(one, row)) for row in conditioning.context]

    seen = []
    for step in range(4):
        change, kept = words(model, config, step)
        seen.append(which(change.student, "a disc"))
        empty = model.encode_prompts([""]).context[0]
        for stays in (kept.student, kept.terms[0][1]):
            assert all(torch.equal(row, empty) for row in stays.context[::2]), "the empty prompt has no template"
            assert which(Conditioning(stays.context[1::2]), "a ring") == seen[-1][1::2]
        ((weight, target),) = change.terms
        assert weight == 1 and all(torch.equal(row, empty) for row in target.context), "nothing of it stays"
    assert {place for step in seen for place in step} == {0, 1, 2} and seen[0] != seen[1]
    assert which(words(model, config, 2)[0].student, "a disc") == seen[2]


def test_the_empty_prompt_stays_where_guidance_needs_it():
    slider = {"positive_prompt": "old", "negative_prompt": "new"}
    for takes_negative, prompts, kept in (
        (True, {"original_prompt": "a disc", **slider}, [""]),
        (False, {"original_prompt": "a disc", **slider}, []),
        (True, slider, []),
        (True, {"original_prompt": "a disc", "protected_prompts": ["a ring"]}, ["", "a ring"]),
        (True, {"original_prompt": "a disc", "both_ways": True}, []),  # at -1 the empty prompt becomes a disc
        (True, {"original_prompt": "a disc", "both_ways": True, "prompt_templates": ["a photo of {}"]}, []),
        (True, {"original_prompt": "a disc", "protected_prompts": ["", "a ring"]}, ["", "a ring"]),
    ):
        assert kept_prompts(TrainConfig(**prompts), takes_negative) == kept


@pytest.mark.parametrize("prompts", [["a ring"], ["a ring", "a star"], ["a ring", "a star", "a tree"]])
@pytest.mark.parametrize(("batch", "accumulated", "times"), [(1, 1, 1), (2, 1, 1), (2, 3, 1), (1, 1, 3), (2, 3, 2)])
def test_every_protected_prompt_is_kept_as_often_at_both_weights(prompts, batch, accumulated, times):
    model, config, _ = prepared(
        original_prompt="a disc", positive_prompt="old", negative_prompt="new", both_ways=True, batch_size=batch,
        gradient_accumulation_steps=accumulated, protected_prompts=prompts, protected_batches=times,
    )  # fmt: skip
    source = WordSource(config, model, (SIDE, SIDE), PRECISION, keep_model_parts=True)
    assert source.prepare(Turns(), TrainCallbacks(), TrainCommands())
    known = {prompt: model.encode_prompts([prompt]).context[0] for prompt in ["", *prompts]}
    seen, times = collections.Counter(), min(times, len(known))
    for step in range(2 * len(known)):
        batches = source.micro_batches(0, step)
        assert len(batches) == accumulated * (1 + times)
        for kept in (batch for place, batch in enumerate(batches) if place % (1 + times)):
            assert len(kept.student) == batch
            for row in kept.student.context:
                (prompt,) = [one for one, context in known.items() if torch.equal(context, row)]
                seen[prompt, kept.strength] += 1
    assert seen == dict.fromkeys(itertools.product(known, (1, -1)), batch * accumulated * times)


def test_of_an_erased_prompt_nothing_stays():
    assert filled("a photo of {}, by night", "") == ""
    assert filled("a photo of {}, by night", "a disc") == "a photo of a disc, by night"


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_latents_that_are_partly_denoised(prediction_type, zero_terminal):
    """By DDIM with guidance on the original prompt, with the LoRA as it is (Song et al. 2021, eq. 12, σ = 0)."""
    if prediction_type == "epsilon" and zero_terminal:
        pytest.skip("there is no x0 in pure noise that ε would tell")
    model, config, adapters = prepared(
        prediction_type, original_prompt="a circle", denoised_steps=5, zero_terminal_snr=zero_terminal
    )
    alphas = rescale_zero_terminal_snr(model.schedule.alphas_cumprod).double().numpy() if zero_terminal else ALPHAS
    with adapters:
        bare = partial(adapters.enabled, False)
        objective = WordObjective(config, model, model.encode_prompts, bare, adapters.multiplied)
        draws = [objective.draw(words(model, config)[0], generator_for(seed)) for seed in range(30)]
        drawn = next(one for one in draws if one.steps == 3)
        found = objective.inputs(drawn)
        times = [999, 799, 599, 399, 199] if zero_terminal else [801, 601, 401, 201, 1]
        assert drawn.timesteps.tolist() == [times[3]]
        latents = drawn.noise.double().numpy()
        contexts = {prompt: model.encode_prompts([prompt]) for prompt in ("", "a circle")}
        for now, after in itertools.pairwise(times[:4]):
            with torch.no_grad():
                free, told = (
                    model.predict(torch.tensor(latents).float(), torch.tensor([now]), contexts[prompt], None)
                    for prompt in ("", "a circle")
                )
            pred = (free + DENOISING_CFG * (told - free)).double().numpy()
            a, sigma = np.sqrt(alphas[now]), np.sqrt(1 - alphas[now])
            if prediction_type == "epsilon":
                x0, noise = (latents - sigma * pred) / a, pred
            else:
                x0, noise = a * latents - sigma * pred, a * pred + sigma * latents
            latents = np.sqrt(alphas[after]) * x0 + np.sqrt(1 - alphas[after]) * noise
        assert np.abs(found.noisy_latents.double().numpy() - latents).max() < 1e-4
        assert np.abs(found.target.double().numpy() - base_of(model, adapters)(latents, [times[3]], "")).max() < 1e-4


# ---- flow models: x_σ = (1-σ)·x0 + σ·ε, and the model predicts ε - x0 ---------------------------------------------


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A tiny FLUX.1 dev with adapters that change something: (model, config of some settings, adapters)."""
    files = tiny_flux(tmp_path_factory.mktemp("flux"), double=1, single=1)
    common = {**files, "lora_rank": 2, "target_modules": ["attention"], "learning_rate": 1e-9}
    config = from_mapping(common)
    with file_lender(config).borrow() as model:
        adapters = AdapterSet.build(model.lora_targets(), config)
        randomize(adapters)
        with adapters:
            yield model, lambda **settings: from_mapping({**common, **settings}), adapters


def velocity(model, latents, sigmas, conditioning, guidance=1.0):
    """Of the model with its adapters as they are, in float64. A model that is not guided is told 1."""
    told = {"guidance": torch.full((len(latents),), guidance)}
    with torch.no_grad():
        asked = Conditioning(conditioning.context, conditioning.pooled, told)
        return model.predict(torch.tensor(latents).float(), torch.tensor(sigmas).float(), asked, None).double().numpy()


@pytest.mark.parametrize("denoised", [0, 4])
def test_words_of_a_flow_model(flux, denoised):
    """The target is a velocity of the base; latents are denoised by Euler's method, σ shifted as by diffusers'
    FlowMatchEulerDiscreteScheduler, at the guidance that FLUX.1 dev draws with."""
    model, configure, adapters = flux
    config = configure(
        original_prompt="a red circle", positive_prompt="a red square", negative_prompt="a blue circle", guidance=2.5,
        denoised_steps=denoised, both_ways=True, batch_size=2, min_timestep=300, max_timestep=899,
    )  # fmt: skip
    bare = partial(adapters.enabled, False)
    objective = WordObjective(config, model, model.encode_prompts, bare, adapters.multiplied)
    (change,) = words(model, config, step=1)  # alone: this model is drawn without a negative prompt
    assert change.shape == (16, 8, 8) and change.strength == -1
    draws = [objective.draw(change, generator_for(seed)) for seed in range(20)]
    told = {prompt: model.encode_prompts([prompt] * 2) for prompt in ("a red circle", "a red square", "a blue circle")}
    if denoised:
        even = 1 - np.arange(5) / 4
        places = math.exp(1.15) * even / (1 + (math.exp(1.15) - 1) * even)
        assert {one.steps for one in draws} == {1, 2, 3} & {i for i in range(4) if 0.3 <= places[i] <= 0.9}
        drawn = next(one for one in draws if one.steps == 2)
        latents, sigmas = drawn.noise.double().numpy(), np.full(2, places[2])
        with adapters.multiplied(-1):
            for now, after in ((places[0], places[1]), (places[1], places[2])):
                latents = latents + (after - now) * velocity(model, latents, [now] * 2, told["a red circle"], 3.5)
    else:
        drawn = draws[0]
        latents, sigmas = drawn.noise.double().numpy(), drawn.timesteps.double().numpy()
        assert np.all((sigmas >= 0.3) & (sigmas <= 0.9)) and sigmas[0] != sigmas[1]
    assert np.abs(drawn.timesteps.double().numpy() - sigmas).max() < 1e-6
    with adapters.enabled(False):
        first, more, less = (velocity(model, latents, sigmas, conditioning) for conditioning in told.values())
    target = first - 2.5 * (more - less)
    inputs = objective.inputs(drawn)
    assert np.abs(inputs.noisy_latents.double().numpy() - latents).max() < 1e-4
    assert np.abs(inputs.target.double().numpy() - target).max() < 1e-3 * np.abs(target).max()
    with adapters.multiplied(inputs.strength):
        seen = velocity(model, latents, sigmas, told["a red circle"])
        assert np.abs(seen - first).max() > 1e-3, "the adapters change nothing"
        assert objective.loss(inputs).item() == pytest.approx(((seen - target) ** 2).mean((1, 2, 3)).sum(), rel=1e-3)


@pytest.mark.skipif(torch_version() == (2, 3), reason="torch 2.3 cannot count products that go into a given tensor")
@pytest.mark.parametrize("takes_negative", [True, False])
def test_what_words_compute_beside_the_loss_is_forecast(takes_negative, flux, tiny_base):
    """Targets, and pictures that are partly denoised: in two passes a step where there is a negative prompt."""
    steps, prompts = 4, {"original_prompt": "a red circle", "target_prompt": "a red square", "guidance": 2.0,
                         "protected_prompts": ["a ring"] * takes_negative,
                         "protected_batches": 3}  # fmt: skip
    model, configure, adapters = flux
    with contextlib.ExitStack() as stack:
        if takes_negative:
            config = TrainConfig(task="words", denoised_steps=steps, base_model=str(tiny_base), **prompts)
            model = stack.enter_context(file_lender(config).borrow())
            adapters = stack.enter_context(AdapterSet.build(model.lora_targets(), config))
        else:
            config = configure(task="words", denoised_steps=steps, **prompts)
        bare = partial(adapters.enabled, False)
        objective = WordObjective(config, model, model.encode_prompts, bare, adapters.multiplied)
        batches = words(model, config)
        assert len(batches) == (3 if takes_negative else 1)
        noise = torch.randn(1, *batches[0].shape)
        level = objective.draw(batches[0], generator_for(0)).timesteps
        with FlopCounterMode(display=False) as one, torch.no_grad():
            model.predict(noise, level, batches[0].student, None)
        with FlopCounterMode(display=False) as counted:
            for batch, done in itertools.product(batches, range(steps)):
                objective.inputs(WordDraws(batch, noise, level, done))
        passes = counted.get_total_flops() / one.get_total_flops() / len(batches) / steps

    def operations(**settings):
        return work_on_batch(model.architecture, (SIDE, SIDE), replace(config, **settings)).operations

    alone, twice = (operations(task="image", preserve=share) for share in (0.0, 1.0))
    assert (operations() - alone) / (twice - alone) == pytest.approx(passes, rel=0.08)


@pytest.mark.parametrize("forth", [True, False])
def test_a_pair_of_a_flow_model(flux, forth):
    model, configure, adapters = flux
    before, after = pair_of_batches(channels=32)
    told = model.encode_prompts(["a red circle"] * 2)
    before = replace(before, conditioning=told)
    objective = PairObjective(configure(), model, model.encode_prompts, partial(adapters.enabled, False))
    strength = 0.25 if forth else -0.25
    drawn = objective.draw(PairBatch(before, after, forth, strength), generator_for(5))
    inputs = objective.inputs(drawn)
    first, second = ((batch.moments[:, :16].double().numpy() - 0.1159) * 0.3611 for batch in (before, after))
    sigmas, noise = drawn.timesteps.double().numpy(), drawn.noise.double().numpy()
    s = sigmas.reshape(-1, 1, 1, 1)
    seen, shown = ((1 - s) * x + s * noise for x in ((second, first) if forth else (first, second)))
    assert np.abs(inputs.noisy_latents.double().numpy() - seen).max() < 1e-5
    with adapters.enabled(False):
        found = velocity(model, shown, sigmas, told)
    target = (seen - (shown - s * found + (second - first if forth else first - second))) / s  # x0 = x_σ - σ·v
    assert np.abs(inputs.target.double().numpy() - target).max() < 1e-3 * np.abs(target).max()
    with adapters.multiplied(strength):
        wanted = ((velocity(model, seen, sigmas, told) - target) ** 2).mean((1, 2, 3)).sum()
        assert objective.loss(inputs).item() == pytest.approx(wanted, rel=1e-3)


def pair_of_batches(count=2, channels=8):
    generator = torch.Generator().manual_seed(3)

    def batch():
        moments = torch.randn(count, channels, 8, 8, generator=generator)
        return Batch(moments, ("a disc",) * count, Conditioning(torch.randn(count, 77, CONTEXT, generator=generator)),
                     None, None, torch.ones(count))  # fmt: skip

    before, after = batch(), batch()
    after.moments[:, :, 4:] = before.moments[:, :, 4:]  # the lower half is the same
    return before, after


def around(places):
    """These and their neighbours."""
    padded = np.pad(places, 1)
    return sum(padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)) > 0


@pytest.mark.parametrize(
    ("prediction_type", "zero_terminal"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
@pytest.mark.parametrize("forth", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_target_of_a_pair(forth, masked, prediction_type, zero_terminal):
    """The student's x0 is the base's and the difference of the pictures."""
    model, config, adapters = prepared(prediction_type, pair_mask=masked, zero_terminal_snr=zero_terminal)
    before, after = pair_of_batches()
    strength = 0.25 if forth else -0.25
    alphas = rescale_zero_terminal_snr(model.schedule.alphas_cumprod).double().numpy() if zero_terminal else ALPHAS
    with adapters:
        objective = PairObjective(config, model, model.encode_prompts, partial(adapters.enabled, False))
        drawn = objective.draw(PairBatch(before, after, forth, strength), generator_for(5))
        inputs = objective.inputs(drawn)
        first, second = (batch.moments[:, :4].double().numpy() * 0.18215 for batch in (before, after))
        a = alphas[drawn.timesteps.numpy()].reshape(-1, 1, 1, 1)
        noise = drawn.noise.double().numpy()
        noisy = {name: np.sqrt(a) * x + np.sqrt(1 - a) * noise for name, x in (("before", first), ("after", second))}
        student, teacher = ("after", "before") if forth else ("before", "after")
        with torch.no_grad(), adapters.enabled(False):
            found = model.predict(torch.tensor(noisy[teacher]).float(), drawn.timesteps, before.conditioning, None)
        found, b = found.double().numpy(), np.sqrt(1 - a)
        moved = (second - first) if forth else (first - second)
        if prediction_type == "epsilon":
            target = found
        else:  # x0 = √ᾱ·x_t - √(1-ᾱ)·v
            target = (np.sqrt(a) * noisy[student] - (np.sqrt(a) * noisy[teacher] - b * found + moved)) / b
        assert np.abs(inputs.target.double().numpy() - target).max() < 1e-5
        with adapters.multiplied(strength):
            seen = model.predict(torch.tensor(noisy[student]).float(), drawn.timesteps, before.conditioning, None)
        squares = (seen.detach().double().numpy() - target) ** 2
        if masked:
            distance = np.abs(second - first).mean(1)
            mask = np.stack([around(d >= 0.1 * d.max()) for d in distance])
            assert 0 < mask.mean() < 1
            wanted = ((squares * mask[:, None]).sum((1, 2, 3)) / (4 * mask.sum((1, 2)))).sum()
        else:
            wanted = squares.mean((1, 2, 3)).sum()
        with adapters.multiplied(inputs.strength):
            assert objective.loss(inputs).item() == pytest.approx(wanted, rel=1e-4)


def test_the_strength_holds_in_the_backward_pass_and_ends_with_it():
    """A layer that is computed anew for its gradient, as with gradient checkpointing, has the same strength again."""
    model, config, adapters = prepared(learning_rate=1e-2)
    seen = []
    with adapters:
        objective = PairObjective(config, model, model.encode_prompts, partial(adapters.enabled, False))
        step = TrainingStep(config, objective, adapters, PRECISION, 10)
        (up,) = [adapter.lora_up for target, adapter in adapters.items() if target.kohya_name.endswith("to_q")]
        up.register_hook(lambda grad: seen.append(adapters.multiplier))
        for strength in (0.25, -0.25):
            assert step(0, [PairBatch(*pair_of_batches(), strength > 0, strength)]) is not None
            assert seen.pop() == strength and adapters.multiplier == 1


def test_what_is_saved_stronger_is_trained_alike():
    """Twice the alpha, at half the weight."""
    plain = TrainConfig(task="pair", lora_rank=2, alpha=1, conv_rank=2, conv_alpha=1)
    stronger = TrainConfig(task="pair", lora_rank=2, alpha=1, conv_rank=2, conv_alpha=1, saved_strength=2.0)
    model = FakeModel()
    alphas = [
        [adapter.alpha for _, adapter in AdapterSet.build(model.lora_targets(), config).items()]
        for config in (plain, stronger)
    ]
    assert alphas == [[1] * 4, [2] * 4] and stronger.effective_alpha == 2
    assert [config.pair_weight / config.strength for config in (plain, stronger)] == [0.25, 0.125]
    assert TrainConfig(saved_strength=2.0).strength == 1, "pictures know no such thing"
