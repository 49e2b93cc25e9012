"""Phrases for CLIP to choose from, in groups of which at most one or a few fit. No names of artists."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """``most``: how many phrases of the group are told of a picture at the most. ``prompt``: what CLIP reads."""

    name: str
    phrases: tuple[str, ...]
    most: int = 1
    prompt: str = "{}"


def _list(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split(",") if phrase.strip())


GROUPS: tuple[Group, ...] = (
    Group("medium", _list(
        "photograph, oil painting, watercolor painting, acrylic painting, gouache painting, pencil drawing, "
        "charcoal drawing, ink drawing, pastel drawing, digital painting, vector illustration, 3d render, pixel art, "
        "anime illustration, comic panel, line art, screenshot, collage, woodcut print, engraving, sculpture, mosaic, "
        "mural, embroidery, low poly render, technical drawing, poster, logo"
    ), prompt="a {}"),
    Group("style", _list(
        "minimalist, realistic, impressionist, expressionist, cubist, surreal, abstract, art deco, art nouveau, "
        "baroque, gothic, cyberpunk, steampunk, retro futuristic, vaporwave, film noir, fantasy, science fiction, "
        "vintage, flat design, cel shading, chibi, ukiyo-e, chinese ink wash, folk art, pop art, psychedelic"
    ), most=2, prompt="a picture in {} style"),
    Group("shot", _list(
        "extreme close-up, close-up, portrait, upper body shot, full body shot, wide shot, aerial view, macro shot, "
        "still life, landscape, panorama, group shot, pattern, product shot"
    ), prompt="a {}"),
    Group("angle", _list(
        "from above, from below, from the side, from behind, at eye level, tilted, symmetrical composition, "
        "view through a window, reflection in a mirror"
    ), prompt="a picture taken {}"),
    Group("lighting", _list(
        "soft light, hard light, backlight, rim light, golden hour light, candlelight, neon light, studio light, "
        "moonlight, dappled light, overcast light, low-key lighting, high-key lighting, volumetric light, firelight, "
        "flash photography, silhouette"
    ), most=2, prompt="a picture with {}"),
    Group("time", _list("at dawn, in the morning, at noon, in the afternoon, at sunset, at dusk, at night"),
          prompt="a picture {}"),
    Group("weather", _list(
        "clear sky, cloudy sky, rain, snow, fog, storm, wind, sunshine, hail, after rain"
    ), prompt="a picture of a place with {}"),
    Group("season", _list("spring, summer, autumn, winter"), prompt="a picture taken in {}"),
    Group("place", _list(
        "indoors, city street, forest, beach, mountains, desert, field, river, lake, sea, garden, kitchen, bedroom, "
        "living room, office, workshop, cafe, shop, station, rooftop, bridge, harbor, village, ruins, temple, castle, "
        "underwater, outer space, plain background, stage, laboratory, library, park"
    ), most=2, prompt="a picture of {}"),
    Group("palette", _list(
        "black and white, monochrome, sepia, pastel colors, vivid colors, muted colors, warm colors, cool colors, "
        "high contrast, low contrast, dark colors, neon colors, earth tones"
    ), most=2, prompt="a picture in {}"),
    Group("mood", _list(
        "calm, cheerful, melancholic, mysterious, dramatic, tense, romantic, lonely, energetic, dreamy, eerie, cozy, "
        "majestic, playful"
    ), prompt="a {} picture"),
)  # fmt: skip
