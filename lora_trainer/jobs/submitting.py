"""From what a person entered to a job in the queue: checked, confined, named."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lora_trainer.config import Problems, TrainConfig, from_mapping, parse_yaml, read_text, to_yaml
from lora_trainer.config.foreign import read_what_can_be_read
from lora_trainer.config.names import ALIASES
from lora_trainer.dataset.text.rows import ENDINGS as ROW_FILES
from lora_trainer.errors import ConfigError, UserError
from lora_trainer.files import atomic_write, safe_name_problem
from lora_trainer.jobs.folders import JobFolders
from lora_trainer.jobs.job import ACTIVE, WAITING_TO_START, Job
from lora_trainer.jobs.store import JobStore
from lora_trainer.workspace.paths import check_name, confine_config

if TYPE_CHECKING:
    from lora_trainer.host.base import Host


def read_settings(settings: Mapping[str, Any] | str) -> dict[str, Any]:
    """Settings as a mapping, or as text (YAML, or what another trainer writes) -> a mapping by our names."""
    return read_text(settings)[0] if isinstance(settings, str) else dict(settings)


def check_settings(settings: Mapping[str, Any] | str, host: Host) -> TrainConfig:
    """A configuration that may run on this host.

    Raises:
        ConfigError: with every problem, each naming its field; its ``config`` names no path that may not be used.
    """
    problems = Problems()
    values, unread = settings, list[UserError]()
    if isinstance(values, str):
        values, _, unread = read_what_can_be_read(values)
    try:
        config = from_mapping(values, unread)
    except ConfigError as error:
        problems.add(error.problems)
        config = error.config
    config = _settled(config, host)
    is_text = config.task == "text"
    if not config.train_data_dir and config.task != "words":
        message, remedy = "No pictures are chosen.", "Add pictures or choose a folder."
        if config.task == "pair":
            message, remedy = "No pair is chosen.", "Add the picture before the change and the one after it."
        if is_text:
            message, remedy = "No file with rows is chosen.", "Add a .jsonl or .json file."
        problems.add([UserError(message, field="train_data_dir", remedy=remedy)])
    if is_text and not config.base_model:
        remedy = "Choose one of the list, or give the folder of one."
        problems.add([UserError("No language model is chosen.", field="base_model", remedy=remedy)])
    if config.merge_into_base and not os.path.isabs(os.path.expanduser(config.merge_into_base)):
        message = f"The path {config.merge_into_base} does not say in which folder."
        problems.add([UserError(message, field="merge_into_base", remedy="Give the whole path.")])
    try:
        config = confine_config(config, host.folders().data, host.access(), known_models(host))
    except ConfigError as error:
        problems.add(error.problems)
        config = error.config
    if problems.found:
        raise ConfigError(problems.found, config)
    return config


def check_places(settings: Mapping[str, Any] | str, host: Host) -> TrainConfig:
    """Settings of a language model of which only the paths are checked. Raises UserError for one that may not be used.
    """
    config = _settled(from_mapping({**read_settings(settings), "task": "text"}), host)
    return confine_config(config, host.folders().data, host.access(), known_models(host))


def _settled(config: TrainConfig, host: Host) -> TrainConfig:
    """With the task named, and the folder of a language model that is given by its name in the host's list."""
    if config.task != "image":
        folder = host.language_models().get(config.base_model)
        config = config if folder is None else dataclasses.replace(config, base_model=str(folder))
    if config.task == "auto" and not os.path.isdir(config.base_model):
        return dataclasses.replace(config, task="image")  # without torch, which is slow to import
    from lora_trainer.run.workloads import task_of

    return dataclasses.replace(config, task=task_of(config))


def check_shown(config: TrainConfig, host: Host, shown: str | None) -> None:
    """Raises UserError when a person was shown another base model (by its title) than the one that is selected, and
    would be trained, now."""
    now = host.selected()
    if not shown or config.base_model or now is None or _unhashed(shown) == _unhashed(now.title):
        return
    raise UserError(
        f"The WebUI's model is {now.title} now, and {shown} was shown.",
        field="base_model",
        remedy="Look at what a training on it takes, and start again; or choose the model by its name.",
    )


def _unhashed(title: str) -> str:
    """A WebUI adds a file's hash to its title when it has computed it: "name.safetensors [12ab34cd56]"."""
    return re.sub(r" \[[0-9a-f]+\]$", "", title)


def check_beginning(config: TrainConfig) -> None:
    """What a run would refuse before anything else, without its model. Raises UserError."""
    from lora_trainer.run import check_files
    from lora_trainer.training.optim import check_optimizer

    check_files(config)
    check_optimizer(config)


def known_models(host: Host) -> set[str]:
    """Every way in which the host's list names a base model: title, path, file name and stem."""
    names = {str(folder) for folder in host.language_models().values()}
    for checkpoint in host.checkpoints():
        names.add(checkpoint.title)
        if checkpoint.path is not None:
            path = Path(checkpoint.path)
            names |= {str(path), path.name, path.stem}
    return names


