"""The page of a run: whole by itself, right, safe to show, and there also when much of the run is not."""

from __future__ import annotations

import ast
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lora_trainer.cli.main import main
from lora_trainer.config import from_mapping, to_yaml
from lora_trainer.errors import UserError
from lora_trainer.files import sha256_file
from lora_trainer.report import RunFolder, report_of
from lora_trainer.report.curves import Line, chart
from lora_trainer.report.words import Words, find
from lora_trainer.training.validation import verdict
from tests.pictures import draw_dataset
from tests.training.test_validation import VERDICTS, series

ROOT = Path(__file__).parents[2]
CHINESE = json.loads((ROOT / "localizations" / "zh_CN.json").read_text(encoding="utf-8"))
EVIL = "<script>alert('cat')</script>\"><img src=x onerror=alert(1)>"


class Reader(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def named(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]

    @property
    def words(self):
        return "\n".join(self.text)


def make_run(folder: Path, **changes) -> Path:
    """What a run of 40 steps leaves; returns its output folder."""
    data = draw_dataset(folder / "my pictures", 6, lambda index: (80, 64), caption=lambda index: f"a **disc**, {index}")
    (data / "disc 00.txt").write_text(EVIL)
    out = folder / "out"
    (out / "logs").mkdir(parents=True)
    (out / "previews").mkdir()
    settings = {
        "base_model": str(folder / "models" / "base.safetensors"), "train_data_dir": str(data),
        "output_dir": str(out), "output_name": "disc", "lora_rank": 7, "trigger_word": "zwx", "validation_share": 0.3,
        "preview_prompts": ["a disc", EVIL], "description": f"drawn in {data}", **changes,
    }  # fmt: skip
    text = f"# disc, started 2026-11-28T12:00:00+00:00\n{to_yaml(from_mapping(settings))}"
    (out / "disc.config.yaml").write_text(text, encoding="utf-8")
    lines = []
    for step in range(41):
        if step:
            lines.append({"step": step, "epoch": 1, "loss": None if step == 7 else 1 / step, "lr": 1e-4,
                          "seconds": 3.0, "images": 1, "grad_norm": 0.5})  # fmt: skip
        if step % 8 == 0:
            held = {0: 1.0, 8: 0.8}.get(step, 0.8 + step / 100)
            lines.append({"kind": "validation", "step": step, "epoch": 1, "validation": held,
                          "training": 0.3 - step / 1000 if step else 1.0,
                          "drift": step / 100})  # fmt: skip
    (out / "logs" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "logs" / "disc.environment.json").write_text(json.dumps({"torch": "9.8.7", "device": "cpu (one)"}))
    for step, color in ((0, "red"), (8, "blue"), (16, "green")):
        Image.new("RGB", (32, 32), color).save(out / "previews" / f"disc-step{step:08d}-0.png")
    metadata = {"ss_steps": "40", "ss_new_sd_model_hash": "ab" * 32, "lora_trainer.run": "12345678",
                "ss_dataset_dirs": json.dumps({"my pictures": {"n_repeats": 1, "img_count": 6}}),
                "ss_tag_frequency": json.dumps({"my pictures": {"a disc": 6}})}  # fmt: skip
    for name in ("disc", "disc-step00000008", "other"):
        save_file({"a": torch.zeros(4)}, str(out / f"{name}.safetensors"), metadata)
    (out / "compare" / "0002").mkdir(parents=True)
    Image.new("RGB", (64, 20), "red").save(out / "compare" / "0002" / "grid.png")
    return out


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("somebodys_folder"))


@pytest.fixture(scope="module")
def page(out):
    return report_of(RunFolder(out))


def test_it_needs_nothing_else_and_runs_nothing(page):
    read = Reader(page)
    assert not read.open, "every element is closed"
    assert not read.named("script") and not read.named("link") and "@import" not in page and "url(" not in page
    assert all(picture["src"].startswith("data:image/jpeg;base64,") for picture in read.named("img"))
    assert not [key for _, attributes in read.tags for key in attributes if key.startswith("on")]
    assert read.words.count(EVIL) == 3, "as a caption, as a prompt, and among the settings"
    assert "prefers-color-scheme: dark" in page


def test_it_names_no_place_and_no_person(page, out, monkeypatch):
    for part in out.parts[1:-1]:
        assert part not in page, part
    monkeypatch.setenv("HOME", str(out.parent))
    monkeypatch.setenv("USERPROFILE", str(out.parent))
    (out / "home.config.yaml").write_text(f"train_data_dir: {out.parent}\nbase_model: {out.parent / 'b'}\n")
    assert out.parent.name not in report_of(RunFolder(out / "home.config.yaml"))
    (out / "home.config.yaml").unlink()


