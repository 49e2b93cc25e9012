"""A run on rows of prompts and answers, for a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.merge_folder import check_folders, merge_folder
from lora_trainer.captioning.registry import Sources
from lora_trainer.config import TrainConfig, without_effect
from lora_trainer.dataset.findings import enumerate_some
from lora_trainer.dataset.text.encoding import EncodedRow, Encoder
from lora_trainer.dataset.text.held_out import RowSplit, hold_out_rows
from lora_trainer.dataset.text.rows import read_rows
from lora_trainer.dataset.text.templates import choose_template
from lora_trainer.errors import UserError, concerning
from lora_trainer.models.base import Lender, LoraTarget
from lora_trainer.models.families.causal_lm.families import LANGUAGE_FAMILIES, family_of
from lora_trainer.models.families.causal_lm.folder import load_tokenizer, read_config
from lora_trainer.models.families.causal_lm.lender import LanguageModelLender
from lora_trainer.models.families.causal_lm.model import LanguageModel
from lora_trainer.models.sharding import Peers
from lora_trainer.run.outputs import AdapterFolders, Outputs
from lora_trainer.run.saving import AdapterSaver
from lora_trainer.run.workloads.base import Work, digest
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.objectives.causal_lm import CausalLmObjective
from lora_trainer.training.precision import Precision
from lora_trainer.training.protocols import Previewer
from lora_trainer.training.ranks import ALONE, Ranks
from lora_trainer.training.source import Turn
from lora_trainer.training.text_inputs import RowSource
from lora_trainer.training.validation import ValidationData

_NAMED = 5
"""So many rows are named in a message; of further ones the number is said."""
_VLLM_RANK = 16


class Texts:
    """The ``Workload`` of rows of text. ``open`` makes it."""

    def __init__(self, config: TrainConfig, rows: Sequence[EncodedRow], split: RowSplit | None = None):
        self._config, self._rows, self._split = config, rows, split

    @staticmethod
    def file_lender(config: TrainConfig, precision: Precision, peers: Peers | None = None) -> LanguageModelLender:
        """The lender of ``base_model`` as a folder. peers: the processes that keep it together."""
        return LanguageModelLender(
            config.base_model,
            precision.device,
            precision.weight_dtype,
            trust_remote_code=config.trust_remote_code,
            nf4=config.quantize == "nf4",
            peers=peers,
        )

    @staticmethod
    def look(config: TrainConfig, captioners: Sources | None = None) -> None:
        """Raises UserError for an adapter that no language model takes, and where not a single row can be read."""
        refuse_other_adapters(config)
        if not read_rows(Path(config.train_data_dir))[0]:
            raise _nothing_to_learn(config)

    @classmethod
    def open(
        cls,
        config: TrainConfig,
        lender: Lender,
        callbacks: TrainCallbacks,
        commands: TrainCommands,
        captioners: Sources | None = None,
        ranks: Ranks = ALONE,
    ) -> Texts:
        """Read and encode the rows.

        Raises:
            UserError: there is nothing to train on, or the model cannot be trained.
        """
        refuse_other_adapters(config)
        info = lender.describe()
        for sentence in without_effect(config, task="text"):
            callbacks.on_warning(sentence)
        encoder = encoder_of(config, info.path or Path(config.base_model), info.family)
        usable, warnings = usable_rows(config, encoder, lambda done, total: callbacks.on_phase("rows", done, total))
        for sentence in warnings:
            callbacks.on_warning(sentence)
        if not config.validation_share:
            return cls(config, usable)
        split = hold_out_rows(usable, config.validation_share, config.seed)
        names = [row.row.where for row in split.held_out]
        callbacks.on_warning(f"Not trained, but measured: {enumerate_some(names, _NAMED)}.")
        return cls(config, split.trained, split)

    def placed(self, config: TrainConfig, callbacks: TrainCallbacks) -> TrainConfig:
        return replace(config, gradient_checkpointing=config.given_gradient_checkpointing)

    def run_key(self, model: LanguageModel) -> dict[str, Any]:
        return {
            "rows": digest([(row.tokens, row.learned) for row in self._rows]),
            "base_model": digest([model.info.family, model.network_key]),
        }

    def work(
        self, model: LanguageModel, precision: Precision, *, keep_model_parts: bool, ranks: Ranks = ALONE
    ) -> Work:
        config, split = self._config, self._split

        def targets() -> list[LoraTarget]:
            return model.lora_targets()

        def saver(outputs: Outputs, adapters: AdapterSet, callbacks: TrainCallbacks) -> AdapterSaver:
            return AdapterSaver(config, outputs, adapters, [target.diffusers_name for target in targets()])

        source, validation = RowSource(config, self._rows), None if split is None else self._validation(split)
        return Work(source, lambda adapters: CausalLmObjective(model), targets, saver, validation)

    def _validation(self, split: RowSplit) -> ValidationData:
        """Sources that show each row once, alone. What the model makes of the prompts should not move."""
        config = replace(self._config, batch_size=1, gradient_accumulation_steps=1, repeats=1)
        prompts = [replace(row, learned=(False, *(not one for one in row.learned[1:]))) for row in split.held_out]
        held_out, seen = RowSource(config, split.held_out), RowSource(config, split.seen)
        return ValidationData(held_out, seen, untriggered=RowSource(config, prompts))

    def previewer(self, model: LanguageModel, turn: Turn, precision: Precision) -> Previewer | None:
        return None

    def outputs(self, config: TrainConfig, digest: str) -> AdapterFolders:
        return AdapterFolders.of(config, digest)

    def merger(self, model: LanguageModel, outputs: Outputs) -> Callable[[], Path] | None:
        if not self._config.merge_into_base:
            return None
        base, output = Path(self._config.base_model), Path(self._config.merge_into_base)
        with concerning("merge_into_base"):
            check_folders(base, output)
        return lambda: merge_folder(base, outputs.lora.parent, 1.0, output).path

    def usage(self, lora: Path) -> tuple[str, ...]:
        base, folder, rank = self._config.base_model, lora.parent, self._config.lora_rank
        lines = [
            f"Try it: python -m lora_trainer generate --base {base} --adapter {folder} --prompt …",
            f"For llama.cpp: python convert_lora_to_gguf.py --base {base} {folder}",
        ]
        if rank > _VLLM_RANK:
            lines.append(f"vLLM needs --max-lora-rank {rank} for it.")
        return tuple(lines)


def usable_rows(
    config: TrainConfig, encoder: Encoder, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[EncodedRow], list[str]]:
    """The rows that are learned from, encoded, and a sentence on each kind of the others.

    Raises:
        UserError: there are none.
    """
    rows, bad = read_rows(Path(config.train_data_dir))
    encoded = []
    for done, row in enumerate(rows, 1):
        encoded.append(encoder.encode(row))
        progress(done, len(rows))
    usable = [row for row in encoded if any(row.learned)]
    length, lost = config.max_length, [row.row.where for row in encoded if not any(row.learned)]
    unread, cut = [f"{row.where} ({row.reason})" for row in bad], [row.row.where for row in usable if row.cut]
    warnings: list[str] = []
    if unread:
        warnings.append(f"{len(unread)} rows cannot be read and are left out: {_some(unread)}.")
    if cut:
        warnings.append(f"{len(cut)} rows are longer than max_length ({length} tokens) and are cut: {_some(cut)}.")
    if lost:
        what = f"{len(lost)} rows have no answer within max_length ({length} tokens) and are left out: {_some(lost)}."
        warnings.append(what)
    if not usable:
        raise _nothing_to_learn(config)
    return usable, warnings


def _some(names: Sequence[str]) -> str:
    return enumerate_some(names, _NAMED)


def _nothing_to_learn(config: TrainConfig) -> UserError:
    message = f"{config.train_data_dir} holds no row that can be learned from."
    remedy = "python -m lora_trainer check says what is wrong with each row."
    return UserError(message, field="train_data_dir", remedy=remedy)


def encoder_of(config: TrainConfig, folder: Path, family: str) -> Encoder:
    """What writes and encodes the rows of a run. Raises UserError for a tokenizer or template that cannot be used."""
    tokenizer = load_tokenizer(folder, config.trust_remote_code)
    _, template = choose_template(config.chat_template, tokenizer, LANGUAGE_FAMILIES[family].template)
    return Encoder(tokenizer, template, config.max_length, config.system_prompt)


def encoder_for(config: TrainConfig) -> Encoder:
    """The same for a base model that is given by its folder. Raises UserError for one that cannot be trained."""
    folder = Path(config.base_model)
    family = family_of(read_config(folder), config.base_model, config.trust_remote_code)
    return encoder_of(config, folder, family.name)


def refuse_other_adapters(config: TrainConfig) -> None:
    """Raises UserError for adapters that PEFT's folder cannot hold as they are, or that vLLM does not read."""
    if config.adapter != "lora":
        raise UserError(
            f"A language model is not trained with {config.adapter} here.", field="adapter", remedy="Use adapter: lora."
        )
    if config.dora:
        raise UserError("A language model is not trained with DoRA here.", field="dora", remedy="Leave it off.")
