"""The Dataset sub-tab in a real WebUI, from twenty raw pictures to a training; and the same tab with two thousand.

LORA_TRAINER_SHOTS names a folder for screenshots of every station. Clicks and seconds are printed (pytest -s).
"""

from __future__ import annotations

import inspect
import statistics
import time
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from tests.captioning import models
from tests.dataset.test_checks import photograph
from tests.webui.person import Walk, drop, shot
from tests.webui.test_tab import TRAINED, address, open_tab, page, until  # noqa: F401 - fixtures

SIDE = 300
FAULTS = {
    "copy.jpg": "duplicate", "again.jpg": "near-duplicate", "turned.jpg": "rotated", "tiny.png": "too-small",
    "blurred.png": "blurred", "print.jpg": "cmyk",
}  # fmt: skip
GRID = "#lora_trainer_editor_grid"
MEASURE = """async () => {
    const {editor, get} = loraTrainer, times = {turn: [], tag: [], text: []};
    const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    const timed = async(kind, action, shown) => {
        await new Promise((done) => setTimeout(done, 200)); // a person looks at a page before turning it
        const begin = performance.now();
        await action();
        while (!shown()) await painted();
        get("editor_grid").offsetHeight; // laid out
        await painted();
        times[kind].push(performance.now() - begin);
    };
    const first = () => editor.gallery.rows.length && editor.gallery.rows[0].file;
    await editor.gallery.load(0);
    for (let page = 0; page < 40; page++) {
        const before = first();
        await timed("turn", () => get("editor_later").click(), () => first() !== before);
    }
    for (let number = 0; number < 20; number++) {
        await timed("tag", () => editor.gallery.want("tags", "number " + number), () => editor.gallery.total === 40);
        await timed("tag", () => editor.gallery.want("tags", "number " + number), () => editor.gallery.total === 2000);
    }
    for (let number = 0; number < 10; number++) { // with the wait until typing has ended
        for (const [words, total] of [["number " + (number + 10), 40], ["", 2000]]) {
            await timed("text", () => {
                get("editor_text").value = words;
                get("editor_text").dispatchEvent(new Event("input"));
            }, () => editor.gallery.total === total);
        }
    }
    return times;
}"""


def twenty(folder: Path) -> list[Path]:
    """Thirteen clean pictures and seven with faults."""
    clean = [photograph(seed, (SIDE, SIDE)) for seed in range(13)]
    for index, picture in enumerate(clean):
        picture.save(folder / f"clean{index:02}.jpg", quality=92)
    turned = Image.Exif()
    turned[0x0112] = 6
    (folder / "copy.jpg").write_bytes((folder / "clean00.jpg").read_bytes())
    clean[1].resize((SIDE - 40, SIDE - 40)).save(folder / "again.jpg", quality=60)
    (folder / "cut.jpg").write_bytes((folder / "clean02.jpg").read_bytes()[:9000])
    photograph(20, (SIDE, SIDE)).save(folder / "turned.jpg", exif=turned)
    photograph(21, (50, 50)).save(folder / "tiny.png")
    photograph(22, (SIDE, SIDE)).filter(ImageFilter.GaussianBlur(3)).save(folder / "blurred.png")
    photograph(23, (SIDE, SIDE)).convert("CMYK").save(folder / "print.jpg")
    return sorted(folder.iterdir())


def put_captioner(webui) -> None:
    """A BLIP with random weights, made by the WebUI's own transformers."""
    folder = webui.data / "lora_trainer" / "captioners" / "blip"
    head = f"from __future__ import annotations\nfrom pathlib import Path\nimport torch\nWORDS = {models.WORDS!r}\n"
    webui.probe(f"{head}{inspect.getsource(models.tiny_blip)}\ntiny_blip(Path({str(folder)!r}))\nresult = None")


def unsaved(page, count):  # noqa: F811
    until(page, f"loraTrainer.editor.state.unsaved === {count}")


