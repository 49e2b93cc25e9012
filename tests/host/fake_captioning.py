"""A WebUI's interrogator and deepbooru: what ``modules/interrogate.py`` and ``modules/deepbooru.py`` offer, with small
networks. Each of them downloads what it misses, which no test may see happen."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

DEVICE, CPU = torch.device("cpu", 0), torch.device("cpu")  # told apart by their index
TAGS = ("rating:safe", "red_hat", "blue_sky", "^_^", "watermark")


class Network(nn.Module):
    """Scores by the mean color of a picture; knows where it lies. Runs on its device and under the lock only."""

    tags = TAGS

    def __init__(self, webui: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.place, self._webui = CPU, webui

    def to(self, *place: Any, **named: Any) -> Network:
        self.place = named.get("device", place[0] if place else self.place)
        return self

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        assert self.place == DEVICE, "the network was sent away"
        assert self._webui.call_queue.queue_lock._lock.locked(), "outside of a turn"
        assert pixels.shape[1:] == (512, 512, 3)
        red, _, blue = pixels.mean((1, 2)).unbind(-1)
        return torch.stack([torch.ones_like(red), red, blue, 0.4 * red, red], 1)


class Interrogator:
    """``InterrogateModels``, of which BLIP alone is wanted."""

    def __init__(self, webui: Any):
        self._webui = webui
        self.blip_model = self.clip_model = self.dtype = None
        self.running_on_cpu = False

    def load_blip_model(self) -> Network:
        assert list(Path(self._webui.paths.models_path, "BLIP").glob("*.pth")), "this would be a download"
        return Network(self._webui)

    def load(self) -> None:
        raise AssertionError("this loads CLIP, and may download it")

    def send_blip_to_ram(self) -> None:
        if not self._webui.shared.opts.interrogate_keep_models_in_memory and self.blip_model is not None:
            self.blip_model = self.blip_model.to(CPU)

    def generate_caption(self, pil_image: Image.Image) -> str:
        assert self.dtype == torch.float32
        with torch.no_grad():
            pixels = torch.from_numpy(np.asarray(pil_image.resize((512, 512)), np.float32)[None] / 255)
            return f"a picture with {self.blip_model(pixels)[0, 1]:.1f} red "


class ForgeInterrogator(Interrogator):
    load_device, offload_device = DEVICE, CPU

    def __init__(self, webui: Any):
        super().__init__(webui)
        self.dtype, self.blip_patcher = torch.float32, None

    def send_blip_to_ram(self) -> None:
        pass


class DeepDanbooru:
    def __init__(self, webui: Any):
        self._webui, self.model = webui, None

    def load(self) -> None:
        if self.model is None:
            folder = Path(self._webui.paths.models_path, "torch_deepdanbooru")
            assert list(folder.glob("*.pt")), "this would be a download"
            self.model = Network(self._webui)

    def start(self) -> None:
        self.load()
        self.model.to(DEVICE)

    def stop(self) -> None:
        if not self._webui.shared.opts.interrogate_keep_models_in_memory:
            self.model.to(CPU)


class ForgeDeepDanbooru(DeepDanbooru):
    patcher = None

    def start(self) -> None:
        self.load()
        self.patcher = self.patcher or self._webui.ModelPatcher(self.model, load_device=DEVICE, offload_device=CPU)
        self._webui.memory_management.load_models_gpu([self.patcher])

    def stop(self) -> None:
        pass


def resize_image(mode: int, image: Image.Image, width: int, height: int, upscaler_name: str | None = None) -> Any:
    assert mode == 2 and upscaler_name == "None", "another upscaler may be a network, and a download"
    return image.resize((width, height))


def add_captioners(webui: Any, *, forge: bool = False) -> None:
    """What a WebUI's namespace needs so that its captioners can be asked for; their files are missing."""
    webui.paths.models_path, webui.paths.paths = str(webui.folder / "models"), {"BLIP": "repositories/BLIP"}
    webui.devices.device_interrogate, webui.devices.autocast = DEVICE, contextlib.nullcontext
    webui.shared.cmd_opts.no_half = True
    webui.shared.opts.interrogate_keep_models_in_memory = False
    webui.shared.opts.deepbooru_filter_tags = "watermark, text"
    webui.images = SimpleNamespace(resize_image=resize_image)
    webui.shared.interrogator = (ForgeInterrogator if forge else Interrogator)(webui)
    webui.deepbooru = SimpleNamespace(model=(ForgeDeepDanbooru if forge else DeepDanbooru)(webui))
    if forge:
        webui.ModelPatcher = lambda model, **places: SimpleNamespace(model=model, **places)
        load = webui.memory_management.load_models_gpu

        def load_models_gpu(patchers: list[Any], **options: Any) -> None:
            ours = [patcher for patcher in patchers if isinstance(patcher.model, Network)]
            for patcher in ours:
                patcher.model.to(patcher.load_device)
            if not ours:
                load(patchers, **options)

        webui.memory_management.load_models_gpu = load_models_gpu


def put_files(webui: Any) -> None:
    for folder, name in (("BLIP", "blip.pth"), ("torch_deepdanbooru", "deepbooru.pt")):
        path = Path(webui.paths.models_path, folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / name).touch()
