"""The settings as form fields, made from ``config/schema.py``: same names, defaults and explanations everywhere."""

from __future__ import annotations

import dataclasses
import json
import logging
import types
import typing
from typing import Any

from lora_trainer import plugins
from lora_trainer.config import FACTS, TrainConfig, field_docs, to_mapping, unused_by
from lora_trainer.config.facts import CHANGES
from lora_trainer.config.schema import GROUPS
from lora_trainer.errors import UserError
from lora_trainer.ui.markup import Markup, tag
from lora_trainer.workspace.presets import HELD

log = logging.getLogger(__name__)

GROUP_TITLES = {
    "model": "Model",
    "data": "Pictures and captions",
    "change": "The change",
    "adapter": "The LoRA itself",
    "optimization": "How it learns",
    "objective": "What counts as an error",
    "output": "Saving and previews",
}

_WORDS = {"lora": "LoRA", "snr": "SNR", "ema": "EMA", "lr": "learning rate", "vae": "VAE", "min": "minimum",
          "max": "maximum", "dir": "folder", "reg": "regularization", "init": "initial", "dora": "DoRA", "c": "c",
          "lokr": "LoKr", "metadata": "caption", "path": "table", "diffusers": "diffusers"}  # fmt: skip
_LABELS = {"min_snr_gamma": "Min-SNR gamma", "cuda_graphs": "CUDA graphs", "v_prediction": "V-prediction",
           "metadata_path": "Caption table",
           "gpus": "GPUs", "shard_base": "Shard the base model",
           "optimizer_args": "Optimizer arguments", "init_lora": "Start from a LoRA", "tensorboard": "TensorBoard",
           "reg_data_dir": "Regularization folder", "preserve": "Keep what the model knows",
           "preserve_words": "Words to preserve", "preserve_pictures": "Pictures to preserve",
           "merge_into_base": "Merge into base model",
           "block_lr_weights": "Block learning rate weights", "cache_dir": "Cache folder", "flip": "Mirror",
           "multires_noise_iterations": "Multi-resolution noise iterations", "lora_rank": "Rank",
           "adapter": "Network type",
           "multires_noise_discount": "Multi-resolution noise discount", "dora": "DoRA", "loss": "Loss function",
           "export_diffusers": "Export for diffusers", "output_name": "Name"}  # fmt: skip


_SWITCHED = {"": "automatic", "auto": "automatic", "true": "yes", "false": "no"}


def label(name: str) -> str:
    """``text_encoder_lr`` -> "Text encoder learning rate"."""
    words = " ".join(_WORDS.get(word, word) for word in name.split("_"))
    return _LABELS.get(name) or words[0].upper() + words[1:]


def advanced() -> Markup:
    """Every setting that the steps do not ask for, in its group, folded."""
    from lora_trainer.devices import gpu_count  # torch is slow to import

    sections = []
    hidden = {"gpus", "shard_base"} if gpu_count() < 2 else set[str]()
    for group, kind in GROUPS:
        fields = [field(one.name) for one in dataclasses.fields(kind)
                  if FACTS[one.name].given_by == "form" and one.name not in hidden]  # fmt: skip
        if not fields:
            continue
        summary = tag("summary", tag("span", GROUP_TITLES[group]), tag("span", class_="changed", data_changed=group))
        sections.append(tag("details", summary, tag("div", *fields, class_="fields"), class_="group", data_group=group))
    return Markup("".join(sections))


