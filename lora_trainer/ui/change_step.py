"""What the first step shows of a training that learns a change: a pair of pictures, two folders, or words."""

from __future__ import annotations

from lora_trainer.ui.form import field
from lora_trainer.ui.markup import Markup, button, tag

WAYS = {"pictures": "Pictures", "pair": "A pair", "words": "Words"}
"""By name, what image models learn from: the kinds of the second step are those of one of them."""
PICTURES = "image/*"


def way_of(task: str) -> str:
    """The way that a kind of training, one of the setting ``task``, belongs to."""
    return {"pair": "pair", "slider": "pair", "words": "words"}.get(task, "pictures")


def in_way(classes: str, way: str) -> str:
    """The classes of an element that is shown with one way alone; the page begins with pictures."""
    return classes if way == "pictures" else f"{classes} other_way"


def choice_of_ways() -> Markup:
    choices = [
        tag("label", tag("input", type="radio", name="lora_trainer_way", value=way, checked=way == "pictures",
                         class_="spoken"), tag("span", title), class_="segment")
        for way, title in WAYS.items()
    ]  # fmt: skip
    return tag("fieldset", tag("legend", "What to learn from", class_="spoken"), *choices, class_="segments")


def pair(offer_folders: bool) -> list[Markup]:
    """offer_folders: whether a folder of the server may be named."""
    place = "/path/to/pictures" if offer_folders else "name of earlier pictures"
    two = tag("div", _drop("before", "Before"), _drop("after", "After"), class_="two")
    prompt = tag(
        "div",
        tag("label", "What both show", for_="pair_prompt"),
        tag("textarea", id_="pair_prompt", rows=2, spellcheck="false",
            placeholder="a prompt that fits both, such as: a woman, portrait"),
        class_="field",
        id_="pair_prompt_field",
        hidden=True,
    )  # fmt: skip
    folder = tag(
        "div",
        tag("label", "Folder with pairs", for_="pair_folder"),
        tag("div",
            tag("input", type="text", id_="pair_folder", spellcheck="false", autocomplete="off", placeholder=place,
                list="lora_trainer_known_sets"),
            button("Use it", "use-pairs"),
            class_="inline"),
        tag("p", "The second picture of each pair has the name of the first one with _after behind it: a.png and"
            " a_after.png.", class_="help"),
        class_="field",
    )  # fmt: skip
    one = tag(
        "div",
        tag("p", "Two pictures of one size that differ in what is to be learned and in nothing else.", class_="lead"),
        two,
        tag("p", id_="pair_upload", class_="status", role="status", hidden=True),
        tag("p", "The galleries of txt2img and img2img have buttons that send a picture here.", class_="help"),
        prompt,
        tag("details", tag("summary", "Many pairs"), folder, id_="pair_folders", class_="quiet"),
        class_="way",
        data_task="pair",
    )
    positive = tag(
        "div",
        tag("label", "Folder with pictures of it", for_="slider_folder"),
        tag("input", type="text", id_="slider_folder", spellcheck="false", autocomplete="off", placeholder=place,
            list="lora_trainer_known_sets"),
        class_="field",
    )  # fmt: skip
    both = tag(
        "div",
        tag("p", "Pictures of something and of its opposite, with captions of the same kind that name neither.",
            class_="lead"),
        positive,
        field("opposite_dir", text="Folder with pictures of the opposite", placeholder=place, explained=False,
              known="lora_trainer_known_sets"),
        class_="way",
        data_task="slider",
    )  # fmt: skip
    judged = tag("p", id_="pair_judged", class_="status", role="status", hidden=True)
    hints = tag("ul", id_="pair_hints", class_="hints", hidden=True)
    return [one, both, tag("datalist", id_="known_sets"), judged, hints]


def _drop(place: str, title: str) -> Markup:
    return tag(
        "label",
        tag("img", id_=f"{place}_picture", alt="", hidden=True),
        tag("strong", title),
        tag("span", "drop or choose a picture"),
        tag("input", type="file", id_=f"{place}_file", class_="spoken", accept=PICTURES, aria_label=title),
        id_=f"{place}_drop",
        class_="drop",
    )


def words() -> list[Markup]:
    return [
        tag("p", "No pictures are needed: what the model draws for one prompt becomes what it draws for another.",
            class_="lead"),
        field("original_prompt", text="Original prompt", placeholder="a person", explained=False),
        field("positive_prompt", text="Positive prompt", placeholder="an old person", explained=False,
              data_kinds="words_slider"),
        field("negative_prompt", text="Negative prompt", placeholder="a young person", explained=False,
              data_kinds="words_slider"),
        field("target_prompt", text="Target prompt", placeholder="what it becomes", data_kinds="turn words_slider"),
        field("protected_prompts", text="Protected prompts", placeholder="a dog"),
        tag("ul", id_="word_hints", class_="hints", hidden=True),
    ]  # fmt: skip
