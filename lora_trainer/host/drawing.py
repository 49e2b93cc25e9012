"""Pictures by the WebUI's own sampler, without a trace in anything that belongs to the user."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_trainer.errors import UserError
from lora_trainer.host.base import PreviewRequest
from lora_trainer.host.lending import loaded_model
from lora_trainer.host.loras import HostLoras
from lora_trainer.training.sampling import CFG

FLOW_CFG = 4.5
"""Guidance of a flow model by a second prediction, where a prompt does not say."""
DISTILLED_CFG = 3.5
"""Guidance of a model that reads it, where a prompt does not say."""

_TEST_STEPS = 4


def draw(webui: Any, loras: HostLoras, request: PreviewRequest) -> Image.Image:
    """One picture of the model that is loaded. Call it in a turn, with the model kept (``model_kept``).

    The LoRA gets a name that was never used before, because weights and encoded prompts are kept by name.

    No option is overridden for it: the WebUI would set the former value again afterwards, and what the user chose
    meanwhile would be gone.
    """
    name = f"lora-trainer-preview-{uuid.uuid4().hex}"
    if request.lora is not None and loras.networks is None:
        raise UserError("The WebUI's builtin Lora extension is disabled.", remedy="Switch it on to see previews.")
    prompt = request.prompt
    if request.lora is not None:
        prompt += f" <lora:{name}:{request.lora_weight:g}>"
    added = webui.shared.opts.data.get("sd_lora")
    if added not in (None, "", "None"):
        prompt += f" <lora:{added}:0>"  # or the WebUI adds it, at full strength, to every prompt without it
    with _state_kept(webui), loras.registered(name, request.lora) if request.lora is not None else nullcontext():
        p = webui.processing.StableDiffusionProcessingTxt2Img(
            sd_model=webui.shared.sd_model,
            prompt=prompt,
            negative_prompt=request.negative_prompt,
            seed=request.seed,
            width=request.width - request.width % webui.processing.opt_f,
            height=request.height - request.height % webui.processing.opt_f,
            steps=request.steps,
            **_guidance(webui.shared.sd_model, request.cfg_scale),
            sampler_name="Euler",
            scheduler=_schedule(webui.shared.sd_model),
            do_not_save_samples=True,
            do_not_save_grid=True,
        )
        p.cached_c, p.cached_uc = [None] * 3, [None] * 3  # not the ones that all other runs share
        try:
            with closing(p):
                images = webui.processing.process_images_inner(p).images
            used = request.lora is None or any(net.name == name for net in loras.networks.loaded_networks)
        finally:
            loaded = loaded_model(webui)
            if loaded is not None:
                loras.unmerge(loaded)
        if webui.shared.state.interrupted or webui.shared.state.stopping_generation or not images:
            raise UserError("The preview was interrupted in the WebUI.")
        if not used:
            raise UserError("The WebUI drew the preview without the LoRA.", remedy="Look into the WebUI's console.")
        return images[0].convert("RGB")


def verify(webui: Any, loras: HostLoras, lora: Path, prompt: str) -> str | None:
    """See ``Host.verify``. Call it as ``draw``."""
    if loras.networks is None:
        return "The LoRA was not checked in the WebUI: its builtin Lora extension is disabled."
    loaded = loaded_model(webui)
    side = 256 if getattr(loaded, "is_sdxl", False) else 128
    request = PreviewRequest(prompt, width=side, height=side, steps=_TEST_STEPS, seed=1)
    without = draw(webui, loras, request)
    missing = loras.unmatched(loaded, lora)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        title = loaded.sd_checkpoint_info.name_for_extra
        return f"The loaded model {title} has no place for some layers of the LoRA: {', '.join(missing[:3])}{more}."
    if obstacle := loras.obstacle(loaded):
        return obstacle
    with_lora = draw(webui, loras, replace(request, lora=lora))
    if np.array_equal(np.asarray(without), np.asarray(with_lora)):
        return "The LoRA changes nothing in a test picture; it may have been trained too briefly."
    return None


def _guidance(sd_model: Any, scale: float | None) -> dict[str, float]:
    """The arguments that guide a picture. scale: None for the usual strength."""
    if not getattr(sd_model, "use_distilled_cfg_scale", False):
        return {"cfg_scale": _usual_cfg(sd_model) if scale is None else scale}
    return {"cfg_scale": 1.0, "distilled_cfg_scale": DISTILLED_CFG if scale is None else scale}


def _usual_cfg(sd_model: Any) -> float:
    """Of a model that reads no guidance."""
    if getattr(sd_model, "is_sd3", False):
        return FLOW_CFG
    if not _is_forges_flow_model(sd_model):
        return CFG
    # Of the flow models with T5 those with CLIP are FLUX.1, which without that input is distilled to need no guidance.
    return 1.0 if hasattr(sd_model.forge_objects_original.clip.cond_stage_model, "clip_l") else FLOW_CFG


def _schedule(sd_model: Any) -> str:
    """Forge's automatic one ends a flow model's picture with a step from noise level 0, which is 0 / 0."""
    return "Simple" if _is_forges_flow_model(sd_model) else "Automatic"


def _is_forges_flow_model(sd_model: Any) -> bool:
    objects = getattr(sd_model, "forge_objects_original", None)
    return objects is not None and getattr(objects.unet.model.predictor, "prediction_type", None) == "const"


@contextmanager
def model_kept(webui: Any, loader: str, answer: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, this thread's pictures are drawn with the model that is loaded now.

    Drawing first loads what the settings say, and the settings page sets the option before it waits for its turn.

    loader: the function of ``sd_models`` that drawing calls for that. answer: the model -> what that returns.
    """
    sd_models, thread = webui.sd_models, threading.get_ident()
    original, kept = getattr(sd_models, loader), [answer(loaded_model(webui))]

    def load(*args: Any, **kwargs: Any) -> Any:
        return kept[0] if kept and threading.get_ident() == thread else original(*args, **kwargs)

    setattr(sd_models, loader, load)
    try:
        yield
    finally:
        kept.clear()  # somebody may have wrapped it meanwhile
        if getattr(sd_models, loader) is load:
            setattr(sd_models, loader, original)


@contextmanager
def _state_kept(webui: Any) -> Iterator[None]:
    """What a generation leaves behind in the WebUI is afterwards as it was before."""
    state, options = webui.shared.state, webui.shared.cmd_opts
    fields = {key: value for key, value in vars(state).items() if not key.startswith("_")}
    no_history = getattr(options, "no_prompt_history", False)
    schedules = {}
    loaded = loaded_model(webui)
    if loaded is not None:
        schedules[loaded] = getattr(loaded, "alphas_cumprod", None)
    options.no_prompt_history = True  # params.txt holds the user's last prompt
    for flag in ("interrupted", "skipped", "stopping_generation"):
        setattr(state, flag, False)
    try:
        yield
    finally:
        options.no_prompt_history = no_history
        for key in list(vars(state)):
            if not key.startswith("_") and key not in fields:
                delattr(state, key)
        for key, value in fields.items():
            setattr(state, key, value)
        state.current_latent = None
        for model, schedule in schedules.items():
            if schedule is not None:
                model.alphas_cumprod = schedule
