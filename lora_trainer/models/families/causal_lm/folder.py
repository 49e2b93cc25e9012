"""The folder of a language model: its config.json, its weights, its tokenizer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_trainer.errors import UserError
from lora_trainer.models.hints import read_json
from lora_trainer.models.tensors import Tensors, open_source

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_DEPTH = 3
"""Folders are searched so far down: owner/name is usual."""
_PROBES, _PROBE_BYTES = 16, 4096


def is_language_model(base_model: str | Path) -> bool:
    """Whether it is a folder whose config.json names a causal language model."""
    if not base_model or not Path(base_model).is_dir():
        return False
    config = read_json(Path(base_model) / "config.json")
    classes = config.get("architectures")
    names = [str(name) for name in classes] if isinstance(classes, list) else []
    auto_map = config.get("auto_map")
    return any(name.endswith("ForCausalLM") for name in names) or (
        isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map
    )


def language_models_in(roots: Iterable[Path]) -> dict[str, Path]:
    """The folders of language models below ``roots``, by their paths from there, in the order of these names."""
    found: dict[str, Path] = {}
    for root in roots:
        for folder, subfolders, _ in os.walk(root, followlinks=True):
            path = Path(folder)
            inside = path.relative_to(root)
            if is_language_model(path):
                found.setdefault(path.name if path == root else inside.as_posix(), path)
                subfolders.clear()
            elif len(inside.parts) >= _DEPTH:
                subfolders.clear()
    return dict(sorted(found.items(), key=lambda entry: entry[0].casefold()))


def read_config(folder: Path) -> dict[str, Any]:
    """Raises UserError when the folder is not that of a language model."""
    if not is_language_model(folder):
        raise UserError(
            f"{folder.name} is no folder of a language model: its config.json names none.",
            field="base_model",
            remedy="Give a folder as transformers saves it, with config.json, tokenizer and .safetensors.",
        )
    return read_json(folder / "config.json")


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights, one or many. Raises UserError when there are none."""
    for name in _WEIGHTS:
        if (index := folder / f"{name}.index.json").is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise UserError(f"{index.name} names no files.", field="base_model", remedy="Copy the folder again.")
            return [folder / shard for shard in sorted({Path(str(shard)).name for shard in shards.values()})]
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(f"{folder.name} holds no {_WEIGHTS[0]}.", field="base_model", remedy="Copy the whole folder.")


def open_weights(folder: Path) -> Tensors:
    """The tensors of all files, each read when it is asked for. Raises UserError when one cannot be read."""
    tensors = Tensors()
    for path in weight_files(folder):
        source = open_source(path)
        for name in source.shapes:
            tensors.add(name, source, name)
    return tensors


def weights_digest(folder: Path) -> str:
    """Changes when the weights do: SHA-256 of the files' sizes and of some bytes of each."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        for probe in _probes(path):
            digest.update(probe)
    return digest.hexdigest()


def _probes(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        for place in range(_PROBES + 1):
            file.seek(max(0, size - _PROBE_BYTES) * place // _PROBES)
            yield file.read(_PROBE_BYTES)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer. Raises UserError when transformers cannot make one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
    # A damaged file, one that is missing, or one of a newer release: each raises what it likes.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"The tokenizer in {folder} cannot be read: {reason}", field="base_model", remedy="Copy the whole folder."
        ) from error
