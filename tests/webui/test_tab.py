"""The tab as a person meets it in a real WebUI, from pictures to prompt.

Takes the WebUI that LORA_TRAINER_WEBUI_URL names (it trains there, and leaves a LoRA), else starts one as the other
tests here do.
"""

from __future__ import annotations

import os
import re
import time

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.webui.person import drop, shot
from tests.webui.server import FORGE, PICTURE

TRAINED = "SETTINGS = {resolution: '128', min_bucket_resolution: 64, epochs: 2, lora_rank: 4}"
if FORGE:
    TRAINED = "SETTINGS = {resolution: '64', min_bucket_resolution: 64, max_train_steps: 8, lora_rank: 4}"


@pytest.fixture(scope="module")
def address(request):
    url = os.environ.get("LORA_TRAINER_WEBUI_URL")
    return url or request.getfixturevalue("webui").url("/")


@pytest.fixture
def page(browser, address):
    errors = []
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(120_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address, wait_until="domcontentloaded")
    yield page
    page.close()
    assert not errors


def open_tab(page):
    page.wait_for_selector("#txt2img_generate")
    page.wait_for_function("() => window.loraTrainer && loraTrainer.begun")
    page.evaluate("() => loraTrainer.host.openTab('lora_trainer')")
    page.wait_for_selector("#lora_trainer_start")


def add(page, pictures):
    page.evaluate("() => loraTrainer.pictures.choose(null)")
    page.set_input_files("#lora_trainer_files", sorted(pictures.iterdir()))
    page.wait_for_selector("#lora_trainer_pictures:not([hidden])")


def until(page, condition, seconds=300):
    page.wait_for_function(f"() => {condition}", timeout=seconds * 1000)


FIELDS = """(values) => values.forEach(([name, value]) => {
    const field = document.querySelector(`#txt2img_${name} input[type=number]`);
    field.value = value;
    updateInput(field);
})"""


def generate(page, prompt):
    """The bytes of the picture that txt2img makes of ``prompt``."""
    shown = "(document.querySelector('#txt2img_gallery img') || {}).src"
    page.fill("#txt2img_prompt textarea", prompt)
    page.evaluate(FIELDS, list((PICTURE | {"seed": 5}).items()))
    before = page.evaluate(f"() => {shown}")
    page.click("#txt2img_generate")
    page.wait_for_function(f"(before) => {shown} && {shown} !== before", arg=before, timeout=300_000)
    return page.evaluate(f"async () => Array.from(new Uint8Array(await (await fetch({shown})).arrayBuffer()))")


def test_from_pictures_to_prompt(page, pictures):
    name = f"ellipse_{int(time.time())}"
    open_tab(page)
    add(page, pictures)
    page.check("input[value=object]")
    page.fill("#lora_trainer_field_output_name", name)
    page.evaluate(f"() => {{ const {TRAINED}; for (const [name, value] of Object.entries(SETTINGS)) "
                  "loraTrainer.form.set(name, value); return loraTrainer.estimate.now(); }")  # fmt: skip
    steps = int(page.inner_text("#lora_trainer_fact_steps"))
    page.click("#lora_trainer_start")
    mine = f"loraTrainer.live.job && loraTrainer.live.job.name === '{name}'"
    until(page, f"{mine} && loraTrainer.live.job.step > 1")
    page.reload()
    open_tab(page)
    until(page, f"{mine} && loraTrainer.live.points.length > 1")
    page.evaluate("() => loraTrainer.host.openTab('txt2img')")
    without = generate(page, "a red ellipse")
    until(page, f"{mine} && loraTrainer.live.job.status === 'finished'")
    assert page.evaluate("() => loraTrainer.live.job.step") == steps, "as many as it said before"
    assert page.evaluate("() => [loraTrainer.live.job.published, loraTrainer.live.job.verified]") == [name, True]
    page.evaluate("() => loraTrainer.host.openTab('lora_trainer')")
    page.wait_for_selector("#lora_trainer_previews img")
    page.click("#lora_trainer_job_buttons >> text=Try it")
    page.wait_for_selector("#txt2img_prompt textarea:visible")
    assert f"<lora:{name}:" in page.input_value("#txt2img_prompt textarea")
    page.click("#txt2img_extra_tabs >> text=Lora")
    card = page.wait_for_selector(f"#txt2img_lora_cards .card[data-name={name}]", state="attached")
    assert card.query_selector("img.preview"), "the card has its picture"
    page.fill("#txt2img_prompt textarea", "")
    card.click()
    assert f"<lora:{name}:" in page.input_value("#txt2img_prompt textarea")
    page.click("#txt2img_extra_tabs >> text=Generation")
    assert generate(page, f"a red ellipse <lora:{name}:1>") != without


def test_pictures_go_from_the_gallery_to_the_trainer(page):
    """Each with its own prompt as caption, without LoRA calls; the overview that the host draws of several stays."""
    page.wait_for_function("() => window.loraTrainer && loraTrainer.begun")
    page.evaluate(FIELDS, [["batch_size", 2]])
    generate(page, "a red ellipse, 背景 <lora:nothing:1>")
    page.click("#lora_trainer_send")
    page.wait_for_selector("#lora_trainer_pictures:visible")
    captions = page.evaluate("() => loraTrainer.pictures.rows.map((row) => row.caption)")
    assert captions == ["a red ellipse, 背景"] * 2
    page.hover(".lora_trainer_small_picture >> nth=0")
    page.click(".lora_trainer_take_out >> nth=0")
    until(page, "document.querySelector('#lora_trainer_pictures').innerText.includes('1 excluded')")


