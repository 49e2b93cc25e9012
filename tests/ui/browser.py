"""A Chromium for the tests, and the tab served without a WebUI: a page with the host's landmarks around it."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lora_trainer import requirements
from lora_trainer.ui import dataset_tab, results_tab, tools_tab, train_tab
from tests.ui import localization
from tests.ui.words import ROOT

FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")  # fmt: skip
LATENCY = float(os.environ.get("LORA_TRAINER_LATENCY", "0"))  # seconds: see SlowNetwork
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

# What the host's page has and the tab uses: top tabs, txt2img's prompt and gallery buttons, the picker's hidden button.
HOST_PAGE = """<!doctype html><html lang="en"><head><meta name="viewport" content="width=device-width"><style>
:root {{ --body-text-color: #222; --block-background-fill: #fff; --border-color-primary: #ddd; --color-accent: #e60 }}
[style*="none"] {{ display: none }} {css}</style></head><body>
<div id="tabs"><div class="tab-nav"><button>txt2img</button><button class="selected">Train LoRA</button></div>
<div class="tabitem" id="tab_txt2img" style="display: none"><div id="txt2img_prompt"><textarea></textarea></div>
<div id="image_buttons_txt2img"><button class="lg">Save</button></div>
<div id="image_buttons_img2img"><button class="lg">Save</button></div><button id="txt2img_lora_extra_refresh_internal"
></button></div><div class="tabitem" id="tab_lora_trainer"><div id="lora_trainer"><div id="lora_trainer_tabs">
<div class="tab-nav"><button>Train</button><button>Dataset</button><button>Runs</button>
<button>Tools</button></div>
<div class="tabitem" id="lora_trainer_tab_train">{train}</div>
<div class="tabitem" id="lora_trainer_tab_dataset" style="display: none">{dataset}</div>
<div class="tabitem" id="lora_trainer_tab_runs" style="display: none">{runs}</div>
<div class="tabitem" id="lora_trainer_tab_tools" style="display: none">{tools}</div></div></div></div></div>
<script>
var opts = {{}};
var refreshed = 0;
document.getElementById("txt2img_lora_extra_refresh_internal").addEventListener("click", () => refreshed++);
for (const tabs of document.querySelectorAll("#tabs, #lora_trainer_tabs")) {{
  const items = tabs.querySelectorAll(":scope > .tabitem");
  tabs.querySelectorAll(":scope > .tab-nav > button").forEach((button, index) => button.addEventListener("click", () =>
    items.forEach((item, number) => item.style.display = number === index ? "block" : "none")));
}}
</script>{localization}{scripts}</body></html>"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; skips where playwright or a Chromium is missing (LORA_TRAINER_CHROMIUM names one)."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("LORA_TRAINER_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


def host_page() -> str:
    scripts = "".join(f'<script src="/javascript/{path.name}"></script>' for path in
                      sorted((ROOT / "javascript").glob("*.js")))  # fmt: skip
    css = (ROOT / "style.css").read_text(encoding="utf-8")
    return HOST_PAGE.format(css=css, train=train_tab.create_ui(), dataset=dataset_tab.create_ui(),
                            runs=results_tab.create_ui(), tools=tools_tab.create_ui(), localization=localization.SCRIPT,
                            scripts=scripts)  # fmt: skip


class SlowNetwork:
    """An ASGI application of which most requests, and many answers, are on their way for up to ``longest`` seconds.

    What a test takes for granted between a click and its answer fails here, and not by chance on a busy machine.
    """

    def __init__(self, app: Any, longest: float):
        self.app, self.longest, self.chance = app, longest, random.Random()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not scope.get("path", "").startswith("/lora-trainer/"):
            await self.app(scope, receive, send)
            return
        there, back = (self.chance.random() * self.longest * (self.chance.random() < share) for share in (0.6, 0.4))

        async def later(message: Any) -> None:
            if message["type"] == "http.response.start":
                await asyncio.sleep(back)
            await send(message)

        await asyncio.sleep(there)
        await self.app(scope, receive, later)


@contextmanager
def served(app: Any) -> Iterator[str]:
    """``app`` with the tab's page at "/", on a free port; yields its address.

    LORA_TRAINER_LATENCY gives it a slow network: the longest way of a request, in seconds.
    """
    uvicorn = pytest.importorskip("uvicorn")
    from fastapi.responses import HTMLResponse
    from fastapi.staticfiles import StaticFiles

    assert requirements.problem() is None  # every host asks at its start, and imports what two requests must not
    app.mount("/javascript", StaticFiles(directory=ROOT / "javascript"))
    app.add_api_route("/", lambda: HTMLResponse(host_page()), methods=["GET"])
    server = uvicorn.Server(uvicorn.Config(SlowNetwork(app, LATENCY) if LATENCY else app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(10)
