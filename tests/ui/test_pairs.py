"""Settings that go with each other: one that nobody touched follows the other, and the page says so."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api")
from tests.ui.person import add, estimated, text, wait_for_text


def choose(page, **settings):
    page.evaluate(
        "(all) => Object.entries(all).forEach(([name, value]) => loraTrainer.form.set(name, value))", settings
    )


def shown(page, *names):
    return [page.input_value(f"#lora_trainer_field_{name}") for name in names]


@pytest.fixture
def ready(page, files):
    add(page, files)
    estimated(page)
    return page


def test_alpha_follows_the_rank_until_it_is_touched(ready):
    assert shown(ready, "lora_rank", "alpha") == ["12", "24"]
    ready.evaluate("() => document.querySelectorAll('#lora_trainer details').forEach((one) => (one.open = true))")
    ready.fill("#lora_trainer_field_lora_rank", "4")
    estimated(ready)
    assert shown(ready, "alpha") == ["8"] and ready.evaluate("loraTrainer.form.settings().alpha") == 8
    assert text(ready, "follows_alpha") == "Follows Rank until you change it."
    ready.fill("#lora_trainer_field_lora_rank", "")
    ready.fill("#lora_trainer_field_lora_rank", "48")
    assert shown(ready, "alpha") == ["96"], "what was typed on the way leaves no trace"
    ready.fill("#lora_trainer_field_alpha", "5")
    ready.fill("#lora_trainer_field_lora_rank", "6")
    estimated(ready)
    assert shown(ready, "alpha") == ["5"] and ready.is_hidden("#lora_trainer_follows_alpha")
    choose(ready, alpha=None)
    ready.click("[data-reset=alpha]")
    assert shown(ready, "alpha") == ["12"]
    ready.click("[data-reset=lora_rank]")
    assert shown(ready, "lora_rank", "alpha") == ["12", "24"]


@pytest.mark.parametrize("reload", [False, True])
def test_values_of_an_earlier_run_keep_their_ratio(ready, train, reload):
    train.free = True
    choose(ready, output_name="one", lora_rank=12, alpha=6, conv_rank=4, conv_alpha=2, learning_rate=1e-4,
           train_text_encoder=True, text_encoder_lr=2e-5)  # fmt: skip
    ready.click("#lora_trainer_start")
    wait_for_text(ready, "job_state", "finished")
    ready.click("#lora_trainer_job_buttons >> text=Run again with changes")
    ready.wait_for_function("() => loraTrainer.form.given.output_name === 'one_2'")
    if reload:
        ready.reload()
        ready.wait_for_function("() => window.loraTrainer && loraTrainer.begun && loraTrainer.pictures.chosen")
    choose(ready, lora_rank=4, conv_rank=8, learning_rate=3e-4)
    estimated(ready)
    settings = ready.evaluate("loraTrainer.form.settings()")
    assert (settings["alpha"], settings["conv_alpha"], settings["text_encoder_lr"]) == (2, 4, 6e-5)
    choose(ready, alpha=6)
    assert ready.evaluate("loraTrainer.form.value('alpha')") == 6, "typed again, it is a person's"


def test_prodigy_gets_the_rate_that_it_needs_and_others_get_theirs_back(ready):
    rate = shown(ready, "learning_rate")
    choose(ready, optimizer="prodigy")
    estimated(ready)
    assert shown(ready, "learning_rate") == ["1"]
    choose(ready, optimizer="adafactor")
    assert shown(ready, "learning_rate") == rate != ["1"]
    choose(ready, learning_rate=0.5, optimizer="prodigy")
    assert shown(ready, "learning_rate") == ["0.5"]


def test_a_rate_of_the_text_encoders_switches_them_on_unless_they_were_switched_off(ready, train):
    choose(ready, text_encoder_lr=5e-5, output_name="one")
    estimated(ready)
    switch = ready.locator("#lora_trainer_field_train_text_encoder")
    assert switch.is_checked() and ready.evaluate("loraTrainer.form.settings().train_text_encoder") is True
    choose(ready, train_text_encoder=False)
    estimated(ready)
    assert not switch.is_checked() and "train_text_encoder is off" in ready.inner_text("#lora_trainer_hints")
    train.free = True
    ready.click("#lora_trainer_start")
    wait_for_text(ready, "job_state", "finished")
    assert train.config().train_text_encoder is False, "what is shown is what runs"


def test_a_number_of_steps_leaves_no_warning_of_epochs_that_nobody_chose(ready):
    choose(ready, max_train_steps=24)
    estimated(ready)
    assert "epochs" not in ready.inner_text("#lora_trainer_hints")
    choose(ready, epochs=3)
    estimated(ready)
    assert "epochs: 3 has no effect" in ready.inner_text("#lora_trainer_hints")


def test_intervals_that_a_run_never_reaches_are_said_before_it(ready):
    choose(ready, max_train_steps=24, save_steps=500, preview_prompts=["a hat"], preview_steps=25, lr_warmup_steps=30)
    estimated(ready)
    hints = ready.inner_text("#lora_trainer_hints")
    assert "save_steps: 500 is more than this run has (24 steps)" in hints
    assert "preview_steps: 25 is more than" in hints and "lr_warmup_steps (30) is as long as" in hints


def test_start_right_after_a_change_saves_as_often_as_is_suggested(ready, train):
    choose(ready, output_name="one", epochs=2)
    ready.click("#lora_trainer_start")
    ready.wait_for_selector("#lora_trainer_live:not([hidden])")
    config = train.config()
    steps = int(text(ready, "fact_steps"))
    assert config.epochs == 2 and config.save_steps == -(-steps // 4)


def test_the_hosts_settings_are_followed_too(page, files):
    page.context.add_init_script("""window.onOptionsAvailable = (action) => {
        opts.lora_trainer_defaults = "lora_rank: 4";
        action();
    }""")
    page.reload()
    page.wait_for_function("() => window.loraTrainer && loraTrainer.begun")
    add(page, files)
    estimated(page)
    assert shown(page, "lora_rank", "alpha") == ["4", "8"]
