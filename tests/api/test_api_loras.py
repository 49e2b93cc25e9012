"""Tools on the LoRAs of the host's folder: in the background, by names alone, nothing overwritten."""

from __future__ import annotations

import json
import zipfile
from contextlib import contextmanager
from threading import Event

import pytest
import torch
from fastapi import FastAPI
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_trainer.adapters.export import save_lora
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.api import add_routes
from lora_trainer.host.standalone import StandaloneHost
from lora_trainer.jobs.worker import JobManager
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.families import targets_of
from tests import tiny
from tests.adapters.layers import randomize, settings
from tests.api.conftest import Client
from tests.jobs.fakes import wait_for

BASE = "base.safetensors"
META = {"ss_base_model_version": "sd_v1", "modelspec.trigger_phrase": "zwx", "lora_trainer.run": "abcd1234"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Base models and LoRAs: ink with a card, and red in a folder."""
    root = tmp_path_factory.mktemp("host")
    base = tiny.tiny_sd1(root / "models" / BASE, depths=(1, 0, 0, 0))
    tensors = load_file(base)
    name = next(name for name in tensors if name.endswith("attn1.to_q.weight"))
    tensors[name] = tensors[name] + torch.outer(torch.ones(len(tensors[name])), torch.ones(tensors[name].shape[1]))
    save_file(tensors, root / "models" / "tuned.safetensors")
    targets = targets_of(FileLender(base).architecture())
    (root / "loras" / "colors").mkdir(parents=True)
    for seed, path in enumerate(("ink", "colors/red")):
        adapters = AdapterSet.build(targets, settings(lora_rank=4), "cpu")
        randomize(adapters, seed, deviation=0.1)
        save_lora(adapters, root / "loras" / f"{path}.safetensors", META, "fp16")
    card = {"activation text": "zwx ink", "preferred weight": 0.6, "notes": "mine"}
    (root / "loras" / "ink.json").write_text(json.dumps(card))
    return root


@pytest.fixture(scope="module")
def host(folder):
    return StandaloneHost(folder / "data", checkpoints=folder / "models", lora=folder / "loras", device="cpu")


@pytest.fixture(scope="module")
def client(host):
    manager = JobManager(host)
    app = FastAPI()
    add_routes(app, manager, host)
    yield Client(app)
    manager.close()


def use(client, tool, **wish):
    """What the tool made."""
    answer = client.post(f"/loras/{tool}", json=wish)
    assert answer.status_code == 202, answer.json()
    task = wait_for(lambda: (one := client.get("/loras").json()["task"])["status"] != "running" and one)
    assert task["status"] == "finished", task["error"]
    return task["result"]


def card(folder, name):
    return json.loads((folder / "loras" / f"{name}.json").read_text(encoding="utf-8"))


def test_a_resized_lora_is_a_new_one_with_the_card_of_the_old(client, folder):
    before = (folder / "loras" / "ink.safetensors").read_bytes()
    done = use(client, "resize", lora="ink.safetensors", output="ink_small", rank=2, base=BASE)
    assert done["published"] == "ink_small" and done["ranks"] == [2, 2] and 0 < done["kept"] < 1
    assert card(folder, "ink_small") == {**card(folder, "ink"), "sd version": "SD1", "notes": "mine\nresized to rank 2"}
    assert (folder / "loras" / "ink.safetensors").read_bytes() == before
    assert "ink_small.safetensors" in [one["name"] for one in client.get("/loras").json()["loras"]]
    assert not list((folder / "data").glob(".tool-*"))


def test_combined_extracted_and_measured(client, folder):
    parts = [{"name": "ink.safetensors", "strength": 0.5}, {"name": "colors/red.safetensors", "strength": -1}]
    both = use(client, "combine", loras=parts, output="both", base=BASE)
    assert both["ranks"] == [8, 8]
    assert (card(folder, "both")["activation text"], card(folder, "both")["preferred weight"]) == ("zwx ink, zwx", 1.0)
    one = use(client, "extract", base=BASE, tuned="tuned.safetensors", output="change", rank=4)
    assert one["layers"] == 1 and one["ranks"] == [1, 1] and card(folder, "change")["sd version"] == "SD1"
    blocks = use(client, "strength", lora="change.safetensors", base=BASE)["blocks"]
    assert [block["name"] for block in blocks if block["strength"]] == [block["name"] for block in blocks] == ["IN01"]


def test_what_a_webui_does_not_read_is_converted_to_be_downloaded(client, folder):
    listed = [one["name"] for one in client.get("/loras").json()["loras"]]
    for layout, end in (("diffusers", ".safetensors"), ("peft", ".zip")):
        done = use(client, "convert", lora="ink.safetensors", output="ink_other", layout=layout, base=BASE)
        assert done["file"] == f"ink_other{end}"
        made = client.get(f"/loras/converted/{done['file']}")
        assert made.status_code == 200 and "attachment" in made.headers["content-disposition"]
        again = client.post("/loras/convert", json={"lora": "ink.safetensors", "output": "ink_other", "layout": layout})
        assert again.status_code == 400 and again.json()["field"] == "output_name"
    names = zipfile.ZipFile(folder / "data" / "converted" / "ink_other.zip").namelist()
    assert {"unet/adapter_model.safetensors", "unet/adapter_config.json"} <= set(names)
    assert [one["name"] for one in client.get("/loras").json()["loras"]] == listed
    assert use(client, "convert", lora="ink.safetensors", output="k", layout="kohya", base=BASE)["published"] == "k"


def test_other_metadata_and_activation_text(client, folder):
    changes = {"trigger": "zwx pen", "description": "A pen.", "set": {"ss_note": "x"}}
    use(client, "edit", lora="ink.safetensors", output="pen", **changes)
    fields = card(folder, "pen")
    assert (fields["activation text"], fields["description"], fields["preferred weight"]) == ("zwx pen", "A pen.", 0.6)
    metadata = client.get("/loras/metadata", params={"name": "pen.safetensors"}).json()["metadata"]
    assert metadata["modelspec.trigger_phrase"] == "zwx pen" and metadata["ss_note"] == "x"
    assert "lora_trainer.run" not in metadata, "publishing that run again would replace it"
    with safe_open(folder / "loras" / "ink.safetensors", framework="pt") as one:
        assert one.metadata()["modelspec.trigger_phrase"] == "zwx"


REFUSED = [
    ("resize", {"lora": "ink.safetensors", "output": "ink", "rank": 2}, "output_name"),
    ("resize", {"lora": "ink.safetensors", "output": "red", "rank": 2}, "output_name"),  # in a sub-folder
    ("resize", {"lora": "ink.safetensors", "output": "../evil", "rank": 2}, "output_name"),
    ("resize", {"lora": "../models/base.safetensors", "output": "new", "rank": 2}, "lora"),
    ("resize", {"lora": "/etc/passwd", "output": "new", "rank": 2}, "lora"),
    ("resize", {"lora": "ink.safetensors", "output": "new"}, "rank"),
    ("resize", {"lora": "ink.safetensors", "output": "new", "share": 2}, "share"),
    ("resize", {"lora": "ink.safetensors", "output": "new", "rank": 2, "base": "/etc/passwd"}, "base"),
    ("combine", {"loras": [{"name": "gone"}], "output": "new"}, "loras"),
    ("extract", {"base": BASE, "tuned": BASE, "output": "new"}, "tuned"),
    ("convert", {"lora": "ink.safetensors", "output": "new", "layout": "onnx"}, "layout"),
    ("convert", {"lora": "ink.safetensors", "output": "a/b", "layout": "peft"}, "output_name"),
    ("edit", {"lora": "ink.safetensors", "output": "new"}, "trigger"),
]


@pytest.mark.parametrize(("tool", "wish", "field"), REFUSED)
def test_what_cannot_be_done_is_refused_with_its_field(client, tool, wish, field):
    answer = client.post(f"/loras/{tool}", json=wish)
    assert answer.status_code == 400 and answer.json()["field"] == field and answer.json()["remedy"]


def test_what_goes_wrong_on_the_way_is_said_and_leaves_nothing(client, folder):
    one = [{"name": "ink.safetensors"}]
    assert client.post("/loras/combine", json={"loras": one, "output": "new", "base": BASE}).status_code == 202
    task = wait_for(lambda: (one := client.get("/loras").json()["task"])["status"] != "running" and one)
    assert task["status"] == "failed" and task["error"]["field"] == "loras"
    assert not (folder / "loras" / "new.safetensors").exists() and not list((folder / "data").glob(".tool-*"))


def test_one_at_a_time(client, host, monkeypatch):
    go_on = Event()

    @contextmanager
    def turn():
        assert go_on.wait(20)
        yield

    monkeypatch.setattr(host, "device_turn", turn)  # modules are built in a turn of the host's
    wish = {"lora": "ink.safetensors", "base": BASE}
    assert client.post("/loras/strength", json=wish).status_code == 202
    again = client.post("/loras/strength", json=wish)
    assert again.status_code == 400 and "worked on" in again.json()["message"]
    go_on.set()
    wait_for(lambda: client.get("/loras").json()["task"]["status"] == "finished")
