"""The WebUI's own BLIP and deepbooru describe pictures, through its real loading code, on random weights.

The weights are made inside the WebUI in the shapes of its own networks: every matrix is a view of a few numbers, so
that the files are small.
"""

from __future__ import annotations

import time

import pytest

from tests.webui.server import FORGE, Server

NAMES = ("host-blip", "host-deepbooru")

DEEPBOORU = """
from pathlib import Path
from modules import deepbooru_model, paths

generator = torch.Generator().manual_seed(0)
def small(tensor):
    if tensor.dim() < 2:
        return torch.zeros(tensor.shape)
    numbers = torch.randn(sum(tensor.shape), generator=generator) * 1.2 / tensor[0].numel() ** 0.5
    return numbers.as_strided(tensor.shape, (1,) * tensor.dim())

state = {name: small(tensor) for name, tensor in deepbooru_model.DeepDanbooruModel().state_dict().items()}
state["tags"] = ["rating:safe", "red_hat", "^_^", *(f"tag_{number}" for number in range(9173))]
path = Path(paths.models_path, "torch_deepdanbooru", "model-resnet_custom_v3.pt")
path.parent.mkdir(exist_ok=True)
torch.save(state, path)
result = path.stat().st_size
"""
BLIP = """
from pathlib import Path
from modules import paths
shared.interrogator.create_fake_fairscale()
import models.blip

generator = torch.Generator().manual_seed(1)
def small(tensor):
    if not tensor.is_floating_point() or tensor.dim() < 2:
        return tensor
    numbers = torch.randn(sum(tensor.shape), generator=generator) * 0.05
    return numbers.as_strided(tensor.shape, (1,) * tensor.dim())

config = Path(paths.paths["BLIP"], "configs", "med_config.json")
network = models.blip.blip_decoder(pretrained="", image_size=384, vit="base", med_config=str(config))
path = Path(paths.models_path, "BLIP", "model_base_caption_capfilt_large.pth")
path.parent.mkdir(exist_ok=True)
torch.save({"model": {name: small(tensor) for name, tensor in network.state_dict().items()}}, path)
result = path.stat().st_size
"""
LOADED = """
from modules import deepbooru
result = [shared.interrogator.blip_model is not None, deepbooru.model.model is not None]
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Hugging Face's cache, empty."""
    folder = tmp_path_factory.mktemp("huggingface")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
            patch.setenv(name, str(folder))
        yield folder


@pytest.fixture(scope="module")
def webui(tmp_path_factory, cache):
    with Server(tmp_path_factory.mktemp("webui")) as server:
        yield server


def put_tokenizer(cache):
    """bert-base-uncased with words of its own."""
    folder = cache / "models--bert-base-uncased" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (cache / "models--bert-base-uncased" / "refs").mkdir()
    (cache / "models--bert-base-uncased" / "refs" / "main").write_text("0" * 40)
    words = ["[PAD]", *(f"[unused{number}]" for number in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += ["a", "picture", "of"]
    words += [f"word{number}" for number in range(30522 - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')


def listed(webui):
    return {one["name"]: one for one in webui.get("/lora-trainer/v1/captioners")["captioners"]}


def caption(webui, folder, name, mode="replace"):
    session = webui.post("/lora-trainer/v1/editor", {"folder": str(folder)})["id"]
    webui.post(f"/lora-trainer/v1/editor/{session}/caption", {"captioner": name, "mode": mode, "batch_size": 2})
    deadline = time.monotonic() + 600
    while (state := webui.get(f"/lora-trainer/v1/editor/{session}"))["task"]["status"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.3)
    assert state["task"]["status"] == "finished", state["task"]
    found = webui.post(f"/lora-trainer/v1/editor/{session}/pictures", {})["rows"]
    return {row["file"]: row["caption"] for row in found}


def test_files_that_are_missing_are_named_and_not_fetched(webui, pictures):
    for name in NAMES:
        row = listed(webui)[name]
        assert row["problem"] and str(webui.data / "models") in row["remedy"]
        with pytest.raises(RuntimeError, match="400"):
            caption(webui, pictures, name)
    assert webui.probe(LOADED) == [False, False]
    assert not [path for path in (webui.data / "models").rglob("*") if path.suffix in (".pth", ".pt")]


def test_they_describe_pictures_and_leave_the_model_as_it_was(webui, pictures, cache, tmp_path):
    for path in pictures.glob("[0-2].png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = webui.generate("a house")
    sha = webui.sha()
    print("bytes of deepbooru's weights:", webui.probe(DEEPBOORU))
    assert listed(webui)["host-deepbooru"]["problem"] is None
    (webui.data / "models" / "BLIP").mkdir(exist_ok=True)
    (webui.data / "models" / "BLIP" / "model_base_caption_capfilt_large.pth").touch()
    assert "bert-base-uncased" in listed(webui)["host-blip"]["problem"]
    put_tokenizer(cache)
    print("bytes of BLIP's weights:", webui.probe(BLIP))
    assert listed(webui)["host-blip"]["problem"] is None
    for name in NAMES:
        began = time.monotonic()
        captions = caption(webui, tmp_path, name)
        print(name, f"{time.monotonic() - began:.1f} s", {key: text[:60] for key, text in captions.items()})
        assert len(captions) == 3 and all(captions.values())
        assert caption(webui, tmp_path, name) == captions, "the same pictures, the same words"
        word = "word" if name == "host-blip" else "tag "
        assert all(word in text and "rating" not in text for text in captions.values())
    assert webui.probe(LOADED) == [False, False], "gone afterwards"
    assert webui.sha() == sha and (webui.generate("a house") == before).all()
    assert FORGE or webui.probe("from modules import lowvram\nresult = lowvram.module_in_gpu is None")
