"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.errors import UserError
from lora_trainer.models.base import ModelInfo
from lora_trainer.models.casting import cast_layers
from lora_trainer.models.families.unet.architecture import Architecture, UNetShape, clip_l, open_clip_text
from lora_trainer.models.families.unet.binding import build_unet, text_body
from lora_trainer.models.families.unet.family import NO_SIGMA, UNetFamily
from lora_trainer.models.families.unet.shapes import ADDED, CLASSES, TextRules, linear_projections
from lora_trainer.models.family import Shapes

_UNET: dict[str, Any] = {
    "channels": (320, 640, 1280, 1280),
    "layers": (2, 2, 2, 2),
    "depths": (1, 1, 1, 0),
    "mid_depth": 1,
}


class SD1(UNetFamily):
    name = "sd1"
    title = "Stable Diffusion 1.x"
    card_version = "SD1"
    lora_versions = ("sd_v1", "sd_1.5")
    text_encoders = (TextRules("cond_stage_model."),)
    heads = 8
    usual = Architecture(
        "sd1",
        UNetShape(**_UNET, heads=(8, 8, 8, 8), context_dim=768, linear_projection=False),
        None,
        (clip_l("cond_stage_model.transformer."),),
    )

    def _resembles(self, shapes: Shapes) -> bool:
        return not {ADDED, CLASSES} & shapes.keys() and linear_projections(shapes) is False

    def hidden_state(self, encoder: nn.Module, output: Any, clip_skip: int) -> Tensor:
        if clip_skip <= 1:
            return output.last_hidden_state
        layers = len(output.hidden_states) - 1
        if clip_skip > layers:
            raise UserError(
                f"{clip_skip} is too much: this text encoder has {layers} layers.",
                field="clip_skip",
                remedy=f"Use 1 to {layers}.",
            )
        return text_body(encoder).final_layer_norm(output.hidden_states[-clip_skip])

    def _versions(self, predicts_v: bool) -> tuple[str, str]:
        return "sd_v1_v" if predicts_v else "sd_v1", "stable-diffusion-v1"


class SD2(UNetFamily):
    """Its text encoder is built without the last layer, so that its end is the last layer but one of the file."""

    name = "sd2"
    title = "Stable Diffusion 2.x"
    card_version = "SD2"
    lora_versions = ("sd_v2",)
    is_v2 = True
    unused: Mapping[str, str] = {"clip_skip": "Stable Diffusion 2 fixes the layer of its text encoder", **NO_SIGMA}
    text_encoders = (TextRules("cond_stage_model.", open_clip=True, skips_last=True),)
    usual = Architecture(
        "sd2",
        UNetShape(**_UNET, heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True),
        None,
        (open_clip_text("cond_stage_model.model.", 1024, 23),),
    )

    def _resembles(self, shapes: Shapes) -> bool:
        return not {ADDED, CLASSES} & shapes.keys() and linear_projections(shapes) is True

    def default_resolution(self, info: ModelInfo) -> int:
        return 768 if info.prediction_type == "v_prediction" else 512

    @torch.no_grad()
    def prediction_type(self, tensors: Mapping[str, Tensor], architecture: Architecture) -> str:
        """Shapes do not tell, so the UNet is run once, on 8x8 latents.

        At the noisiest step, latents of 0.5 are all noise to a model that predicts noise, and it answers with them; one
        that predicts v answers with the negative picture that it sees in them. The test and its threshold are those of
        the WebUI (``is_using_v_parameterization_for_sd2``).
        """
        unet, bindings = build_unet(architecture.unet)
        cast_layers(unet, torch.float32)
        for binding in bindings:
            binding.bind(tensors, None)
        latents = torch.full((1, self.latents.channels, 8, 8), 0.5)
        context = torch.zeros(1, 2, architecture.unet.context_dim)
        predicted = unet.eval()(latents, torch.tensor([999]), encoder_hidden_states=context, return_dict=False)[0]
        return "v_prediction" if (predicted - latents).mean().item() < -1 else "epsilon"

    def _versions(self, predicts_v: bool) -> tuple[str, str]:
        return "sd_v2_v" if predicts_v else "sd_v2", f"stable-diffusion-v2-{'768-v' if predicts_v else '512'}"
