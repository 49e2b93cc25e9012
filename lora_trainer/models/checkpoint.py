"""Lends a model from a file: one .safetensors or .ckpt, or a diffusers folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from lora_trainer.errors import UserError, concerning
from lora_trainer.files import sha256_file
from lora_trainer.models.base import Lender, ModelInfo
from lora_trainer.models.casting import cast_layers
from lora_trainer.models.detect import UNET, VAE, detect
from lora_trainer.models.families.unet.architecture import Architecture, Hints
from lora_trainer.models.families.unet.binding import build_unet
from lora_trainer.models.families.unet.folder import add_vae_file, read_folder
from lora_trainer.models.families.unet.model import DiffusionModel, assemble
from lora_trainer.models.hints import file_hints
from lora_trainer.models.tensors import Source, Tensors, open_source
from lora_trainer.models.tokenizer import load_tokenizer

_SD1_TEXT = "cond_stage_model.transformer."
_TURBO_TEXT = "conditioner.embedders.0.model."


class FileLender(Lender):
    """See ``Lender``. Nothing else uses the weights, so a turn costs nothing.

    path: a .safetensors or .ckpt file, or a diffusers folder.
    weight_dtype: number format to keep the weights in; None keeps them as stored. On the CPU, weights that are stored
        in this format are mapped from the file instead of copied. The VAE's are kept as stored: it computes in fp32.
    compute_dtype: number format to compute in; by default ``weight_dtype`` (fp32 where that is None).
    vae: file of another VAE to use instead of the checkpoint's own.
    v_prediction, zero_terminal_snr: override what the file says.
    tokenizer_dirs: folders to look for CLIP's vocabulary in, before the usual places.
    """

    def __init__(
        self,
        path: Path | str,
        device: torch.device | str = "cpu",
        weight_dtype: torch.dtype | None = torch.float32,
        vae: Path | str | None = None,
        v_prediction: bool | None = None,
        zero_terminal_snr: bool | None = None,
        tokenizer_dirs: Sequence[Path] = (),
        compute_dtype: torch.dtype | None = None,
        clip_skip: int = 1,
    ):
        self.path = Path(path)
        self.device = torch.device(device)
        self.weight_dtype = weight_dtype
        self.compute_dtype = compute_dtype or weight_dtype or torch.float32
        self.clip_skip = clip_skip
        self._vae = vae
        self._v_prediction = v_prediction
        self._zero_terminal_snr = zero_terminal_snr
        self._tokenizer_dirs = tuple(tokenizer_dirs)
        self._described: ModelInfo | None = None
        self._hash: str | None = None

    def describe(self) -> ModelInfo:
        """Reads only the table of contents of a .safetensors; a .ckpt has none and is read whole.

        An SD 2 file that does not say what it predicts is asked: its UNet runs once, on 8x8 latents.
        """
        if self._described is None:
            self._open()
        return self._described

    @contextmanager
    def borrow(self) -> Iterator[DiffusionModel]:
        """Builds the model. Raises ``UserError`` when the file is none that can be trained."""
        tensors = self._open()
        info = self._described
        tokenizer = load_tokenizer([*self._tokenizer_dirs, self.path / "tokenizer"])
        tensors.place(self.device, self.weight_dtype, as_stored=VAE)
        model = assemble(
            tensors,
            info.architecture,
            tokenizer,
            info=info,
            device=self.device,
            compute_dtype=self.compute_dtype,
            clip_skip=self.clip_skip,
        )
        del tensors
        try:
            yield model
        finally:
            model.release("vae", "text_encoders", "unet")  # whoever still holds the model holds no weights

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def model_hash(self) -> str | None:
        """SHA-256 of the file, read once; None for a folder."""
        if self._hash is None and self.path.is_file():
            self._hash = sha256_file(self.path)
        return self._hash

    def architecture(self) -> Architecture:
        """What the file says of the model, also of one without a VAE. Raises ``UserError`` when it is none."""
        return self._read()[1]

    def _open(self) -> Tensors:
        tensors, architecture, hints = self._read()
        if architecture.vae is None:
            raise UserError(f"{self.path} has no VAE.", field="vae", remedy="Name a VAE file with vae: …")
        if self._described is None:
            self._described = self._info(tensors, architecture, hints)
        return tensors

    def _read(self) -> tuple[Tensors, Architecture, Hints]:
        if self.path.is_dir():
            tensors, hints = read_folder(self.path)
        else:
            source = open_source(self.path)
            tensors, hints = single_file(source), file_hints(self.path, source.shapes, source.metadata)
        if self._vae:
            with concerning("vae"):
                add_vae_file(tensors, Path(self._vae))
        return tensors, detect(tensors.shapes, dtypes=tensors.dtypes, source=self.path, hints=hints), hints

    def _info(self, tensors: Tensors, architecture: Architecture, hints: Hints) -> ModelInfo:
        prediction = hints.prediction_type
        if self._v_prediction is not None:
            prediction = "v_prediction" if self._v_prediction else "epsilon"
        elif prediction is None:
            prediction = (
                "v_prediction" if architecture.family == "sd2" and predicts_v(tensors, architecture) else "epsilon"
            )
        zero = bool(hints.zero_terminal_snr) if self._zero_terminal_snr is None else self._zero_terminal_snr
        return ModelInfo(architecture.family, prediction, self.path.stem, self.path, zero, architecture)


@torch.no_grad()
def predicts_v(tensors: Tensors, architecture: Architecture) -> bool:
    """Whether an SD 2 UNet predicts v. Shapes do not tell.

    At the noisiest step, latents of 0.5 are all noise to a model that predicts noise, and it answers with them; one
    that predicts v answers with the negative picture that it sees in them. The test and its threshold are those of
    the WebUI (``is_using_v_parameterization_for_sd2``).
    """
    unet, bindings = build_unet(architecture.unet)
    cast_layers(unet, torch.float32)
    for binding in bindings:
        binding.bind(tensors, None)
    latents = torch.full((1, 4, 8, 8), 0.5)
    context = torch.zeros(1, 2, architecture.unet.context_dim)
    answer = unet.eval()(latents, torch.tensor([999]), encoder_hidden_states=context, return_dict=False)[0]
    return (answer - latents).mean().item() < -1


def single_file(source: Source) -> Tensors:
    """A single file's tensors under the usual names; some files deviate from these."""
    tensors = Tensors()
    turbo = f"{UNET}label_emb.0.0.weight" not in source.shapes
    for name in source.shapes:
        usual = name
        if name.startswith(_SD1_TEXT) and name[len(_SD1_TEXT) :].startswith(
            ("embeddings.", "encoder.", "final_layer_norm.")
        ):
            usual = f"{_SD1_TEXT}text_model.{name[len(_SD1_TEXT) :]}"  # saved by transformers before 4.0
        elif turbo and name.startswith(_TURBO_TEXT):
            usual = f"cond_stage_model.model.{name[len(_TURBO_TEXT) :]}"  # SD-Turbo: SD 2 in sgm's names
        tensors.add(usual, source, name)
    return tensors
