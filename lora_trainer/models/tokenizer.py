"""CLIP's tokenizer without a network.

The vocabulary (49,408 entries, the same for CLIP and open_clip) is not part of this package. It comes from the lender
or a folder, else from the local cache of transformers, else from the installed open_clip package.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from lora_trainer.errors import UserError

_CACHED_REPOSITORIES = (
    "openai/clip-vit-large-patch14",
    "openai/clip-vit-base-patch32",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
)
_MERGES = 49152 - 256 - 2  # as open_clip and CLIP cut the list of merges in their file


class Tokenizer:
    """Text to token ids, without start and end token.

    load: gives a transformers CLIPTokenizer of our own. It is asked when there is text to read: the table takes 20 MB,
    and a run that finds its captions encoded needs none.
    """

    def __init__(self, load: Callable[[], Any]):
        self._load = load

    @cached_property
    def _source(self) -> Any:
        source = self._load()
        # Captions are cut into chunks here; transformers' warning about long ones would only confuse.
        source.model_max_length = int(1e9)
        return source

    @property
    def bos(self) -> int:
        return self._source.bos_token_id

    @property
    def eos(self) -> int:
        return self._source.eos_token_id

    @cached_property
    def comma(self) -> int:
        return self.ids(",")[-1]

    def ids(self, text: str) -> list[int]:
        return list(self._source(text, add_special_tokens=False, truncation=False)["input_ids"])

    def pieces(self, text: str) -> list[str]:
        """The text of each token, for people: a word's last piece ends with a blank."""
        names = self._source.convert_ids_to_tokens(self.ids(text))
        return [name.replace("</w>", " ") for name in names]


def load_tokenizer(folders: Iterable[Path] = ()) -> Tokenizer:
    """The first tokenizer found in ``folders`` (vocab.json and merges.txt), transformers' cache, or open_clip.

    Raises:
        UserError: there is none; says what to install. One that cannot be read says so when it is needed.
    """
    for folder in folders:
        if all((Path(folder) / name).is_file() for name in ("vocab.json", "merges.txt")):
            return Tokenizer(partial(_read, Path(folder)))
    return _installed_tokenizer()


@lru_cache(maxsize=1)
def _installed_tokenizer() -> Tokenizer:
    if (folder := _cached_folder()) is not None:
        return Tokenizer(partial(_read, folder))
    if (vocabulary := _open_clip_vocabulary()) is not None:
        return Tokenizer(partial(_read_merges, vocabulary))
    raise UserError(
        "CLIP's vocabulary was not found on this machine.",
        remedy="Install it with: pip install open_clip_torch",
    )


def _read(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    try:
        # A path to an existing folder is never looked up on the network.
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for damaged files
        raise UserError(f"The tokenizer in {folder} cannot be read: {error}.") from error


def _cached_folder() -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for repository in _CACHED_REPOSITORIES:
        files = [try_to_load_from_cache(repository, name) for name in ("vocab.json", "merges.txt")]
        if all(isinstance(file, str) for file in files):
            return Path(files[0]).parent
    return None


def _open_clip_vocabulary() -> Path | None:
    """open_clip's vocabulary file, found without importing the package (which imports torchvision and more)."""
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
        if path.is_file():
            return path
    return None


def _read_merges(vocabulary: Path) -> Any:
    with tempfile.TemporaryDirectory(prefix="clip-vocabulary-") as temporary:
        _unpack(vocabulary, Path(temporary))
        return _read(Path(temporary))


def _unpack(vocabulary: Path, folder: Path) -> None:
    """Write vocab.json and merges.txt, built from CLIP's list of merges as CLIP's own tokenizer builds them."""
    with gzip.open(vocabulary, "rt", encoding="utf-8") as handle:
        merges = handle.read().split("\n")[1 : _MERGES + 1]
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary_table = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary_table), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def _byte_letters() -> list[str]:
    """A printable letter for every byte, in the order of CLIP's vocabulary (GPT-2's bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]
