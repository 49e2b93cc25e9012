"""What is pasted into the form: what was taken and what was not, in which format it was read, and all that is wrong."""

from __future__ import annotations

import pytest


def told(client, text):
    answer = client.post("/settings/check", json={"yaml": text})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("lora_rank: 8\noutput_dir: ./output/my_cat\n", "YAML"),
        ('lora_rank = 8\noutput_dir = "./output/my_cat"\n', "TOML"),
        ('{"lora_rank": 8, "output_dir": "./output/my_cat"}', "JSON"),
    ],
)
def test_our_own_settings_are_reported_too(client, text, form):
    answer = told(client, text)
    report = answer["translation"]
    assert report["tool"] == f"this program ({form})"
    assert [(one["theirs"], one["ours"], one["value"]) for one in report["taken"]] == [("lora_rank", "lora_rank", "8")]
    assert [one["theirs"] for one in report["unmet"]] == ["output_dir"]
    assert answer["settings"]["output_name"] == "my_cat" and "output_name" in answer["given"]


def test_a_name_that_is_given_stays(client):
    assert told(client, "output_dir: ./output/a\noutput_name: b\n")["settings"]["output_name"] == "b"


def test_settings_of_another_tool_name_their_format(client):
    text = 'pretrained_model_name_or_path = "a.safetensors"\nnetwork_module = "networks.lora"\nxformers = true\n'
    assert told(client, text)["translation"]["tool"].endswith("(TOML)")


FLUX = """network_module = "networks.lora_flux"
clip_l = "/m/clip_l.safetensors"
t5xxl = "/m/t5xxl.safetensors"
fp8_base = true
gradient_checkpointing = true
blocks_to_swap = 2
t5xxl_max_token_length = 256
guidance_scale = 1.0
"""


def test_how_a_flux_is_read_from_its_file_is_left_out_where_a_webui_lends_it(client, host):
    kept = {"text_encoders": ["/m/clip_l.safetensors", "/m/t5xxl.safetensors"], "base_precision": "fp8",
            "offload_blocks": 3}  # fmt: skip
    answer = told(client, FLUX)
    assert {name: answer["settings"][name] for name in kept} == kept and set(kept) <= set(answer["given"])
    host.name = "Forge"
    for text in (FLUX, "base_precision: fp8\noffload_blocks: 3\ntext_encoders: [/m/t5.safetensors]\n"
                       "gradient_checkpointing: true\n"):  # fmt: skip
        answer = told(client, text)
        assert answer["settings"]["offload_blocks"] == "auto" and answer["settings"]["base_precision"] == "stored"
        assert answer["settings"]["text_encoders"] == [] and not set(kept) & set(answer["given"])
        assert sum("WebUI" in one["reason"] for one in answer["translation"]["unmet"]) == 3
    answer = told(client, "base_precision: fp8\ngpus: [0]\n")  # whose processes read the file
    assert answer["settings"]["base_precision"] == "fp8"


def test_all_that_is_wrong_is_said_in_one_round(client):
    settings = {"merge_into_base": "m.safetensors", "init_lora": "/x\u0001y"}
    answer = client.post("/estimate", json={"settings": settings})
    fields = {one["field"] for one in answer.json()["problems"]}
    assert {"train_data_dir", "merge_into_base", "init_lora"} <= fields


@pytest.mark.parametrize("form", ["settings", "yaml"])
@pytest.mark.parametrize("route", ["/estimate", "/jobs"])
def test_settings_base_model_and_pictures_are_complained_of_in_one_answer(client, tmp_path, route, form):
    (tmp_path / "none").mkdir()
    settings = {"epochs": -1, "base_model": "missing", "train_data_dir": str(tmp_path / "none")}
    text = "".join(f"{name}: {one}\n" for name, one in settings.items()) + "seed 1\n"
    given = settings if form == "settings" else text
    answer = client.post(route, json={form: given})
    fields = {one["field"] for one in answer.json()["problems"]}
    assert fields == {*settings, *(["seed"] if form == "yaml" else [])}


def test_what_may_not_be_looked_at_is_not(client, monkeypatch):
    def scan(*args, **more):
        raise AssertionError("the folder was read")

    monkeypatch.setattr("lora_trainer.dataset.folder.scan", scan)
    answer = client.post("/estimate", json={"settings": {"epochs": -1, "train_data_dir": "/etc"}})
    assert {"epochs", "train_data_dir"} <= {one["field"] for one in answer.json()["problems"]}
