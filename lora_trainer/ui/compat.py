"""What is needed of gradio, the same in 3.41.2 and 4.40.0. Nothing else in the package imports it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import gradio


def tabbed_page(element_id: str, blocks: Sequence[tuple[str, str]]) -> gradio.Blocks:
    """A page with one sub-tab for each ``(title, html)``; everything lies inside the element ``element_id``."""
    page = gradio.Blocks(analytics_enabled=False)
    with page, gradio.Column(elem_id=element_id), unsaved(gradio.Tabs(elem_id=f"{element_id}_tabs")):
        for title, html in blocks:
            with gradio.Tab(title, elem_id=f"{element_id}_tab_{title.lower()}"):
                unsaved(gradio.HTML(html, elem_id=f"{element_id}_{title.lower()}"))
    return page


def unsaved(component: Any) -> Any:
    """``component``, of which the host shall not freeze the first values into its ui-config.json."""
    component.do_not_save_to_config = True
    return component


def serve_alone(
    app: Any, tab: gradio.Blocks, title: str, style: str, scripts: Sequence[str], languages: Mapping[str, str]
) -> Any:
    """``app`` with a page that holds nothing but the tab; ``scripts`` are addresses, loaded in their order.
    ``languages``: address of a localization by what the browser's language begins with.

    Plays the part of the WebUIs' own scripts: those of ours begin when all are loaded and the page is there, and its
    texts are translated.
    """
    load = """async () => {
        const scripts = %s, languages = %s, begin = [];
        window.onUiLoaded = (action) => begin.push(action);
        const language = Object.keys(languages).find((start) => navigator.language.toLowerCase().startsWith(start));
        if (language) {
            window.localization = await (await fetch(languages[language])).json();
            const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            while (texts.nextNode()) {
                const node = texts.currentNode, text = node.data.trim();
                if (Object.hasOwn(localization, text)) node.data = node.data.replace(text, () => localization[text]);
            }
        }
        const next = () => {
            if (!scripts.length) return begin.forEach((action) => action());
            const script = document.createElement("script");
            script.src = scripts.shift();
            script.onload = next;
            document.head.append(script);
        };
        next();
    }""" % (json.dumps(list(scripts)), json.dumps(dict(languages)))  # noqa: UP031 - braces of JavaScript
    # gradio's own theme asks another server for its fonts.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    with gradio.Blocks(title=title, css=style, theme=theme, analytics_enabled=False) as page:
        tab.render()
        # gradio 4 renamed the argument.
        name = "js" if "js" in inspect.signature(page.load).parameters else "_js"
        page.load(None, None, None, **{name: load})
    return gradio.mount_gradio_app(app, page, path="/")
