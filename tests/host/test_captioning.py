"""The WebUIs' own captioners: under their lock, on their device, gone afterwards; refused where files are missing."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from lora_trainer.captioning.base import Settings, UnavailableError
from lora_trainer.captioning.registry import Sources, available, check_available, choose, open_captioner
from lora_trainer.dataset.caption_files import read_captions
from lora_trainer.dataset.writing import CaptionFolder
from lora_trainer.host import captioning
from lora_trainer.run.captioning import CaptionJob, caption_folder
from tests.host.fake_captioning import CPU, DEVICE, add_captioners, put_files


@pytest.fixture(params=["a1111", "forge"])
def fake(request):
    return request.getfixturevalue("webui" if request.param == "a1111" else "fake_forge")


@pytest.fixture
def host(request, fake, monkeypatch):
    is_forge = hasattr(fake, "memory_management")
    add_captioners(fake, forge=is_forge)
    monkeypatch.setattr(captioning, "_has_tokenizer", lambda: True)
    return request.getfixturevalue("forge" if is_forge else "a1111")


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, color in (("a", "#ff0000"), ("b", "#0000ff"), ("c", "#ff00ff")):
        Image.new("RGB", (40, 30), color).save(folder / f"{name}.png")
    return folder


def caption(root, host, name, **job):
    sources = Sources(host=host.captioners())
    check_available(choose(name, sources), sources)
    caption_folder(CaptionJob(CaptionFolder(root), name, **job), sources, turn=host.device_turn)
    return {key.removesuffix(".png"): found.text for key, found in read_captions(root).items()}


def test_their_words_become_captions_under_the_lock(host, fake, root):
    put_files(fake)
    tags = {"a": "red hat, ^_^", "b": "blue sky", "c": "red hat, blue sky, ^_^"}
    assert caption(root, host, "host-deepbooru", batch_size=2) == tags, "without ratings and what the user filters out"
    words = caption(root, host, "host-blip", mode="replace")
    assert words == {"a": "a picture with 1.0 red", "b": "a picture with 0.0 red", "c": "a picture with 1.0 red"}
    both = caption(root, host, "host-blip+host-deepbooru", mode="replace", settings=Settings(threshold=0.9))
    assert both["c"] == "a picture with 1.0 red, red hat, blue sky"


def test_what_was_loaded_for_us_is_gone_afterwards_and_what_was_there_stays(host, fake, root):
    put_files(fake)
    caption(root, host, "host-blip+host-deepbooru")
    assert fake.shared.interrogator.blip_model is None and fake.deepbooru.model.model is None
    assert not fake.call_queue.queue_lock._lock.locked()
    with host.device_turn():
        fake.deepbooru.model.start()
    network = fake.deepbooru.model.model
    caption(root, host, "host-deepbooru", mode="replace")
    assert fake.deepbooru.model.model is network
    assert network.place == (DEVICE if hasattr(fake, "memory_management") else CPU), "Forge takes it when it must"
    fake.deepbooru.model.model = fake.deepbooru.model.patcher = None
    fake.shared.opts.interrogate_keep_models_in_memory = True
    caption(root, host, "host-deepbooru", mode="replace")
    assert fake.deepbooru.model.model.place == DEVICE, "as the user's setting says"


def test_between_batches_the_webui_may_take_the_device(a1111, webui, root, monkeypatch):
    add_captioners(webui)
    put_files(webui)
    monkeypatch.setattr(captioning, "_has_tokenizer", lambda: True)
    waits = [True, False, False]
    monkeypatch.setattr(type(a1111._turns), "somebody_waits", property(lambda turns: waits.pop(0)))
    places = []

    class Watched(type(webui.shared.interrogator)):
        def generate_caption(self, pil_image):
            places.append(self.blip_model.place)
            return super().generate_caption(pil_image)

    webui.shared.interrogator.__class__ = Watched
    webui.lowvram.module_in_gpu = torch.nn.Linear(1, 1)
    with a1111.device_turn():
        captioner = a1111.captioners()["host-blip"].open(Settings())
    assert webui.lowvram.module_in_gpu is None, "with --medvram a part of the base model makes room"
    picture = Image.open(root / "a.png")
    with a1111.device_turn():
        captioner.describe([picture])
    assert webui.shared.interrogator.blip_model.place == CPU, "somebody waits for the device"
    with a1111.device_turn():
        captioner.describe([picture])
    assert places == [DEVICE, DEVICE] and webui.shared.interrogator.blip_model.place == DEVICE


def test_missing_files_are_named_with_their_place_and_size_and_nothing_is_loaded(host, fake, root, monkeypatch):
    sources = Sources(host=host.captioners())
    rows = {row.name: row for row in available(sources)}
    assert "model_base_caption_capfilt_large.pth, 0.9 GB" in rows["host-blip"].problem
    assert str(fake.folder / "models" / "BLIP") in rows["host-blip"].remedy
    assert "model-resnet_custom_v3.pt, 0.6 GB" in rows["host-deepbooru"].problem
    for name in ("host-blip", "host-deepbooru"):
        with pytest.raises(UnavailableError):
            check_available(name, sources)
        with pytest.raises(UnavailableError):
            open_captioner(name, Settings(), sources)
    fake.shared.cmd_opts.hide_ui_dir_config = True
    assert not any(str(fake.folder) in one.remedy for one in host.captioners().values())
    put_files(fake)
    monkeypatch.setattr(captioning, "_has_tokenizer", lambda: False)
    assert "bert-base-uncased" in host.captioners()["host-blip"].problem
    assert host.captioners()["host-deepbooru"].problem is None
    fake.paths.paths.clear()
    assert "repositories/BLIP" in host.captioners()["host-blip"].problem


def test_the_tokenizer_is_looked_for_and_not_fetched(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(captioning, "_TOKENIZER", "somewhere")
    assert not captioning._has_tokenizer()
    (tmp_path / "somewhere").mkdir()
    for name in captioning._TOKENIZER_FILES:
        (tmp_path / "somewhere" / name).write_text("{}")
    assert captioning._has_tokenizer()
