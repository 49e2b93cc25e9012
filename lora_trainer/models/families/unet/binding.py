"""Modules built on the meta device, and the lender's tensors bound to their parameters without a copy.

diffusers and transformers are slow to import: what builds no model does without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_trainer.errors import UserError
from lora_trainer.models.families.unet.architecture import TextShape, UNetShape, VAEShape
from lora_trainer.models.families.unet.names import UNET, VAE, Table, open_clip_table, rename, unet_table, vae_table
from lora_trainer.storage import Packing, pack, packing_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Binding:
    """One parameter and where it comes from: ``view(tensors[source])``, which shares the source's memory."""

    owner: nn.Module
    name: str
    shape: torch.Size
    source: str
    view: View | None = None

    def bind(self, tensors: Mapping[str, Tensor], device: torch.device | None) -> None:
        """Alias the tensor; move it first when it lies on another device."""
        try:
            tensor = tensors[self.source]
        except KeyError as error:
            raise UserError(f"The model lacks the tensor {self.source}.", remedy="The file may be damaged.") from error
        packing = packing_of(tensor)
        if device is not None:
            tensor = tensor.to(device)
        value = tensor.detach()
        if packing is not None:
            self._bind_packed(value, packing)
            return
        if self.view is not None:
            value = self.view(value)
        if value.dim() != len(self.shape) and value.numel() == self.shape.numel():
            value = value.view(self.shape)  # a 1x1 convolution where the module has a Linear, or the reverse
        if value.shape != self.shape:
            raise UserError(
                f"The tensor {self.source} has the shape {tuple(value.shape)} instead of {tuple(self.shape)}.",
                remedy="The model may be pruned or distilled; choose another.",
            )
        self.owner._parameters[self.name] = nn.Parameter(value, requires_grad=False)

    def _bind_packed(self, value: Tensor, packing: Packing) -> None:
        """A weight whose numbers are not the tensor's: its layer asks ``dense_weight`` for them."""
        shape = packing.shape_of(value)
        if self.view is not None or shape != tuple(self.shape):
            raise UserError(
                f"The tensor {self.source} has the shape {shape} instead of {tuple(self.shape)}.",
                remedy="The model may be pruned or distilled; choose another.",
            )
        parameter = nn.Parameter(value, requires_grad=False)
        self.owner._parameters[self.name] = pack(parameter, packing.to(value.device))

    def unbind(self) -> None:
        """Let go of the tensor."""
        self.owner._parameters[self.name] = nn.Parameter(torch.empty(self.shape, device="meta"), requires_grad=False)


def build_unet(shape: UNetShape) -> tuple[UNet2DConditionModel, list[Binding]]:
    """The UNet on meta, and what binds it."""
    from diffusers import UNet2DConditionModel

    levels = range(len(shape.channels))
    depths = [depth or shape.mid_depth for depth in shape.depths]  # the last one also counts for the middle block
    added = shape.added_channels
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            in_channels=4,
            out_channels=4,
            block_out_channels=shape.channels,
            layers_per_block=list(shape.layers),
            down_block_types=tuple("CrossAttnDownBlock2D" if shape.depths[i] else "DownBlock2D" for i in levels),
            up_block_types=tuple("CrossAttnUpBlock2D" if shape.depths[i] else "UpBlock2D" for i in reversed(levels)),
            transformer_layers_per_block=depths,
            attention_head_dim=shape.heads,  # diffusers' name for the number of heads
            cross_attention_dim=shape.context_dim,
            use_linear_projection=shape.linear_projection,
            addition_embed_type=None if added is None else "text_time",
            addition_time_embed_dim=None if added is None else 256,
            projection_class_embeddings_input_dim=added,
        )
    table = unet_table(shape.layers, [bool(depth) for depth in shape.depths])
    return unet, _bindings(unet, table, UNET)


def build_vae(shape: VAEShape) -> tuple[AutoencoderKL, list[Binding]]:
    """The VAE on meta, and what binds it."""
    from diffusers import AutoencoderKL

    levels = len(shape.channels)
    with torch.device("meta"):
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=shape.latent_channels,
            block_out_channels=shape.channels,
            layers_per_block=shape.layers,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            scaling_factor=shape.scaling_factor,
            **({} if shape.quant else {"use_quant_conv": False, "use_post_quant_conv": False}),
        )
    return vae, _bindings(vae, vae_table(levels, shape.layers), VAE)


def build_text_encoder(shape: TextShape) -> tuple[nn.Module, list[Binding]]:
    """A CLIPTextModel (with projection where the shape has one) on meta, and what binds it."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.positions,
        hidden_act=shape.activation,
        projection_dim=shape.projection or shape.width,
        bos_token_id=shape.vocabulary - 2,
        eos_token_id=shape.vocabulary - 1,
    )
    with torch.device("meta"):
        model = (CLIPTextModelWithProjection if shape.projection else CLIPTextModel)(config)
    # Buffers, which no checkpoint needs to hold.
    for module in model.modules():
        if "position_ids" in module._buffers:
            module._buffers["position_ids"] = torch.arange(shape.positions).unsqueeze(0)
    if shape.layout == "transformers":
        return model, _bindings(model, {}, shape.prefix, text=True)
    return model, _open_clip_bindings(model, shape)


def text_body(model: nn.Module) -> nn.Module:
    """The module with embeddings, layers and final LayerNorm; transformers 5.6 removed the ``text_model`` level."""
    return getattr(model, "text_model", model)


def _bindings(model: nn.Module, table: Table, prefix: str, *, text: bool = False) -> list[Binding]:
    bindings = []
    for owner, name, path, shape in parameters_of(model):
        source: str | None
        if text:
            source = path if path.startswith("text_projection.") else "text_model." + path.removeprefix("text_model.")
        else:
            source = rename(path, table)
            if source is None:
                raise RuntimeError(f"the parameter {path} has no name in the table")
        bindings.append(Binding(owner, name, shape, prefix + source))
    return bindings


def _open_clip_bindings(model: nn.Module, shape: TextShape) -> list[Binding]:
    table, width, bindings = open_clip_table(shape.layers), shape.width, []
    for owner, name, path, size in parameters_of(model):
        path = path.removeprefix("text_model.")
        view: View | None = None
        if path == "text_projection.weight":
            source, view = "text_projection", torch.t
        elif (part := path.split(".")[-2]) in ("q_proj", "k_proj", "v_proj"):
            source = f"transformer.resblocks.{path.split('.')[2]}.attn.in_proj_{name}"
            view = _Rows("qkv".index(part[0]) * width, width)
        else:
            renamed = rename(path, table)
            if renamed is None:
                raise RuntimeError(f"the parameter {path} has no name in the table")
            source = renamed
        bindings.append(Binding(owner, name, size, shape.prefix + source, view))
    return bindings


@dataclass(frozen=True)
class _Rows:
    """One of the three matrices in open_clip's fused q, k, v."""

    start: int
    length: int

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(0, self.start, self.length)


def parameters_of(model: nn.Module) -> list[tuple[nn.Module, str, str, torch.Size]]:
    return [
        (module, name, f"{path}.{name}" if path else name, parameter.shape)
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