CHECKPOINT = "(document.querySelector('.model_selection input, #setting_sd_model_checkpoint input') || {}).value"


def test_the_webui_is_switched_back_by_a_button_and_its_own_field_shows_it(page, pictures, webui):
    open_tab(page)
    add(page, pictures)
    page.fill("#lora_trainer_field_output_name", "switched back")
    long = TRAINED.replace("epochs: 2", "max_train_steps: 4000").replace("max_train_steps: 8", "max_train_steps: 4000")
    page.evaluate(f"() => {{ const {long}; for (const [name, value] of Object.entries(SETTINGS)) "
                  "loraTrainer.form.set(name, value); return loraTrainer.estimate.now(); }")  # fmt: skip
    page.click("#lora_trainer_start")
    job = "(loraTrainer.live.job || {name: ''})"
    until(page, f"{job}.name === 'switched back' && {job}.step > 1")
    try:
        first = page.evaluate(CHECKPOINT)
        titles = [one["title"] for one in webui.get("/sdapi/v1/sd-models")]
        other = next(title for title in titles if first.split(".")[0] not in title)
        page.evaluate("(title) => selectCheckpoint(title)", other)
        until(page, f"{CHECKPOINT} !== {first!r}")
        page.evaluate("() => loraTrainer.host.openTab('txt2img')")
        generate(page, "a red ellipse")
        until(page, f"{job}.status === 'waiting' && {job}.switches_back")
        page.evaluate("() => loraTrainer.host.openTab('lora_trainer')")
        page.click("#lora_trainer_job_buttons >> text=Switch back")
        until(page, f"{job}.status === 'running' && {CHECKPOINT} === {first!r}")
        shot(page, "switched-back")
    finally:
        page.evaluate(f"() => loraTrainer.live.command({job}, 'stop')")
        until(page, f"!{job}.active")


def beside(page, field, words):
    """The sentence beside ``field``, once it holds ``words``."""
    page.wait_for_function("([id, words]) => document.getElementById(id).offsetParent && "
                           "document.getElementById(id).innerText.includes(words)",
                           arg=[f"lora_trainer_problem_{field}", words])  # fmt: skip
    shot(page, f"problem-{field}-{re.sub('[^a-z]+', '-', words.lower())[:12]}", full_page=True)


def inpainting(source, target):
    """``source`` as a model whose first layer also takes a mask and a picture."""
    with safe_open(source, "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    first = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[first] = np.pad(tensors[first], ((0, 0), (0, 5), (0, 0), (0, 0)))
    save_file(tensors, target)


def test_each_failure_is_a_sentence_beside_its_field(page, webui, pictures, tmp_path):
    folder = webui.data / "models"
    checkpoints = folder / "Stable-diffusion"
    inpainting(next(checkpoints.glob("*.safetensors")), checkpoints / "fills.safetensors")
    (folder / "Lora" / "taken.safetensors").write_bytes(b"somebody's")
    webui.post("/sdapi/v1/refresh-checkpoints")
    open_tab(page)
    page.fill("#lora_trainer_field_output_name", "failing")
    page.click("#lora_trainer_start")
    beside(page, "train_data_dir", "No pictures are chosen")
    page.click("#lora_trainer_other_pictures > summary")
    page.fill("#lora_trainer_folder", "/there/is/no/folder")
    page.click("[data-action=use-folder]")
    beside(page, "train_data_dir", "/there/is/no/folder")

    (tmp_path / "broken.png").write_bytes((pictures / "0.png").read_bytes()[:100])
    (tmp_path / "bare.png").write_bytes((pictures / "1.png").read_bytes())
    page.evaluate("() => loraTrainer.pictures.choose(null)")
    drop(page, tmp_path.glob("*.png"))
    until(page, "loraTrainer.get('refused').innerText.includes('broken.png')")
    until(page, "loraTrainer.get('pictures').innerText.includes('1 picture is fine')")
    page.fill("#lora_trainer_field_trigger_word", "")
    page.click("#lora_trainer_start")
    beside(page, "trigger_word", "no captions")

    page.fill("#lora_trainer_field_trigger_word", "zwx")
    page.fill("#lora_trainer_field_output_name", "taken")
    beside(page, "output_name", "There is a LoRA named taken already")
    page.click("#lora_trainer_start")
    beside(page, "output_name", "taken")
    page.fill("#lora_trainer_field_output_name", "failing")

    (model,) = page.evaluate("Array.from(loraTrainer.get('field_base_model').options, (one) => one.value)"
                             ".filter((value) => value.startsWith('fills'))")  # fmt: skip
    page.select_option("#lora_trainer_field_base_model", model)
    beside(page, "base_model", "npainting")
    page.click("#lora_trainer_start")
    beside(page, "base_model", "npainting")
    page.select_option("#lora_trainer_field_base_model", "")

    webui.probe("import errno, os\nos.real_fsync = os.fsync\n"
                "def full(handle): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
                "os.fsync, result = full, None")  # fmt: skip
    try:
        drop(page, [pictures / "2.png"])
        beside(page, "train_data_dir", "The disk is full")
    finally:
        webui.probe("import os\nos.fsync, result = os.real_fsync, None")
    assert all(job["name"] != "failing" for job in webui.get("/lora-trainer/v1/jobs")["jobs"]), "nothing was started"
    assert (folder / "Lora" / "taken.safetensors").read_bytes() == b"somebody's"


def test_every_id_is_ours(page):
    open_tab(page)
    ids = page.evaluate(
        "() => Array.from(document.querySelectorAll('#lora_trainer [id]'), (one) => one.id)"
        ".filter((id) => id && !id.startsWith('lora_trainer') && !id.startsWith('component-'))"
    )
    assert not ids
