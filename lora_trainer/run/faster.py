"""What makes the steps of a run faster where it can: CUDA graphs, and compiled blocks."""

from __future__ import annotations

from collections.abc import Callable

from lora_trainer.config import TrainConfig
from lora_trainer.models.base import Lender, LentNetwork
from lora_trainer.models.families.parts import PartedModel
from lora_trainer.training.ranks import Ranks
from lora_trainer.training.step import TrainingStep


def make_faster(
    step: TrainingStep,
    config: TrainConfig,
    lender: Lender,
    model: LentNetwork,
    ranks: Ranks,
    say: Callable[[str], None],
) -> None:
    """Have ``step`` use what the settings ask for and what this model takes.

    say: is told what comes of ``compile: auto``.
    """
    if model.info.prediction_type in ("flow", "next_token"):
        # Their passes copy tables from main memory. A recording that fails is no way out: before torch 2.12 the
        # allocator then takes it for one that goes on (pytorch/pytorch#180395).
        step.graphs.give_up("this kind of model cannot be recorded.")
    if config.compile == "off":
        return
    step.compiled.say = say
    blocks = model.compilable() if isinstance(model, PartedModel) else []
    if lender.is_shared:
        step.compiled.leave("torch.compile is not used: the WebUI would wait for it for minutes.")
    elif ranks.size > 1:
        step.compiled.leave("torch.compile is not used: several processes train together.")
    elif not blocks:
        step.compiled.leave("torch.compile is not used: blocks of this kind of model cannot be compiled.")
    elif config.adapter != "lora":
        step.compiled.leave(f"torch.compile is not used: layers with {config.adapter} cannot be compiled.")
    else:
        step.compiled.use(blocks)
