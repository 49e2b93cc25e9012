"""The frozen network: built by transformers without weights, which are then read one by one to the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.errors import UserError
from lora_trainer.models.families.causal_lm.families import REMOTE_CODE, readable_config


def build_network(folder: Path, config: Mapping[str, Any], trust_remote_code: bool = False) -> nn.Module:
    """The network of a model's folder, in eval mode, with parameters on the meta device and buffers on the CPU.

    Raises:
        UserError: transformers cannot build it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        if config["model_type"] == REMOTE_CODE:
            known = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
        else:
            known = AutoConfig.for_model(**readable_config(config))
        with _parameters_on_meta():
            network = AutoModelForCausalLM.from_config(known, trust_remote_code=trust_remote_code)
    # A value that the network cannot be built with fails wherever it is first used; remote code raises anything.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"transformers cannot build the model of {folder}: {reason}",
            field="base_model",
            remedy="Its config.json may be damaged, or need another release of transformers.",
        ) from error
    return network.eval().requires_grad_(False)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, parameters of modules that this thread makes have no memory; buffers, such as tables of rotary
    embeddings, which no file holds, do."""
    register, thread = nn.Module.register_parameter, threading.get_ident()

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and threading.get_ident() == thread:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def as_it_is(module: nn.Module, name: str, value: Tensor) -> nn.Parameter:
    """A frozen parameter of this value."""
    return nn.Parameter(value, requires_grad=False)


def bind_weights(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    source: Path,
    frozen: Callable[[nn.Module, str, Tensor], nn.Parameter] = as_it_is,
    taken: Callable[[nn.Module], None] = lambda owner: None,
) -> None:
    """Give every parameter its tensor, and every buffer its place on ``device``.

    frozen: makes the parameters. taken: is told whose parameter was given its tensor.

    Raises:
        UserError: a tensor is missing, or has another shape than config.json says.
    """
    missing = []
    for path, module in network.named_modules():
        for name, parameter in module._parameters.items():
            full = f"{path}.{name}" if path else name
            if parameter is None:
                continue
            if full not in tensors:
                missing.append((module, name, full))
                continue
            value = tensors[full]
            if value.shape != parameter.shape:
                raise UserError(
                    f"{full} in {source} has the shape {tuple(value.shape)} instead of {tuple(parameter.shape)}.",
                    field="base_model",
                    remedy="Its config.json and its weights are of different models.",
                )
            module._parameters[name] = frozen(module, name, value)
            taken(module)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    head, embedding = head_of(network), network.get_input_embeddings()
    for module, name, full in missing:
        if module is not head or name != "weight" or not getattr(network.config, "tie_word_embeddings", False):
            raise UserError(f"{source} lacks the tensor {full}.", field="base_model", remedy="Copy the whole folder.")
        head._parameters["weight"] = embedding._parameters["weight"]


def head_of(network: nn.Module) -> nn.Module:
    """The layer from hidden states to logits."""
    head = network.get_output_embeddings()
    return network.transformer.output_layer if head is None else head  # ChatGLM does not say it


def decoder_layers(network: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of the network's blocks, with its name."""
    lists = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda entry: len(entry[1]))
