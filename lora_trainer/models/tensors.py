"""Tensors of a file, handed out one by one: mapped from the disk where they can be used as they are, else converted."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lora_trainer.devices import torch_version
from lora_trainer.errors import UserError
from lora_trainer.models import gguf
from lora_trainer.models.header import DTYPES, SIZES, read_header
from lora_trainer.storage import Scaled, pack

_RECENT = 4  # fused tensors are asked for once for each of their parts; no more than these are remembered


class Source(Protocol):
    """A file's tensors. ``dtypes``: the safetensors names of their number formats."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> Tensor: ...


class SafetensorsSource:
    """A .safetensors file."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._header = read_header(self.path)
        self.shapes, self.dtypes = self._header.shapes, self._header.dtypes
        self.metadata = self._header.metadata

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """The tensor; on the CPU and without a change of format it is the file itself, mapped into memory."""
        entry = self._header.entries[name]
        stored = DTYPES.get(entry.dtype)
        if stored is None:
            message = f"{self.path.name}: {name} has the number format {entry.dtype}, which cannot be trained on."
            raise UserError(message)
        if not stored.is_floating_point or stored.itemsize == 1:
            dtype = None  # fp8 stays what it is: only files that are trained as they are hold it
        if entry.start == entry.stop:
            return torch.empty(entry.shape, dtype=dtype or stored, device=device)
        try:
            if device.type == "cpu" and dtype in (None, stored) and entry.start % stored.itemsize == 0:
                # A map of its own for each tensor, so that its pages leave memory as soon as nobody holds it.
                data = np.memmap(self.path, mode="c", offset=entry.start, shape=(entry.stop - entry.start,))
                return torch.from_numpy(data).view(stored).reshape(entry.shape)
            # Read instead of mapped: converting would keep the mapped pages in memory next to the converted copy.
            data = np.fromfile(self.path, np.uint8, entry.stop - entry.start, offset=entry.start)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path.name} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        if len(data) != entry.stop - entry.start:
            raise UserError(f"{self.path.name} became shorter while it was read.")
        return torch.from_numpy(data).view(stored).reshape(entry.shape).to(device, dtype or stored)


class PickleSource:
    """A .ckpt, .pt or .bin file, read with ``weights_only`` so that it cannot run code.

    Before torch 2.6 it can all the same (CVE-2025-32434), so there no such file is read.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self._tensors = self._load()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        names = {dtype: name for name, dtype in DTYPES.items()}
        self.dtypes = {name: names.get(tensor.dtype, str(tensor.dtype)) for name, tensor in self._tensors.items()}

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        tensor = self._tensors[name]
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    def _load(self) -> dict[str, Tensor]:
        if torch_version() < (2, 6):
            raise UserError(
                f"{self.path.name} is not opened: with torch {torch.__version__} a file of this kind could run code.",
                remedy="Convert it to .safetensors, choose the .safetensors version of this model, or update torch to "
                "2.6 or newer. A WebUI's loaded model can be trained whatever its file is.",
            )
        try:
            # From torch.serialization, because WebUIs replace torch.load with one that returns None when it refuses.
            content = torch.serialization.load(
                str(self.path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(self.path)
            )
        except FileNotFoundError as error:
            raise UserError(f"{self.path.name} does not exist.") from error
        except pickle.UnpicklingError as error:
            with open(self.path, "rb") as file:
                is_checkpoint = zipfile.is_zipfile(self.path) or file.read(1) == pickle.PROTO
            if not is_checkpoint:
                raise UserError(
                    f"{self.path.name} is no PyTorch checkpoint, whatever its ending says.",
                    remedy="Rename it if it is a .safetensors file, else download or copy it again.",
                ) from error
            raise UserError(
                f"{self.path.name} holds more than weights and is refused, because opening it could run code.",
                remedy="Convert it to .safetensors, or choose the .safetensors version of this model.",
            ) from error
        except Exception as error:
            raise UserError(
                f"{self.path.name} is damaged or is not a PyTorch checkpoint ({type(error).__name__}).",
                remedy="Choose the .safetensors version of this model.",
            ) from error
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        if not isinstance(content, dict):
            raise UserError(f"{self.path.name} holds no table of tensors.", remedy="Choose a base model.")
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if not tensors:
            # Textual inversions keep their tensor inside a table of their own.
            raise UserError(
                f"{self.path.name} is not a base model"
                + (" but a textual inversion" if "string_to_param" in content else "")
                + ".",
                remedy="Choose a base model.",
            )
        return tensors


class Tensors(Mapping[str, Tensor]):
    """Tensors of one or more files under the names that ``assemble`` knows.

    Each is read when it is asked for, onto the device and in the number format of ``place`` (at first: the CPU, as
    stored).
    """

    def __init__(self) -> None:
        self._where: dict[str, tuple[Source, str]] = {}
        self._recent: OrderedDict[str, Tensor] = OrderedDict()
        self.place(torch.device("cpu"), None)

    def place(
        self,
        device: torch.device,
        dtype: torch.dtype | None,
        as_stored: str | None = None,
        quantize: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        """From now on, read onto ``device`` and in ``dtype`` (None: as stored).

        as_stored: prefix of the names that keep the number format of the file. quantize: what a tensor of this name is
        handed out as, made when it is there.
        """
        self._device, self._dtype, self._as_stored, self._quantize = device, dtype, as_stored, quantize
        self._recent.clear()

    def add(self, name: str, source: Source, stored_name: str) -> None:
        self._where[name] = (source, stored_name)

    def discard(self, prefix: str) -> None:
        """Forget every name that starts with ``prefix``."""
        self._where = {name: where for name, where in self._where.items() if not name.startswith(prefix)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: source.shapes[stored] for name, (source, stored) in self._where.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: source.dtypes[stored] for name, (source, stored) in self._where.items()}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._recent:
            return self._recent[name]
        source, stored = self._where[name]
        keeps = self._as_stored is not None and name.startswith(self._as_stored)
        tensor = source.read(stored, self._device, None if keeps else self._dtype)
        if tensor.element_size() == 1 and tensor.is_floating_point():
            stem = name.removesuffix("weight")
            for scale in (f"{stem}scale_weight", f"{stem}weight_scale"):
                if scale in self._where:
                    if self[scale].numel() != 1:
                        raise UserError(
                            f"{name} is fp8 with a scale for each row, which cannot be trained on.",
                            field="base_model",
                            remedy="Choose this model in bf16, fp16, or fp8 with one scale for each weight.",
                        )
                    pack(tensor, Scaled(self[scale].float()))
        if self._quantize is not None:
            tensor = self._quantize(name, tensor)
        self._recent[name] = tensor
        if len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def stored_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of a ``Source``. dtype: the name of its number format there."""
    return gguf.stored_size(dtype, shape) if dtype.startswith(gguf.PREFIX) else math.prod(shape) * SIZES.get(dtype, 0)


def open_source(path: Path) -> Source:
    """The tensors of a file, by its ending. Raises ``UserError`` when it cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path.name} does not exist or is not a file.", remedy="Check the path.")
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        return PickleSource(path)
    with open(path, "rb") as file:
        if file.read(len(gguf.MAGIC)) == gguf.MAGIC:
            return gguf.GgufSource(path)
    return SafetensorsSource(path)
