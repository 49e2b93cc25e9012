"""Presets of one's own and the search in Advanced, in a browser."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("playwright.sync_api")
from tests.jobs.fakes import wait_for
from tests.ui.person import add, estimated, text, wait_for_text
from tests.ui.words import ROOT

CHINESE = json.loads((ROOT / "localizations" / "zh_CN.json").read_text(encoding="utf-8"))


@pytest.fixture
def advanced(page):
    page.evaluate("document.querySelectorAll('#lora_trainer_advanced, #lora_trainer_advanced details').forEach((one) => (one.open = true))")  # noqa: E501
    return page


def value(page, name):
    return page.input_value(f"#lora_trainer_field_{name}")


def save_as(page, name):
    page.fill("#lora_trainer_preset_name", name)
    page.click("text=Save as preset")
    page.wait_for_function("(name) => loraTrainer.presets.chosen === name", arg=name)


def test_a_preset_is_saved_chosen_renamed_and_deleted(advanced, files, manager):
    page = advanced
    page.check("input[value=style]")
    page.fill("#lora_trainer_field_output_name", "first")
    page.fill("#lora_trainer_field_lora_rank", "20")
    page.fill("#lora_trainer_field_reg_data_dir", str(files[0].parent))
    save_as(page, "my style")
    saved = (manager.folders.data / "presets" / "my style.yaml").read_text(encoding="utf-8")
    assert "lora_rank: 20" in saved and "kind: style" in saved and "first" not in saved and "reg_data_dir" not in saved
    page.select_option("#lora_trainer_preset", "")
    page.check("input[value=character]")
    estimated(page)
    assert value(page, "lora_rank") == "12"
    page.fill("#lora_trainer_field_output_name", "second")
    page.fill("#lora_trainer_field_epochs", "3")
    page.reload()
    page.wait_for_selector("#lora_trainer_preset option:nth-child(2)", state="attached")
    add(page, files)
    page.select_option("#lora_trainer_preset", "my style")
    estimated(page)
    assert (value(page, "lora_rank"), value(page, "output_name")) == ("20", "second")
    assert value(page, "alpha") == "40", "what goes with the rank follows it"
    assert value(page, "epochs") == "10" and page.is_checked("input[value=style]"), "the rest is the kind's"
    assert value(page, "reg_data_dir") == str(files[0].parent), "what belongs to the pictures stays"
    page.reload()
    page.wait_for_function("() => loraTrainer.begun && loraTrainer.presets.rows.length")
    page.reload()  # twice: what is remembered is not forgotten by looking at it
    page.wait_for_function("() => loraTrainer.begun && loraTrainer.presets.rows.length")
    assert page.input_value("#lora_trainer_preset") == "my style"
    page.evaluate("document.querySelectorAll('#lora_trainer_advanced, #lora_trainer_advanced details').forEach((one) => (one.open = true))")  # noqa: E501
    page.fill("#lora_trainer_preset_name", "yours")
    page.click("#lora_trainer_preset_chosen >> text=Rename it")
    page.wait_for_function("() => loraTrainer.presets.chosen === 'yours'")
    page.click("#lora_trainer_preset_chosen >> text=Delete …")
    wait_for_text(page, "preset_message", "This deletes the preset yours.")
    assert len(list((manager.folders.data / "presets").iterdir())) == 1
    page.click("#lora_trainer_preset_message >> text=Delete it")
    page.wait_for_selector("#lora_trainer_preset_field", state="hidden")
    assert list((manager.folders.data / "presets").iterdir()) == []


def test_a_name_that_is_taken_is_replaced_when_asked(advanced, manager):
    page = advanced
    page.fill("#lora_trainer_field_epochs", "3")
    save_as(page, "mine")
    page.fill("#lora_trainer_field_epochs", "4")
    page.click("text=Save as preset")
    wait_for_text(page, "preset_message", "There is a preset mine already.")
    with page.expect_response(lambda answer: answer.request.method == "GET" and "presets" in answer.url):
        page.click("#lora_trainer_preset_message >> text=Replace it")
    page.wait_for_function("() => document.querySelector('#lora_trainer_preset').value === 'mine'")
    wait_for(lambda: "epochs: 4" in (manager.folders.data / "presets" / "mine.yaml").read_text())
    page.fill("#lora_trainer_preset_name", "a/b")
    page.click("text=Save as preset")
    wait_for_text(page, "preset_message", "cannot be a name")


def test_the_settings_of_an_earlier_run_are_a_complete_preset(advanced, files, manager):
    page = advanced
    add(page, files)
    page.fill("#lora_trainer_yaml", "lora_rank: 6\nepochs: 7\n")
    page.click("text=Use these settings")
    page.wait_for_function("() => loraTrainer.form.faithful")
    save_as(page, "run")
    page.check("input[value=style]")
    page.evaluate("loraTrainer.form.set('lora_rank', 99)")
    page.select_option("#lora_trainer_preset", "run")
    estimated(page)
    assert [value(page, name) for name in ("lora_rank", "epochs", "dropout", "batch_size")] == ["6", "7", "0", "1"]


@pytest.mark.parametrize(("said", "shown", "sent"), [("auto", "auto", "auto"), ("true", "true", True),
                                                     ("0.25", "0.25", 0.25), ("0.0", "0", 0)])  # fmt: skip
def test_a_share_of_gradient_checkpointing_from_a_file_is_shown_and_sent(advanced, said, shown, sent):
    page = advanced
    page.fill("#lora_trainer_yaml", f"gradient_checkpointing: {said}\n")
    page.click("text=Use these settings")
    page.wait_for_function("() => loraTrainer.form.faithful")
    assert value(page, "gradient_checkpointing") == shown
    assert page.evaluate("loraTrainer.form.settings().gradient_checkpointing") == sent


def test_a_file_that_is_no_preset_is_said_and_changes_nothing(page, manager):
    folder = manager.folders.data / "presets"
    folder.mkdir(parents=True)
    (folder / "odd.yaml").write_text("kind: style\nsettings: {merge_into_base: /etc/x, lora_rank: 3}\n")
    page.reload()
    page.wait_for_selector("#lora_trainer_preset option:nth-child(2)", state="attached")
    before = page.evaluate("JSON.stringify(loraTrainer.form.given)")
    page.select_option("#lora_trainer_preset", "odd")
    wait_for_text(page, "preset_message", "sets what a preset may not: merge_into_base")
    assert page.evaluate("JSON.stringify(loraTrainer.form.given)") == before


def found(page, words):
    page.fill("#lora_trainer_find", words)
    return page.evaluate("[...document.querySelectorAll('#lora_trainer_advanced [data-field]')].filter((one) => one.offsetParent).map((one) => one.dataset.field)")  # noqa: E501


def test_a_setting_is_found_by_name_label_and_explanation(page):
    page.click("#lora_trainer_advanced > summary")
    page.click("#lora_trainer_advanced [data-group=output] > summary")
    assert found(page, "min_snr_gamma") == ["min_snr_gamma"] and found(page, "network type") == ["adapter"]
    assert "conv_rank" in found(page, "LoCon") and "conv_alpha" not in found(page, "LoCon")
    assert found(page, "UNET rate prodigy") == ["learning_rate"]
    assert text(page, "found") == "1 setting"
    assert found(page, "no such setting") == [] and text(page, "found") == "0 settings"
    assert page.locator("#lora_trainer_advanced [data-group]:visible").count() == 0
    everything = found(page, "")
    assert set(everything) and page.locator("#lora_trainer_advanced [data-group]:visible").count() == 6
    opened = page.evaluate("[...document.querySelectorAll('#lora_trainer_advanced [data-group]')].filter((one) => one.open).map((one) => one.dataset.group)")  # noqa: E501
    assert opened == ["output"], "as it was before"


def test_a_setting_is_found_in_chinese_and_in_english_on_a_chinese_page(page):
    page.evaluate("(words) => { window.localization = words; }", CHINESE)
    page.click("#lora_trainer_advanced > summary")
    assert "lora_rank" in found(page, "秩") and "lora_rank" in found(page, "rank")
    assert found(page, "镜像显示") == ["flip"] and found(page, "flip mirrored") == ["flip"]
