"""All adapters of one run: chosen, built, put into the model and taken out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.adapters.base import Adapter, Target, is_text_encoder, weight_shape, without_alpha
from lora_trainer.adapters.copies import WorkingCopies
from lora_trainer.adapters.joint import Joint, joints
from lora_trainer.adapters.loha import LohaAdapter
from lora_trainer.adapters.lokr import LokrAdapter
from lora_trainer.adapters.lora import LoraAdapter
from lora_trainer.adapters.masks import DropoutMasks, MicroBatchPart, seed_from
from lora_trainer.adapters.selection import select_targets
from lora_trainer.config.schema import TrainConfig
from lora_trainer.errors import UserError

BLOCKS = 25
_KINDS: dict[str, type[Adapter]] = {"lora": LoraAdapter, "loha": LohaAdapter, "lokr": LokrAdapter}


class AdapterSet(nn.Module):
    """The adapters of a model, by their name in the LoRA file (``kohya_name``).

    ``attach`` puts each adapter's forward in the place of its layer's, on the instance; ``detach`` undoes it. As a
    context manager the set is attached inside and detached afterwards, whatever happens. The state dict holds the
    trained tensors only: ``<kohya_name>.<tensor>``.
    """

    def __init__(self, targets: Sequence[Target], adapters: Sequence[Adapter], seed: int = 0):
        super().__init__()
        self.targets = tuple(targets)
        self.seed = seed
        self.masks = DropoutMasks()
        self._replaced: list[tuple[nn.Module, Any]] | None = None
        self.joints: list[Joint] = []
        for target, adapter in zip(targets, adapters):
            adapter.masks = self.masks
            self.add_module(target.kohya_name, adapter)

    @classmethod
    def build(cls, targets: Sequence[Target], config: TrainConfig, device: torch.device | None = None) -> AdapterSet:
        """New adapters for the layers that ``choose`` finds among ``targets``; they change nothing yet.

        device: where the model computes; by default, each adapter lies where its layer's weight is.

        Initial weights depend on (seed, name of the layer) alone. Raises what ``choose`` raises.
        """
        chosen = choose(targets, config)
        adapters = [_build_one(target, rank, alpha, config, device) for target, rank, alpha in chosen]
        built = cls([target for target, _, _ in chosen], adapters, config.seed)
        for target, adapter in built.items():
            adapter.requires_grad_(_lr_weight(target, config) > 0)
        return built

    def items(self) -> Iterator[tuple[Target, Adapter]]:
        """Each target with its adapter, in the order of the file."""
        for target in self.targets:
            yield target, self._modules[target.kohya_name]

    def __len__(self) -> int:
        return len(self.targets)

    # -- in the model ------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Put the adapters into the model. Attaching twice is an error of the program."""
        if self._replaced is not None:
            raise RuntimeError("This adapter set is attached already.")
        self._replaced = []
        for target, adapter in self.items():
            self._replaced.append((target.module, vars(target.module).get("forward")))
            adapter.base = target.module.forward
            target.module.forward = adapter.forward
        self.joints = joints(list(self.items()))
        for joint in self.joints:
            joint.layers[0].joint = joint

    def detach(self) -> None:
        """Take the adapters out; every layer has its own forward again. Harmless when nothing is attached."""
        for joint in self.joints:
            if vars(joint.layers[0]).get("joint") is joint:
                del joint.layers[0].joint
        self.joints = []
        for module, own_forward in reversed(self._replaced or []):
            if own_forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = own_forward
        self._replaced = None

    def __enter__(self) -> AdapterSet:
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    @contextmanager
    def enabled(self, active: bool = True) -> Iterator[None]:
        """Inside, the adapters count (or, with False, do not: the bare model, for baselines)."""
        before = [adapter.active for _, adapter in self.items()]
        try:
            for _, adapter in self.items():
                adapter.active = active
            yield
        finally:
            for (_, adapter), was in zip(self.items(), before):
                adapter.active = was

    @property
    def multiplier(self) -> float:
        """Strength of the whole set, 1 in training; what ``<lora:name:0.7>`` sets in a WebUI."""
        return next(adapter.multiplier for _, adapter in self.items())

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        for _, adapter in self.items():
            adapter.multiplier = float(value)

    @contextmanager
    def multiplied(self, strength: float) -> Iterator[None]:
        """Inside, the whole set has this strength."""
        before, self.multiplier = self.multiplier, strength
        try:
            yield
        finally:
            self.multiplier = before

    def limit_norms(self, maximum: float) -> None:
        """Scale the change of each layer that learns down to this norm where it is larger."""
        for _, adapter in self.items():
            if any(parameter.requires_grad for parameter in adapter.parameters()):
                adapter.limit_norm(maximum)

    def begin_step(self, step: int, micro_step: int = 0, part: MicroBatchPart | None = None) -> None:
        """Fix the dropout masks of what follows; they depend on (seed, step, micro-step, layer) and nothing else.

        part: the part of the micro-batch that is computed next; None for the whole.
        """
        self.masks.begin(seed_from(self.seed, "dropout", step, micro_step), part)

    def working_copies(self, dtype: torch.dtype) -> WorkingCopies:
        """Copies for training steps that compute in ``dtype``; of an attached set."""
        return WorkingCopies([adapter for _, adapter in self.items()], self.joints, dtype)

    # -- to the optimizer and to the file ----------------------------------------------------------------------

    def param_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """What learns, as the optimizer takes it: ``params``, ``lr`` and ``name`` of each group.

        Names: the targets' ``part``; with block_lr_weights ``unet_block_00`` … ``unet_block_24`` for the UNet's.
        """
        groups: dict[str, dict[str, Any]] = {}
        for target, adapter in self.items():
            trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
            if not trained:
                continue
            name, lr = target.part, config.learning_rate * _lr_weight(target, config)
            if is_text_encoder(target):
                lr = config.effective_text_encoder_lr
            elif config.block_lr_weights is not None and target.block is not None:
                name = f"{target.part}_block_{target.block:02d}"
            groups.setdefault(name, {"params": [], "lr": lr, "name": name})["params"].extend(trained)
        if not groups:
            raise UserError("every block is frozen: nothing would learn.", field="block_lr_weights")
        return [groups[name] for name in sorted(groups, key=lambda name: (name.startswith("text_encoder"), name))]

    def export(self) -> dict[str, Tensor]:
        """Every tensor of the LoRA file by its kohya key, fp32. Frozen adapters that change nothing are left out."""
        tensors = {}
        for target, adapter in self.items():
            learns = any(parameter.requires_grad for parameter in adapter.parameters())
            if learns or not adapter.is_neutral():
                layer = adapter.export() if target.alpha else without_alpha(target.kohya_name, adapter.export())
                tensors.update({f"{target.kohya_name}.{suffix}": value for suffix, value in layer.items()})
        return tensors

    @property
    def ranks(self) -> dict[str, int]:
        return {target.kohya_name: adapter.rank for target, adapter in self.items()}


