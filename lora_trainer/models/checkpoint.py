"""Lends a model from a file: one .safetensors, .ckpt or .gguf, or a diffusers folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_trainer.devices import free_memory
from lora_trainer.errors import UserError, concerning
from lora_trainer.files import sha256_file
from lora_trainer.models.base import Lender, LentModel, ModelInfo, Room
from lora_trainer.models.detect import detect
from lora_trainer.models.families import choose, claiming, families, get_family
from lora_trainer.models.family import Family
from lora_trainer.models.hints import Hints, read_json
from lora_trainer.models.quantize import quantize
from lora_trainer.models.sharding import Peers
from lora_trainer.models.tensors import Source, Tensors, open_source


class FileLender(Lender):
    """See ``Lender``. Nothing else uses the weights, so a turn costs nothing.

    path: a .safetensors, .ckpt or .gguf file, or a diffusers folder.
    weight_dtype: number format to keep the weights in; None keeps them as stored. On the CPU, weights that are stored
        in this format are mapped from the file instead of copied. The VAE's are kept as stored: it computes in fp32.
    base_precision: the setting; what fp8 and nf4 quantize is quantized as it is read.
    offload_blocks: so many blocks wait in main memory; ``offload`` may change it.
    peers: the processes that keep the denoiser's blocks together; None keeps them whole.
    compute_dtype: number format to compute in; by default ``weight_dtype`` (fp32 where that is None).
    vae: file of another VAE to use instead of the checkpoint's own. text_encoders: files of text encoders, for a family
        whose checkpoints lack them. complete: False for one that is only described, and that somebody else completes.
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
        text_encoders: Sequence[Path | str] = (),
        complete: bool = True,
        base_precision: str = "stored",
        offload_blocks: int = 0,
        peers: Peers | None = None,
    ):
        self.path = Path(path)
        self.device = torch.device(device)
        self.weight_dtype = weight_dtype
        self.compute_dtype = compute_dtype or weight_dtype or torch.float32
        self.clip_skip = clip_skip
        self.base_precision, self.offload_blocks = base_precision, offload_blocks
        self._peers = peers
        self._vae, self._complete = vae, complete
        self._text_encoders = tuple(Path(path) for path in text_encoders)
        self._v_prediction = v_prediction
        self._zero_terminal_snr = zero_terminal_snr
        self._tokenizer_dirs = tuple(tokenizer_dirs)
        self._described: ModelInfo | None = None
        self._hash: str | None = None
        self._lent: LentModel | None = None

    def describe(self) -> ModelInfo:
        """Reads only the table of contents of a .safetensors; a .ckpt has none and is read whole.

        An SD 2 file that does not say what it predicts is asked: its UNet runs once, on 8x8 latents.
        """
        return self._described or self._open()[1]

    @contextmanager
    def borrow(self) -> Iterator[LentModel]:
        """Builds the model. Raises ``UserError`` when the file is none that can be trained."""
        tensors, info = self._open()
        family = get_family(info.family)
        places = [path if path.is_dir() else path.parent for path in (self.path, *self._text_encoders)]
        tokenizer = family.tokenizer([*self._tokenizer_dirs, self.path / "tokenizer", *places])
        self._place(tensors, family)
        model = family.build(
            tensors,
            info.architecture,
            tokenizer,
            info=info,
            device=self.device,
            compute_dtype=self.compute_dtype,
            clip_skip=self.clip_skip,
            reload=True,
            **({"offload_blocks": self.offload_blocks} if self.offload_blocks else {}),
            **({"peers": self._peers} if self._peers is not None else {}),
        )
        self._place(tensors, family)  # which lets go of the tensors that were read last
        self._lent = model
        try:
            yield model
        finally:
            self._lent = None
            model.release("vae", "text_encoders", "unet")  # whoever still holds the model holds no weights

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def rest(self) -> Iterator[None]:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # somebody else may need the memory inside
        yield

    def make_room(self) -> None:
        """Nobody else's things are on the device, but parts of the model that a step does not need may be."""
        if self._lent is not None:
            self._lent.make_room()

    def room(self) -> Room | None:
        return Room(free_memory(self.device)) if self.device.type == "cuda" else None

    def room_for_blocks(self) -> int | None:
        offloads = get_family(self.describe().family).offloads and self._peers is None
        return free_memory(self.device) if offloads and self.device.type == "cuda" else None

    def offload(self, blocks: int) -> None:
        self.offload_blocks = blocks

    def model_hash(self) -> str | None:
        """SHA-256 of the file, read once; None for a folder."""
        if self._hash is None and self.path.is_file():
            self._hash = sha256_file(self.path)
        return self._hash

    def architecture(self) -> Any:
        """What the file says of the model, also of one without a VAE. Raises ``UserError`` when it is none."""
        return self._read()[1]

    def _place(self, tensors: Tensors, family: Family) -> None:
        def quantized(name: str, tensor: Tensor) -> Tensor:
            ours = family.in_blocks(name) and name.endswith(".weight") and tensor.dim() == 2
            return quantize(tensor, self.base_precision) if ours else tensor

        made = None if self.base_precision == "stored" else quantized
        tensors.place(self.device, self.weight_dtype, as_stored=family.as_stored, quantize=made)

    def _open(self) -> tuple[Tensors, ModelInfo]:
        tensors, architecture, hints = self._read()
        family = get_family(architecture.family)
        if self.base_precision != "stored" and not family.quantized:
            raise UserError(
                f"{family.title} is not trained on quantized weights.",
                field="base_precision",
                remedy="Use stored. FLUX.1, Chroma and SD 3 can be quantized.",
            )
        if self.base_precision != "stored" and self.path.suffix.lower() == ".gguf":
            raise UserError(f"{self.path.name} is quantized already.", field="base_precision", remedy="Use stored.")
        if self.offload_blocks and not family.offloads:
            raise UserError(
                f"{family.title} is not trained with blocks in main memory.",
                field="offload_blocks",
                remedy="Use auto. FLUX.1, Chroma and SD 3 can be.",
            )
        if self._complete:
            family.check_complete(architecture, self.path.name)
        if self._described is None:
            self._described = self._info(tensors, architecture, hints)
        return tensors, self._described

    def _read(self) -> tuple[Tensors, Any, Hints]:
        source, hints = None, Hints()
        if self.path.is_dir():
            tensors, hints = read_folder(self.path)
        else:
            source = open_source(self.path)
            tensors = single_file(source)
        if (family := claiming(tensors.shapes)) is not None:
            if source is not None:
                hints = family.file_hints(self.path, source.shapes, source.metadata)
            if self._vae:
                with concerning("vae"):
                    family.add_vae(tensors, Path(self._vae))
            for path in self._text_encoders:
                with concerning("text_encoders"):
                    family.add_text_encoders(tensors, path)
        architecture = detect(
            tensors.shapes,
            dtypes=tensors.dtypes,
            source=self.path.name,
            hints=hints,
            metadata=source.metadata if source is not None else None,
        )
        return tensors, architecture, hints

    def _info(self, tensors: Tensors, architecture: Any, hints: Hints) -> ModelInfo:
        prediction, family = hints.prediction_type, get_family(architecture.family)
        if self._v_prediction is not None and "v_prediction" not in family.unused:
            prediction = "v_prediction" if self._v_prediction else "epsilon"
        elif prediction is None:
            prediction = family.prediction_type(tensors, architecture)
        zero = bool(hints.zero_terminal_snr) if self._zero_terminal_snr is None else self._zero_terminal_snr
        stored = family.stored_bytes(tensors.shapes, tensors.dtypes)
        return ModelInfo(architecture.family, prediction, self.path.stem, self.path, zero, architecture, stored)


def single_file(source: Source) -> Tensors:
    """A single file's tensors under the names that its family knows."""
    tensors = Tensors()
    for name in source.shapes:
        usual = name
        for family in families().values():
            usual = family.usual_name(usual, source.shapes)
        tensors.add(usual, source, name)
    return tensors


def read_folder(folder: Path) -> tuple[Tensors, Hints]:
    """The tensors of a diffusers folder, and what its configuration says. Raises ``UserError``."""
    for family in families().values():
        if (found := family.read_folder(folder)) is not None:
            return found
    kind = read_json(folder / "model_index.json").get("_class_name")
    message = f"{folder.name} is not a diffusers model folder."
    if kind:
        message = f"{folder.name} holds a {kind}, which cannot be trained here."
    raise UserError(message, field="base_model", remedy=choose())
