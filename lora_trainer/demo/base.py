"""The embedded default base model: a complete SD1-layout checkpoint, built from a small shipped file on first use.

Shipped is what was learned: the UNet, the text encoder, and the embeddings of the captions' words. The VAE and the
other token embeddings are constructed.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from lora_trainer.demo import networks, vae
from lora_trainer.errors import UserError
from lora_trainer.files import atomic_write, sha256_file

SHIPPED = Path(__file__).with_name("base.safetensors")
CACHE_VARIABLE = "LORA_TRAINER_CACHE"
CONSTRUCTION = 1
"""Counts changes of what is constructed, so that a cached checkpoint of an older version is not taken."""
UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = "cond_stage_model.transformer.text_model."
EMBEDDING_IDS, EMBEDDING_ROWS = "token_embedding.ids", "token_embedding.rows"
METADATA = {
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.architecture": "stable-diffusion-v1",
    "modelspec.title": "Drawn shapes (embedded default of sd-webui-lora-trainer)",
    "modelspec.prediction_type": "epsilon",
    "modelspec.resolution": "128x128",
    # Shapes of tensors do not tell the number of attention heads.
    "lora_trainer.architecture": json.dumps({"num_heads": 4, "text_heads": [4]}),
}


def cache_folder() -> Path:
    """Where built checkpoints live: $LORA_TRAINER_CACHE, else the user's cache folder."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "sd-webui-lora-trainer"


def build_base(path: Path | None = None) -> Path:
    """The checkpoint's path; it is written there first when it is missing (33 MB, fp16, a second or two).

    Without `path` it goes into `cache_folder()` under a name that holds the shipped file's hash, so that a new version
    of the package never meets an old file. The file appears complete or not at all.

    Raises:
        UserError: the shipped file is missing or damaged, or the folder cannot be written.
    """
    if not SHIPPED.is_file():
        raise UserError(
            f"{SHIPPED} is missing.", remedy="Install the package again, or train it: see demo/pretrain.py."
        )
    if path is None:
        key = hashlib.sha256(f"{sha256_file(SHIPPED)} {CONSTRUCTION}".encode()).hexdigest()[:12]
        path = cache_folder() / f"shapes-base-{key}.safetensors"
    if not path.is_file():
        _write(path)
    return path


def _write(path: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    # The library leaves the order of the metadata to chance; equal checkpoints must have equal hashes.
    from lora_trainer.adapters.tensor_file import serialize

    try:
        tensors = load_file(SHIPPED)
        ids, rows = tensors.pop(EMBEDDING_IDS), tensors.pop(EMBEDDING_ROWS)
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{SHIPPED} is damaged: {error}.", remedy="Install the package again.") from error
    table: np.ndarray = networks.constructed_embeddings().astype(np.float16)
    table[ids] = rows
    tensors[f"{TEXT}embeddings.token_embedding.weight"] = table
    tensors[f"{TEXT}embeddings.position_ids"] = np.arange(networks.CONTEXT_LENGTH, dtype=np.int64)[None]
    tensors |= {VAE + name: weight.astype(np.float16) for name, weight in vae.construct().items()}
    atomic_write(path, serialize({name: torch.from_numpy(value) for name, value in tensors.items()}, METADATA))
