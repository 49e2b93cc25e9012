"""From a finished LoRA to its card in the host's picker."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_trainer.config import TrainConfig
from lora_trainer.config.facts import CHANGES
from lora_trainer.errors import UserError
from lora_trainer.jobs.job import Job

if TYPE_CHECKING:
    from PIL import Image

    from lora_trainer.host.base import Card, Host
    from lora_trainer.jobs.store import JobStore

PREFERRED_WEIGHT = 0.8
CHANGE_WEIGHT = 1.0
"""The weight at which a change was taught."""
THUMBNAIL_SIDE = 512
_MAX_CORE_TEXTS = 8

log = logging.getLogger(__name__)


def check_weight(weight: float) -> float:
    """A weight that a card may prefer. Raises UserError."""
    from lora_trainer.host.base import is_lora_weight

    if not is_lora_weight(weight):
        raise UserError(f"{weight:g} is no weight for a LoRA.", field="weight", remedy="Use one such as 0.8.")
    return weight


def make_card(job: Job, config: TrainConfig, picture: Path | None, weight: float | None = None) -> Card:
    """The card of a finished job. ``picture``: a preview; without one the first training picture is shown. weight:
    None for the usual one."""
    from lora_trainer.host.base import Card
    from lora_trainer.models.families import find_family

    family = find_family(job.family)
    captions, first = _captions(config)
    return Card(
        activation_text=activation_text(config.trigger_word, captions),
        preferred_weight=(CHANGE_WEIGHT if config.task in CHANGES else PREFERRED_WEIGHT) if weight is None else weight,
        description=config.description,
        notes=notes(job, config, len(captions)),
        sd_version=family.card_version if family else "",
        thumbnail=_thumbnail(picture) or _thumbnail(first),
    )


def activation_text(trigger_word: str, captions: list[str]) -> str:
    """The trigger word, then the core (**bold**) words that at least half of the captions share, as a prompt."""
    from lora_trainer.dataset.captions import core_texts, escape_brackets, parse

    counts = Counter(text for caption in captions for text in core_texts(parse(caption)))
    trigger = trigger_word.strip()
    shared = [text for text, count in counts.most_common() if 2 * count >= len(captions)]
    words = [trigger, *(text for text in shared if text.casefold() != trigger.casefold())][: _MAX_CORE_TEXTS + 1]
    return ", ".join(escape_brackets(word) for word in words if word)


def notes(job: Job, config: TrainConfig, pictures: int) -> str:
    """How it was made, in a few lines that a person reads beside the LoRA."""
    rank = f"rank {config.lora_rank}, alpha {config.effective_alpha:g}"
    batch = f"{config.batch_size} × {config.gradient_accumulation_steps}"
    taught = f"{pictures} pictures"
    if config.task == "words":
        prompts = (config.original_prompt, config.target_prompt, config.positive_prompt, config.negative_prompt)
        taught = f"words: {' → '.join(repr(prompt) for prompt in prompts if prompt)}"
    lines = [
        f"Trained on {job.base_model or config.base_model or 'the loaded model'} with {taught}.",
        f"{job.step} steps, batch {batch}, {config.adapter}, {rank}.",
        f"{config.optimizer}, learning rate {config.learning_rate:g}, {config.lr_scheduler}, seed {config.seed}.",
    ]
    if advice := job.result.get("advice"):
        recommended = job.step == job.result.get("recommended_step")
        lines.append(f"These are the weights that are recommended. {advice}" if recommended else advice)
    if job.loss is not None:
        lines.append(f"Last loss {job.loss:.4f}.")
    return "\n".join(lines)


def publish(
    host: Host,
    job: Job,
    config: TrainConfig,
    lora: Path,
    name: str,
    picture: Path | None,
    *,
    weight: float | None = None,
    overwrite: bool,
    on_phase: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Hand the LoRA to the host and have it checked there. on_phase: is told "publishing", then "verifying".

    Returns what to remember: ``published`` (path), ``published_step`` and ``chosen_step`` (None: it is the last),
    ``verified`` and ``verdict``.

    Raises:
        UserError: the name is taken, the disk is full, it is for a language model; the LoRA stays where it is.
    """
    if config.task == "text":
        message = f"{job.name} is for a language model, and the WebUI draws with image models."
        raise UserError(message, remedy="Its files lie in the folder of the training.")
    on_phase("publishing", 0, 0)
    path = _copied(host, lora, name, make_card(job, config, picture, weight), overwrite=overwrite)
    on_phase("verifying", 0, 0)
    verified = _verify(host, path, config.trigger_word or job.name)
    return {"published": str(path), "published_step": None, "chosen_step": None, **verified}