def captions(page):  # noqa: F811
    return page.evaluate("Object.fromEntries(loraTrainer.editor.gallery.rows.map((row) => [row.file, row.caption]))")


def test_from_twenty_raw_pictures_to_a_training(page, webui, tmp_path):  # noqa: F811
    put_captioner(webui)
    name = f"walk_{int(time.time())}"
    open_tab(page)
    page.evaluate(f"() => {{ const {TRAINED}; for (const [name, value] of Object.entries(SETTINGS)) "
                  "loraTrainer.form.set(name, value); loraTrainer.pictures.choose(null); }")  # fmt: skip
    walk = Walk(page, "dataset")
    drop(page, twenty(tmp_path))
    page.wait_for_selector("#lora_trainer_picture_links:visible")
    page.wait_for_function("() => loraTrainer.pictures.rows.length === 19")
    assert "cut.jpg" in page.text_content("#lora_trainer_refused ul"), "what cannot be read is refused at once"
    walk.station("dropped")

    walk.click("[data-action=caption-chosen]")
    page.wait_for_selector("#lora_trainer_editor_caption_go:not([disabled])")
    assert page.input_value("#lora_trainer_editor_captioner") == "blip", "the one that can run"
    walk.click("#lora_trainer_editor_trigger")
    page.fill("#lora_trainer_editor_trigger", "zwx")
    walk.station("captioner chosen")
    walk.click("#lora_trainer_editor_caption_go")
    until(page, "loraTrainer.editor.state.captioned === 19")
    until(page, "loraTrainer.editor.gallery.rows.every((row) => row.caption)")
    assert all(text.startswith("zwx, ") for text in captions(page).values())
    walk.station("captioned")

    page.evaluate("document.activeElement.blur()")
    before = captions(page)
    order = list(before)
    for index in range(10):
        page.keyboard.press("Enter")
        if index in (2, 5):
            page.keyboard.press("Control+a")
            page.keyboard.type("a thing without its word" if index == 2 else " ")
        else:
            page.keyboard.type(f", drawn by hand {index}")
        page.keyboard.press("Enter")
        unsaved(page, index + 1)
        page.keyboard.press("ArrowRight")
        until(page, f"loraTrainer.editor.row.file === {order[index + 1]!r}")
    page.keyboard.press("Control+z")
    unsaved(page, 9)
    page.keyboard.press("Control+y")
    unsaved(page, 10)
    page.keyboard.press("Control+s")
    unsaved(page, 0)
    edited = captions(page)
    assert [file for file in order if edited[file] != before[file]] == order[:10]
    walk.station("ten edited with the keyboard")

    walk.click("#lora_trainer_editor_opens_many")
    walk.click("#lora_trainer_editor_action")
    page.select_option("#lora_trainer_editor_action", "replace")
    walk.click("#lora_trainer_editor_old")
    page.fill("#lora_trainer_editor_old", "zwx")
    page.keyboard.press("Tab")
    page.keyboard.type("**zwx**")
    walk.click("[data-action=editor-apply]")
    unsaved(page, 17)
    assert sum("**zwx**" in text for text in captions(page).values()) == 17
    walk.station("replaced in all")
    walk.click("#lora_trainer_editor_message >> text=Undo")
    unsaved(page, 0)
    assert captions(page) == edited
    walk.station("undone")

    walk.click("#lora_trainer_editor_opens_check")
    walk.click("[data-action=editor-check]")
    until(page, "loraTrainer.editor.tools.report && !loraTrainer.editor.tools.report.stale")
    findings = page.evaluate("loraTrainer.editor.tools.report.findings")
    found = {(file, one["kind"]) for one in findings for file in {one["file"], *one["files"]}}
    expected = set(FAULTS.items()) | {(order[2], "trigger-missing"), (order[5], "empty-caption")}
    # Its twin is named beside each; and the captioner of the test says the same of many.
    beside = {("clean00.jpg", "duplicate"), ("clean01.jpg", "near-duplicate")}
    false = {pair for pair in found - expected - beside if pair[1] != "identical-captions"}
    assert expected <= found and not false, (expected - found, false)
    walk.station("faults found")
    walk.click("[data-action=editor-fix-all]")
    until(page, "loraTrainer.editor.state.excluded > 0")
    walk.station("fixed what is safe")

    walk.click("[data-action=editor-train]")
    page.wait_for_selector("#lora_trainer_pictures:visible")
    page.fill("#lora_trainer_field_output_name", name)
    page.evaluate("() => loraTrainer.estimate.now()")
    walk.click("#lora_trainer_start")
    until(page, f"loraTrainer.live.job && loraTrainer.live.job.name === '{name}' && loraTrainer.live.job.step > 0")
    walk.station("training")
    page.evaluate("() => loraTrainer.openSubTab('Train')")
    until(page, "loraTrainer.live.job.status === 'finished'")
    walk.station("trained")


