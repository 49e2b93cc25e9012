"""An A1111 of a few hundred lines: only what docs say about the real one, so that its traps can be sprung in a second.

It keeps one loaded model and copies another checkpoint of the same layout in place into the same parameters; its Lora
extension merges into the weights and leaves them merged; its lock has no owner and can be stolen from a slow waiter.
"""

from __future__ import annotations

import collections
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn


class QueueLock:
    """Not re-entrant, without owner and timeout; a woken waiter has to win the inner lock."""

    def __init__(self) -> None:
        self._lock, self._inner = threading.Lock(), threading.Lock()
        self._pending_threads: collections.deque = collections.deque()

    def acquire(self, blocking: bool = True) -> bool:
        with self._inner:
            if self._lock.acquire(False):
                return True
            if not blocking:
                return False
            woken = threading.Event()
            self._pending_threads.append(woken)
        woken.wait()
        return self._lock.acquire()

    def release(self) -> None:
        with self._inner:
            if self._pending_threads:
                self._pending_threads.popleft().set()
            self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *reason: object) -> None:
        self.release()


class Wrapper(nn.Module):
    """The WebUI's wrapping of text encoders and token embeddings."""

    def __init__(self, wrapped: nn.Module):
        super().__init__()
        self.wrapped = wrapped


def module_tree(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Modules whose parameters have these dotted names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for step in path:
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module._modules[step]
        module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    return root


class Info:
    """A CheckpointInfo."""

    def __init__(self, path: Path):
        self.filename, self.name, self.name_for_extra = str(path), path.name, path.stem
        self.title = f"{path.name} [0123456789]"
        self.sha256 = None


class Networks:
    """The Lora extension's module."""

    def __init__(self, webui: FakeA1111):
        self.webui = webui
        self.available_networks: dict[str, Any] = {}
        self.available_network_aliases: dict[str, Any] = {}
        self.networks_in_memory: dict[str, Any] = {}
        self.loaded_networks: list[Any] = []

    def update_available_networks_by_names(self, names: list[str]) -> None:
        for path in Path(self.webui.shared.cmd_opts.lora_dir).rglob("*.safetensors"):
            if path.stem in names:
                entry = SimpleNamespace(name=path.stem, filename=str(path), alias=path.stem)
                self.available_networks[path.stem] = self.available_network_aliases[path.stem] = entry

    def load_network(self, name: str, on_disk: Any) -> Any:
        """Keys are split at the first dot; those without a layer are left out in silence."""
        mapping = self.webui.sd_models.model_data.sd_model.network_layer_mapping
        modules = {}
        for key, tensor in load_file(on_disk.filename).items():
            stem, _, kind = key.partition(".")
            if stem in mapping:
                module = modules.setdefault(stem, SimpleNamespace(network_key=key, w={}))
                module.w[kind] = tensor
        return SimpleNamespace(name=name, modules=modules, bundle_embeddings={})

    def load_networks(self, multipliers: dict[str, float]) -> None:
        """By names. A name that is in memory keeps its old weights."""
        self.loaded_networks.clear()
        for name, multiplier in multipliers.items():
            if name not in self.networks_in_memory:
                self.networks_in_memory[name] = self.load_network(name, self.available_networks[name])
            self.networks_in_memory[name].unet_multiplier = multiplier
            self.loaded_networks.append(self.networks_in_memory[name])

    def network_apply_weights(self, layer: nn.Module) -> None:
        wanted = tuple((net.name, net.unet_multiplier, net.unet_multiplier, None) for net in self.loaded_networks)
        if vars(layer).get("network_current_names", ()) == wanted or "weight" not in layer._parameters:
            return
        if wanted and vars(layer).get("network_weights_backup") is None:
            layer.network_weights_backup = layer.weight.detach().clone()
        self.network_restore_weights_from_backup(layer)
        for net in self.loaded_networks:
            module = net.modules.get(layer.network_layer_name)
            if module is not None:
                up, down = module.w["lora_up.weight"], module.w["lora_down.weight"]
                change = (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape).to(layer.weight)
                layer.weight += net.unet_multiplier * change
        layer.network_current_names = wanted

    def network_restore_weights_from_backup(self, layer: nn.Module) -> None:
        if vars(layer).get("network_weights_backup") is not None:
            layer.weight.copy_(layer.network_weights_backup)


class Processing:
    """StableDiffusionProcessingTxt2Img. Its lists of encoded prompts are shared by all of them."""

    cached_c = [None, None]  # noqa: RUF012 - as the real one
    cached_uc = [None, None]  # noqa: RUF012

    def __init__(self, **values: Any):
        self.cached_c, self.cached_uc = Processing.cached_c, Processing.cached_uc
        self.__dict__.update(values)

    def close(self) -> None:
        pass


class FakeA1111:
    """``import_webui()``'s namespace, and what a user can do."""

    def __init__(self, folder: Path, checkpoints: list[Path], kohya_names: dict[str, str]):
        """kohya_names: name in a LoRA file -> name of the tensor's module in the checkpoint."""
        self.folder, self._kohya_names = folder, kohya_names
        infos = [Info(path) for path in checkpoints]
        lora_dir = folder / "models" / "Lora"
        lora_dir.mkdir(parents=True, exist_ok=True)
        options = {"lora_dir": str(lora_dir), "lowvram": False, "medvram": False, "no_prompt_history": False}
        data = {"sd_model_checkpoint": infos[0].title, "sd_checkpoint_hash": None, "sd_lora": "None",
                "sd_unet": "Automatic", "fp8_storage": "Disable", "cache_fp16_weight": False}  # fmt: skip
        self.shared = SimpleNamespace(
            cmd_opts=SimpleNamespace(**options),
            opts=SimpleNamespace(data=data),
            state=SimpleNamespace(
                interrupted=False, skipped=False, stopping_generation=False, job="", current_latent=None
            ),
        )
        self.paths = SimpleNamespace(data_path=str(folder), models_path=str(folder / "models"))
        self.call_queue = SimpleNamespace(queue_lock=QueueLock())
        self.devices = SimpleNamespace(
            device=torch.device("cpu"), fp8=False, dtype_vae=torch.float32, torch_gc=lambda: None
        )
        self.lowvram = SimpleNamespace(module_in_gpu=None, send_everything_to_cpu=self._send_everything_to_cpu)
        self.sd_unet = SimpleNamespace(
            current_unet=None, get_unet_option=self._get_unet_option, apply_unet=self._apply_unet
        )
        self.sd_vae = SimpleNamespace(
            loaded_vae_file=None, resolve_vae=lambda checkpoint: SimpleNamespace(vae=self.sd_vae.loaded_vae_file)
        )
        self.processing = SimpleNamespace(
            opt_f=8,
            StableDiffusionProcessing=Processing,
            StableDiffusionProcessingTxt2Img=Processing,
            process_images_inner=self._process_images_inner,
        )
        self.networks = Networks(self)
        self.loads: list[str] = []
        host = self

        class SkipWritingToConfig:
            skip = False

            def __enter__(self) -> None:
                SkipWritingToConfig.skip = True

            def __exit__(self, *reason: object) -> None:
                SkipWritingToConfig.skip = False

        def reload_model_weights(sd_model: Any = None, info: Any = None, forced_reload: bool = False) -> Any:
            info = info or host.select_checkpoint()
            current = host.sd_models.model_data.sd_model
            host.devices.fp8 = data["fp8_storage"] == "Enable"
            if current is None or current.sd_checkpoint_info is not info or forced_reload:
                if not SkipWritingToConfig.skip:
                    data["sd_model_checkpoint"] = info.title
                host._load(info)
            return host.sd_models.model_data.sd_model

        self.sd_models = SimpleNamespace(
            model_data=SimpleNamespace(sd_model=None, loaded_sd_models=[]),
            checkpoints_list={info.title: info for info in infos},
            checkpoint_aliases={},
            select_checkpoint=self.select_checkpoint,
            reload_model_weights=reload_model_weights,
            SkipWritingToConfig=SkipWritingToConfig,
            send_model_to_device=lambda model: self._move(model, self.devices.device),
            send_model_to_cpu=lambda model: self._move(model, torch.device("cpu")),
        )
        self._load(infos[0])
        self.shared.sd_model = self.sd_models.model_data.sd_model

    def _get_unet_option(self) -> Any:
        """Of the accelerated UNets, the one that the settings name; there is one at most."""
        there = self.sd_unet.current_unet
        return None if self.shared.opts.data["sd_unet"] == "None" or there is None else there.option

    def _apply_unet(self) -> None:
        if self._get_unet_option() is None:
            self.sd_unet.current_unet = None

    def select_checkpoint(self) -> Info:
        return self.sd_models.checkpoints_list[self.shared.opts.data["sd_model_checkpoint"]]

    @property
    def model(self) -> Any:
        return self.sd_models.model_data.sd_model

    def _load(self, info: Info) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(info.filename).items()}
        self.loads.append(info.name_for_extra)
        current = self.model
        if current is not None and {n: t.shape for n, t in named(current).items()} == {
            n: t.shape for n, t in tensors.items()
        }:
            with torch.no_grad():
                for name, parameter in named(current).items():
                    parameter.data = parameter.data.to(tensors[name].dtype)
                    parameter.copy_(tensors[name])
            for layer in current.modules():
                for kept in ("network_weights_backup", "network_current_names"):
                    vars(layer).pop(kept, None)
            current.sd_checkpoint_info = info
            return
        model = self.sd_models.model_data.sd_model = self.shared.sd_model = self._build(tensors, info)
        self.sd_models.model_data.loaded_sd_models[:] = [model]

    def _build(self, tensors: dict[str, torch.Tensor], info: Info) -> nn.Module:
        model = module_tree(tensors)
        is_xl = hasattr(model, "conditioner")
        encoders = list(model.conditioner.embedders.children()) if is_xl else [model.cond_stage_model]
        for encoder in encoders:
            for module in list(encoder.modules()):
                if "token_embedding" in module._modules:
                    module.token_embedding = Wrapper(module.token_embedding)
            if hasattr(encoder, "transformer"):
                width = next(p.shape[0] for n, p in encoder.named_parameters() if n.endswith("final_layer_norm.weight"))
                encoder.transformer.config = SimpleNamespace(num_attention_heads=max(1, width // 64))
            else:
                blocks = nn.ModuleList(encoder.model.transformer.resblocks.children())
                encoder.model.transformer.resblocks = blocks
                blocks[0].attn.num_heads = max(1, blocks[0].attn.out_proj.weight.shape[0] // 64)
        if is_xl:
            model.conditioner.embedders = nn.ModuleList(Wrapper(encoder) for encoder in encoders)
        else:
            model.cond_stage_model = Wrapper(model.cond_stage_model)
        modules = {name.replace(".wrapped", ""): module for name, module in model.named_modules()}
        model.network_layer_mapping = {}
        for kohya, name in self._kohya_names.items():
            if name in modules:
                modules[name].network_layer_name = kohya
                model.network_layer_mapping[kohya] = modules[name]
        model.sd_checkpoint_info, model.lowvram, model.parameterization = info, False, "eps"
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        model.alphas_cumprod_original = torch.from_numpy(np.cumprod(1 - betas)).float()
        model.alphas_cumprod = model.alphas_cumprod_original
        return model

    # What a user does -----------------------------------------------------------------------------------------------

    def select(self, stem: str) -> None:
        """The setting; its callback waits for the lock."""
        info = next(info for info in self.sd_models.checkpoints_list.values() if info.name_for_extra == stem)
        self.shared.opts.data["sd_model_checkpoint"] = info.title
        with self.call_queue.queue_lock:
            self.sd_models.reload_model_weights()

    def _move(self, model: nn.Module, device: torch.device) -> None:
        model.to(device)
        self.unload()  # any move gives the tensors other addresses

    def unload(self) -> None:
        for parameter in self.model.parameters():
            parameter.data = parameter.data.clone()

    def generate(self, prompt: str) -> Image.Image:
        with self.call_queue.queue_lock:
            return self._process_images_inner(Processing(prompt=prompt, width=64, height=64, seed=1)).images[0]

    def _process_images_inner(self, p: Processing) -> Any:
        """A picture that every weight has a part in. Leaves the traces that the real one leaves."""
        self.sd_models.reload_model_weights()
        tags = [part.partition(">")[0].split(":") for part in p.prompt.split("<lora:")[1:]]
        multipliers = {name: float(multiplier) for name, multiplier in tags}
        added = self.shared.opts.data["sd_lora"]
        self.networks.load_networks(multipliers if added in (*multipliers, "None") else multipliers | {added: 1.0})
        with torch.no_grad():
            for layer in self.model.network_layer_mapping.values():
                self.networks.network_apply_weights(layer)
        torch.manual_seed(p.seed)
        random.seed(p.seed)
        self.shared.state.sampling_step, self.shared.state.current_latent = p.seed, torch.zeros(1)
        self.model.alphas_cumprod = self.model.alphas_cumprod_original.half()
        if not self.shared.cmd_opts.no_prompt_history:
            (self.folder / "params.txt").write_text(p.prompt)
        sums = [float(parameter.double().sum()) for parameter in self.model.parameters()]
        shade = np.frombuffer(np.float64(sum(sums)).tobytes(), np.uint8)
        p.cached_c[:] = [p.prompt, shade]
        return SimpleNamespace(images=[Image.fromarray(np.resize(shade, (p.height, p.width, 3)))])

    def _send_everything_to_cpu(self) -> None:
        if self.lowvram.module_in_gpu is not None:
            self.lowvram.module_in_gpu.to("cpu")
        self.lowvram.module_in_gpu = None


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names of the checkpoint file."""
    return {name.replace(".wrapped", ""): parameter for name, parameter in model.named_parameters()}
