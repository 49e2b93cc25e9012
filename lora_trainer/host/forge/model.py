"""Reading the Stable Diffusion that Forge has loaded: its tensors by single-file names, and whether it can be lent."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.errors import UserError
from lora_trainer.host.lending import stored_buffers
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.detect import detect
from lora_trainer.models.families.flow.tokenizer import FlowTokenizer
from lora_trainer.models.families.unet.names import UNET, VAE
from lora_trainer.models.header import read_header
from lora_trainer.models.hints import Hints, file_hints, merged
from lora_trainer.models.tokenizer import Tokenizer, load_tokenizer

_FIELD = "base_model"
LOW_BITS = 'Set "Diffusion in Low Bits" (shown with "UI: all", at the top) to Automatic.'
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_QUANTIZED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8, "gguf")
"""What models of a ``Family.quantized`` may be kept in as well; bytes are GGUF's blocks."""
_PREFIXES = {
    ("clip_l",): ("cond_stage_model.",),
    ("clip_h",): ("cond_stage_model.",),
    ("clip_g", "clip_l"): ("conditioner.embedders.1.", "conditioner.embedders.0."),
    ("t5xxl",): ("text_encoders.t5xxl.",),
    ("clip_l", "t5xxl"): ("text_encoders.clip_l.", "text_encoders.t5xxl."),
    ("clip_g", "clip_l", "t5xxl"): ("text_encoders.clip_g.", "text_encoders.clip_l.", "text_encoders.t5xxl."),
}
"""Forge's names of the text encoders -> what their tensors' names start with in a single file."""
_T5, _FLOW = "t5xxl", "const"


class ForgeModel:
    """One ``sd_model`` object of Forge. Holds its modules, never its tensors: those are replaced when LoRAs are merged.

    ``forge_objects_original`` is what LoRAs are never patched into; all its users share the modules.
    """

    def __init__(self, sd_model: Any, reads_t5: bool, clip_skip: int):
        """reads_t5: whether a T5 that is there reads. clip_skip: Forge's setting, 1 for the last of CLIP's layers."""
        self.sd_model, self._clip_skip = sd_model, clip_skip
        self._slots = list(_slots(sd_model, reads_t5))

    def tensors(self, parts: frozenset[str]) -> dict[str, Tensor]:
        """Single-file name -> the very tensor that Forge computes with, of these parts of the model."""
        return {
            name: module._parameters[key] if key in module._parameters else module._buffers[key]
            for part, name, module, key in self._slots
            if part in parts
        }

    def architecture(self, tensors: Mapping[str, Tensor], hints: Hints) -> Any:
        # A GGUF parameter's are numpy's numbers, which torch takes for no sizes.
        shapes = {name: tuple(map(int, tensor.shape)) for name, tensor in tensors.items()}
        return detect(shapes, source=self.sd_model.sd_checkpoint_info.name_for_extra, hints=hints)

    def hints(self) -> Hints:
        """What shapes do not tell: what the file says, and over it what Forge made of it."""
        if is_flow(self.sd_model):
            return Hints()  # its shapes tell everything
        path = Path(self.sd_model.sd_checkpoint_info.filename)
        header = read_header(path) if path.suffix.lower() == ".safetensors" and path.is_file() else None
        from_file = file_hints(path, header.shapes, header.metadata) if header else Hints()
        prediction = self.sd_model.forge_objects_original.unet.model.predictor.prediction_type
        from_host = Hints(
            text_heads=tuple(encoder.transformer.config.num_attention_heads for _, encoder in _encoders(self.sd_model)),
            prediction_type=prediction if prediction in ("epsilon", "v_prediction") else None,
            zero_terminal_snr=bool(getattr(self.sd_model.model_config, "ztsnr", False)) or None,
            latent_scale=self.sd_model.forge_objects_original.vae.first_stage_model.config.scaling_factor,
        )
        return merged(from_file, from_host)

    def tokenizer(self) -> Tokenizer | FlowTokenizer:
        """Copies of Forge's: ours set another maximal length."""
        tokenizers = vars(self.sd_model.forge_objects_original.clip.tokenizer)
        if is_flow(self.sd_model):
            file = Path(tokenizers[_T5].name_or_path) / "tokenizer.json"
            # Where it reads CLIP's states at all, "Clip skip" says which, and an empty negative prompt is nothing.
            clip = Tokenizer(partial(copy.copy, tokenizers.get("clip_l")))
            return FlowTokenizer(clip, file, hidden=-self._clip_skip, zero_empty=True)
        for tokenizer in (tokenizers.get("clip_l"), *tokenizers.values()):
            if hasattr(tokenizer, "bos_token_id"):
                return Tokenizer(partial(copy.copy, tokenizer))
        return load_tokenizer()

    def alphas_cumprod(self) -> Tensor | None:
        """None for a flow model, which has none."""
        predictor = self.sd_model.forge_objects_original.unet.model.predictor
        return None if is_flow(self.sd_model) else predictor.alphas_cumprod  # only sigmas are rewritten


