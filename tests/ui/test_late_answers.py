"""Answers that come late: what was asked for since stays, whatever the earlier question is answered with."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api")
from lora_trainer.workspace.library import DatasetLibrary
from tests.jobs.fakes import make_pictures, wait_for
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
            wait_for(lambda: page.wait_for_timeout(10) or waiting, f"a request to {address}")
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


TYPE = "(text) => { loraTrainer.editor.picture.type(text); loraTrainer.editor.picture.keep().catch(() => null); }"


@pytest.fixture
def captions(manager):
    """captions(name): what the server holds of the data set's first picture."""

    def of(name):
        return manager.sessions.open(name).session.captions["0000.png"]

    return of


@pytest.fixture
def cats(page):
    page.evaluate("() => loraTrainer.editor.open('cats')")
    page.wait_for_selector("#lora_trainer_editor_grid li")
    return page


def test_captions_are_written_into_the_folder_in_which_they_were_typed(cats, held, captions):
    dogs = captions("dogs")
    let_go = held("**/captions")
    for typed in ("first", "second"):
        cats.evaluate(TYPE, typed)
    with cats.expect_response("**/v1/editor"):
        cats.evaluate("() => { loraTrainer.editor.open('dogs'); }")
    cats.wait_for_timeout(100)
    let_go()
    cats.wait_for_function("() => loraTrainer.editor.folder === 'dogs' && loraTrainer.editor.row")
    wait_for(lambda: captions("cats") == "second", "the second caption")
    assert captions("dogs") == dogs == cats.input_value("#lora_trainer_editor_caption")
    assert cats.evaluate("loraTrainer.editor.gallery.rows[0].caption") == dogs


def test_an_answer_does_not_overwrite_the_caption_that_was_typed_after_it(cats, captions):
    waiting = []
    cats.route("**/captions", lambda route: waiting.append(route))
    for typed in ("first", "second"):
        cats.evaluate(TYPE, typed)
    wait_for(lambda: cats.wait_for_timeout(10) or waiting, "the first caption")
    with cats.expect_response("**/captions"):
        waiting[0].continue_()
    wait_for(lambda: cats.wait_for_timeout(10) or len(waiting) == 2, "the second caption")
    cats.evaluate("() => loraTrainer.editor.gallery.reload()")  # neither does a page that knows nothing of it
    assert cats.input_value("#lora_trainer_editor_caption") == "second"
    waiting[1].abort()
    cats.wait_for_function("() => loraTrainer.editor.picture.touched()")
    assert cats.input_value("#lora_trainer_editor_caption") == "second", "it can be sent again"
    assert cats.evaluate("loraTrainer.editor.row.caption") == captions("cats") == "first"
    cats.unroute("**/captions")
    cats.evaluate("() => loraTrainer.editor.picture.keep()")
    assert captions("cats") == "second" and not cats.evaluate("loraTrainer.editor.picture.touched()")


def test_the_first_folder_stays_where_it_is_asked_for_again(cats, held):
    let_go = held("**/v1/editor")
    cats.evaluate("() => { loraTrainer.editor.open('dogs'); }")
    cats.evaluate("() => loraTrainer.editor.open('cats', 'tags')")
    let_go()
    assert cats.evaluate("loraTrainer.editor.folder") == "cats" and text(cats, "editor_name") == "cats"


def test_what_is_typed_is_not_put_into_a_folder_that_was_opened_while_its_own_was_reopened(cats, manager, captions):
    dogs = captions("dogs")
    manager.sessions._open.clear()
    cats.evaluate("() => loraTrainer.editor.picture.type('of a cat')")
    waiting = []
    cats.route("**/v1/editor", lambda route: route.continue_() if waiting else waiting.append(route))
    cats.evaluate("() => { loraTrainer.editor.act(() => loraTrainer.editor.call('/refresh')); }")
    wait_for(lambda: cats.wait_for_timeout(10) or waiting, "the folder to be opened again")
    manager.sessions.open("cats")
    cats.evaluate("() => loraTrainer.editor.open('dogs')")
    with cats.expect_response("**/v1/editor"):
        waiting[0].continue_()
    cats.wait_for_timeout(100)
    assert cats.evaluate("loraTrainer.editor.folder") == "dogs" and captions("cats") == "of a cat"
    assert cats.input_value("#lora_trainer_editor_caption") == dogs


def test_numbers_that_were_asked_for_twice_are_waited_for_by_both(page):
    """Start waits for them and sends what they suggest: an older question ends with the newest one's answer."""
    page.evaluate("() => loraTrainer.pictures.choose('cats')")
    answered = page.evaluate("""async() => {
        const {estimate, form} = loraTrainer;
        const own = form.ownDefaults;
        let asked = 0;
        form.ownDefaults = async() => {
            await new Promise((done) => setTimeout(done, 100));
            asked++;
            return own();
        };
        const first = estimate.now().then(() => asked);
        estimate.now();
        return first;
    }""")
    assert answered == 1, "the first gives up where it stands; the second asks"