@pytest.fixture(scope="module")
def two_thousand(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    for index in range(20):
        photograph(index, (256, 256)).save(folder / f"source{index:02}.jpg")
    for index in range(2000):
        (folder / f"{index:04}.jpg").hardlink_to(folder / f"source{index % 20:02}.jpg")
        words = f"zwx, number {index % 50}, *soft light*, picture {index}, a long caption of many words in all"
        (folder / f"{index:04}.txt").write_text(words, encoding="utf-8")
    for index in range(20):
        (folder / f"source{index:02}.jpg").unlink()
    return folder


def test_two_thousand_pictures_stay_fluid(page, two_thousand):  # noqa: F811
    open_tab(page)
    begin = time.monotonic()
    page.evaluate("(folder) => loraTrainer.editor.open(folder)", str(two_thousand))
    page.wait_for_selector(f"{GRID} li >> nth=47")
    print(f"opened in {time.monotonic() - begin:.1f} s")
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def computed():
        """Seconds that the page has computed, however busy the machine is with other things."""
        return {one["name"]: one["value"] for one in devtools.send("Performance.getMetrics")["metrics"]}["TaskDuration"]

    before = computed()
    times = page.evaluate(MEASURE)
    each = 1000 * (computed() - before) / sum(map(len, times.values()))
    for kind, values in times.items():
        print(f"{kind}: median {statistics.median(values):.0f} ms, most {max(values):.0f} ms of {len(values)}")
    print(f"{each:.0f} ms of it in the page itself")
    assert each < 100
    shot(page, "two-thousand")


def test_what_is_not_saved_is_warned_of_and_what_others_write_is_told(page, two_thousand):  # noqa: F811
    open_tab(page)
    page.evaluate("(folder) => loraTrainer.editor.open(folder)", str(two_thousand))
    page.wait_for_selector(f"{GRID} li >> nth=47")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Enter")
    page.keyboard.type(", mine")
    page.keyboard.press("Enter")
    unsaved(page, 1)
    asked = []
    page.once("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    page.reload()
    assert asked == ["beforeunload"]
    open_tab(page)
    page.evaluate("(folder) => loraTrainer.editor.open(folder)", str(two_thousand))
    unsaved(page, 1)
    first = two_thousand / "0000.txt"
    first.write_text("theirs", encoding="utf-8")
    page.click("#lora_trainer_editor_save")
    page.wait_for_selector("#lora_trainer_editor_conflicts:visible")
    assert first.read_text(encoding="utf-8") == "theirs"
    shot(page, "conflict")
    page.click("text=Keep mine, all")
    unsaved(page, 0)
    assert first.read_text(encoding="utf-8").endswith(", mine\n")
    page.click("#lora_trainer_editor_opens_export")
    page.click("#lora_trainer_editor_backups >> text=Go back to it")
    until(page, "loraTrainer.editor.row.caption === 'theirs'")
