"""No WebUI at all: base models are files in a folder, and so are finished LoRAs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_trainer.adapters.describe import describe
from lora_trainer.adapters.lora_file import ModuleWeights, read_lora
from lora_trainer.errors import UserError
from lora_trainer.host.base import (
    AccessPolicy,
    Card,
    Checkpoint,
    Folders,
    Host,
    LenderOptions,
    ModelFiles,
    PreviewRequest,
)
from lora_trainer.host.publishing import place_lora
from lora_trainer.models.base import LentModel, LoraTarget
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.families.causal_lm.folder import is_language_model
from lora_trainer.storage import Packing, dense_weight, pack, packing_of
from lora_trainer.training.precision import resolve
from lora_trainer.training.preview import sample

_ENDINGS = (".safetensors", ".ckpt", ".gguf")


class StandaloneHost(Host):
    """See ``Host``.

    data: the trainer's own folder. checkpoints: folder with base models, searched with its sub-folders; None when
    they are given by path. lora: where finished LoRAs go; None leaves them in the job.
    """

    name = "standalone"

    def __init__(
        self,
        data: Path,
        *,
        checkpoints: Path | None = None,
        lora: Path | None = None,
        device: str = "auto",
        access: AccessPolicy | None = None,
        options: Mapping[str, object] | None = None,
    ):
        self._checkpoints = None if checkpoints is None else Path(checkpoints)
        models = () if self._checkpoints is None else (self._checkpoints,)
        self._folders = Folders(Path(data), None if lora is None else Path(lora), models)
        self._precision = resolve(device, "auto")
        self._describing = threading.Lock()
        self._access, self._options = access or AccessPolicy(), dict(options or {})

    def folders(self) -> Folders:
        return self._folders

    def access(self) -> AccessPolicy:
        return self._access

    def option(self, key: str, default: object) -> object:
        return self._options.get(key, default)

    def device(self) -> torch.device:
        return self._precision.device

    def checkpoints(self) -> list[Checkpoint]:
        """Files and diffusers folders; nothing is ever loaded between runs."""
        root = self._checkpoints
        if root is None:
            return []
        found = sorted(_base_models(root), key=lambda path: str(path).casefold())
        return [Checkpoint(path.relative_to(root).as_posix(), path) for path in found]

    def lender(self, checkpoint: str, options: LenderOptions) -> FileLender:
        device = options.device or self._precision.device
        dtype = options.compute_dtype or resolve(device, "auto").compute_dtype
        return FileLender(
            self._path(checkpoint),
            device=device,
            weight_dtype=dtype,
            vae=options.vae,
            text_encoders=options.text_encoders,
            v_prediction=options.v_prediction,
            zero_terminal_snr=options.zero_terminal_snr,
            compute_dtype=dtype,
            clip_skip=options.clip_skip,
            base_precision=options.base_precision,
            offload_blocks=options.offload_blocks,
        )

    def model_files(self, checkpoint: str) -> ModelFiles:
        return ModelFiles(self._path(checkpoint))

    def device_turn(self) -> AbstractContextManager[Any]:
        return self._describing

    @contextmanager
    def spare_turn(self) -> Iterator[bool]:
        ours = self._describing.acquire(blocking=False)
        try:
            yield ours
        finally:
            if ours:
                self._describing.release()

    def draw(self, request: PreviewRequest) -> Image.Image:
        with closing(self.draw_all([request])) as pictures:
            return next(pictures)

    def draw_all(
        self, requests: Sequence[PreviewRequest], options: LenderOptions | None = None
    ) -> Generator[Image.Image, None, None]:
        options = options or LenderOptions(compute_dtype=self._precision.weight_dtype)
        lender = self.lender(requests[0].checkpoint, options)
        with lender.borrow() as model:
            for request in requests:
                lora = request.lora
                with lender.turn(), nullcontext() if lora is None else _merged(model, lora, request.lora_weight):
                    picture = _picture(model, request)
                yield picture

    def publish(self, lora: Path, name: str, card: Card, *, overwrite: bool = False) -> Path:
        if self._folders.lora is None:
            raise UserError("There is no LoRA folder to publish to.", remedy="Name one when the trainer is started.")
        return place_lora(lora, self._folders.lora, name, card, overwrite=overwrite)

    def verify(self, lora: Path, prompt: str) -> str | None:
        """Without a WebUI there is no other loader: the file itself is looked at."""
        return next(iter(describe(lora).problems), None)

    def _path(self, name: str) -> Path:
        known = [(checkpoint.title, checkpoint.path) for checkpoint in self.checkpoints() if checkpoint.path]
        if not name:
            if len(known) == 1:
                return known[0][1]
            raise UserError("No base model is named.", field="base_model", remedy="Choose one of the list.")
        for title, path in known:
            if name in (title, str(path), path.name, path.stem):
                return path
        if Path(name).exists():
            return Path(name)
        raise UserError(f"There is no base model {name!r}.", field="base_model", remedy="Choose one of the list.")


def _base_models(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        if "model_index.json" in files:
            subfolders.clear()  # its parts are no models by themselves
            yield Path(folder)
            continue
        if is_language_model(folder):
            continue
        yield from (Path(folder) / file for file in files if file.lower().endswith(_ENDINGS))


def _picture(model: LentModel, request: PreviewRequest) -> Image.Image:
    return sample(
        model,
        request.prompt,
        request.negative_prompt,
        width=request.width,
        height=request.height,
        steps=request.steps,
        cfg=request.cfg_scale,
        seed=request.seed,
    )


@dataclass(frozen=True)
class _Changed:
    """See ``storage.Packing``: a weight of few bits, to which a LoRA's change is added whenever it is unpacked: its sum
    has no place in its format, and kept in another one it would take several times the memory."""

    packing: Packing | None
    weights: ModuleWeights
    strength: float

    def shape_of(self, stored: torch.Tensor) -> tuple[int, ...]:
        return tuple(stored.shape) if self.packing is None else self.packing.shape_of(stored)

    def unpack(self, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        base = stored.float() if self.packing is None else self.packing.unpack(stored, torch.float32)
        return (base + self.strength * self.weights.change(base)).to(dtype)

    def to(self, device: torch.device) -> _Changed:
        packing = None if self.packing is None else self.packing.to(device)
        return replace(self, packing=packing, weights=_on(self.weights, device))


def _on(weights: ModuleWeights, device: torch.device) -> ModuleWeights:
    return replace(weights, tensors={name: tensor.to(device) for name, tensor in weights.tensors.items()})


def _changed(bound: torch.Tensor, weights: ModuleWeights, strength: float) -> torch.nn.Parameter:
    """The weight with the LoRA's change in it, in its format where that is fine enough for the change to show."""
    packing, weights = packing_of(bound), _on(weights, bound.device)
    if packing is None and bound.dtype in (torch.float32, torch.bfloat16, torch.float16):
        base = dense_weight(bound, torch.float32)
        merged = base + strength * weights.change(base)
        return torch.nn.Parameter(merged.to(bound.dtype), requires_grad=False)
    same = torch.nn.Parameter(bound.detach(), requires_grad=False)
    return pack(same, _Changed(packing, weights, strength))


@contextmanager
def _merged(model: LentModel, lora: Path, weight: float) -> Iterator[None]:
    """Inside, the model's layers have the LoRA's change in them. The bound weights themselves are not written to."""
    targets = model.lora_targets()
    matched, unmatched = read_lora(lora).match(targets)
    if not matched or unmatched:
        raise UserError(f"{lora.name} does not fit this base model.", remedy="Choose the one that it was made for.")
    of_part: dict[str, list[LoraTarget]] = {"unet": [], "text_encoders": []}
    for target in targets:
        if target.kohya_name in matched:
            of_part["unet" if target.part == "unet" else "text_encoders"].append(target)

    def merge(part: str) -> Callable[[], None]:
        bound = [(target.module, target.module.weight) for target in of_part.get(part, ())]
        for target, (module, parameter) in zip(of_part.get(part, ()), bound):
            module.weight = _changed(parameter, matched[target.kohya_name], weight)

        def restore() -> None:
            for module, parameter in bound:
                module.weight = parameter

        return restore

    residency = getattr(model, "residency", None)
    if residency is not None:  # parts that leave the device come back without the change
        with residency.changed(merge):
            yield
        return
    undo = [merge(part) for part in of_part]
    try:
        yield
    finally:
        for restore in undo:
            restore()
