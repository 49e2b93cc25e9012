"""The run itself. The same function serves the command line, the job queue of a WebUI and the demo."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from lora_trainer import plugins
from lora_trainer.adapters.initialize import init_from
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora_file import LoraFile
from lora_trainer.captioning.registry import Sources
from lora_trainer.config import FACTS, TrainConfig, to_mapping, to_yaml
from lora_trainer.errors import UserError
from lora_trainer.files import atomic_write, sha256_file
from lora_trainer.models.base import Lender, LentNetwork
from lora_trainer.run.beginning import (
    check_files,
    check_processes,
    look_at_data,
    with_all_others,
    with_work_for_all,
)
from lora_trainer.run.environment import write_environment
from lora_trainer.run.faster import make_faster
from lora_trainer.run.layout import Layout
from lora_trainer.run.outputs import Outputs, output_name
from lora_trainer.run.passes import Passes, first_pass, second_pass
from lora_trainer.run.waiting import StoppedWhileWaiting, patient_turns
from lora_trainer.run.workloads import task_of, workload_of
from lora_trainer.run.workloads.base import Workload, digest
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.loop import Outcome, Trainer
from lora_trainer.training.objectives.base import drawn_for_comparison
from lora_trainer.training.optim import check_optimizer
from lora_trainer.training.precision import resolve
from lora_trainer.training.protocols import Previewer
from lora_trainer.training.ranks import ALONE, Ranks
from lora_trainer.training.state import StateStore, differences, named_state, run_digest
from lora_trainer.training.trial import resumes, try_one_step
from lora_trainer.training.validation import Measurable, Validator


@dataclass(frozen=True)
class Result:
    """How a run ended.

    status: "finished" or "stopped". lora, diffusers, merged: the files that are there; None for those that are not.
    loss: mean over the last steps. seconds: of the training, resumed parts included. usage: what to do with the files,
    in sentences. best: the LoRA that the measurements on held-out data recommend, if that is another one. verdict: what
    they say, in sentences. recommended: the step of ``best``, where the verdict is that it is the better one.
    """

    status: str
    step: int
    total_steps: int
    seconds: float
    loss: float | None
    lora: Path | None = None
    diffusers: Path | None = None
    merged: Path | None = None
    name: str = ""
    trigger_word: str = ""
    usage: tuple[str, ...] = ()
    best: Path | None = None
    verdict: str = ""
    recommended: int | None = None


def train(
    config: TrainConfig,
    lender: Lender,
    *,
    callbacks: TrainCallbacks | None = None,
    commands: TrainCommands | None = None,
    previewer: Previewer | None = None,
    captioners: Sources | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """Train a LoRA as ``config`` says on the model that ``lender`` lends.

    previewer: draws the previews; by default our own sampler on the lent model.
    captioners: where one is looked for that describes the pictures, if there is not a single caption.
    ranks: the processes that train this LoRA together, each with a lender of its own; all of them call this.

    Raises:
        UserError: something the user can put right, before or during the training; what was saved stays.
    """
    callbacks, commands = callbacks or TrainCallbacks(), commands or TrainCommands()
    ranks.listen(commands)
    given = dataclasses.replace(config, output_name=output_name(config))
    config = with_work_for_all(given, ranks.size)
    if config != given:
        callbacks.on_warning(
            f"gradient_accumulation_steps is {ranks.size} instead of {given.gradient_accumulation_steps}, as "
            f"{ranks.size} processes share the micro-batches of a step. The learning rate stays as it is."
        )
    before = first_pass(config)
    if before is None:
        return _train(config, lender, callbacks, commands, previewer, captioners, ranks)
    after = config.max_train_steps or config.copy_steps
    first = _train(before, lender, Passes(callbacks, 0, after), commands, None, captioners, ranks)
    if first.status != "finished" or first.lora is None:
        return dataclasses.replace(first, total_steps=first.total_steps + after, lora=None, usage=())
    callbacks = Passes(callbacks, before.copy_steps, 0)
    return _train(second_pass(config, first.lora), lender, callbacks, commands, previewer, captioners, ranks)


def _train(
    config: TrainConfig,
    lender: Lender,
    callbacks: TrainCallbacks,
    commands: TrainCommands,
    previewer: Previewer | None,
    captioners: Sources | None,
    ranks: Ranks,
) -> Result:
    """One pass; see ``train``."""
    try:
        initial = check_files(config)
        check_optimizer(config)
        check_processes(config, ranks.size)
        workload = workload_of(config).open(config, lender, callbacks, commands, captioners, ranks)
    except UserError as error:
        others = with_all_others(error, config, lambda config: lender, lambda config: look_at_data(config, captioners))
        raise others or error from None
    if workload is None:
        return Result("stopped", 0, 0, 0.0, None, name=config.output_name, trigger_word=config.trigger_word)
    turn = ranks.guard(patient_turns(lender, callbacks, commands))
    commands.resting = lender.rest

    callbacks.on_phase("model", 0, 0)  # a WebUI may have to load it first
    placed = workload.placed(config, callbacks)
    with lender.borrow() as model, ExitStack() as beneath:
        precision = resolve(model.device, config.mixed_precision, model.compute_dtype)
        run_key = _run_key(config, workload, model, precision.name, initial)
        _refuse_other_data(run_key, ranks)
        outputs = workload.outputs(config, run_digest(run_key))
        ranks.first(lambda: _refuse_to_overwrite(config, outputs, run_key))
        merge = workload.merger(model, outputs) if ranks.leads else None
        ours = None
        if previewer is None and config.preview_prompts and ranks.leads:
            previewer = ours = workload.previewer(model, turn, precision)
        work = workload.work(model, precision, keep_model_parts=ours is not None, ranks=ranks)
        try:
            with turn():
                beneath.enter_context(work.beneath())
                # Building modules is part of a turn: hosts swap torch.nn's classes while they load a model.
                adapters = AdapterSet.build(work.targets(), config, model.device)
            if initial:
                for warning in init_from(adapters, initial):
                    callbacks.on_warning(warning)
            objective, validator = work.objective(adapters), None
            if work.validation is not None and ranks.leads:
                validator = Validator(cast(Measurable, objective), adapters, work.validation, config.seed)
            # Made before anything is encoded: it refuses settings that cannot be combined.
            trainer = Trainer(
                placed,
                model,
                adapters,
                work.source,
                objective,
                precision,
                turn=turn,
                saver=work.saver(outputs, adapters, callbacks),
                output_dir=outputs.directory,
                name=outputs.name,
                run_key=run_key,
                callbacks=callbacks,
                commands=commands,
                previewer=previewer,
                validator=validator,
                make_room=lender.make_room,
                ranks=ranks,
            )
            make_faster(trainer.train_step, config, lender, model, ranks, callbacks.on_warning)
            trainer.train_step.layout = layout = Layout(config, model, ranks, callbacks.on_warning)
            if config.channels_last == "auto" and not resumes(trainer):
                with turn():
                    layout.choose()
            if ranks.leads:
                _save_configuration(config, outputs)
                write_environment(outputs, model.device, precision.name)
            with adapters:
                ranks.expect_progress()
                if not all(ranks.meet(try_one_step(trainer, adapters))):
                    raise StoppedWhileWaiting
                measurable = validator is None or validator.prepare(turn, callbacks, commands)
                if not all(ranks.meet(measurable)):
                    raise StoppedWhileWaiting
                if not all(ranks.meet(work.source.prepare(turn, callbacks, commands))):
                    raise StoppedWhileWaiting
                outcome = trainer.run()
        except StoppedWhileWaiting:
            outcome = Outcome("stopped", 0, work.source.total_steps, 0, None, 0.0, None)
        result = _result(config, workload, outputs, outcome)
        if outcome.status == "finished" and merge is not None:
            callbacks.on_phase("merging", 0, 0)
            try:
                with lender.rest():
                    result = dataclasses.replace(result, merged=merge())
            except UserError as error:  # the LoRA is there all the same
                callbacks.on_warning(f"The LoRA is finished, but not merged: {error}")
        ranks.meet(None)  # rank 0 has saved everything, and needs nothing of what the others have of the model
    return result


def summary(result: Result, resume: str = "auto") -> str:
    """What a person wants to know at the end: where the file is and how to use it. ``resume``: the run's setting."""
    minutes, seconds = divmod(round(result.seconds), 60)
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    lines = [f"{result.status} after step {result.step} of {result.total_steps}, {minutes}:{seconds:02d} min{loss}"]
    for label, path in (
        ("LoRA", result.lora),
        ("best", result.best),
        ("diffusers", result.diffusers),
        ("merged", result.merged),
    ):
        if path is not None:
            lines.append(f"  {label + ':':<11}{path}")
    lines += [result.verdict] if result.verdict else []
    lines += result.usage
    if result.status == "stopped" and result.total_steps:
        how = "the same command again" if resume == "auto" else "it again with resume: auto"
        lines.append(f"Start {how} to go on from here.")
    return "\n".join(lines)


