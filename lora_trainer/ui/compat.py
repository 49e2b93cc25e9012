"""What is needed of gradio, the same in 3.41.2 and 4.40.0. Nothing else in the package imports it."""

from __future__ import annotations

from collections.abc import Sequence
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
