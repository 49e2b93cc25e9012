"""What a person does at the page, and looks at."""

from __future__ import annotations


def add(page, files):
    page.set_input_files("#lora_trainer_files", files)
    page.wait_for_selector("#lora_trainer_pictures:not([hidden])")


def text(page, name):
    return page.inner_text(f"#lora_trainer_{name}")


def wait_for_text(page, name, part):
    page.wait_for_function("([id, part]) => document.getElementById(id).innerText.includes(part)",
                           arg=[f"lora_trainer_{name}", part])  # fmt: skip


def estimated(page):
    """Until the numbers follow what was changed last."""
    page.evaluate("() => loraTrainer.estimate.now()")


def start(page, files, name="hat_v1"):
    add(page, files)
    page.fill("#lora_trainer_field_output_name", name)
    page.click("#lora_trainer_start")
    page.wait_for_selector("#lora_trainer_live:not([hidden])")


def curve(page):
    return page.get_attribute("#lora_trainer_curve .lora_trainer_raw", "d") or ""