def add_job(store: JobStore, folders: JobFolders, host: Host, settings: Mapping[str, Any] | str, *,
            held: bool = False) -> Job:  # fmt: skip
    """Append a checked job to the queue, with its folder. Raises UserError."""
    values = read_settings(settings)
    config = check_settings(values, host)
    given = config.output_name or last_part(config.output_dir)
    if given:
        name = check_name(given, "output_name")
        if not config.overwrite and (reason := name_taken(store, host, name)):
            raise UserError(reason, field="output_name", remedy="Choose another name, or allow overwriting it.")
    else:
        name = free_name(store, host, _usual_name(config))
    # The model that is selected now is meant, whatever is selected when the job's turn comes.
    selected = None if config.task == "text" else host.selected()
    base_model = config.base_model or (selected.title if selected else "")
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)

    def prepare(job_id: int) -> dict[str, Any]:
        folder = folders.create(job_id, name)
        atomic_write(folder / "config.yaml", text)
        effective = dataclasses.replace(
            config,
            base_model=base_model,
            output_dir=str(folder / "output"),
            output_name=name,
            cache_dir=str(folders.cache),
        )
        return {"folder": folder.name, "effective_config": to_yaml(effective)}

    return store.add(
        name,
        text,
        prepare,
        status="paused" if held else "queued",
        dataset=config.train_data_dir,
        base_model=base_model,
        task=config.task,
        host=host.name,
    )


def name_taken(store: JobStore, host: Host, name: str) -> str | None:
    """Why a LoRA cannot be called ``name``: there is one, in some sub-folder perhaps, or a job that will make one, or
    the WebUI would not find it. None when it can."""
    from lora_trainer.host.publishing import is_reserved, is_taken

    lora = host.folders().lora
    if not name:
        return None
    if is_reserved(name):
        return f"{name} cannot be a name: the WebUI keeps it for itself."
    if lora is not None and is_taken(Path(lora), name):
        return f"There is a LoRA named {name} already."
    if any(job.name.casefold() == name.casefold() for job in store.jobs((*WAITING_TO_START, *ACTIVE))):
        return f"Another training in the queue makes a LoRA named {name}."
    return None


def free_name(store: JobStore, host: Host, name: str) -> str:
    """``name``, or with the first number behind it that makes it free."""
    stem, _, number = name.rpartition("_")
    base, count = (stem, int(number)) if stem and number.isdecimal() and len(number) < 4 else (name, 1)
    taken = {job.name.casefold() for job in store.jobs(limit=100_000)}
    candidate = name
    while candidate.casefold() in taken or name_taken(store, host, candidate):
        count += 1
        candidate = f"{base}_{count}"
    return candidate


def stored_config(job: Job) -> TrainConfig:
    """The checked configuration as it was submitted, with the job's own folder and name."""
    config = from_mapping(parse_yaml(job.effective_config))
    # Releases that left it open trained pictures only.
    return dataclasses.replace(config, task="image") if config.task == "auto" else config


def run_config(job: Job, folders: JobFolders) -> TrainConfig:
    """The configuration for the next attempt at ``job``: its own folder, continued where a state was left there."""
    config = stored_config(job)
    left_off = job.attempt > 1 and any(folders.output(job).glob("state/*.state"))
    given = config.resume not in ("auto", "never", "")
    return dataclasses.replace(
        config,
        output_dir=str(folders.output(job)),
        # The folder is the job's alone, so what lies there may be replaced; what it is merged into lies elsewhere.
        overwrite=config.overwrite or not config.merge_into_base,
        resume=config.resume if given and not left_off else "auto",
    )


def merged(job: Job, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A job's settings with ``changes``; a changed setting may have been written under another of its names."""
    replaced = {ALIASES.get(name, name) for name in changes}
    kept = {name: value for name, value in parse_yaml(job.config).items() if ALIASES.get(name, name) not in replaced}
    return {**kept, **changes}


def last_part(output_dir: str) -> str:
    """The LoRA's name where only output_dir says it, as on the command line ("./output/my_style_lora")."""
    name = Path(output_dir.replace("\\", "/")).name
    return "" if output_dir == TrainConfig().output_dir else name


def _usual_name(config: TrainConfig) -> str:
    """What a LoRA without a name is called: after its pictures, or its prompts."""
    if config.task == "words":
        prompts = (config.original_prompt, config.target_prompt or config.positive_prompt)
        words = "_to_".join(word for prompt in prompts if (word := re.sub(r"\W+", "_", prompt)[:30].strip("_")))
        return words if words and safe_name_problem(words) is None else "lora"
    path = Path(config.train_data_dir)
    name = path.stem if path.suffix.lower() in ROW_FILES else path.name
    return name if safe_name_problem(name) is None else "lora"
