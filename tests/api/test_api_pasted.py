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


def test_all_that_is_wrong_is_said_in_one_round(client):
    settings = {"merge_into_base": "m.safetensors", "init_lora": "/x\u0001y"}
    answer = client.post("/estimate", json={"settings": settings})
    fields = {one["field"] for one in answer.json()["problems"]}
    assert {"train_data_dir", "merge_into_base", "init_lora"} <= fields
