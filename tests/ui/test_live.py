"""The page while trainings run, end and are looked at again."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("playwright.sync_api")
from lora_trainer.errors import Problem, UserError
from lora_trainer.jobs.worker import JobManager
from tests.jobs.fakes import wait_for, weights_at
from tests.ui.person import start, text, wait_for_text


def test_two_pages_agree(page, open_page, files, train):
    start(page, files)
    train.allow(3)
    other = open_page()
    wait_for_text(other, "job_facts", "step 3 of 20")
    other.click("#lora_trainer_job_buttons >> text=Pause")
    wait_for_text(page, "job_state", "paused")
    page.click("#lora_trainer_job_buttons >> text=Resume")
    wait_for_text(other, "job_state", "training")
    train.allow(2)
    for one in (page, other):
        wait_for_text(one, "job_facts", "step 5 of 20")
    with other.expect_response("**/preview-now"):  # the step that follows draws
        other.click("#lora_trainer_job_buttons >> text=Preview now")
    train.allow(1)
    for one in (page, other):
        one.wait_for_selector("#lora_trainer_previews img")
    page.click("#lora_trainer_job_buttons >> text=Stop and save")
    for one in (page, other):
        wait_for_text(one, "job_state", "stopped")


def test_what_goes_on_around_the_steps_is_said(page, files, train, manager, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(manager.host, "verify", lambda lora, prompt: answer.wait(20) and None)
    train.phases = (("previews", 1, 2),)
    start(page, files)
    wait_for_text(page, "job_facts", "Drawing the previews 1/2")
    train.allow(20)
    wait_for_text(page, "job_facts", "Loading it back and trying it")
    answer.set()
    wait_for_text(page, "job_state", "finished")
    assert "step 20 of 20" in text(page, "job_facts") and "Loading" not in text(page, "job_facts")


def test_what_a_server_that_ended_cut_off_is_offered(page, open_page, files, train, manager):
    train.state_every = 8
    start(page, files)
    train.allow(11)
    wait_for_text(page, "job_facts", "step 11 of 20")
    manager.close()  # and a second job is there as the next server begins
    again = JobManager(manager.host, train=train)
    again.submit({"train_data_dir": again.store.jobs()[0].dataset, "output_name": "second"})
    manager.__dict__.update(again.__dict__)  # the routes keep the manager they were made with
    manager.start_worker()
    for one in (page, open_page()):
        wait_for_text(one, "job_name", "second")
        wait_for_text(one, "interrupted", "hat_v1 was cut off, as the WebUI ended, at step 11 of 20. It goes on from")
        assert "from step 8." in text(one, "interrupted")
    page.click("#lora_trainer_interrupted >> text=Resume")
    wait_for_text(page, "queue", "hat_v1")
    page.wait_for_selector("#lora_trainer_interrupted", state="hidden")
    train.allow(20)
    wait_for_text(page, "job_name", "hat_v1")
    train.allow(12)
    wait_for_text(page, "job_state", "finished")
    assert [config.output_name for config in train.configs] == ["hat_v1", "second", "hat_v1"]


def test_the_queue_waits_its_turn(page, files, train):
    start(page, files)
    for name in ("second", "third"):
        page.fill("#lora_trainer_field_output_name", name)
        page.click("#lora_trainer_start")
        wait_for_text(page, "queue", name)
    page.locator("#lora_trainer_queue_list li", has_text="third").get_by_text("First").click()
    page.wait_for_function("() => document.querySelector('#lora_trainer_queue_list li').innerText.includes('third')")
    page.locator("#lora_trainer_queue_list li", has_text="second").get_by_text("Remove").click()
    page.wait_for_function("() => document.querySelectorAll('#lora_trainer_queue_list li').length === 1")


def test_a_training_that_waits_is_paused_and_resumed_in_its_place(page, files, train, manager):
    start(page, files)
    for name in ("second", "third"):
        page.fill("#lora_trainer_field_output_name", name)
        page.click("#lora_trainer_start")
        wait_for_text(page, "queue", name)
    row = page.locator("#lora_trainer_queue_list li", has_text="second")
    row.get_by_text("Pause", exact=True).click()
    row.get_by_text("paused", exact=True).wait_for()
    assert row.get_by_role("button").all_inner_texts() == ["Resume", "Remove"]
    row.get_by_text("Resume", exact=True).click()
    row.get_by_text("waiting for its turn").wait_for()
    assert [job.name for job in manager.store.jobs(("queued",))] == ["second", "third"]


def test_checkpoints_are_chosen_by_their_pictures(page, files, train, manager):
    train.free, train.checkpoints = True, (5, 10)
    start(page, files)
    wait_for_text(page, "job_state", "finished")
    page.click("#lora_trainer_job_buttons >> text=Compare checkpoints")
    shown = page.locator("#lora_trainer_previews .lora_trainer_checkpoint")
    shown.nth(2).get_by_text("in your Lora tab").wait_for()  # what was saved is told by another request
    assert written_under(shown) == ["step 5 Use this one", "step 10 Use this one", "step 20 in your Lora tab"]
    assert [one.locator("img").count() for one in shown.all()] == [1, 1, 0]
    shown.nth(0).get_by_text("Use this one").click()
    wait_for_text(page, "job_message", "keeps hat_v1 as it was at step 5")
    assert (manager.host.root / "Lora" / "hat_v1.safetensors").read_bytes() == weights_at(5)
    shown.nth(0).get_by_text("in your Lora tab").wait_for()
    page.click("#lora_trainer_job_buttons >> text=Files")
    inside = page.locator(".lora_trainer_inside")
    inside.get_by_text("Compare checkpoints").click()
    inside.get_by_text("Use this one").nth(0).click()
    page.wait_for_function("() => loraTrainer.live.job.published_step === 10")
    assert (manager.host.root / "Lora" / "hat_v1.safetensors").read_bytes() == weights_at(10)


def written_under(checkpoints):
    return [" ".join(one.locator("figcaption").inner_text().split()) for one in checkpoints.all()]


def test_what_was_saved_without_a_picture_can_be_chosen_as_well(page, files, train, manager):
    train.checkpoints = (5,)
    start(page, files)
    train.allow(7)
    wait_for_text(page, "job_facts", "step 7 of 20")
    page.click("#lora_trainer_job_buttons >> text=Stop and save")
    wait_for_text(page, "job_message", "in your Lora tab")
    page.click("#lora_trainer_job_buttons >> text=Compare checkpoints")
    shown = page.locator("#lora_trainer_previews .lora_trainer_checkpoint")
    shown.nth(1).get_by_text("no picture").wait_for()
    assert written_under(shown) == ["step 5 Use this one", "step 7 in your Lora tab"]
    for step, number in ((5, 0), (7, 1)):
        shown.nth(number).get_by_text("Use this one").click()
        shown.nth(number).get_by_text("in your Lora tab").wait_for()
        assert (manager.host.root / "Lora" / "hat_v1.safetensors").read_bytes() == weights_at(step)
    page.click("#lora_trainer_job_buttons >> text=Compare checkpoints")
    page.wait_for_selector("#lora_trainer_previews .lora_trainer_large img")


def test_the_title_and_a_notification_tell_the_end(open_page, files, train):
    page = open_page()
    page.evaluate("""() => {
        window.told = [];
        window.Notification = class { constructor(title, {body}) { window.told.push([title, body]); } };
        Notification.permission = "granted";
        document.title = "Stable Diffusion";
    }""")
    before = page.title()
    start(page, files)
    train.allow(5)
    page.wait_for_function("() => document.title.startsWith('25 % ') && document.title.includes('hat_v1')")
    train.allow(15)
    page.wait_for_function("() => document.title.startsWith('hat_v1: finished')")
    assert page.evaluate("told") == [["hat_v1: finished", "It is in your Lora tab as hat_v1."]]
    page.wait_for_function("(before) => document.title === before", arg=before)


def test_history(page, files, train, manager):
    train.free = True
    start(page, files)
    wait_for_text(page, "job_state", "finished")
    page.click("#lora_trainer_job_buttons >> text=Files")
    inside = page.locator(".lora_trainer_inside")
    inside.get_by_text("Files", exact=True).click()
    assert "hat_v1.safetensors" in inside.inner_text()
    inside.get_by_text("Continue from it").click()
    wait_for_text(page, "origin", "Continues from hat_v1")
    assert page.input_value("#lora_trainer_field_output_name") == "hat_v2"
    page.click("#lora_trainer_start")
    wait_for_text(page, "job_name", "hat_v2")
    wait_for_text(page, "job_state", "finished")
    assert train.config(1).init_lora.endswith("hat_v1.safetensors")
    page.evaluate("loraTrainer.openSubTab('Runs')")
    page.wait_for_selector("#lora_trainer_run_2")
    page.click("#lora_trainer_run_2 > button")
    page.click("#lora_trainer_run_2 >> text=Delete …")
    page.click("#lora_trainer_run_2 >> text=Delete it")
    page.wait_for_selector("#lora_trainer_run_2", state="detached")
    assert [job.id for job in manager.store.jobs()] == [1]
    assert (manager.host.root / "Lora" / "hat_v2.safetensors").exists(), "the published LoRA stays"


def test_only_a_name_that_is_taken_can_be_replaced(page, files, train, manager):
    train.free = True
    taken = manager.host.root / "Lora" / "old.safetensors"
    taken.write_bytes(b"before")
    start(page, files)
    wait_for_text(page, "job_state", "finished")
    page.click("#lora_trainer_job_buttons >> text=Files")
    inside = page.locator(".lora_trainer_inside")
    name = inside.get_by_label("Name in the Lora tab")
    name.fill("old")
    manager.host.publish_error = UserError("'a/b' cannot be a name.", field="output_name", remedy="Choose another.")
    inside.get_by_text("Publish again").click()
    inside.get_by_text("cannot be a name").wait_for()
    assert not inside.get_by_text("Replace it").count()
    manager.host.publish_error = None
    inside.get_by_text("Publish again").click()
    inside.get_by_text("Replace it").click()
    inside.get_by_text("It is in your Lora tab as old.").wait_for()
    assert taken.read_bytes() == (manager.host.root / "Lora" / "hat_v1.safetensors").read_bytes()


def test_of_five_hundred_runs_the_first_fifty_are_asked_for(manager, open_page, tmp_path):
    config = "train_data_dir: x\n"
    for index in range(500):
        manager.store.add(f"run_{index}", config, status="finished", dataset="x", base_model="m", host="standalone")
    page = open_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url) if "/jobs?" in request.url else None)
    page.evaluate("loraTrainer.openSubTab('Runs')")
    wait_for_text(page, "runs_count", "50 of 500")
    assert page.locator(".lora_trainer_run").count() == 50
    page.click("#lora_trainer_runs_more")
    wait_for_text(page, "runs_count", "100 of 500")
    assert page.locator(".lora_trainer_run").count() == 100
    assert len(asked) <= 4 and all("limit=50" in url for url in asked), asked


def test_an_idle_page_leaves_the_hosts_page_alone(page):
    """A1111 runs every extension's callbacks whenever a node comes or goes."""
    page.wait_for_load_state("networkidle")  # the lists that a page begins with are there
    changes = page.evaluate("""async () => {
        let changes = 0;
        new MutationObserver((found) => (changes += found.length)).observe(document, {childList: true, subtree: true});
        for (let look = 0; look < 5; look++) await loraTrainer.live.look();
        return changes;
    }""")
    assert changes == 0