def is_flow(sd_model: Any) -> bool:
    """Whether it is a flow model with a T5, by what Forge says of it."""
    objects = sd_model.forge_objects_original
    has_t5 = _T5 in dict(objects.clip.cond_stage_model.named_children())
    return has_t5 and getattr(objects.unet.model.predictor, "prediction_type", None) == _FLOW


def patchers(sd_model: Any) -> dict[str, Any]:
    """What Forge's memory management loads and unloads, by the names of the parts."""
    objects = sd_model.forge_objects_original
    return {"unet": objects.unet, "vae": objects.vae.patcher, "text_encoders": objects.clip.patcher}


def refuse_unsuitable(sd_model: Any, remedy: Callable[[str], str]) -> None:
    """Raises UserError when this model, or the way in which Forge keeps it, does not let it be trained.

    remedy: what to do about coarse weights of "unet" or "clip".
    """
    name, objects = sd_model.sd_checkpoint_info.name_for_extra, sd_model.forge_objects_original
    encoders = tuple(sorted(encoder for encoder, _ in objects.clip.cond_stage_model.named_children()))
    if encoders == ("clip_g",):
        raise UserError(f"{name} is the SDXL refiner.", field=_FIELD, remedy="Choose the SDXL base model.")
    prediction = getattr(objects.unet.model.predictor, "prediction_type", None)
    flow = is_flow(sd_model)
    if encoders not in _PREFIXES or (prediction not in ("epsilon", "v_prediction") and not flow):
        path = Path(sd_model.sd_checkpoint_info.filename)
        if path.suffix.lower() in (".safetensors", ".gguf"):
            FileLender(path).architecture()  # which says what it is
        message = f"{name} is no Stable Diffusion 1, 2, XL or 3, no FLUX.1 and no Chroma."
        raise UserError(message, field=_FIELD, remedy="Choose one of these models.")
    if sd_model.is_inpaint:
        raise UserError(
            f"{name} is an inpainting, depth or edit model, which cannot be trained here.",
            field=_FIELD,
            remedy="Choose the model that it was made from.",
        )
    refuse_storage(objects.unet.model.storage_dtype, "UNet", remedy("unet"), flow)
    for weight in objects.clip.cond_stage_model.parameters():
        packed = hasattr(weight, "quant_state")  # bitsandbytes' 4 bits, whose bytes are uint8 like GGUF's
        refuse_storage("nf4 or fp4" if packed else weight.dtype, "text encoder", remedy("clip"), flow)


def refuse_storage(dtype: Any, what: str, remedy: str, quantized: bool = False) -> None:
    """Raises UserError when weights are kept in a format too coarse to train on.

    dtype: a torch.dtype, or Forge's name of a format that torch does not have ("nf4", "fp4", "gguf").
    quantized: see ``Family.quantized``.
    """
    if dtype in FLOATS or (quantized and dtype in _QUANTIZED):
        return
    raise UserError(
        f"Forge keeps the {what} in {str(dtype).removeprefix('torch.')}, which is too coarse to train on.",
        field=_FIELD,
        remedy=remedy,
    )


def _slots(sd_model: Any, reads_t5: bool) -> Iterator[tuple[str, str, nn.Module, str]]:
    """(part, single-file name, module, attribute) of every parameter that a lent model is made of."""
    objects = sd_model.forge_objects_original
    parts = [("unet", UNET, objects.unet.model.diffusion_model), ("vae", VAE, objects.vae.first_stage_model)]
    encoders = [one for one in _encoders(sd_model) if reads_t5 or _T5 not in one[0]]
    parts += [("text_encoders", f"{prefix}transformer.", it.transformer) for prefix, it in encoders]
    for part, prefix, root in parts:
        for path, module in root.named_modules():
            # Forge wraps token embeddings, to put textual inversions in; the wrapper names the same weight once more.
            is_projected = "embedders.1" in prefix or "clip_g" in prefix
            if "wrapped" in module._modules or (path == "text_projection" and not is_projected):
                continue
            steps = [step for step in path.split(".") if step and step != "wrapped"]
            for attribute, weight in (*module._parameters.items(), *(stored_buffers(module) if part == "unet" else ())):
                if weight is not None:
                    yield part, prefix + ".".join([*steps, attribute]), module, attribute


def _encoders(sd_model: Any) -> list[tuple[str, nn.Module]]:
    """Name prefix and module of each text encoder, in the order of the single file."""
    encoders = dict(sd_model.forge_objects_original.clip.cond_stage_model.named_children())
    names = tuple(sorted(encoders))
    return sorted((prefix, encoders[name]) for name, prefix in zip(names, _PREFIXES[names]))