def field(
    name: str,
    *,
    text: str | None = None,
    placeholder: str | None = None,
    explained: bool = True,
    known: str | None = None,
    **attributes: object,
) -> Markup:
    """One setting with its label, explanation and the place for what is wrong with it.

    ``text``: another label. ``explained`` False leaves the explanation to hover and screen readers. ``known``: id of
    the list of values that are offered. ``attributes``: of the whole field.
    """
    caption, explanation = text or label(name), field_docs()[name]
    control_id, help_id, problem_id = f"field_{name}", f"help_{name}", f"problem_{name}"
    described = {"id_": control_id, "data_setting": name, "data_preset": name in HELD,
                 "aria_describedby": f"{help_id} {problem_id}", "list": known}  # fmt: skip
    switch = typing.get_type_hints(TrainConfig)[name] is bool
    head = tag(
        "label",
        tag("span", control(name, described, None), caption, class_="switch") if switch else tag("span", caption),
        tag("button", "reset", type="button", class_="reset", data_action="reset", data_reset=name, hidden=True,
            title="Back to the suggested value"),
        for_=control_id,
        title=name,
    )  # fmt: skip
    help_text = tag("p", explanation, id_=help_id, class_="help" if explained else "help spoken")
    problem = tag("p", id_=problem_id, class_="problem", role="alert", hidden=True)
    inputs = [] if switch else [control(name, described, placeholder)]
    idle = " ".join(task for task in CHANGES if name in unused_by(task)) or None
    return tag("div", head, *inputs, help_text, problem, class_="field", data_field=name, data_task=FACTS[name].task,
               data_idle=idle, data_find="\n".join((name, caption, explanation)), **attributes)  # fmt: skip


def control(name: str, attributes: dict[str, Any], placeholder: str | None = None) -> Markup:
    """The input for a setting, by its type: ``data-type`` tells the page how to read it."""
    default, kind = to_mapping(TrainConfig())[name], typing.get_type_hints(TrainConfig)[name]
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    optional = origin in (types.UnionType, typing.Union)
    if optional:
        kinds = [option for option in options if option is not type(None)]
        if len(kinds) > 1 and bool in kinds:  # a word beside yes and no
            words = [*typing.get_args(kinds[0]), "true", "false"]
            return _select([(word, _SWITCHED.get(word, word)) for word in words], str(default).lower(),
                           attributes | {"data_type": "switch"})  # fmt: skip
        if len(kinds) > 1:  # a word or a number, such as "auto", 5, or empty for none
            return _text(str(default), "number", attributes | {"inputmode": "text"}, placeholder)
        (kind,) = kinds
        origin, options = typing.get_origin(kind), typing.get_args(kind)
    if kind is bool:
        options = ("", "true", "false") if optional else ("false", "true")
        attributes |= {"data_type": "choice"}
        if not optional:
            return tag("input", type="checkbox", **{**attributes, "data_type": "boolean"}, checked=default)
        return _select([(option, _SWITCHED[option]) for option in options], "", attributes)
    if origin is typing.Literal:
        attributes |= {"data_type": "number" if isinstance(options[0], int) else "choice"}
        options = (*options, *_of_plugins(name))
        return _select([(str(option), str(option)) for option in options], str(default), attributes)
    if origin is list and options[0] is str:
        lines = "\n".join(default or [])
        return tag("textarea", lines, rows=max(2, len(default or [])), spellcheck="false", placeholder=placeholder,
                   **attributes, data_type="lines")  # fmt: skip
    if origin is list:
        return _text("", "numbers", attributes, placeholder)
    if origin is dict:
        return tag("textarea", rows=2, spellcheck="false", placeholder=placeholder or "weight_decay: 0.01",
                   **attributes, data_type="mapping")  # fmt: skip
    value = "" if default is None else json.dumps(default) if isinstance(default, float) else str(default)
    return _text(value, "number" if kind in (int, float) else "text", attributes, placeholder)


def _of_plugins(name: str) -> list[str]:
    """The choices that plug-ins add to a setting. A broken one must not cost the page; whoever submits is told."""
    kind = FACTS[name].plugin
    try:
        return [] if kind is None else plugins.names(kind)
    except UserError as error:
        log.warning("%s", error)
        return []


def _text(value: str, kind: str, attributes: dict[str, Any], placeholder: str | None) -> Markup:
    attributes = {"inputmode": "decimal" if kind == "number" else None, **attributes}
    return tag("input", type="text", value=value, autocomplete="off", spellcheck="false",
               placeholder=placeholder, **attributes, data_type=kind)  # fmt: skip


def _select(options: list[tuple[str, str]], chosen: str, attributes: dict[str, Any]) -> Markup:
    rows = [tag("option", text, value=value, selected=value == chosen) for value, text in options]
    return tag("select", *rows, **attributes)
