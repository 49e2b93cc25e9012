"""Reading the Stable Diffusion that A1111 has loaded: its tensors by single-file names, and whether it can be lent."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.errors import UserError
from lora_trainer.host.lending import stored_buffers
from lora_trainer.models.detect import detect
from lora_trainer.models.families.flow.tokenizer import FlowTokenizer
from lora_trainer.models.families.unet.names import UNET, VAE
from lora_trainer.models.header import read_header
from lora_trainer.models.hints import Hints, file_hints, merged
from lora_trainer.models.schedule import scaled_linear_alphas_cumprod
from lora_trainer.models.tokenizer import Tokenizer, load_tokenizer

_FIELD = "base_model"


class HostModel:
    """One ``sd_model`` object of the WebUI. Holds its modules, never its tensors: those may be replaced any time."""

    def __init__(self, sd_model: Any, reads_t5: bool):
        """reads_t5: whether a T5 that is there reads; A1111 has zeros for it while its setting is off."""
        self.sd_model, self._reads_t5 = sd_model, reads_t5
        self._slots = list(_slots(sd_model, reads_t5))

    @property
    def roots(self) -> dict[str, nn.Module]:
        """The parts by the names that a lent model gives them."""
        model = self.sd_model
        return {"unet": model.model, "vae": model.first_stage_model, "text_encoders": _text_root(model)}

    def tensors(self, parts: frozenset[str]) -> dict[str, Tensor]:
        """Single-file name -> the very tensor that the WebUI computes with, of these parts of the model.

        Where weights are stored in fp8, the WebUI's own fp16 copy of them.
        """
        found = {}
        for part, name, module, attribute in self._slots:
            if part in parts:
                value = vars(module).get(f"fp16_{attribute}")  # getattr is slow where a module has none
                stored = module._parameters if attribute in module._parameters else module._buffers
                found[name] = stored[attribute] if value is None else value
        return found

    def devices(self, part: str) -> set[torch.device]:
        """Where the part lies: one device, but for encoders that the WebUI moves one by one (``medvram_modules``)."""
        moved = [self.roots[part]]
        if part == "text_encoders" and is_flow(self.sd_model):
            encoders = self.sd_model.cond_stage_model
            moved = [one for one in (encoders.clip_g, encoders.clip_l, encoders.t5xxl) if one is not None]
        return {next(module.parameters()).device for module in moved}

    def architecture(self, tensors: Mapping[str, Tensor], hints: Hints) -> Any:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return detect(shapes, source=self.sd_model.sd_checkpoint_info.name_for_extra, hints=hints)

    def hints(self) -> Hints:
        """What shapes do not tell, from the host's modules; what predicts v from the file as well, because A1111
        does not know the marker that newer SDXL files carry. Of a flow model shapes tell everything."""
        if is_flow(self.sd_model):
            return Hints()
        unet = self.sd_model.model.diffusion_model
        heads, head_dim = getattr(unet, "num_heads", -1), getattr(unet, "num_head_channels", -1)
        path = Path(self.sd_model.sd_checkpoint_info.filename)
        header = read_header(path) if path.suffix.lower() == ".safetensors" and path.is_file() else None
        from_file = file_hints(path, header.shapes, header.metadata) if header else Hints()
        from_host = Hints(
            num_heads=heads if heads and heads > 0 else None,
            head_dim=head_dim if head_dim and head_dim > 0 else None,
            text_heads=tuple(_text_heads(encoder) for _, encoder in _text_encoders(self.sd_model, self._reads_t5)),
            prediction_type="v_prediction" if getattr(self.sd_model, "parameterization", "eps") == "v" else None,
        )
        return merged(from_file, from_host)

    def tokenizer(self) -> Tokenizer | FlowTokenizer:
        """CLIP's, from the host when it has a transformers one. A copy: ours sets another maximal length."""
        if is_flow(self.sd_model):
            encoders = self.sd_model.cond_stage_model
            reads = self._reads_t5 and encoders.t5xxl is not None
            t5 = encoders.model_t5.tokenizer.backend_tokenizer.to_str() if reads else None
            # T5's prompts are as long as CLIP's there.
            return FlowTokenizer(Tokenizer(partial(copy.copy, encoders.model_lg.tokenizer)), t5, length=None)
        for _, encoder in _text_encoders(self.sd_model, self._reads_t5):
            tokenizer = getattr(encoder, "tokenizer", None)
            if hasattr(tokenizer, "bos_token_id"):
                return Tokenizer(partial(copy.copy, tokenizer))
        return load_tokenizer()

    def alphas_cumprod(self) -> Tensor | None:
        """The usual one, unless the model has another: A1111 rounds its own to fp16 when fp8 is switched off again.
        None for a flow model."""
        if is_flow(self.sd_model):
            return None
        theirs = self.sd_model.alphas_cumprod_original  # alphas_cumprod is rewritten by every generation
        usual = scaled_linear_alphas_cumprod()
        return usual if torch.allclose(theirs.float().cpu(), usual, rtol=0, atol=1e-3) else theirs