def parameter_count(targets: Sequence[Target], config: TrainConfig) -> int:
    """How many numbers ``AdapterSet.build`` would make. Raises what ``choose`` raises."""
    kind, total = _KINDS[config.adapter], 0
    for target, rank, _ in choose(targets, config):
        shape = weight_shape(target.module)
        total += kind.count(shape, rank, **_options(config)) + (shape[1] if config.dora else 0)
    return total


def choose(targets: Sequence[Target], config: TrainConfig) -> list[tuple[Target, int, float]]:
    """The layers that ``config`` selects among ``targets``, each with its rank and alpha.

    Text encoders take part if ``train_text_encoder`` is set and their learning rate is not 0.

    Raises:
        UserError: nothing or something unknown is selected, or block_ranks does not fit.
    """
    for field in ("block_ranks", "block_lr_weights"):
        values = getattr(config, field)
        if values is not None and len(values) != BLOCKS:
            raise UserError(f"{len(values)} values are given.", field=field, remedy=f"Give {BLOCKS}, one a block.")
    network = [target for target in targets if not is_text_encoder(target)]
    text = [target for target in targets if is_text_encoder(target)]
    trains_text = config.text_encoders_learn and bool(text)
    selected = []
    if config.target_modules or config.conv_rank or not trains_text:  # else the text encoders learn alone
        selected += select_targets(network, config.target_modules, config.conv_rank)
    if trains_text:
        patterns = config.text_encoder_target_modules
        selected += select_targets(text, patterns, field="text_encoder_target_modules")
    ranked = [(target, *rank_and_alpha(target, config)) for target in selected]
    chosen = [(target, rank, alpha) for target, rank, alpha in ranked if rank]
    if not chosen:
        raise UserError("every block has rank 0: nothing would learn.", field="block_ranks")
    return chosen


def rank_and_alpha(target: Target, config: TrainConfig) -> tuple[int, float]:
    """Rank and alpha of one layer; rank 0 leaves it out.

    conv_rank counts for 3×3 convolutions only. A block's rank counts for its other layers; its alpha is ``alpha``
    where that is given (as kohya does), else the block's rank. A block with rank 0 has no adapters at all.
    """
    block_rank = None
    if config.block_ranks is not None and target.block is not None:
        block_rank = config.block_ranks[target.block]
        if block_rank == 0:
            return 0, 0.0
    if target.group == "conv":
        return config.conv_rank, config.effective_conv_alpha
    rank = config.lora_rank if block_rank is None else block_rank
    return rank, config.strength * (rank if config.alpha is None else config.alpha)


def _lr_weight(target: Target, config: TrainConfig) -> float:
    if config.block_lr_weights is None or target.block is None:
        return 1.0
    return config.block_lr_weights[target.block]


def _build_one(target: Target, rank: int, alpha: float, config: TrainConfig, device: torch.device | None) -> Adapter:
    return _KINDS[config.adapter](
        target.module,
        rank,
        alpha,
        name=target.kohya_name,
        seed=config.seed,
        dropout=config.dropout,
        rank_dropout=config.rank_dropout,
        module_dropout=config.module_dropout,
        dora=config.dora,
        device=device,
        **_options(config),
    )


def _options(config: TrainConfig) -> dict[str, Any]:
    """What one kind of adapter has and the others do not."""
    return {"factor": config.lokr_factor} if config.adapter == "lokr" else {}
