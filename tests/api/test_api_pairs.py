"""A pair of pictures that is put together: each place by itself, replaced, and kept where a run has used it."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from lora_trainer.dataset.cache import TensorCache
from lora_trainer.planning.presets import preset
from tests.jobs.fakes import make_pictures, wait_for


def upload(name="b.png", color="navy", caption="", data=None):
    if data is None:
        stream = io.BytesIO()
        Image.new("RGB", (64, 64), color).save(stream, "PNG")
        data = stream.getvalue()
    return {"name": name, "data": base64.b64encode(data).decode(), "caption": caption}


@pytest.fixture
def put(client):
    def put(place, dataset=None, **picture):
        return client.post("/pairs", json={"place": place, "dataset": dataset, "picture": upload(**picture)})

    return put


def names(client):
    return [one["name"] for one in client.get("/datasets").json()["datasets"]]


def test_both_places_make_a_pair_that_can_be_trained(client, put, manager):
    first = put("before", name="眼睛.png", caption="a woman").json()
    assert first["name"] and first["after"] is None
    both = put("after", first["name"], name="眼睛.jpg", color="red").json()
    assert both["name"] == first["name"] == names(client)[0]
    assert [both[place]["file"] for place in ("before", "after")] == ["pair.png", "pair_after.jpg"]
    assert both["after"]["caption"] == "a woman", "what both show"
    assert client.get(f"/datasets/{both['name']}/pair").json() == both
    settings = {"task": "pair", "train_data_dir": both["name"], "output_name": "eyes", **preset("expression", 2, "sd1")}
    facts = client.post("/estimate", json={"settings": settings}).json()
    assert (facts["task"], facts["pictures"], facts["steps"], facts["warnings"]) == ("pair", 2, 50, [])
    job = client.post("/jobs", json={"settings": settings}).json()
    assert job["task"] == "pair" and client.get("/jobs").json()["jobs"][0]["task"] == "pair"


def test_another_picture_takes_the_place_and_what_was_trained_on_stays(client, put, manager):
    pair = put("before", caption="a cat").json()["name"]
    put("after", pair, color="red")
    other = put("after", pair, color="green").json()
    assert other["name"] != pair and names(client) == [other["name"]], "nobody has used it"
    assert other["before"]["caption"] == "a cat"
    manager.start_worker()
    job = client.post("/jobs", json={"settings": {"task": "pair", "train_data_dir": other["name"]}}).json()["id"]
    wait_for(lambda: manager.store.get(job).status == "finished", "the end")
    third = put("before", other["name"], color="blue").json()["name"]
    assert set(names(client)) == {other["name"], third}


@pytest.fixture
def pair(client, put):
    """The name of a pair that nobody has used."""
    name = put("before", caption="a cat").json()["name"]
    return put("after", name, color="red").json()["name"]


@pytest.mark.parametrize("why", ["renamed", "a mask", "notes", "a folder", "trained", "in the editor"])
def test_a_pair_with_anything_of_a_persons_stays_when_a_picture_is_replaced(client, put, manager, pair, why):
    root = manager.folders.datasets
    if why == "renamed":
        client.post(f"/datasets/{pair}/rename", json={"name": "我的眼睛"})
        pair = "我的眼睛"
    elif why == "a mask":
        Image.new("L", (64, 64), 9).save(root / pair / "pair_mask.png")
    elif why == "notes":
        (root / pair / "notes.md").write_text("mine")
    elif why == "a folder":
        (root / pair / "pair.txt.d").mkdir()
    elif why == "trained":  # by a job that is not in the list any more
        TensorCache(manager.folders.data / "cache", user=root / pair).put("a" * 64, {})
    else:
        client.post(f"/datasets/{pair}/exclude", json={"files": ["pair_after.jpg", "pair.png"][1:]})
    files = sorted(path.name for path in (root / pair).iterdir())
    for place in ("after", "before"):
        other = put(place, pair, color="green").json()
        assert other["name"] != pair and other["before"]["caption"] == other["after"]["caption"] == "a cat"
        assert sorted(path.name for path in (root / pair).iterdir()) == files
        masks = [path.name for path in (root / other["name"]).glob("*mask*")]
        assert masks == (["pair.mask.png"] if why == "a mask" else [])
        assert other["before"]["excluded"] == (why == "in the editor" and place == "after"), "it was the other picture"


def test_a_caption_without_its_picture_does_not_take_the_place(client, put, manager):
    pair = put("before", caption="a cat").json()["name"]
    orphan = manager.folders.datasets / pair / "pair_after.txt"
    orphan.write_text("of another picture")
    both = put("after", pair, color="red", name="b.png").json()
    assert [both[place]["file"] for place in ("before", "after")] == ["pair.png", "pair_after.png"]
    assert both["after"]["caption"] == "a cat" and both["name"] != pair
    assert sorted(path.suffix for path in orphan.parent.glob("pair*")) == [".png", ".txt", ".txt"]


def test_two_pages_that_fill_the_same_place_have_a_pair_each(client, put):
    pair = put("before", caption="a cat").json()["name"]
    first, second = (
        client.post("/pairs", json={"place": "after", "dataset": pair, "free": True, "picture": upload(color=color)})
        for color in ("red", "green")
    )
    assert first.json()["name"] == pair != second.json()["name"] and second.json()["before"]["caption"] == "a cat"
    assert client.get(f"/datasets/{pair}/pair").json() == first.json(), "what the first page shows is there"


def test_a_prompt_is_written_anew_only_where_no_job_knows_the_old_one(client, manager, pair):
    def describe(name, text):
        return client.post(f"/datasets/{name}/pair", json={"prompt": text}).json()

    told = describe(pair, "a dog")
    assert told["name"] == pair and told["before"]["caption"] == told["after"]["caption"] == "a dog"
    client.post("/jobs", json={"settings": {"task": "pair", "train_data_dir": pair}})
    before = client.get(f"/datasets/{pair}/pair").json()
    assert describe(pair, "a dog") == before, "the same words are no change"
    other = describe(pair, "a bird")
    assert other["name"] != pair and other["before"]["caption"] == other["after"]["caption"] == "a bird"
    assert client.get(f"/datasets/{pair}/pair").json() == before
    count = len(names(client))
    assert client.post(f"/datasets/{pair}/pair", json={"prompt": "x" * 20_001}).status_code == 400
    assert client.post("/datasets/nothing/pair", json={"prompt": "x"}).status_code == 400
    assert len(names(client)) == count


def test_what_is_no_picture_or_no_pair_changes_nothing(client, put, manager):
    make_pictures(manager.folders.datasets / "cats", 3)
    pair = put("before").json()["name"]
    before = set(names(client))
    for bad in ({"name": "坏.png", "data": b"no picture"}, {"name": "x.exe"}):
        for dataset in (pair, None, "cats", "nothing", "../cats"):
            answer = put("after", dataset, **bad)
            assert answer.status_code == 400 and answer.json()["field"] == "train_data_dir", answer.text
            assert "pair_after" not in answer.text
    assert put("between", pair).status_code == 400
    assert set(names(client)) == before and client.get("/datasets/cats/pair").json()["name"] == ""
    assert put("after", "cats").json()["name"] not in before, "other pictures are left alone"


def test_a_folder_of_the_opposite_may_be_a_dataset(client, manager, settings):
    for name in ("young", "old"):
        make_pictures(manager.folders.datasets / name, 2)
    wish = {"task": "slider", "train_data_dir": "old", "opposite_dir": "young", **preset("opposites", 2, "sd1")}
    facts = client.post("/estimate", json={"settings": wish}).json()
    assert (facts["task"], facts["pictures"], facts["warnings"]) == ("slider", 4, [])
    answer = client.post("/estimate", json={"settings": {**wish, "opposite_dir": "nowhere"}}).json()
    assert answer["field"] == "opposite_dir", answer


@pytest.mark.parametrize("kind", ["words_slider", "turn", "erase"])
def test_presets_for_words_set_nothing_that_has_no_effect(client, kind):
    wish = {"task": "words", "original_prompt": "a circle", "positive_prompt": "a square" * (kind == "words_slider"),
            "target_prompt": "a square" * (kind == "turn"), **preset(kind, 0, "sd1", 1 << 30)}  # fmt: skip
    facts = client.post("/estimate", json={"settings": wish}).json()
    assert (facts["task"], facts["steps"], facts["warnings"]) == ("words", wish["max_train_steps"], [])
