"""The page for eyes, keys and screen readers: progress in view, texts that can be read, focus, spoken lines."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api")
from tests.ui.person import add, estimated, start, text, wait_for_text

# gradio's default theme with what A1111 and Forge make of it, and one as gradio has it with a bright yellow accent.
LIGHT = {"body-text-color": "#1f2937", "block-background-fill": "transparent", "body-background-fill": "white",
         "background-fill-primary": "white", "background-fill-secondary": "#f9fafb", "color-accent": "#f97316",
         "border-color-primary": "#e5e7eb", "link-text-color": "#2563eb", "input-background-fill": "white",
         "button-primary-background-fill": "linear-gradient(to bottom right, #ffedd5, #fdba74)",
         "button-primary-text-color": "#ea580c", "button-secondary-text-color": "#374151",
         "button-secondary-background-fill": "linear-gradient(to bottom right, #f3f4f6, #e5e7eb)"}  # fmt: skip
DARK = {"body-text-color": "#f3f4f6", "block-background-fill": "transparent", "body-background-fill": "#0b0f19",
        "background-fill-primary": "#0b0f19", "background-fill-secondary": "#111827", "color-accent": "#f97316",
        "border-color-primary": "#374151", "link-text-color": "#3b82f6", "input-background-fill": "#1f2937",
        "button-primary-background-fill": "linear-gradient(to bottom right, #f97316, #ea580c)",
        "button-primary-text-color": "white", "button-secondary-text-color": "white",
        "button-secondary-background-fill": "linear-gradient(to bottom right, #4b5563, #374151)"}  # fmt: skip
YELLOW = {"color-accent": "#facc15", "button-primary-background-fill": "#fde047", "button-primary-text-color": "white"}
THEMES = {"light": LIGHT, "dark": DARK, "yellow": LIGHT | YELLOW | {"block-background-fill": "white"},
          "dark yellow": DARK | YELLOW | {"block-background-fill": "#1f2937"}}  # fmt: skip

CONTRASTS = """() => {
    const numbers = (color) => {
        const [red, green, blue, alpha = 1] = color.match(/[\\d.]+(e-\\d+)?/g).map(Number);
        const most = color.startsWith("color(") ? 1 : 255;
        return [red / most, green / most, blue / most, alpha];
    };
    const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
    const behind = (node) => {
        const layers = [];
        for (let one = node; one; one = one.parentElement) {
            const style = getComputedStyle(one);
            const gradient = style.backgroundImage.match(/(rgba?|color)\\([^()]*\\)/g) || [];
            layers.push(gradient.length ? gradient.map(numbers) : [numbers(style.backgroundColor)]);
        }
        const join = (below, colors) => colors.flatMap((color) => below.map((one) => over(color, one)));
        return layers.reverse().reduce(join, [[1, 1, 1, 1]]);
    };
    const light = (color) => {
        const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        const [red, green, blue] = color.slice(0, 3).map(linear);
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const found = [];
    for (const node of document.querySelectorAll("#lora_trainer *")) {
        const own = [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
        const drawn = node.namespaceURI.endsWith("svg");
        const said = typeof node.value === "string" ? node.value : own ? node.textContent.trim() : "";
        const heard = node.closest(".lora_trainer_spoken");
        if (!said || heard || !node.checkVisibility() || node.disabled || node.type === "range") continue;
        for (const back of behind(node)) {
            const front = light(over(numbers(getComputedStyle(node)[drawn ? "fill" : "color"]), back));
            const [high, low] = [front, light(back)].sort((one, other) => other - one);
            found.push([(high + 0.05) / (low + 0.05), node.getAttribute("class") || node.tagName, said.slice(0, 40)]);
        }
    }
    return found.sort((one, other) => one[0] - other[0]);
}"""


@pytest.fixture
def themed(page):
    def wear(theme):
        rules = "".join(f"--{name}: {value}; " for name, value in THEMES[theme].items())
        page.evaluate("(dark) => document.body.classList.toggle('dark', dark)", theme.startswith("dark"))
        css = f":root, .dark {{ {rules} }} body {{ background: var(--body-background-fill) }}"
        page.add_style_tag(content=css + " * { transition: none !important }")

    return wear


@pytest.mark.parametrize("theme", THEMES)
def test_every_text_can_be_read(page, themed, files, train, theme):
    """WCAG's 4.5:1, in each part of the page; primary buttons also under the mouse."""
    themed(theme)
    add(page, files)
    page.fill("#lora_trainer_field_output_name", "hat_v1")
    page.evaluate("() => document.querySelectorAll('#lora_trainer details').forEach((one) => (one.open = true))")
    page.fill("#lora_trainer_field_epochs", "x")
    estimated(page)
    assert page.is_visible("#lora_trainer_problem_epochs")
    everything = page.evaluate(CONTRASTS)
    page.hover("#lora_trainer_start")
    everything += page.evaluate(CONTRASTS)
    page.fill("#lora_trainer_field_epochs", "3")
    page.click("#lora_trainer_start")
    page.wait_for_selector("#lora_trainer_live:not([hidden])")
    train.allow(20)
    wait_for_text(page, "job_state", "finished")
    page.wait_for_selector("#lora_trainer_job_buttons >> text=Try it")
    everything += page.evaluate(CONTRASTS)
    page.evaluate("loraTrainer.openSubTab('Runs')")
    page.click("#lora_trainer_run_1 > button")
    page.wait_for_selector(".lora_trainer_inside >> text=Compare checkpoints")
    everything += page.evaluate(CONTRASTS)
    page.evaluate("loraTrainer.editor.open(loraTrainer.pictures.chosen)")
    page.wait_for_selector("#lora_trainer_editor_save")
    everything += page.evaluate(CONTRASTS)
    assert len(everything) > 300
    assert not [one for one in everything if one[0] < 4.5]


IN_VIEW = """(name) => {
    const box = document.getElementById("lora_trainer_" + name).getBoundingClientRect();
    return box.height > 0 && box.top >= 0 && box.bottom <= window.innerHeight + 1;
}"""


def in_view(page, name):
    return page.evaluate(IN_VIEW, name)


def test_progress_and_time_left_stay_in_view(page, files, train):
    start(page, files)
    train.allow(5)
    wait_for_text(page, "job_facts", "step 5 of 20")
    page.evaluate("() => document.querySelectorAll('#lora_trainer details').forEach((one) => (one.open = true))")
    page.evaluate("() => document.querySelector('#lora_trainer_field_tensorboard').scrollIntoView()")
    page.wait_for_selector("#lora_trainer_strip:not([hidden])")
    assert in_view(page, "strip") and not in_view(page, "job_name")
    assert text(page, "strip_percent") == "25 %" and text(page, "strip_left").endswith(" left")
    train.allow(5)
    wait_for_text(page, "strip_percent", "50 %")
    assert page.title().startswith("50 % · ") and " left · hat_v1" in page.title()
    for tab in ("Runs", "Dataset"):
        page.evaluate("(tab) => loraTrainer.openSubTab(tab)", tab)
        assert in_view(page, "strip")
    page.click("#lora_trainer_strip >> text=Show it")
    page.wait_for_selector("#lora_trainer_strip", state="hidden")
    page.wait_for_function(IN_VIEW, arg="job_name")  # it scrolls there
    assert page.is_visible("#lora_trainer_tab_train")
    page.evaluate("() => window.scrollTo(0, document.body.scrollHeight)")
    page.wait_for_selector("#lora_trainer_strip:not([hidden])")
    train.allow(20)
    page.wait_for_selector("#lora_trainer_strip", state="hidden")


def test_the_panel_stands_above_the_advanced_settings(page, files, train):
    start(page, files)
    page.click("#lora_trainer_advanced > summary")
    order = page.evaluate("""() => ["start", "live", "advanced"].map(
        (name) => document.getElementById("lora_trainer_" + name).getBoundingClientRect().top)""")
    assert order == sorted(order)


def test_a_screen_reader_hears_what_changes_and_not_every_step(page, files, train):
    page.evaluate("""() => {
        window.heard = [];
        const live = "[role=status], [role=alert], [aria-live=polite], [aria-live=assertive]";
        new MutationObserver((found) => {
            for (const one of found) {
                const node = one.target.nodeType === 1 ? one.target : one.target.parentElement;
                const place = node && node.closest("#lora_trainer :is(" + live + ")");
                if (place && place.checkVisibility()) window.heard.push(place.innerText);
            }
        }).observe(document, {childList: true, subtree: true, characterData: true});
    }""")
    add(page, files)
    assert sum("Uploading" in one for one in page.evaluate("heard")) == 0
    page.fill("#lora_trainer_field_output_name", "hat_v1")
    page.click("#lora_trainer_start")
    page.wait_for_selector("#lora_trainer_live:not([hidden])")
    train.allow(1)
    wait_for_text(page, "job_facts", "step 1 of 20")
    wait_for_text(page, "spoken", "hat_v1: training")
    page.evaluate("heard.length = 0")
    for step in range(2, 10):
        train.allow(1)
        wait_for_text(page, "job_facts", f"step {step} of 20")
    assert page.evaluate("heard") == [], "two quarters in less than half a minute"
    page.evaluate("() => { const now = Date.now(); Date.now = () => now + 60000; }")
    train.allow(1)
    wait_for_text(page, "spoken", "hat_v1: training, 50 %")
    page.click("#lora_trainer_job_buttons >> text=Pause")
    wait_for_text(page, "spoken", "hat_v1: paused")
    page.click("#lora_trainer_job_buttons >> text=Resume")
    train.allow(20)
    wait_for_text(page, "spoken", "hat_v1: finished")


FOCUS = {
    "no pictures": ({}, "files"),
    "a number": ({"output_name": "a", "learning_rate": "much", "alpha": "x"}, "field_alpha"),
    "a name": ({"output_name": "a/b", "learning_rate": "much"}, "field_output_name"),
}


@pytest.mark.parametrize("case", FOCUS)
def test_a_refused_start_takes_the_keys_to_the_first_wrong_field(page, files, case):
    given, wanted = FOCUS[case]
    if given:
        add(page, files)
    page.evaluate(
        "(given) => Object.entries(given).forEach(([name, value]) => loraTrainer.form.set(name, value))", given
    )
    page.focus("#lora_trainer_start")
    page.keyboard.press("Enter")
    page.wait_for_function("(id) => document.activeElement.id === id", arg=f"lora_trainer_{wanted}")
    assert page.evaluate("document.activeElement.checkVisibility()")
