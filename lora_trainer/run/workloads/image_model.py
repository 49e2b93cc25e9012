"""What all runs on an image model have in common, whatever they learn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.merge import check_paths, merge
from lora_trainer.adapters.metadata import RunFacts
from lora_trainer.config import TrainConfig, without_effect
from lora_trainer.errors import UserError, concerning
from lora_trainer.models.base import Lender, LentModel, ModelInfo
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.families import get_family, meta_model
from lora_trainer.models.sharding import Peers
from lora_trainer.run.outputs import Outputs
from lora_trainer.run.saving import LoraSaver
from lora_trainer.run.workloads.base import digest
from lora_trainer.training.callbacks import TrainCallbacks
from lora_trainer.training.forecast import blocks_to_offload, parts_to_recompute
from lora_trainer.training.precision import Precision, resolve
from lora_trainer.training.preview import ModelPreviewer
from lora_trainer.training.ranks import Ranks
from lora_trainer.training.source import Turn

Saver = Callable[[Outputs, AdapterSet, TrainCallbacks], LoraSaver]


class OfImageModel:
    """A part of a ``Workload``. size: of the pictures, (width, height) in pixels."""

    def __init__(self, config: TrainConfig, lender: Lender, info: ModelInfo, size: tuple[int, int]):
        self._config, self._lender, self._info, self._size = config, lender, info, size

    @staticmethod
    def file_lender(config: TrainConfig, precision: Precision, peers: Peers | None = None) -> FileLender:
        """The lender of ``base_model`` as a file. peers: the processes that keep it together."""
        return FileLender(
            config.base_model,
            device=precision.device,
            weight_dtype=precision.weight_dtype,
            vae=config.vae,
            v_prediction=config.v_prediction,
            zero_terminal_snr=config.zero_terminal_snr,
            clip_skip=config.clip_skip,
            text_encoders=config.text_encoders,
            base_precision=config.base_precision,
            offload_blocks=config.given_offload_blocks,
            peers=peers,
        )

    def placed(self, config: TrainConfig, callbacks: TrainCallbacks) -> TrainConfig:
        """``config`` with ``gradient_checkpointing`` and ``offload_blocks`` decided, which the lender is told."""
        if config.gradient_checkpointing == "auto":
            config = self._checkpointed(config, callbacks)
        free = self._lender.room_for_blocks() if config.offload_blocks == "auto" else None
        if free is None:
            return config
        precision, model = resolve(config.device, config.mixed_precision), meta_model(self._info.architecture)
        blocks = blocks_to_offload(model, self._size, config, precision, free, self._info.stored)
        if blocks and config.given_gradient_checkpointing < 1:
            callbacks.on_warning(
                f"The training may need more than the {_gb(free)} that are free on the GPU. With "
                "gradient_checkpointing: true blocks of the base model could wait in main memory."
            )
            blocks = 0
        self._lender.offload(blocks)
        if blocks:
            callbacks.on_warning(
                f"{blocks} of {len(model.blocks)} blocks of the base model wait in main memory, as {_gb(free)} are "
                "free on the GPU (offload_blocks: auto)."
            )
        return replace(config, offload_blocks=blocks)

    def _checkpointed(self, config: TrainConfig, callbacks: TrainCallbacks) -> TrainConfig:
        """As many parts as must; none where the memory of the device is not known."""
        if (room := self._lender.room()) is None:
            return replace(config, gradient_checkpointing=False)
        device, info = resolve(config.device, config.mixed_precision), self._info
        parts, total = parts_to_recompute(meta_model(info.architecture), self._size, config, device, room, info.stored)
        if parts:
            callbacks.on_warning(
                f"Gradient checkpointing of {parts} of {total} parts of the model, as {_gb(room.free)} are free on the "
                "GPU (gradient_checkpointing: auto)."
            )
        return replace(config, gradient_checkpointing=parts / total)

    def run_key(self, model: LentModel) -> dict[str, Any]:
        info = model.info
        base = [info.family, info.prediction_type, model.network_key, model.vae_key, model.text_key]
        return {"base_model": digest(base), "noise_schedule": digest(model.schedule.key)}

    def saver(self, facts: RunFacts) -> Saver:
        def made(outputs: Outputs, adapters: AdapterSet, callbacks: TrainCallbacks) -> LoraSaver:
            return LoraSaver(self._config, outputs, adapters, facts, callbacks, self._lender.model_hash)

        return made

    def previewer(self, model: LentModel, turn: Turn, precision: Precision) -> ModelPreviewer:
        return ModelPreviewer(model, turn, self._size)

    def outputs(self, config: TrainConfig, digest: str) -> Outputs:
        return Outputs.of(config, digest)

    def merger(self, model: LentModel, outputs: Outputs) -> Callable[[], Path] | None:
        config, base = self._config, model.info.path
        if not config.merge_into_base:
            return None
        output = Path(config.merge_into_base)
        if base is None:
            raise UserError(
                "The base model is no file that could be merged into.",
                field="merge_into_base",
                remedy="Leave it empty, and merge the finished LoRA elsewhere.",
            )
        with concerning("merge_into_base"):
            check_paths(base, outputs.lora, output, config.overwrite)

        def merged() -> Path:
            targets = model.lora_targets()
            return merge(base, outputs.lora, 1.0, output, targets=targets, overwrite=config.overwrite).path

        return merged

    def usage(self, lora: Path) -> tuple[str, ...]:
        word = self._config.trigger_word
        prompt = f"<lora:{lora.stem}:0.8>" + (f" {word}" if word else "")
        return (f"Copy the LoRA into models/Lora of your WebUI and prompt with {prompt}",)


def refuse_text_encoders(config: TrainConfig) -> None:
    """Raises UserError where the text encoders are to learn, which no change is taught to."""
    if config.text_encoders_learn:
        raise UserError(
            "A change is learned by the UNet alone.",
            field="train_text_encoder",
            remedy="Leave it off, and text_encoder_lr empty.",
        )


def describe_base(lender: Lender, config: TrainConfig, callbacks: TrainCallbacks, task: str = "image") -> ModelInfo:
    """The model that is to learn; settings that do nothing with it are told. Raises UserError for those that no LoRA of
    its family can be trained with."""
    info = lender.describe()
    get_family(info.family).check_settings(config)
    for sentence in without_effect(config, get_family(info.family).unused, task):
        callbacks.on_warning(sentence)
    if config.given_offload_blocks and resolve(config.device, config.mixed_precision).device.type != "cuda":
        callbacks.on_warning("offload_blocks has no effect, because the training does not run on an NVIDIA or AMD GPU.")
    return info


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def refuse_several(ranks: Ranks) -> None:
    """Raises UserError where several processes are to train together, which a change is not learned by."""
    if ranks.size > 1:
        raise UserError(
            f"A change is learned by one process, and these are {ranks.size}.", field="task", remedy="Start one alone."
        )
