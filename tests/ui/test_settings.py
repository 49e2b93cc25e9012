"""The page's settings: presets, changed values, YAML, the host's own defaults."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api")
from tests.ui.person import add, estimated, start, text, wait_for_text


def use_yaml(page, text):
    page.fill("#lora_trainer_yaml", text)
    page.click("text=Use these settings")


def open_yaml(page):
    page.click("#lora_trainer_advanced > summary")
    page.click("text=As YAML, in and out")


def test_settings_as_yaml(page, files):
    add(page, files)
    page.fill("#lora_trainer_field_output_name", "hat_v1")
    open_yaml(page)
    page.click("text=Show the settings here")
    page.wait_for_function("() => loraTrainer.get('yaml').value.includes('output_name: hat_v1')")
    use_yaml(page, "network_dim: 32\nlearning_rate: 5e-5\nepochs: 3\noutput_name: other")
    page.wait_for_function("() => loraTrainer.form.control('lora_rank').value === '32'")
    assert page.input_value("#lora_trainer_field_learning_rate") == "5e-5"
    assert page.input_value("#lora_trainer_field_output_name") == "other"
    use_yaml(page, "epocs: 3\nbatch_size: 0")
    wait_for_text(page, "problem_yaml", "Did you mean 'epochs'?")
    assert "batch_size: 0 is below 1." in text(page, "problem_yaml"), "which of ninety lines it is"


def test_another_tools_settings_are_pasted_and_what_became_of_them_is_told(page, files):
    add(page, files)
    open_yaml(page)
    use_yaml(page, 'pretrained_model_name_or_path = "a.safetensors"\nnetwork_module = "networks.lora"\n'
             'network_dim = 12\noutput_name = "hat"\nxformers = true\noptimizer_type = "DAdaptAdam"\n')  # fmt: skip
    wait_for_text(page, "translation", "network_dim → lora_rank: 12")
    told = text(page, "translation")
    assert "TOML" in told and "Mean nothing here: xformers" in told
    assert "Cannot be honored here: optimizer_type: DAdaptAdam" in told
    page.wait_for_function("() => loraTrainer.form.control('output_name').value === 'hat'")
    assert page.input_value("#lora_trainer_field_lora_rank") == "12"
    use_yaml(page, 'network_dim = 0\noutput_name = "hat\n[[datasets]\n')
    wait_for_text(page, "problem_yaml", "line 2")
    wrong = text(page, "problem_yaml")
    assert "line 3" in wrong and "0 is below 1" in wrong, f"all in one round: {wrong}"
    assert not page.locator("#lora_trainer_translation").is_visible()


def test_a_yaml_of_one_setting_empties_neither_name_nor_model(page, files):
    add(page, files)
    page.fill("#lora_trainer_field_output_name", "hat_v1")
    page.evaluate("loraTrainer.form.set('base_model', '/models/my own.safetensors')")
    estimated(page)
    assert page.input_value("#lora_trainer_field_base_model") == "/models/my own.safetensors", "a path is shown, too"
    open_yaml(page)
    use_yaml(page, "network_dim: 32")
    page.wait_for_function("() => loraTrainer.form.control('lora_rank').value === '32'")
    assert page.input_value("#lora_trainer_field_output_name") == "hat_v1"
    assert page.input_value("#lora_trainer_field_base_model") == "/models/my own.safetensors"
    assert text(page, "changed") == "1 changed", "empty fields are none"
    page.click("input[value=character]")
    page.wait_for_function("() => !loraTrainer.form.faithful")
    assert page.input_value("#lora_trainer_field_lora_rank") == "32", "what was given stays"


def test_the_name_follows_a_trigger_word_that_is_given_alone(page, files):
    add(page, files)
    page.fill("#lora_trainer_field_trigger_word", "zwx face")
    assert page.input_value("#lora_trainer_field_output_name") == "zwx_face"
    page.fill("#lora_trainer_field_output_name", "mine_v2")
    assert page.input_value("#lora_trainer_field_trigger_word") == "zwx face"
    page.fill("#lora_trainer_field_trigger_word", "")
    estimated(page)
    assert page.input_value("#lora_trainer_field_output_name") == "mine_v2"


def test_a_changed_value_stays_until_it_is_reset(page, files):
    add(page, files)
    page.click("#lora_trainer_advanced > summary")
    page.click("[data-group=optimization] > summary")
    page.fill("#lora_trainer_field_epochs", "3")
    page.check("input[value=style]")
    estimated(page)
    assert page.input_value("#lora_trainer_field_epochs") == "3" and text(page, "changed") == "1 changed"
    page.click("[data-reset=epochs]")
    assert page.input_value("#lora_trainer_field_epochs") == "10" and text(page, "changed") == ""


def test_continuing_takes_what_the_form_says_also_where_that_is_a_default(page, files, train):
    train.free = True
    add(page, files)
    page.evaluate("loraTrainer.form.set('epochs', 7)")
    start(page, [])
    wait_for_text(page, "job_state", "finished")
    page.click("#lora_trainer_job_buttons >> text=Continue from it")
    wait_for_text(page, "origin", "Continues from hat_v1")
    page.evaluate("loraTrainer.form.set('epochs', undefined)")
    estimated(page)
    assert page.input_value("#lora_trainer_field_epochs") == "10"
    page.click("#lora_trainer_start")
    wait_for_text(page, "job_name", "hat_v2")
    wait_for_text(page, "job_state", "finished")
    assert train.config(1).epochs == 10 and train.config(1).init_lora.endswith("hat_v1.safetensors")
    page.click("#lora_trainer_job_buttons >> text=Run again with changes")
    page.wait_for_function("() => loraTrainer.form.given.output_name === 'hat_v3'")
    assert page.evaluate("loraTrainer.form.given.init_lora").endswith("hat_v1.safetensors"), "it began with that, too"


def test_a_number_of_steps_decides_how_often_a_picture_is_seen(page, files):
    add(page, files)
    page.evaluate("""() => {
        const settings = {max_train_steps: 24, batch_size: 2, gradient_accumulation_steps: 3};
        Object.entries(settings).forEach(([name, value]) => loraTrainer.form.set(name, value));
    }""")
    estimated(page)
    steps = "12 pictures × 8 repeats = 16 steps an epoch; max_train_steps sets how many in all"
    assert (text(page, "fact_steps"), text(page, "fact_sum")) == ("24", steps)


def test_optimizer_arguments_are_what_they_look_like(page):
    page.evaluate("""() => {
        const field = loraTrainer.form.control("optimizer_args");
        field.value = "nesterov: false\\nbetas: [0.9, 0.99]\\neps: 1e-8\\nname: plain";
        field.dispatchEvent(new Event("input", {bubbles: true}));
        loraTrainer.form.display();
    }""")
    given = {"nesterov": False, "betas": [0.9, 0.99], "eps": 1e-8, "name": "plain"}
    assert page.evaluate("loraTrainer.form.given.optimizer_args") == given
    assert "betas: [0.9,0.99]" in page.input_value("#lora_trainer_field_optimizer_args")


def test_a_kind_that_is_set_anew_in_the_settings_counts(page):
    page.context.add_init_script("""window.onOptionsAvailable = (action) => {
        opts.lora_trainer_kind = localStorage.getItem("kind of the settings");
        action();
    }""")

    def kind(settings, chosen=None):
        page.evaluate("(kind) => localStorage.setItem('kind of the settings', kind)", settings)
        page.reload()
        page.wait_for_function("() => window.loraTrainer && loraTrainer.begun")
        if chosen:
            page.check(f"input[value={chosen}]")
        return page.evaluate("loraTrainer.form.kind()")

    kind("character", chosen="scene")
    assert kind("character") == "scene", "what was chosen last stays"
    assert kind("style") == "style"


def test_the_hosts_settings_count_for_every_kind_also_where_they_are_a_default(page, files):
    """Few pictures make the presets choose a dropout; the built-in default is none."""
    page.context.add_init_script("""window.onOptionsAvailable = (action) => {
        opts.lora_trainer_defaults = "dropout: 0\\nnetwork_dim: 12";
        action();
    }""")
    add(page, files)
    estimated(page)
    assert page.evaluate("loraTrainer.form.value('dropout')") > 0
    page.reload()
    page.wait_for_function("() => window.loraTrainer && loraTrainer.begun && loraTrainer.pictures.chosen")
    estimated(page)
    assert page.evaluate("['dropout', 'lora_rank'].map(loraTrainer.form.value)") == [0, 12]