def refuse_lowvram(webui: Any) -> None:
    if webui.shared.cmd_opts.lowvram:
        raise UserError(
            "With --lowvram the model never lies in video memory as a whole, so it cannot be trained.",
            remedy="Start the WebUI with --medvram instead.",
        )


def refuse_unsuitable(webui: Any, sd_model: Any) -> None:
    """Raises UserError when this model, or the way in which the WebUI runs it, does not let it be trained."""
    name = sd_model.sd_checkpoint_info.name_for_extra
    refuse_lowvram(webui)
    if webui.sd_unet.current_unet is not None and webui.sd_unet.get_unet_option() is not None:
        raise UserError(
            f"The WebUI draws with the accelerated UNet {webui.sd_unet.current_unet.option.label!r}, which cannot be "
            "trained.",
            field=_FIELD,
            remedy='Set "SD Unet" to None in the settings.',
        )
    if getattr(sd_model.model, "conditioning_key", "crossattn") in ("hybrid", "concat"):
        raise UserError(
            f"{name} is an inpainting, depth or edit model, which cannot be trained here.",
            field=_FIELD,
            remedy="Choose the model that it was made from.",
        )
    if webui.devices.fp8 and not any(hasattr(module, "fp16_weight") for module in sd_model.model.modules()):
        raise UserError(
            "The WebUI keeps the model's weights in fp8, which is too coarse to train on.",
            field=_FIELD,
            remedy='Set "FP8 weight" to Disable in the settings, or switch on "Cache FP16 weight for LoRA".',
        )


def refuse_without_t5(sd_model: Any) -> None:
    """Raises UserError where the WebUI has loaded a Stable Diffusion 3 without T5."""
    if sd_model.cond_stage_model.t5xxl is None:
        raise UserError(
            f"The WebUI has loaded {sd_model.sd_checkpoint_info.name_for_extra} without T5, which the training began "
            "with.",
            remedy='Set "Enable T5" in the settings, and reload the checkpoint.',
        )


def _slots(sd_model: Any, reads_t5: bool) -> Iterator[tuple[str, str, nn.Module, str]]:
    """(part, single-file name, module, attribute) of every parameter that a lent model is made of."""
    parts = [("unet", UNET, sd_model.model.diffusion_model), ("vae", VAE, sd_model.first_stage_model)]
    parts += [("text_encoders", prefix, encoder) for prefix, encoder in _text_encoders(sd_model, reads_t5)]
    for part, prefix, root in parts:
        for path, module in root.named_modules():
            for attribute, weight in (*module._parameters.items(), *(stored_buffers(module) if part == "unet" else ())):
                if weight is not None:
                    # The WebUI wraps token embeddings, to put textual inversions in.
                    names = [step for step in path.split(".") if step and step != "wrapped"]
                    yield part, prefix + ".".join([*names, attribute]), module, attribute


def is_flow(sd_model: Any) -> bool:
    """Whether it is a Stable Diffusion 3, by what A1111 says of it."""
    return bool(getattr(sd_model, "is_sd3", False))


def _text_root(sd_model: Any) -> nn.Module:
    return sd_model.conditioner if hasattr(sd_model, "conditioner") else sd_model.cond_stage_model


def _text_encoders(sd_model: Any, reads_t5: bool) -> list[tuple[str, nn.Module]]:
    """Name prefix and module of each text encoder, out of the WebUI's wrapping."""
    if is_flow(sd_model):
        encoders = sd_model.cond_stage_model
        t5 = encoders.t5xxl if reads_t5 else None
        named = (("clip_l", encoders.clip_l), ("clip_g", encoders.clip_g), ("t5xxl", t5))
        return [(f"text_encoders.{name}.transformer.", it.transformer) for name, it in named if it is not None]
    if not hasattr(sd_model, "conditioner"):
        return [("cond_stage_model.", _unwrapped(sd_model.cond_stage_model))]
    encoders = [(f"conditioner.embedders.{i}.", _unwrapped(e)) for i, e in enumerate(sd_model.conditioner.embedders)]
    # The others turn picture sizes into vectors.
    return [(prefix, it) for prefix, it in encoders if hasattr(it, "transformer") or hasattr(it, "model")]


def _unwrapped(module: Any) -> Any:
    return getattr(module, "wrapped", module)


def _text_heads(encoder: Any) -> int:
    if hasattr(encoder, "model"):  # open_clip
        return encoder.model.transformer.resblocks[0].attn.num_heads
    return encoder.transformer.config.num_attention_heads
