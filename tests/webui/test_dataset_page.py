"""The Dataset sub-tab in a real WebUI: pictures are edited with the keyboard, checked, and trained with.

Takes a running WebUI as ``test_tab.py`` does.
"""

from __future__ import annotations

import time

from tests.webui.test_tab import TRAINED, add, address, browser, open_tab, page, until  # noqa: F401 - fixtures


def test_edit_check_and_train(page, pictures):  # noqa: F811
    name = f"edited_{int(time.time())}"
    open_tab(page)
    add(page, pictures)
    page.click("[data-action=edit-chosen]")
    page.wait_for_selector("#lora_trainer_editor_grid li >> nth=5")
    page.evaluate("document.activeElement.blur()")
    for _ in range(3):
        page.keyboard.press("Enter")
        page.keyboard.type(", drawn")
        page.keyboard.press("Enter")
        until(page, "!loraTrainer.editor.picture.touched()")
        page.keyboard.press("ArrowRight")
    until(page, "loraTrainer.editor.state.unsaved === 3")
    page.keyboard.press("Control+z")
    until(page, "loraTrainer.editor.state.unsaved === 2")
    page.keyboard.press("Control+s")
    until(page, "loraTrainer.editor.state.unsaved === 0")
    page.click("#lora_trainer_editor_opens_check")
    page.click("[data-action=editor-check]")
    until(page, "loraTrainer.editor.tools.report && !loraTrainer.editor.tools.report.stale")
    page.click("[data-action=editor-train]")
    page.wait_for_selector("#lora_trainer_pictures:visible")
    assert page.evaluate("loraTrainer.pictures.rows.filter((row) => row.caption.endsWith(', drawn')).length") == 2
    page.fill("#lora_trainer_field_output_name", name)
    page.evaluate(f"() => {{ const {TRAINED}; for (const [name, value] of Object.entries(SETTINGS)) "
                  "loraTrainer.form.set(name, value); return loraTrainer.estimate.now(); }")  # fmt: skip
    page.click("#lora_trainer_start")
    until(page, f"loraTrainer.live.job && loraTrainer.live.job.name === '{name}' && loraTrainer.live.job.step > 0")
    page.evaluate("() => loraTrainer.openSubTab('Train')")
    until(page, "loraTrainer.live.job.status === 'finished'")
