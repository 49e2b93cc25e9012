"""Answers that come late: what was asked for since stays, whatever the earlier question is answered with."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api")
from lora_trainer.workspace.library import DatasetLibrary
from tests.jobs.fakes import make_pictures
from tests.ui.person import text, wait_for_text


@pytest.fixture
def page(manager, page):
    library = DatasetLibrary(manager.folders.data)
    for name in ("cats", "dogs"):
        make_pictures(library.create(name))
    return page


@pytest.fixture
def held(page):
    """held(address) keeps back the first answer to it; the returned function lets it come."""

    def hold(address):
        waiting = []
        page.route(address, lambda route: route.continue_() if waiting else waiting.append(route))

        def let_go():
            with page.expect_response(address):
                waiting[0].continue_()
            page.wait_for_timeout(100)

        return let_go

    return hold


def test_the_folder_that_was_opened_last_stays_open(page, held):
    let_go = held("**/v1/editor")
    page.evaluate("() => { loraTrainer.editor.open('cats'); }")
    page.evaluate("() => { loraTrainer.editor.open('dogs'); }")
    wait_for_text(page, "editor_name", "dogs")
    page.wait_for_selector("#lora_trainer_editor_grid li")
    let_go()
    assert text(page, "editor_name") == "dogs" and page.evaluate("loraTrainer.editor.folder") == "dogs"


def test_a_folder_is_opened_once_by_two_who_ask_for_it(page):
    asked = []
    page.on("request", lambda request: request.url.endswith("/v1/editor") and asked.append(request))
    page.evaluate("() => { loraTrainer.editor.open('cats'); return loraTrainer.editor.open('cats', 'tags'); }")
    page.wait_for_selector("#lora_trainer_editor_panel_tags:visible")
    assert len(asked) == 1


def test_the_pictures_that_were_chosen_last_stay_chosen(page, held):
    page.wait_for_function("() => loraTrainer.pictures.library")
    page.evaluate("() => loraTrainer.pictures.listEarlier()")
    let_go = held("**/v1/datasets")
    page.evaluate("() => { loraTrainer.pictures.choose('made elsewhere'); }")
    page.evaluate("() => { loraTrainer.pictures.choose('cats'); }")
    wait_for_text(page, "pictures", "3 pictures are fine")
    let_go()
    assert page.input_value("#lora_trainer_folder") == "" and page.input_value("#lora_trainer_earlier") == "cats"


def test_captions_are_sent_in_the_order_in_which_they_were_typed(page, held):
    page.evaluate("() => loraTrainer.editor.open('cats')")
    page.wait_for_selector("#lora_trainer_editor_grid li")
    let_go = held("**/captions")
    typed = "(text) => { loraTrainer.editor.picture.type(text); loraTrainer.editor.picture.keep(); }"
    page.evaluate(typed, "first")
    page.evaluate(typed, "second")
    let_go()
    page.evaluate("() => loraTrainer.editor.picture.keep()")
    page.evaluate("() => loraTrainer.editor.gallery.reload()")
    assert page.evaluate("loraTrainer.editor.gallery.rows[0].caption") == "second"
    assert page.input_value("#lora_trainer_editor_caption") == "second"