def _refuse_other_data(run_key: Mapping[str, Any], ranks: Ranks) -> None:
    """Raises UserError where another process has found other pictures, another model or another release."""
    for rank, key in enumerate(ranks.meet(dict(run_key))):
        if names := differences(run_key, key):
            raise UserError(
                f"Rank {ranks.rank} and rank {rank} do not train the same: {', '.join(names)}.",
                remedy="Give all processes the same settings, files and releases of Python and torch.",
            )


_LATER = {"prompt_templates": [], "preserve_words": [], "preserve_pictures": 0, "base_precision": "stored",
          "min_scale": 1.0, "protected_batches": 1}  # fmt: skip
"""Settings that runs of before did not have, with what these did: such a run goes on."""


def _run_key(
    config: TrainConfig, workload: Workload, model: LentNetwork, precision: str, initial: LoraFile | None
) -> dict[str, Any]:
    """Everything that determines the result, by name; two runs with the same key make the same LoRA."""
    decisive = {name for name, facts in FACTS.items() if facts.decides and facts.applies(task_of(config))}
    if model.info.prediction_type != "flow":  # a run of before there were flow models goes on
        decisive -= {"sigma_sampling", "sigma_shift"}
    decisive -= {name for name, before in _LATER.items() if getattr(config, name) == before}
    settings = {name: value for name, value in to_mapping(config).items() if name in decisive}
    used = plugin_fingerprints(config, model.info.family)
    return {
        **settings,
        **({"plugins": used} if used else {}),
        "mixed_precision": precision,
        **workload.run_key(model),
        "dice": digest(drawn_for_comparison()),
        "init_lora": initial and sha256_file(initial.path),
    }


