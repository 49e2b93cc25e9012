"""A change in a browser: a pair from disk or from a gallery, words, two folders; and the strip of weights after it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api")
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.jobs.fakes import make_pictures
from tests.ui.person import estimated, text, wait_for_text
from tests.webui.person import shot

GALLERY = """([tab, addresses]) => {
    const gallery = document.createElement("div");
    gallery.id = tab + "_gallery";
    gallery.append(...addresses.map((address) => Object.assign(new Image(), {src: address})));
    document.getElementById("tab_txt2img").append(gallery);
}"""
STRIP = "#lora_trainer_previews .lora_trainer_grid_table"


def way(page, name):
    page.click(f".lora_trainer_segment:has(input[value={name}])")


def picture(path, color="navy", size=(96, 64), **info):
    path.parent.mkdir(exist_ok=True, parents=True)
    told = PngInfo()
    for name, value in info.items():
        told.add_text(name, value)
    Image.new("RGB", size, color).save(path, pnginfo=told)
    return path


def put(page, place, path):
    page.set_input_files(f"#lora_trainer_{place}_file", path)
    page.evaluate("() => loraTrainer.pair.busy")


def test_a_pair_from_disk(page, tmp_path, manager, train):
    way(page, "pair")
    assert page.is_hidden("#lora_trainer_drop") and page.is_hidden("#lora_trainer_field_trigger_word")
    page.click("#lora_trainer_start")
    wait_for_text(page, "problem_train_data_dir", "No pair is chosen. Add the picture before the change")
    put(page, "before", picture(tmp_path / "眼睛 开.png"))
    put(page, "after", picture(tmp_path / "眼睛 闭.jpg", "red"))
    page.wait_for_function("() => ['before', 'after'].every((one) => loraTrainer.get(one + '_picture').naturalWidth)")
    page.fill("#lora_trainer_pair_prompt", "a woman, 肖像")
    page.fill("#lora_trainer_field_output_name", "eyes")
    estimated(page)
    assert (text(page, "fact_sum"), text(page, "fact_steps")) == ("1 pair / batch 1", "50")
    shot(page, "pair")
    train.free = True
    page.click("#lora_trainer_start")
    wait_for_text(page, "job_state", "finished")
    config = train.config()
    assert (config.task, config.lora_rank, config.min_timestep, config.trigger_word) == ("pair", 4, 500, "")
    assert config.preview_prompts == ["a woman, 肖像"] and config.max_train_steps == 50
    shot(page, "pair-done")


def test_a_prompt_that_was_just_typed_is_that_of_the_run_and_of_no_earlier_one(page, tmp_path, manager, train):
    def slowly(route):
        if route.request.method == "POST":
            time.sleep(0.3)
        route.continue_()

    def run(name, prompt):
        page.fill("#lora_trainer_field_output_name", name)
        estimated(page)
        page.fill("#lora_trainer_pair_prompt", prompt)
        page.click("#lora_trainer_start")
        page.wait_for_function("() => loraTrainer.get('job_state').innerText.includes('finished')"
                               " && !loraTrainer.get('start').disabled")  # fmt: skip

    train.free = True
    way(page, "pair")
    put(page, "before", picture(tmp_path / "a.png"))
    put(page, "after", picture(tmp_path / "b.png", "red"))
    page.route("**/datasets/**", slowly)
    for count, prompt in enumerate(("a woman", "一个男人"), start=1):
        run(f"eyes {count}", prompt)
        assert len(train.configs) == count and train.configs[-1].preview_prompts == [prompt]
    first, second = (manager.folders.datasets / Path(config.train_data_dir).name for config in train.configs)
    assert [(one / "pair.txt").read_text().strip() for one in (first, second)] == ["a woman", "一个男人"]
    assert page.input_value("#lora_trainer_pair_prompt") == "一个男人"


def test_pictures_come_from_the_galleries_with_prompt_size_and_base_model(page, tmp_path, manager):
    manager.host.models = {"tiny.safetensors [abc]": (True, True), "sub/other one.safetensors": (False, False)}
    drawn = "eyes {}, a face <lora:x:1>\nNegative prompt: bad\nSteps: 20, Size: 96x64, Model: other one, Seed: 1"
    for state, color in (("open", "navy"), ("closed", "red")):
        picture(manager.folders.datasets / "drawn" / f"{state}.png", color, parameters=drawn.format(state))
    for tab, state, place in (("txt2img", "open", "before"), ("img2img", "closed", "after")):
        page.evaluate(GALLERY, [tab, [f"./lora-trainer/v1/datasets/drawn/pictures/{state}.png"]])
        page.evaluate("([id]) => loraTrainer.get(id).click()", [f"{place}_of_{tab}"])
        page.wait_for_function("(place) => loraTrainer.pair.shown[place]", arg=place)
    estimated(page)
    assert page.input_value("#lora_trainer_pair_prompt") == "eyes open, a face"
    settings = page.evaluate("loraTrainer.form.settings()")
    assert (settings["task"], settings["resolution"]) == ("pair", "96x64")
    assert settings["base_model"] == "sub/other one.safetensors" and text(page, "fact_buckets") == "96×64"
    page.reload()
    page.wait_for_function("() => window.loraTrainer && loraTrainer.begun && loraTrainer.pair.shown.after")
    assert page.input_value("#lora_trainer_field_base_model") == "sub/other one.safetensors"
    put(page, "after", picture(tmp_path / "from disk.png", "green"))
    settings = page.evaluate("loraTrainer.form.settings()")
    assert not {"resolution", "base_model"} & settings.keys(), "they came with the picture that is gone"


def test_what_is_wrong_with_a_pair_is_said_beside_it(page, tmp_path):
    way(page, "pair")
    broken = tmp_path / "坏.png"
    broken.write_bytes(b"no picture")
    put(page, "before", broken)
    wait_for_text(page, "problem_train_data_dir", "坏.png")
    put(page, "before", picture(tmp_path / "a.png"))
    assert page.is_hidden("#lora_trainer_problem_train_data_dir")
    put(page, "after", picture(tmp_path / "b.png", size=(64, 64)))
    wait_for_text(page, "problem_train_data_dir", "have different sizes: 96×64 and 64×64.")
    page.click("#lora_trainer_pair_folders > summary")
    page.fill("#lora_trainer_pair_folder", str(tmp_path / "没有"))
    page.press("#lora_trainer_pair_folder", "Enter")
    wait_for_text(page, "problem_train_data_dir", "没有")
    make_pictures(tmp_path / "many")
    for path in sorted((tmp_path / "many").glob("*.png")):
        Image.new("RGB", (64, 64)).save(path.with_name(path.stem + "_after.png"))
    page.fill("#lora_trainer_pair_folder", str(tmp_path / "many"))
    page.click("text=Use it >> visible=true")
    wait_for_text(page, "pair_judged", "6 pictures in pairs")
    assert text(page, "fact_sum") == "3 pairs / batch 1"


def test_words_and_the_strip_after_them(page, manager, train, monkeypatch):
    def draw(request):  # greener by the weight
        return Image.new("RGB", (96, 96), (90, int(100 + 99 * request.lora_weight * bool(request.lora)), 0))

    monkeypatch.setattr(manager.host, "draw", draw)
    page.set_viewport_size({"width": 1400, "height": 1400})
    way(page, "words")
    page.check("input[value=erase]")
    assert page.is_hidden("#lora_trainer_field_target_prompt") and page.is_hidden("#lora_trainer_field_positive_prompt")
    page.click("#lora_trainer_start")
    wait_for_text(page, "problem_original_prompt", "there is nothing to learn")
    page.check("input[value=words_slider]")
    for name, value in (("original", "一个人"), ("positive", "an old person"), ("negative", "a young person")):
        page.fill(f"#lora_trainer_field_{name}_prompt", value)
    page.fill("#lora_trainer_field_protected_prompts", "a dog\na cat, 猫")
    estimated(page)
    assert (text(page, "fact_sum"), text(page, "fact_steps")) == ("words alone / batch 1", "300")
    assert not page.is_visible("#lora_trainer_word_hints")
    shot(page, "words")
    page.reload()
    page.wait_for_function("() => window.loraTrainer && loraTrainer.begun")
    assert page.is_checked("input[name=lora_trainer_way][value=words]")
    train.free = True
    page.click("#lora_trainer_start")
    wait_for_text(page, "job_state", "finished")
    config = train.config()
    assert (config.task, config.both_ways, config.protected_prompts) == ("words", True, ["a dog", "a cat, 猫"])
    page.click("#lora_trainer_job_buttons >> text=Draw a strip")
    page.wait_for_selector(STRIP)
    heads = [one.inner_text() for one in page.locator(f"{STRIP} thead th").all()]
    assert heads == ["", "× -1", "× -0.5", "× 0, base model", "× 0.5", "× 1"]
    page.wait_for_function("(strip) => [...document.querySelectorAll(strip + ' img')]"
                           ".every((one) => one.naturalWidth === 96)", arg=STRIP)  # fmt: skip
    there = page.locator(f"{STRIP} [aria-pressed=true]").get_attribute("title")
    assert there.endswith("at weight 1 into your Lora tab")
    shot(page, "strip", full_page=True)
    page.click(f"{STRIP} td button >> nth=1")
    page.wait_for_selector(f"{STRIP} [aria-pressed=true][title*='weight -0.5']")
    assert manager.host.published[-1][1].preferred_weight == -0.5
    page.click("#lora_trainer_job_buttons >> text=Try it")
    page.wait_for_function("() => document.querySelector('#txt2img_prompt textarea').value.endsWith(':-0.5>')")
    page.evaluate("() => loraTrainer.runs.again(loraTrainer.live.job, false)")
    page.wait_for_function("() => loraTrainer.form.given.negative_prompt === 'a young person'")
    assert page.is_checked("input[value=words_slider]")


def test_two_folders(page, tmp_path, manager, train):
    make_pictures(manager.folders.datasets / "老", 2)
    make_pictures(tmp_path / "young", 3)
    way(page, "pair")
    page.check("input[value=opposites]")
    assert page.is_hidden("#lora_trainer_before_drop")
    page.fill("#lora_trainer_slider_folder", "老")
    page.fill("#lora_trainer_field_opposite_dir", f"{tmp_path}/nothing")
    estimated(page)
    wait_for_text(page, "problem_opposite_dir", "nothing")
    page.fill("#lora_trainer_field_opposite_dir", str(tmp_path / "young"))
    estimated(page)
    assert text(page, "pair_judged") == "5 pictures of both" and page.is_hidden("#lora_trainer_problem_opposite_dir")
    way(page, "pictures")
    assert page.is_visible("#lora_trainer_drop") and page.is_visible("#lora_trainer_field_trigger_word")
    assert "opposite_dir" not in page.evaluate("loraTrainer.form.settings()")