def test_a_server_that_is_away_is_said_and_found_again(page, files, train):
    start(page, files)
    page.context.set_offline(True)
    wait_for_text(page, "trouble", "does not answer")
    page.context.set_offline(False)
    page.wait_for_selector("#lora_trainer_trouble", state="hidden")
    train.allow(4)
    wait_for_text(page, "job_facts", "step 4 of 20")


def test_settings_of_the_training_that_were_on_their_way_are_asked_for_again(page, files):
    page.route("**/settings/check", lambda route: route.abort(), times=30)
    start(page, files)
    page.wait_for_timeout(1500)
    assert page.evaluate("loraTrainer.live.details") is None
    page.unroute("**/settings/check")
    page.wait_for_function("() => loraTrainer.live.details")


def test_settings_that_the_server_refuses_are_not_asked_for_again_and_again(page, files):
    asked = []

    def refuse(route):
        asked.append(route)
        route.fulfill(status=422, json={"message": "There is no such setting.", "problems": []})

    page.route("**/settings/check", refuse)
    start(page, files)
    page.wait_for_timeout(3000)
    assert len(asked) == 1


def test_runs_stay_open_while_others_go_on(page, files, train, manager):
    """Under a filter that the running job does not pass, every look at the server once loaded the list anew."""
    train.free = True
    start(page, files)
    wait_for_text(page, "job_state", "finished")
    train.free = False
    page.evaluate("loraTrainer.openSubTab('Runs')")
    page.select_option("#lora_trainer_runs_filter", "finished")
    page.click("#lora_trainer_run_1 > button")
    page.wait_for_selector(".lora_trainer_inside")
    page.evaluate("""() => {
        window.lists = 0;
        const before = window.fetch;
        window.fetch = (url, ...rest) => ((lists += String(url).includes("/jobs?")), before(url, ...rest));
    }""")
    second = manager.duplicate(1)
    for step in range(1, 4):
        train.allow(1)
        page.wait_for_function("([id, step]) => loraTrainer.live.job.id === id && loraTrainer.live.job.step === step",
                               arg=[second.id, step])  # fmt: skip
    assert page.evaluate("lists") == 0
    train.allow(20)
    page.wait_for_selector("#lora_trainer_run_2")
    assert page.locator("#lora_trainer_run_1 .lora_trainer_inside").count() == 1, "it stays open when the list grows"