def test_what_there_is_stands_on_it(page, out):
    read = Reader(page)
    words = read.words
    for said in ("lora_rank", "zwx", "base.safetensors", "9.8.7", "cpu (one)", "ab" * 32, "12345678", "2.0 min",
                 "memorises", "recommended", "step 8", "before", "disc-step00000008.safetensors"):  # fmt: skip
        assert said in words, said
    assert sha256_file(out / "disc.safetensors") in words and "other.safetensors" not in words
    assert "epochs" not in re.findall(r"^\w+$", words, re.MULTILINE), "as usual, so not among the settings"
    # Six pictures, three previews, and the grid.
    assert len(read.named("img")) == 6 + 3 + 1
    assert "of them held out" in words and words.count("held out") >= 3
    assert len(read.named("svg")) == 5, "loss, held out and trained, drift, gradient norm, learning rate"


def test_the_curves_lie_where_the_values_are():
    drawn = chart("Loss", [Line("each step", "raw", [(0, 0.0), (50, 1.0), (100, 0.5)])])
    (path,) = [attributes["d"] for attributes in Reader(drawn).named("path") if attributes["class"] == "line raw"]
    places = [tuple(map(float, place.split())) for place in path[1:].split("L")]
    assert places[0][0] < places[1][0] < places[2][0] and places[1][0] * 2 == pytest.approx(places[0][0] + places[2][0])
    assert places[0][1] - places[2][1] == pytest.approx(places[2][1] - places[1][1]), "upwards"
    assert chart("Loss", [Line("each step", "raw", [])]) is None


def test_the_curves_of_a_long_run_are_thinned(tmp_path):
    out = make_run(tmp_path, preview_prompts=[])
    with (out / "logs" / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "loss": step % 7, "lr": 1e-4}) + "\n" for step in range(41, 20_000))
    drawn = [attributes["d"] for attributes in Reader(report_of(RunFolder(out))).named("path")]
    assert 600 < max(path.count("L") for path in drawn) < 800


@pytest.mark.parametrize("gone", ["my pictures", "out/logs", "out/previews", "out/disc.safetensors", "out/compare"])
def test_it_is_made_of_what_is_left(tmp_path, gone):
    out = make_run(tmp_path)
    place = tmp_path / gone
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    (out / "previews").mkdir(exist_ok=True)
    (out / "previews" / "disc-step00000024-0.png").write_bytes(b"no picture")
    words = Reader(report_of(RunFolder(out))).words
    assert "lora_rank" in words
    if gone == "my pictures":
        assert "not there any more" in words and "a disc 6" in words


def test_rows_of_text(tmp_path):
    out = make_run(tmp_path, task="text", preview_prompts=[])
    rows = tmp_path / "my pictures" / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Who?", "response": EVIL}) + "\nnot a row\n")
    read = Reader(report_of(RunFolder(out)))
    assert EVIL in read.words and "Who?" in read.words and not read.named("script")


def test_every_word_is_in_chinese(out):
    said = set()
    for path in (ROOT / "lora_trainer" / "report").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "words":
                said |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    assert len(said) > 30 and not said - set(CHINESE)
    page = report_of(RunFolder(out), "zh-Hans")
    read = Reader(page)
    assert read.named("html") == [{"lang": "zh-CN"}]
    for text in ("Settings", "Data set", "Gradient norm", "recommended"):
        assert CHINESE[text] in read.words and text not in read.text
    assert "lora_rank" in read.words, "settings have one name everywhere"


@pytest.mark.parametrize("kind", VERDICTS)
def test_verdicts_are_in_chinese(kind):
    found = verdict(series(*VERDICTS[kind]), 3)
    said = Words("zh").said(found.sentence)
    assert not re.search("[A-Za-z]{2}", said.replace("rank", "")) and "{" not in said
    assert set(re.findall(r"[0-9.]*[0-9]", said)) == set(re.findall(r"[0-9.]*[0-9]", found.sentence))


def test_languages():
    assert find("zh_CN") == find("zh") == find("zh-TW") == "zh_CN" and find("en") is None and find("fr") is None
    assert Words("fr")("{n} min", n=3) == "3 min"


def test_the_command_writes_whole_files_and_asks_before_it_overwrites(tmp_path, capsys):
    out = make_run(tmp_path)
    assert main(["report", str(out)]) == 0
    path = out / "disc.report.html"
    assert path.read_text(encoding="utf-8") == report_of(RunFolder(out)) and str(path) in capsys.readouterr().out
    path.write_text("mine")
    assert main(["report", str(out / "disc.safetensors")]) == 2 and path.read_text() == "mine"
    other = tmp_path / "new" / "page.html"
    assert main(["report", str(out / "disc.config.yaml"), "--out", str(other), "--language", "zh_CN"]) == 0
    assert CHINESE["Settings"] in other.read_text(encoding="utf-8")
    assert main(["report", str(out), "--overwrite"]) == 0 and path.read_text(encoding="utf-8").startswith("<!DOCTYPE")
    assert main(["report", str(out), "--language", "xx", "--overwrite"]) == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_no_run_and_several(tmp_path):
    with pytest.raises(UserError, match="There is no run in"):
        RunFolder(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.config.yaml").write_text("epochs: 1\n")
    with pytest.raises(UserError, match="several") as caught:
        RunFolder(tmp_path)
    assert "a.config.yaml, b.config.yaml" in caught.value.remedy
    assert RunFolder(tmp_path / "b.config.yaml").name == "b"
