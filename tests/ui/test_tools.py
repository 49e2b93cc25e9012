"""The sub-tab with tools on finished LoRAs."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api")
import torch

from lora_trainer.adapters.export import save_lora
from tests.ui.person import wait_for_text

META = {"ss_base_model_version": "sd_v1", "modelspec.trigger_phrase": "zwx"}


@pytest.fixture
def loras(manager):
    """Two LoRAs of a layer of SD 1.5 each."""
    names = ("unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "unet_mid_block_attentions_0_proj_in")
    for seed, (name, size) in enumerate(zip(names, (320, 1280))):
        torch.manual_seed(seed)
        shape = (1, 1) if "proj" in name else ()
        tensors = {f"lora_{name}.lora_down.weight": torch.randn(4, size, *shape),
                   f"lora_{name}.lora_up.weight": torch.randn(size, 4, *shape),
                   f"lora_{name}.alpha": torch.tensor(4.0)}  # fmt: skip
        save_lora(tensors, manager.host.root / "Lora" / f"{('ink', 'red')[seed]}.safetensors", META, "fp16")


@pytest.fixture
def tools(page, loras):
    """The sub-tab, with both LoRAs."""
    page.click("#lora_trainer_tabs > .tab-nav >> text=Tools")
    page.wait_for_selector("#lora_trainer_tools_strength_lora option:nth-child(2)", state="attached")
    return page


def open_tool(page, kind):
    page.locator(f"details:has(form[data-tool={kind}]) > summary").click()
    return page.locator(f"form[data-tool={kind}]")


def test_the_strength_of_each_block_is_a_bar(tools):
    form = tools.locator("form[data-tool=strength]")
    form.get_by_label("LoRA").select_option("red.safetensors")
    form.get_by_text("Measure").click()
    form.locator("table.lora_trainer_strengths").wait_for()
    assert form.locator("th[scope=row]").all_inner_texts() == ["M01"]
    bar = form.locator(".lora_trainer_strength_bar").bounding_box()
    assert bar["width"] > 100 and form.locator("caption").inner_text() == "red"


def test_a_new_lora_is_made_listed_and_never_put_over_another(tools, manager):
    form = open_tool(tools, "resize")
    form.get_by_text("Resize it").click()
    assert "a name" in form.get_by_role("alert").inner_text()
    form.get_by_label("Name of the new LoRA").fill("red")
    form.get_by_label("Rank", exact=True).fill("two")
    form.get_by_text("Resize it").click()
    form.get_by_role("alert").filter(has_text="two is no number.").wait_for()
    form.get_by_label("Rank", exact=True).fill("2")
    form.get_by_text("Resize it").click()
    form.get_by_role("alert").filter(has_text="There is a LoRA red already.").wait_for()
    form.get_by_label("Name of the new LoRA").fill("small")
    form.get_by_text("Resize it").click()
    wait_for_text(tools, "tools_status", "It is in your Lora tab as small. 1 layers of rank 2.")
    assert form.get_by_role("alert").count() == 0
    assert [name for name, _ in manager.host.published] == ["small"] and tools.evaluate("refreshed") == 1
    tools.wait_for_selector("#lora_trainer_tools_edit_lora option[value='small.safetensors']", state="attached")


def test_an_answer_that_comes_late_does_not_end_what_was_started_since(page, loras):
    waiting = []
    page.route("**/loras/metadata*", lambda route: waiting.append(route))  # the lists came before it
    page.click("#lora_trainer_tabs > .tab-nav >> text=Tools")
    page.wait_for_selector("#lora_trainer_tools_strength_lora option:nth-child(2)", state="attached")
    form = open_tool(page, "resize")
    form.get_by_label("Name of the new LoRA").fill("small")
    form.get_by_label("Rank", exact=True).fill("2")
    form.get_by_text("Resize it").click()
    wait_for_text(page, "tools_status", "Working")
    with page.expect_response("**/loras/metadata*"):
        waiting[0].continue_()
    wait_for_text(page, "tools_status", "It is in your Lora tab as small.")


def test_several_are_combined_and_words_are_changed(tools, manager):
    form = open_tool(tools, "combine")
    form.get_by_text("Another").first.click()
    form.get_by_text("Remove").last.click()
    lists = form.locator("#lora_trainer_tools_parts select")
    assert lists.count() == 2
    lists.nth(1).select_option("red.safetensors")
    form.locator("#lora_trainer_tools_parts input").nth(1).fill("0,5")
    form.get_by_label("Name of the new LoRA").fill("both")
    form.get_by_text("Combine them").click()
    wait_for_text(tools, "tools_status", "as both. 2 layers of rank 4.")
    form = open_tool(tools, "edit")
    assert form.get_by_label("Activation text").input_value() == "zwx"
    form.get_by_label("Activation text").fill("zwx pen")
    form.get_by_label("Name of the new LoRA").fill("pen")
    form.get_by_text("Save as a new LoRA").click()
    wait_for_text(tools, "tools_status", "as pen.")
    assert manager.host.published[-1][1].activation_text == "zwx pen"
