"""Lends a language model from its folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from lora_trainer.models.base import Lender, ModelInfo
from lora_trainer.models.families.causal_lm.families import family_of
from lora_trainer.models.families.causal_lm.folder import open_weights, read_config, weights_digest
from lora_trainer.models.families.causal_lm.model import LanguageModel
from lora_trainer.models.families.causal_lm.network import (
    as_it_is,
    bind_weights,
    build_network,
    decoder_layers,
)
from lora_trainer.models.families.causal_lm.quantize import quantized, use_nf4
from lora_trainer.models.families.causal_lm.work import LanguageArchitecture
from lora_trainer.models.sharding import Peers, ShardedBlocks


class LanguageModelLender(Lender[LanguageModel]):
    """See ``Lender``. Nothing else uses the weights, so a turn costs nothing.

    folder: as transformers saves a model. dtype: number format of weights and computation.
    trust_remote_code: run Python code from the folder. nf4: keep the weights of the blocks in 4 bits.
    peers: the processes that keep the blocks together; None keeps them whole.
    """

    def __init__(
        self,
        folder: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        trust_remote_code: bool = False,
        nf4: bool = False,
        peers: Peers | None = None,
    ):
        self.folder, self.device, self.dtype = Path(folder), torch.device(device), dtype
        self.trust_remote_code, self.nf4, self._peers = trust_remote_code, nf4, peers

    def describe(self) -> ModelInfo:
        """Reads config.json alone."""
        config = read_config(self.folder)
        family = family_of(config, str(self.folder), self.trust_remote_code)
        architecture = LanguageArchitecture.from_config(family.name, config)
        return ModelInfo(family.name, "next_token", self.folder.resolve().name, self.folder, architecture=architecture)

    @contextmanager
    def borrow(self) -> Iterator[LanguageModel]:
        """Builds the model. Raises ``UserError`` when the folder is none that can be trained."""
        info = self.describe()
        network = build_network(self.folder, read_config(self.folder), self.trust_remote_code)
        tensors = open_weights(self.folder)
        tensors.place(self.device, self.dtype)
        if self.nf4:
            use_nf4(network, self.dtype, self.device)
        blocks = None
        if self._peers is not None:
            blocks = ShardedBlocks(list(decoder_layers(network)[1]), self._peers, self.device)
        taken = (lambda owner: None) if blocks is None else blocks.take
        bind_weights(network, tensors, self.device, self.folder, quantized if self.nf4 else as_it_is, taken)
        tensors.place(self.device, self.dtype)  # which lets go of those that were read last
        model = LanguageModel(network, info, self.device, self.dtype, weights_digest(self.folder), blocks)
        try:
            yield model
        finally:
            model.release()

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def model_hash(self) -> str | None:
        return None