class NewestWeights:
    """Keeps what a run saved last in the host's LoRA folder while it trains, under the LoRA's name, to be prompted.

    Somebody else's LoRA of this name stays, also where the finished one may replace it: that is asked of the end.
    """

    def __init__(self, host: Callable[[], Host], store: JobStore, job_id: int, config: TrainConfig):
        """``host``: asked anew each time, as "Reload UI" may have exchanged it."""
        self._host, self._store, self._job_id, self._config = host, store, job_id, config

    def show(self, lora: Path, step: int, picture: Path | None) -> None:
        """Publish ``lora`` as it is at ``step``. ``picture``: the last preview.

        Raises:
            UserError: the name is taken, the disk is full.
        """
        host, job = self._host(), self._store.get(self._job_id)
        card = make_card(job, self._config, picture)
        note = f"Still in training: step {step} of {job.total_steps}.\n{card.notes}"
        path = _copied(host, lora, job.name, replace(card, notes=note), overwrite=False)
        facts = {"published": str(path), "published_step": step, "chosen_step": None, "verified": None, "verdict": ""}
        self._store.update(job.id, result={**job.result, **facts})
        self._store.add_event(job.id, "published", job.name, {"step": step})


def _copied(host: Host, lora: Path, name: str, card: Card, *, overwrite: bool) -> Path:
    try:
        return host.publish(lora, name, card, overwrite=overwrite)
    except OSError as error:
        raise UserError(
            f"{name} could not be copied into the LoRA folder: {error.strerror or error}.",
            field="output_name",
            remedy="Free some space or mend the folder's permissions, then publish it again from the run.",
        ) from error


def _verify(host: Host, path: Path, prompt: str) -> dict[str, Any]:
    """Whether the host's own loader finds a layer for every key, and the picture changes. It is published either way.

    ``verified`` is None when that could not be found out; ``verdict`` says why, or what is wrong.
    """
    try:
        verdict = host.verify(path, prompt)
    except Exception as error:  # the host's code: whatever goes wrong there is not a fault of the LoRA
        log.warning("%s could not be checked in the WebUI", path.name, exc_info=True)
        return {"verified": None, "verdict": f"The LoRA could not be checked in the WebUI: {error}"}
    return {"verified": verdict is None, "verdict": verdict or ""}


def _captions(config: TrainConfig) -> tuple[list[str], Path | None]:
    """Every picture's caption as far as it has one, and the first picture. Nothing here may fail a finished job."""
    from lora_trainer.dataset.caption_files import read_captions
    from lora_trainer.dataset.listing import list_folder

    if config.task == "words":
        return [], None
    try:
        root = Path(config.train_data_dir)
        listing = list_folder(root)
        found = read_captions(root, config.metadata_path, config.caption_extension, problems=[], listing=listing)
    except UserError as error:
        log.warning("The pictures' captions could not be read for the card: %s", error)
        return [], None
    first = next(iter(listing.pictures.values()), None)
    return [found[key].text if key in found else "" for key in listing.pictures], first


def _thumbnail(path: Path | None) -> Image.Image | None:
    from lora_trainer.dataset.images import flatten, open_image

    if path is None:
        return None
    try:
        picture = flatten(open_image(path))
    except UserError as error:
        log.warning("No thumbnail from %s: %s", path.name, error)
        return None
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return picture
