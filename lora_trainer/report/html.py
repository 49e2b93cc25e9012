"""HTML in which every text is escaped, because nothing else can be built with it."""

from __future__ import annotations

import html


class Html(str):
    """Text that is HTML already."""


def element(name: str, /, *children: str | Html | None, **attributes: object) -> Html:
    """``<name attributes>children</name>``; what is no ``Html`` is escaped, None left out. class_ is class."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = joined(*children)
    return Html(f"<{name}{said}>" if name in ("img", "meta") else f"<{name}{said}>{inside}</{name}>")


def joined(*children: str | Html | None) -> Html:
    """One behind the other."""
    return Html("".join(one if isinstance(one, Html) else html.escape(one) for one in children if one is not None))
