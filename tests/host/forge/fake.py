"""A Forge of a few hundred lines: only what docs say about the real one, so that its traps can be sprung in a second.

Its parameters are inference tensors; it loads no model by itself; every choice of the user makes another model object;
LoRAs replace parameters and stay until something else is loaded; what is merged is remembered by file name; token
embeddings are wrapped and become fp32 when a prompt is encoded; reading a damaged file renames it.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tests.host.a1111.fake import Info, QueueLock, Wrapper, module_tree

CPU = torch.device("cpu")


class LoraLoader:
    """Merges by putting other parameters in place; what was there is kept in ``backup``.

    unwritable: names of parameters whose number format it cannot write, which it notices when it comes to them.
    """

    def __init__(self, model: nn.Module):
        self.model, self.backup, self.online_backup, self.loaded_hash = model, {}, [], str([])
        self.unwritable: set[str] = set()

    @torch.inference_mode()
    def refresh(self, patches: dict[tuple, dict[str, Any]], force_refresh: bool = False) -> None:
        wanted = str(list(patches))
        if wanted == self.loaded_hash and not force_refresh:
            return
        for name, parameter in self.backup.items():
            put(self.model, name, parameter)
        self.backup = {}
        for name, (up, down) in itertools.chain.from_iterable(group.items() for group in patches.values()):
            weight = self.model.get_parameter(name)
            self.backup.setdefault(name, weight)
            if name in self.unwritable:
                raise NotImplementedError("Low bit LoRA for this data type is not implemented yet.")
            change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape).to(weight)
            put(self.model, name, nn.Parameter(weight + change, requires_grad=False))
        self.loaded_hash = wanted


class Patcher:
    def __init__(self, model: nn.Module):
        self.model, self.lora_patches, self.load_device = model, {}, CPU
        if not hasattr(model, "lora_loader"):
            model.lora_loader = LoraLoader(model)
        self.lora_loader = model.lora_loader

    def clone(self) -> Patcher:
        return Patcher(self.model)

    def memory_required(self, shape: tuple[int, ...]) -> int:
        return 0


def put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    model.get_submodule(path)._parameters[last] = parameter


class Networks:
    """The Lora extension's module."""

    def __init__(self, webui: FakeForge):
        self.webui = webui
        self.available_networks: dict[str, Any] = {}
        self.available_network_aliases: dict[str, Any] = {}
        self.networks_in_memory: dict[str, Any] = {}
        self.loaded_networks: list[Any] = []

        @functools.lru_cache(maxsize=5)
        def load_lora_state_dict(filename: str) -> dict[str, torch.Tensor]:
            try:
                return load_file(filename)
            except Exception:
                os.replace(filename, filename + ".corrupted")
                raise

        self.load_lora_state_dict = load_lora_state_dict

    def update_available_networks_by_names(self, names: list[str]) -> None:
        for path in Path(self.webui.shared.cmd_opts.lora_dir).rglob("*.safetensors"):
            if path.stem in names:
                entry = SimpleNamespace(name=path.stem, filename=str(path), alias=path.stem)
                self.available_networks[path.stem] = self.available_network_aliases[path.stem] = entry

    def model_lora_keys_unet(self, model: nn.Module, keys: dict[str, str]) -> dict[str, str]:
        names = {name for name, _ in model.named_parameters()}
        found = {k: f"{n.removeprefix('model.')}.weight" for k, n in self.webui.kohya_names.items()}
        return {kohya: name for kohya, name in found.items() if name in names}

    def model_lora_keys_clip(self, model: nn.Module, keys: dict[str, str]) -> dict[str, str]:
        return {}

    def load_lora(self, tensors: dict[str, Any], keys: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
        found = {key.partition(".")[0] for key in tensors} & set(keys)
        rest = {key: tensor for key, tensor in tensors.items() if key.partition(".")[0] not in found}
        return {keys[k]: (tensors[f"{k}.lora_up.weight"], tensors[f"{k}.lora_down.weight"]) for k in found}, rest

    def load_networks(self, names: list[str]) -> None:
        sd_model = self.webui.model
        self.loaded_networks[:] = [SimpleNamespace(name=name) for name in names]
        files = [self.available_networks[name].filename for name in names]
        if sd_model.current_lora_hash == str(files):
            return
        sd_model.current_lora_hash = str(files)
        original = sd_model.forge_objects_original
        unet = original.unet
        for file in files:
            patches, _ = self.load_lora(self.load_lora_state_dict(file), self.model_lora_keys_unet(unet.model, {}))
            unet = unet.clone()
            unet.lora_patches[file,] = patches
        sd_model.forge_objects_after_applying_lora = SimpleNamespace(unet=unet, clip=original.clip, vae=original.vae)


class Processing:
    """StableDiffusionProcessingTxt2Img. Its lists of encoded prompts are shared by all of them."""

    cached_c = [None, None, None]  # noqa: RUF012 - as the real one
    cached_uc = [None, None, None]  # noqa: RUF012

    def __init__(self, **values: Any):
        self.cached_c, self.cached_uc = Processing.cached_c, Processing.cached_uc
        self.__dict__.update(values)

    def close(self) -> None:
        pass


class Engine(SimpleNamespace):
    """An ``sd_model``."""

    __hash__ = object.__hash__


class Options:
    """The WebUI's options: attributes and ``data`` are the same."""

    def __init__(self, data: dict[str, Any]):
        self.__dict__["data"] = data

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.data[name] = value


class FakeForge:
    """``import_webui()``'s namespace, and what a user can do."""

    def __init__(self, folder: Path, checkpoints: list[Path], kohya_names: dict[str, str]):
        """kohya_names: name in a LoRA file -> name of the tensor's module in the checkpoint."""
        self.folder, self.kohya_names, self.device = folder, kohya_names, CPU
        infos = [Info(path) for path in checkpoints]
        lora_dir = folder / "models" / "Lora"
        lora_dir.mkdir(parents=True, exist_ok=True)
        data = {"sd_model_checkpoint": infos[0].title, "sd_checkpoint_hash": None, "sd_lora": "None",
                "forge_unet_storage_dtype": "Automatic", "forge_additional_modules": []}  # fmt: skip
        state = {
            "interrupted": False,
            "skipped": False,
            "stopping_generation": False,
            "job": "",
            "current_latent": None,
        }
        self.shared = SimpleNamespace(
            cmd_opts=SimpleNamespace(lora_dir=str(lora_dir), no_prompt_history=False),
            opts=Options(data),
            state=SimpleNamespace(**state),
            sd_model=SimpleNamespace(),
        )
        self.paths = SimpleNamespace(data_path=str(folder), models_path=str(folder / "models"))
        self.call_queue = SimpleNamespace(queue_lock=QueueLock())
        self.devices = SimpleNamespace(device=CPU, torch_gc=lambda: None)
        self.dynamic_args: dict[str, Any] = {}
        self.main_entry = SimpleNamespace(
            forge_unet_storage_dtype_options={
                "Automatic": (None, False), "Automatic (fp16 LoRA)": (None, True), "bnb-nf4": ("nf4", False)
            },
            refresh_model_loading_parameters=self._refresh_model_loading_parameters,
        )
        self.memory_management = SimpleNamespace(
            current_loaded_models=[], get_torch_device=lambda: self.device, load_models_gpu=self._load_models_gpu,
            free_memory=self._free_memory, soft_empty_cache=lambda force: None,
        )
        self.processing = SimpleNamespace(
            opt_f=8,
            StableDiffusionProcessing=Processing,
            StableDiffusionProcessingTxt2Img=Processing,
            process_images_inner=self._process_images_inner,
        )
        self.sd_models = SimpleNamespace(
            model_data=SimpleNamespace(sd_model=SimpleNamespace(), forge_loading_parameters={}, forge_hash=""),
            checkpoints_list={info.title: info for info in infos},
            checkpoint_aliases={},
            select_checkpoint=lambda: self.sd_models.checkpoints_list[data["sd_model_checkpoint"]],
            forge_model_reload=self._forge_model_reload,
        )
        self.networks = Networks(self)
        self.loads: list[str] = []

    @property
    def model(self) -> Any:
        return self.sd_models.model_data.sd_model

    # Loading ------------------------------------------------------------------------------------------------------

    def _refresh_model_loading_parameters(self) -> None:
        storage, _ = self.main_entry.forge_unet_storage_dtype_options[self.shared.opts.forge_unet_storage_dtype]
        self.sd_models.model_data.forge_loading_parameters = {
            "checkpoint_info": self.sd_models.select_checkpoint(),
            "additional_modules": self.shared.opts.forge_additional_modules,
            "unet_storage_dtype": storage,
        }  # fmt: skip

    def _forge_model_reload(self) -> tuple[Any, bool]:
        data = self.sd_models.model_data
        wanted = str(data.forge_loading_parameters)
        if data.forge_hash == wanted:
            return data.sd_model, False
        data.sd_model = None
        self.memory_management.current_loaded_models.clear()
        info = data.forge_loading_parameters["checkpoint_info"]
        self.loads.append(info.name_for_extra)
        data.sd_model = self.shared.sd_model = self._build(info, data.forge_loading_parameters["unet_storage_dtype"])
        if data.forge_loading_parameters["additional_modules"]:  # another VAE
            with torch.inference_mode():
                for weight in data.sd_model.forge_objects_original.vae.first_stage_model.parameters():
                    weight.add_(1)
        data.forge_hash = wanted
        self.shared.opts.data["sd_checkpoint_hash"] = info.title
        return data.sd_model, True

    @torch.inference_mode()
    def _build(self, info: Info, storage: str | None) -> Any:
        tensors = {name: tensor.clone() for name, tensor in load_file(info.filename).items()}
        parts: dict[str, dict[str, torch.Tensor]] = {"unet": {}, "vae": {}, "clip": {}}
        for name, tensor in tensors.items():
            if name.startswith("model.diffusion_model."):
                parts["unet"][name.removeprefix("model.")] = tensor
            elif name.startswith("first_stage_model."):
                parts["vae"][name.removeprefix("first_stage_model.")] = tensor
        parts["clip"] = text_encoders(tensors)
        unet, vae, clip = (module_tree(part) for part in parts.values())
        for encoder in clip.children():
            embeddings = encoder.transformer.text_model.embeddings
            embeddings.token_embedding = Wrapper(embeddings.token_embedding)
            embeddings.token_embedding.weight = embeddings.token_embedding.wrapped.weight
            width = embeddings.position_embedding.weight.shape[1]
            encoder.transformer.config = SimpleNamespace(num_attention_heads=max(1, width // 64))
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        alphas = torch.from_numpy(np.cumprod(1 - betas)).float()
        unet.predictor = SimpleNamespace(prediction_type="epsilon", alphas_cumprod=alphas)
        unet.storage_dtype = storage or torch.float32
        sdxl = "clip_g" in dict(clip.named_children())
        vae.config = SimpleNamespace(scaling_factor=0.13025 if sdxl else 0.18215)
        objects = SimpleNamespace(
            unet=Patcher(unet),
            vae=SimpleNamespace(patcher=Patcher(vae), first_stage_model=vae),
            clip=SimpleNamespace(patcher=Patcher(clip), cond_stage_model=clip, tokenizer=SimpleNamespace()),
        )
        return Engine(
            forge_objects_original=objects, forge_objects_after_applying_lora=objects, sd_checkpoint_info=info,
            current_lora_hash=str([]), is_inpaint=False, is_sdxl=sdxl, model_config=SimpleNamespace(ztsnr=False),
        )  # fmt: skip

    def _load_models_gpu(
        self, models: list[Patcher], memory_required: int = 0, hard_memory_preservation: int = 0
    ) -> None:
        loaded = self.memory_management.current_loaded_models
        for patcher in models:
            if any(entry.model is patcher for entry in loaded):
                continue
            loaded[:] = [entry for entry in loaded if entry.model.model is not patcher.model]
            patcher.lora_loader.refresh(patcher.lora_patches)
            for name, parameter in list(patcher.model.named_parameters())[::2]:  # no room for the others
                if self.device != CPU:
                    put(patcher.model, name, nn.Parameter(parameter.to(self.device), requires_grad=False))
            loaded.insert(0, SimpleNamespace(model=patcher))

    def _free_memory(self, memory_required: float, device: torch.device, keep_loaded: list[Any]) -> None:
        loaded = self.memory_management.current_loaded_models
        for entry in [entry for entry in loaded if entry not in keep_loaded]:
            loaded.remove(entry)
            for name, parameter in list(entry.model.model.named_parameters()):
                put(entry.model.model, name, nn.Parameter(parameter.to(CPU), requires_grad=False))

    # What a user does -----------------------------------------------------------------------------------------------

    def select(self, stem: str) -> None:
        info = next(info for info in self.sd_models.checkpoints_list.values() if info.name_for_extra == stem)
        self.shared.opts.data["sd_model_checkpoint"] = info.title
        self._refresh_model_loading_parameters()

    @torch.inference_mode()
    def unload(self) -> None:
        """Forge moves everything away and back: other parameters with the same values."""
        self.memory_management.current_loaded_models.clear()
        for part in self.parts():
            for name, parameter in list(part.named_parameters()):
                put(part, name, nn.Parameter(parameter.clone(), requires_grad=False))

    def parts(self) -> list[nn.Module]:
        objects = self.model.forge_objects_original
        return [objects.unet.model, objects.vae.first_stage_model, objects.clip.cond_stage_model]

    def generate(self, prompt: str) -> Image.Image:
        with self.call_queue.queue_lock:
            if not self.sd_models.model_data.forge_loading_parameters:
                self._refresh_model_loading_parameters()  # the page does it when it is opened
            return self._process_images_inner(Processing(prompt=prompt, width=64, height=64, seed=1)).images[0]

    @torch.inference_mode()
    def _process_images_inner(self, p: Processing) -> Any:
        """A picture that every weight has a part in. Leaves the traces that the real one leaves."""
        self.sd_models.forge_model_reload()
        self.networks.load_networks([part.split(":")[1] for part in p.prompt.split("<lora")[1:]])
        objects = self.model.forge_objects_after_applying_lora
        self._load_models_gpu([objects.clip.patcher])
        for encoder in objects.clip.cond_stage_model.children():
            encoder.transformer.text_model.embeddings.float()
        self._load_models_gpu([objects.unet, objects.vae.patcher])
        torch.manual_seed(p.seed)
        random.seed(p.seed)
        self.shared.state.job, self.shared.state.current_latent = "drawing", torch.zeros(1)
        if not self.shared.cmd_opts.no_prompt_history:
            (self.folder / "params.txt").write_text(p.prompt)
        sums = [float(parameter.double().sum()) for part in self.parts() for parameter in part.parameters()]
        shade = np.frombuffer(np.float64(sum(sums)).tobytes(), np.uint8)
        p.cached_c[:] = [p.prompt, shade, {}]
        return SimpleNamespace(images=[Image.fromarray(np.resize(shade, (p.height, p.width, 3)))])


def text_encoders(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Forge's names: transformers' for all of them, whatever the file has."""
    found = {}
    for name, tensor in tensors.items():
        for prefix in ("cond_stage_model.", "conditioner.embedders.0."):
            if name.startswith(prefix + "transformer."):
                found["clip_l." + name.removeprefix(prefix)] = tensor
        if name.startswith("conditioner.embedders.1.model."):
            for step, part in open_clip(name.removeprefix("conditioner.embedders.1.model."), tensor):
                found[f"clip_g.transformer.{step}"] = part
    for encoder in {name.partition(".")[0] for name in found}:
        width = found[f"{encoder}.transformer.text_model.final_layer_norm.weight"].shape[0]
        found.setdefault(f"{encoder}.transformer.text_projection.weight", torch.eye(width))
        found[f"{encoder}.logit_scale"] = torch.tensor(4.6055)
    return found


def open_clip(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """One tensor of open_clip -> those that transformers has in its place."""
    if name == "text_projection":
        return [("text_projection.weight", tensor.T.contiguous())]
    whole = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias",
    }  # fmt: skip
    if name in whole:
        return [("text_model." + whole[name], tensor)]
    if not name.startswith("transformer.resblocks."):
        return []
    _, _, layer, *steps = name.split(".")
    body, rest = f"text_model.encoder.layers.{layer}.", ".".join(steps)
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        return [(f"{body}self_attn.{part}_proj.{kind}", rows) for part, rows in zip("qkv", tensor.chunk(3))]
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    stem, _, kind = rest.rpartition(".")
    return [(f"{body}{inner.get(stem, 'self_attn.out_proj')}.{kind}", tensor)]
