"""What a caption leaves out, for each kind of LoRA: what no caption names melts into what is learned.

Patterns are globs over plain, lower-case tags (``* hair``); sentences are cut by regular expressions.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_trainer.errors import UserError


@dataclass(frozen=True)
class CaptionPreset:
    """removes: globs of tags that are left out. cuts: regular expressions of what is cut from a sentence.
    categories: of tags that are left out as a whole. first: globs of tags that come first, for they vary."""

    kind: str
    title: str
    hint: str
    removes: tuple[str, ...] = ()
    cuts: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    first: tuple[str, ...] = ()


def _list(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


_STYLE = _list(
    "* style, * (style), style parody, *painting*, *drawing*, illustration, *illustration, sketch, *sketch, "
    "*watercolor*, *(medium), traditional media, digital media*, lineart, line art, *render, 3d, pixel art, comic, "
    "*comic*, anime*, *anime, manga, cartoon*, realistic, photorealistic, monochrome, greyscale, spot color, "
    "limited palette, flat color, cel shading, chibi, impressionism, surreal, retro artstyle, *artstyle*, parody, "
    "artist name, signature, watermark, dated, web address, *username, photograph, photo*, artwork, concept art"
)
_MEDIUM = (
    r"(?:black and white |colorful |digital |oil |watercolor |pencil |ink |pixel |3d |stylized |abstract )*"
    r"(?:painting|drawing|illustration|sketch|photo(?:graph)?|picture|image|rendering|render|cartoon|artwork|poster|"
    r"print|close ?up)"
)
_COLORS = (
    r"(?:black|brown|blonde?|red|blue|green|pink|purple|white|gr[ae]y|silver|orange|yellow|golden|dark|light|long|"
    r"short|medium|curly|straight|wavy|messy|braided|bright|big|large|small|pale|tan(?:ned)?|fair)"
)
_IDENTITY = _list(
    "* hair, hair between eyes, *bangs, *ponytail*, twintails, *braid*, ahoge, sidelocks, hair intakes, * bun, "
    "* eyes, heterochromia, eyelashes, *pupils, * skin, *skinned*, tan, freckles, mole*, * mole, scar*, * scar, "
    "fang, fangs, pointy ears, *animal ears, * ears, *horns, *tail, *wings, *breasts, facial hair, beard, mustache, "
    "bald, *eyebrows, old man, old woman, mature female, mature male, muscular*, tattoo, * tattoo, elf, "
    "forehead mark, facial mark"
)
_CHANGING_PLACE = _list(
    "*day, night, *night*, dawn, dusk, sunset, sunrise, morning, noon, afternoon, evening, twilight, *hour light, "
    "at *, spring, summer, autumn, winter, rain, *snow*, fog, storm, wind, clear sky, cloudy sky, cloud*, sunshine, "
    "after rain, overcast*, * light, *lighting, sunlight, moonlight, from *, wide shot, *close-up, aerial view, "
    "panorama, *shot, perspective, fisheye, depth of field, bokeh, blurry*"
)
_PLACE = _list(
    "scenery, landscape, no humans, outdoors, building*, architecture, city*, *street, house*, skyscraper, town, "
    "village, castle, temple, forest, mountain*, beach, room, indoors, environment, background"
)

PRESETS: dict[str, CaptionPreset] = {
    preset.kind: preset
    for preset in (
        CaptionPreset("", "As described", "Everything that the captioner says."),
        CaptionPreset(
            "style",
            "Style",
            "Describes the content and leaves out words of style: the style is what is learned.",
            removes=_STYLE,
            cuts=(
                rf"^(?:this is |there is )?(?:an? |the )?{_MEDIUM} (?:of|showing|with) ",
                r",? (?:in|with) (?:an? |the )?[\w -]{0,30}\bstyle\b",
            ),
            categories=("medium", "style", "palette"),
        ),
        CaptionPreset(
            "character",
            "Character",
            "Names what varies, such as clothes, pose and place, and leaves out what makes the person.",
            removes=_IDENTITY,
            cuts=(
                rf",? (?:with|has|having|and) (?:{_COLORS}[ -]?)+(?:and (?:{_COLORS}[ -]?)+)?(?:hair|eyes|skin|beard)"
                rf"(?: and (?:{_COLORS}[ -]?)+(?:hair|eyes|skin|beard))?",
            ),
            categories=("character",),
        ),
        CaptionPreset(
            "scene",
            "Scene",
            "Names time, weather, light and camera first, and leaves out what the place is made of.",
            removes=_PLACE,
            categories=("place",),
            first=_CHANGING_PLACE,
        ),
        CaptionPreset(
            "object",
            "Object",
            "Names the surroundings, the light and the side it is seen from.",
            removes=_list("product, product shot, still life, no humans, object, simple object"),
        ),
    )
}


def caption_preset(kind: str) -> CaptionPreset:
    """Raises UserError for an unknown kind."""
    if kind not in PRESETS:
        known = ", ".join(name for name in PRESETS if name)
        raise UserError(f"There is no kind {kind!r} of LoRA.", field="kind", remedy=f"One of {known}.")
    return PRESETS[kind]