def _refuse_to_overwrite(config: TrainConfig, outputs: Outputs, run_key: dict[str, Any]) -> None:
    """Raises UserError when another run's LoRA has this name; where it is the same run, only longer, with the way to go
    on with it."""
    given = config.resume not in ("auto", "never")
    try:
        outputs.refuse_to_overwrite(run_digest(named_state(config.resume).run_key) if given else None)
    except UserError as error:
        shorter = StateStore(outputs.directory / "state", outputs.name, run_key).other_length()
        if shorter is not None:
            path, step = shorter
            error.remedy = f"To train that LoRA further, from its step {step} on, set resume: {path}. {error.remedy}"
        raise


def plugin_fingerprints(config: TrainConfig, family: str) -> dict[str, str]:
    """Of the plug-ins that determine the result, by kind and name."""
    used = [("family", family)]
    for name, facts in FACTS.items():
        value = getattr(config, name)
        if facts.plugin is not None:
            used += [(facts.plugin, one) for one in ([value] if isinstance(value, str) else value)]
    marks = {f"{kind} {name}": plugins.fingerprint(kind, name) for kind, name in used}
    return {name: mark for name, mark in marks.items() if mark is not None}


def _save_configuration(config: TrainConfig, outputs: Outputs) -> None:
    """The effective settings beside the result; the same command on this file gives the same LoRA."""
    started = datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")
    atomic_write(outputs.configuration, f"# {outputs.name}, started {started}\n{to_yaml(config)}")


def _result(config: TrainConfig, workload: Workload, outputs: Outputs, outcome: Outcome) -> Result:
    found = outcome.verdict
    earlier = found is not None and found.best < outcome.step and outputs.best.exists()
    return Result(
        status=outcome.status,
        step=outcome.step,
        total_steps=outcome.total_steps,
        seconds=outcome.seconds,
        loss=outcome.loss,
        lora=outcome.lora,
        diffusers=outputs.exported if outcome.status == "finished" else None,
        name=outputs.name,
        trigger_word=config.trigger_word,
        best=outputs.best if earlier else None,
        verdict="" if found is None else found.sentence,
        recommended=found.best if found is not None and earlier and found.stops else None,
        usage=() if outcome.lora is None else workload.usage(outcome.lora),
    )