def test_the_page_turns_to_no_other_tab_by_itself(page, files, train):
    start(page, files)
    page.evaluate("loraTrainer.openSubTab('Runs')")
    page.click("#lora_trainer_run_1 > button")
    page.wait_for_selector(".lora_trainer_inside >> text=Stop and save")
    page.evaluate("loraTrainer.openSubTab('Train')")
    train.allow(20)
    wait_for_text(page, "job_state", "finished")
    page.wait_for_selector(".lora_trainer_inside >> text=Compare checkpoints", state="attached")
    assert page.is_visible("#lora_trainer_tab_train") and page.locator(".lora_trainer_inside").count() == 1


def test_a_phone_that_has_no_notifications_shows_the_end_all_the_same(page, files, train):
    page.evaluate("""() => {
        window.Notification = class { constructor() { throw new TypeError("Illegal constructor"); } };
        Notification.permission = "granted";
    }""")
    start(page, files)
    train.allow(20)
    page.wait_for_function("() => !loraTrainer.live.seenRunning.size && loraTrainer.live.job.status === 'finished'")
    assert not page.is_visible("#lora_trainer_trouble")


def test_a_command_that_is_refused_is_said_long_enough(page, files, train, manager, monkeypatch):
    def refused(*args, **more):
        raise UserError("Not now.", remedy="Later.")

    start(page, files)
    page.wait_for_selector("#lora_trainer_job_buttons >> text=Save now")
    monkeypatch.setattr(manager, "_command", refused)
    page.click("#lora_trainer_job_buttons >> text=Save now")
    wait_for_text(page, "trouble", "Not now. Later.")
    train.allow(2)
    wait_for_text(page, "job_facts", "step 2 of 20")
    assert text(page, "trouble") == "Not now. Later."


