"""The training loop: batches in, a trained adapter out, with everything saved that a killed run needs to go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

import lora_trainer
from lora_trainer.config import TrainConfig, never_reached, to_yaml, with_trigger
from lora_trainer.errors import RetryError, UserError
from lora_trainer.models.base import LentNetwork
from lora_trainer.out_of_memory import OutOfMemoryError, is_out_of_memory, release_memory, with_room
from lora_trainer.processor import Stopwatch
from lora_trainer.training.callbacks import StepReport, TrainCallbacks, TrainCommands
from lora_trainer.training.memory import MemoryMeasures, MemoryRecovery
from lora_trainer.training.metrics import MetricsLog, StepMetrics
from lora_trainer.training.objectives.base import MicroBatch, Objective
from lora_trainer.training.optim import computes_on_cpu, learning_rates, optimizer_warnings
from lora_trainer.training.precision import Precision, other_precision
from lora_trainer.training.preview import draw_preview
from lora_trainer.training.protocols import Previewer, Saver
from lora_trainer.training.ranks import ALONE, Ranks
from lora_trainer.training.source import Source, Turn, ahead
from lora_trainer.training.state import StateStore, TrainingState
from lora_trainer.training.step import TrainingStep
from lora_trainer.training.validation import Measurement, Validator, Verdict, measurements_of, recommended, verdict

NON_FINITE_LIMIT = 10
"""So many steps in a row without a finite loss or gradient end the run."""
NON_FINITE_LIMIT_FP16 = 40
"""With fp16 some are normal, while GradScaler looks for its scale: it halves it each time, from 65536."""
STATE_SECONDS = 600
"""A state is saved at least this often, whatever save_steps says: what a crash can cost."""
AVERAGED_STEPS = 100
"""The loss that is reported at the end is the mean over this many last steps, as single ones vary too much."""
PAUSE_POLL_SECONDS = 0.5
SLOW_DISK = 10 * 2**20
"""Bytes a second that saving is granted at least, before other processes take it for one that hangs."""
FIRST_STEP_SECONDS = 600
"""So much longer may take the first step of a process that has tried none before, because the run is resumed."""
FINISHED_BEFORE = "This run had finished before"
"""Begins the warning of a run with nothing left to do, below."""


@dataclass(frozen=True)
class Outcome:
    """How the loop ended.

    status: "finished" or "stopped". loss: mean over the last ``AVERAGED_STEPS`` steps. seconds: spent in steps, those
    before a resume included. lora: what was saved last, None if nothing was. verdict: what held-out pictures say.
    """

    status: str
    step: int
    total_steps: int
    epoch: int
    loss: float | None
    seconds: float
    lora: Path | None
    verdict: Verdict | None = None


class Trainer:
    """One training run: ``source`` gives the data, ``objective`` the loss, ``adapters`` (attached) learn.

    turn: the lender's; taken for every step and every look at the trained weights.
    validator: measures held-out pictures on the way, if some are held out.
    run_key: the settings and facts that determine the result; a state with another key is not resumed from.
    ranks: the processes that compute this run together; rank 0 alone measures, saves, draws and decides.
    output_dir: gets ``state/``, ``logs/`` and ``previews/``; their files start with ``name``.

    Raises:
        UserError: settings that do not go together, or an optimizer whose library is missing.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: LentNetwork,
        adapters: nn.Module,
        source: Source,
        objective: Objective,
        precision: Precision,
        *,
        turn: Turn,
        saver: Saver,
        output_dir: Path,
        name: str,
        run_key: Mapping[str, Any],
        callbacks: TrainCallbacks | None = None,
        commands: TrainCommands | None = None,
        previewer: Previewer | None = None,
        validator: Validator | None = None,
        make_room: Callable[[], None] = lambda: None,
        ranks: Ranks = ALONE,
    ):
        self.ranks = ranks
        self.config, self.model, self.adapters, self.source = config, model, adapters, source
        self.turn, self.saver, self.previewer, self.validator = turn, saver, previewer, validator
        self.make_room = make_room  # see Lender.make_room
        self.callbacks, self.commands = callbacks or TrainCallbacks(), commands or TrainCommands()
        self.output_dir, self.name, self.run_key = Path(output_dir), name, run_key
        self.steps_per_epoch, self.total_steps = source.steps_per_epoch, source.total_steps
        self.recovery = MemoryRecovery(
            MemoryMeasures(),
            checkpointing=config.given_gradient_checkpointing,
            may_move_optimizer=computes_on_cpu(config),
            set_gradient_checkpointing=model.set_gradient_checkpointing,
            make_room=make_room,
            on_warning=self.callbacks.on_warning if ranks.leads else ranks.say,
        )
        self.train_step = TrainingStep(
            config, objective, adapters, precision, source.total_steps, recovery=self.recovery, ranks=ranks
        )
        self.states = StateStore(self.output_dir / "state", name, run_key, self.callbacks.on_warning)

        self.step = 0  # optimizer steps done
        self.seconds = 0.0
        self.recent_losses: list[float] = []
        self.non_finite_steps = 0  # in a row
        self.measurements: list[Measurement] = []
        self.lora: Path | None = None
        self._said: tuple[str, int] | None = None  # the last verdict that was reported
        self._phase = ""  # what the callbacks were told last
        self._state_saved_at = 0.0  # counted from the start of ``run``

    @property
    def epoch(self) -> int:
        """Of the last step, counted from 1."""
        return max(0, self.step - 1) // self.steps_per_epoch + 1

    def run(self) -> Outcome:
        """Train to the end, or until a command stops it. ``source`` must have been prepared.

        Raises:
            UserError: training cannot go on; says why and what helps. What was saved stays.
        """
        self._state_saved_at = time.monotonic()
        self._warn_about_settings()
        self._resume()
        self.recovery.apply(resumed=self.step > 0)
        self.adapters.train()
        if not self.ranks.leads:
            return self._train()
        logs = self.output_dir / "logs"
        log = MetricsLog(logs, self.step, self.config.tensorboard, self.callbacks.on_warning, self.recent_losses)
        with log as self.metrics:
            self.metrics.write_text("settings", to_yaml(self.config))
            if self.step == 0:  # the base, for all that follows to be compared with
                self._measure()
                self._draw_previews()
            return self._train()

    def _train(self) -> Outcome:
        while self.step < self.total_steps:
            epoch, position = divmod(self.step, self.steps_per_epoch)
            self._phase = ""  # an epoch's pictures may be encoded first, which is a phase of its own
            prepared = self.source.prepare_epoch(epoch, self.turn, self.callbacks, self.commands)
            if not all(self.ranks.meet(prepared)):
                return self._stop()
            with closing(self._steps(epoch, position)) as steps:
                for micro_batches in steps:
                    if self.ranks.leads:
                        self._obey()
                    if self.ranks.decide(self.commands.stopping):
                        return self._stop()
                    self._take_step(micro_batches)
        return self._finish()

    def _steps(self, epoch: int, position: int) -> Generator[Sequence[MicroBatch], None, None]:
        """The micro-batches of each step that is left of an epoch; the next ones are read while a step computes."""
        end = min(self.steps_per_epoch, position + self.total_steps - self.step)
        share = self.ranks.share
        return ahead(lambda place: self.source.micro_batches(epoch, place, share), range(position, end))

    def _take_step(self, micro_batches: Sequence[MicroBatch]) -> None:
        """One optimizer step, its report, and what is due after it."""
        if self._phase != "training":
            self._enter("training", self.step, self.total_steps)
        started = time.monotonic()
        rates = learning_rates(self.train_step.optimizer)
        try:
            with self.turn(), self.ranks.unhurried(0 if self.train_step.computed else FIRST_STEP_SECONDS):
                watch = Stopwatch()
                loss = self.train_step(self.step, micro_batches)
                working = watch.lap(computing=self.model.device.type == "cpu")
        except OutOfMemoryError as error:
            self.give_up_for_memory(error)
        seconds = time.monotonic() - started
        self.step += 1
        self.seconds += seconds
        if self.ranks.leads:
            self._report(loss, rates, seconds, working, self.train_step.samples)
        self._guard(loss)
        if self.ranks.leads:
            self._measure_when_due()
            self._save_when_due()

    def _enter(self, phase: str, done: int = 0, total: int = 0) -> None:
        self._phase = phase
        self.callbacks.on_phase(phase, done, total)

    def _report(
        self, loss: float | None, rates: dict[str, float], seconds: float, working: float, images: int
    ) -> None:
        rate = next(iter(rates.values()))
        metrics = StepMetrics(self.step, self.epoch, loss, rate, seconds, images, self.train_step.grad_norm)
        self.metrics.write(metrics, rates)
        epochs = -(-self.total_steps // self.steps_per_epoch)
        report = StepReport(
            self.step, self.total_steps, self.epoch, epochs, loss, rate, seconds, images, working, self.steps_per_epoch
        )
        self.callbacks.on_step(report)

    def _guard(self, loss: float | None) -> None:
        """Count steps that were not finite, and end the run when they persist."""
        if loss is not None:
            self.non_finite_steps = 0
            self.recent_losses = [*self.recent_losses[1 - AVERAGED_STEPS :], loss]
            return
        self.non_finite_steps += 1
        fp16 = self.train_step.scaler is not None
        if self.non_finite_steps == 1 and not fp16:
            self.callbacks.on_warning(f"Step {self.step} gave no finite loss and was left out.")
        if self.non_finite_steps >= (NON_FINITE_LIMIT_FP16 if fp16 else NON_FINITE_LIMIT):
            other = other_precision(self.train_step.precision.name)
            if self.non_finite_steps == self.step:
                raise UserError(
                    f"Not one of {self.step} steps gave a finite loss (NaN), before anything was learned.",
                    field="base_model",
                    remedy=" ".join([self.source.blame, *other]),
                )
            raise UserError(
                f"{self.non_finite_steps} steps in a row, up to step {self.step}, gave no finite loss (NaN).",
                field="learning_rate",
                remedy=" ".join([f"Lower it (now {self.config.learning_rate:g}).", *other]),
            )

    def give_up_for_memory(self, error: Exception) -> NoReturn:
        """Raises UserError; the state is saved where there is one that is whole."""
        self.train_step.optimizer.zero_grad(set_to_none=True)
        if self.ranks.leads and self.step and not self.train_step.updating:
            with suppress(RetryError):  # for which memory was short as well
                self._save_state()
        remedy = "Lower it, or lora_rank, or close other programs that use the GPU."
        if not computes_on_cpu(self.config):  # its state stays on the GPU
            remedy = (
                "Lower it, or lora_rank, or set optimizer: adamw, whose state can lie in main memory, or close other "
                "programs that use the GPU."
            )
        raise UserError(
            f"The GPU's memory does not suffice for step {self.step + 1}, with one {self.source.sample} at a time and"
            " gradient checkpointing.",
            field=self.source.size_setting,
            remedy=remedy,
        ) from error

    # -- validation -----------------------------------------------------------------------------------------------

    def _measure_when_due(self) -> None:
        if self.validator is None:
            return
        sizes = self.config.batch_size, self.config.gradient_accumulation_steps
        interval = self.config.validation_steps or self.validator.interval(self.total_steps, *sizes)
        if _every(self.step, interval) or self.step >= self.total_steps:
            self._measure()

    def _measure(self) -> None:
        """Add a measurement; keep the LoRA where it is the best one so far, and say what the measurements mean."""
        if self.validator is None:
            return
        self._enter("measuring")
        try:
            with self.train_step.averaged():
                measured = self.validator.measure(self.step, self.epoch, self.turn)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            measured = None
        if measured is None or not measured.is_finite:
            release_memory()
            self.callbacks.on_warning(f"No validation at step {self.step}: memory is short, or the loss is not finite.")
            return
        self.measurements.append(measured)
        self.metrics.write_measurement(measured.to_dict())
        self.callbacks.on_measured(measured)
        if 0 < self.step < self.total_steps and recommended(self.measurements) is measured:
            self._save_lora("best")
        self._judge()

    def _judge(self) -> None:
        found = verdict(self.measurements, self.config.early_stopping_patience)
        if found is None or not found.stops or self.config.early_stopping == "off":
            return
        if (found.kind, found.best) != self._said:
            self._said = found.kind, found.best
            self.callbacks.on_warning(found.sentence)
        if self.config.early_stopping == "stop" and self.step < self.total_steps:
            self.commands.stop_and_save()

    # -- commands, saves, previews --------------------------------------------------------------------------------

    def _obey(self) -> None:
        """Do what was asked for since the last step, and wait, outside of any turn, while paused."""
        while True:
            if self.commands.take_save():
                self._save_lora("step")
                self._save_state()
            if self.commands.take_preview():
                self._draw_previews()
            if not self.commands.paused or self.commands.stopping:
                return
            if self._phase != "training":
                self._enter("training", self.step, self.total_steps)
            self.commands.wait_while_paused(PAUSE_POLL_SECONDS)

    def _save_when_due(self) -> None:
        config = self.config
        if self.step >= self.total_steps:
            return  # _finish saves
        due = _every(self.step, config.save_steps)
        due |= _every(self.step, config.save_epochs and config.save_epochs * self.steps_per_epoch)
        if due:
            self._save_lora("step")
        if due or time.monotonic() - self._state_saved_at >= STATE_SECONDS:
            self._save_state()
        if _every(self.step, config.preview_steps) or (due and config.preview_steps is None):
            self._draw_previews()

    def _save_lora(self, kind: str) -> None:
        self.saver.prepare()
        self._enter("saving")

        def write() -> Path:
            with self.train_step.averaged():
                return self.saver(self.step, self.epoch, kind)

        self.lora = self._written(f"Memory does not suffice to save the LoRA of step {self.step}.", write)
        self.callbacks.on_saved(self.lora, self.step, "lora")

    def _save_state(self, finished: bool = False) -> None:
        epoch, position = divmod(self.step, self.steps_per_epoch)
        progress = {
            "seconds": self.seconds,
            "recent_losses": self.recent_losses,
            "non_finite_steps": self.non_finite_steps,
            "measurements": [one.to_dict() for one in self.measurements],
        }
        versions = {"lora_trainer": lora_trainer.__version__, "torch": torch.__version__}

        def write() -> Path:
            parts = {**self.train_step.state_dict(), "progress": progress}
            state = TrainingState(self.step, epoch, position, self.run_key, parts, finished, versions)
            return self.states.save(state)

        path = self._written(f"Memory does not suffice to save the training state of step {self.step}.", write)
        self._state_saved_at = time.monotonic()
        self.callbacks.on_saved(path, self.step, "state")

    def _written(self, failure: str, write: Callable[[], Path]) -> Path:
        """``write()`` in a turn, once more where memory is short. Raises RetryError that says ``failure``."""
        try:
            with self.turn(), self.ranks.unhurried(self.train_step.bytes / SLOW_DISK):
                return with_room(write, self.make_room)
        except OutOfMemoryError as error:
            raise RetryError(
                failure,
                remedy="Close other programs that use it, and start the run again: it goes on from its last state.",
            ) from error

    def _draw_previews(self) -> None:
        """Every preview prompt as a PNG; the same noise each time, so that the pictures show what training changed."""
        prompts = self.config.preview_prompts
        if self.previewer is None or not prompts:
            return
        self._enter("previews", 0, len(prompts))
        for index, prompt in enumerate(prompts):
            path = self.output_dir / "previews" / f"{self.name}-step{self.step:08d}-{index}.png"
            meant, seed = with_trigger(prompt, self.config.trigger_word), self.config.seed + index
            with self.ranks.unhurried():
                averaged = self.train_step.averaged()
                image = draw_preview(self.previewer, meant, seed, self.step, self.adapters, averaged, path)
            if isinstance(image, str):
                self.callbacks.on_warning(f"No preview at step {self.step}: {image}")
                return
            self.metrics.write_preview(self.step, prompt, image)
            self.callbacks.on_preview(path, self.step, prompt)
            self._enter("previews", index + 1, len(prompts))

    # -- beginning and end ----------------------------------------------------------------------------------------

    def _warn_about_settings(self) -> None:
        late = never_reached(self.config, self.total_steps, self.steps_per_epoch)
        for warning in (*late, *optimizer_warnings(self.config), *self.train_step.objective.warnings()):
            self.callbacks.on_warning(warning)

    def _resume(self) -> None:
        state = self.ranks.first(lambda: self.states.find(self.config.resume))
        if state is None:
            return
        remedy = "Set resume: never, or the settings as they were; init_lora goes on from any LoRA, with any of them."
        if (before := state.run_key.get("optimizer", self.config.optimizer)) != self.config.optimizer:
            message = f"The training state of step {state.step} is {before}'s, not {self.config.optimizer}'s."
            raise UserError(message, field="resume", remedy=remedy)
        try:
            with self.turn():
                self.train_step.load_state_dict(state.parts, state.step)
        except (KeyError, ValueError, RuntimeError) as error:
            message = f"The training state of step {state.step} belongs to an adapter of other layers or ranks."
            raise UserError(message, field="resume", remedy=remedy) from error
        progress = state.parts["progress"]
        self.step, self.seconds = state.step, progress["seconds"]
        self.recent_losses, self.non_finite_steps = progress["recent_losses"], progress["non_finite_steps"]
        self.measurements = measurements_of(progress)
        if state.finished and self.step >= self.total_steps:
            self.callbacks.on_warning(
                "This run had finished before; its LoRA is written again. For more steps raise epochs and set resume: "
                f"{self.states.path(self.step)}; set resume: never to train anew."
            )

    def _finish(self) -> Outcome:
        # The state first: killed while the LoRA is written, the run ends by writing it.
        if self.ranks.leads:
            self._save_state()
            self._save_lora("final")
            self._save_state(finished=True)
            self._draw_previews()
        return self._outcome("finished")

    def _stop(self) -> Outcome:
        if self.ranks.leads and self.commands.saves_before_stop and self.step:
            self._save_lora("stopped")
            self._save_state()
        return self._outcome("stopped")

    def _outcome(self, status: str) -> Outcome:
        loss = sum(self.recent_losses) / len(self.recent_losses) if self.recent_losses else None
        found = verdict(self.measurements, self.config.early_stopping_patience)
        return Outcome(status, self.step, self.total_steps, self.epoch, loss, self.seconds, self.lora, found)


def _every(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