def test_a_job_that_another_page_deletes_is_gone(page, files, train, manager):
    train.free = True
    start(page, files)
    wait_for_text(page, "job_state", "finished")
    manager.delete(1, confirm=True)
    page.wait_for_selector("#lora_trainer_live", state="hidden")


def test_held_out_pictures_have_a_curve_of_their_own(page, files, train):
    train.measured = {2: (0.8, 0.7), 4: (0.6, 0.5)}
    start(page, files)
    train.allow(5)
    wait_for_text(page, "job_facts", "step 5 of 20")
    for name in ("validation", "training"):
        drawn = page.get_attribute(f"#lora_trainer_curve .lora_trainer_measured.lora_trainer_{name}", "d")
        assert drawn.count("L") == 1 and drawn.count("a3 3") == 4, "two dots and the line between them"
    assert page.get_attribute("#lora_trainer_curve .lora_trainer_raw", "d").count("L") == 4
    box = page.locator("#lora_trainer_curve svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 50)
    assert "held out 0.600 (step 4) · trained 0.500 (step 4)" in text(page, "curve_reading")


def test_a_run_that_waits_for_another_choice_in_the_webui_is_switched_back_by_a_button(page, files, train):
    start(page, files)
    train.allow(2)
    wait_for_text(page, "job_facts", "step 2 of 20")
    assert not page.locator("#lora_trainer_job_buttons >> text=Switch back").count()
    train.away, train.returns = "The WebUI was switched to b. Training goes on when a is selected again.", True
    wait_for_text(page, "job_message", "goes on when a is selected again")
    page.click("#lora_trainer_job_buttons >> text=Switch back")
    train.allow(2)
    wait_for_text(page, "job_state", "training")
    wait_for_text(page, "job_facts", "step 4 of 20")
    wait_for_text(page, "trouble", "own fields show it when the page is loaded again")  # the same model, another option


def first_button(page):
    return page.locator("#lora_trainer_job_buttons button").first.inner_text()


def test_what_can_only_fail_again_does_not_offer_to_resume_it_first(page, files, train, manager):
    train.free, train.error = True, UserError("No finite loss.", field="learning_rate", remedy="Lower it.")
    start(page, files)
    wait_for_text(page, "job_state", "failed")
    assert first_button(page) == "Run again with changes"
    train.error = UserError("The disk is full.", remedy="Free some space.")
    page.route("**/status*", lambda route: route.abort())  # the page does not see the second attempt run
    manager.resume(1)
    wait_for(lambda: getattr(manager.store.get(1).error, "message", "") == "The disk is full.")
    page.unroute("**/status*")
    wait_for_text(page, "job_message", "The disk is full")
    page.wait_for_function("() => document.querySelector('#lora_trainer_job_buttons button').innerText === 'Resume'")


def test_the_queue_says_why_a_job_does_not_start(page, files, train, manager):
    start(page, files)
    page.fill("#lora_trainer_field_output_name", "second")
    page.click("#lora_trainer_start")
    wait_for_text(page, "queue", "second")
    page.click("#lora_trainer_job_buttons >> text=Pause")
    wait_for_text(page, "queue", "until hat_v1 goes on or is stopped")
    manager.store.update(2, error=Problem("base.safetensors is FLUX.1.", "base_model", "Choose another."))
    wait_for_text(page, "queue", "base.safetensors is FLUX.1. Choose another.")
