"""Terms of captions translated for CLIP, which barely reads Chinese, by a mapping file that the user keeps."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from lora_trainer.dataset.grammar import Caption, Item, Span, escape, format, parse
from lora_trainer.errors import UserError

_LONGEST_YAML, _LONGEST_TABLE = 1 << 20, 16 << 20  # bytes; YAML takes ten seconds a megabyte
_REMEDY = "Write one term a line: '中文: english' in a .yaml file, or '中文,english' in a .csv or .tsv file."


class Terms(dict[str, str]):
    """A mapping with an index: of a hundred thousand terms a caption holds a few."""

    def __init__(self, mapping: Mapping[str, str]):
        super().__init__(mapping)
        self._by_letters = {escape(term).casefold(): term for term in mapping if term}
        self._lengths = sorted({len(letters) for letters in self._by_letters})

    def that_may_stand_in(self, text: str) -> list[str]:
        """The terms whose letters stand in the text, in any case, the longest first."""
        text = text.casefold()
        terms = {
            self._by_letters[letters]
            for length in self._lengths
            for place in range(len(text) - length + 1)
            if (letters := text[place : place + length]) in self._by_letters
        }
        return sorted(terms, key=lambda term: (-len(term), term))


def load_mapping(path: str | Path) -> dict[str, str]:
    """Read term → translation from YAML (``中文: english``) or CSV/TSV (two columns, UTF-8).

    Raises:
        UserError: the file is missing, not UTF-8, or holds something else than pairs.
    """
    path = Path(path)
    try:
        longest = _LONGEST_YAML if path.suffix.lower() in (".yaml", ".yml") else _LONGEST_TABLE
        if path.exists() and not path.is_file():  # reading a pipe or a device may never end
            raise UserError(f"The mapping file {path} is no file.", remedy=_REMEDY)
        if path.stat().st_size > longest:
            raise UserError(f"The mapping file {path} is larger than {longest >> 20} MB.", remedy=_REMEDY)
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"The mapping file {path} does not exist.", remedy=_REMEDY) from None
    except UnicodeDecodeError:
        raise UserError(f"The mapping file {path} is not UTF-8.", remedy="Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"The mapping file {path} cannot be read: {error.strerror or error}.") from error

    if path.suffix.lower() in (".csv", ".tsv"):
        pairs = _read_table(path, text)
    elif path.suffix.lower() in (".yaml", ".yml"):
        pairs = _read_yaml(path, text)
    else:
        raise UserError(f"The mapping file {path} is neither .yaml, .csv nor .tsv.", remedy=_REMEDY)
    return Terms({term: english for term, english in ((a.strip(), b.strip()) for a, b in pairs) if term and english})


def translate(caption: Caption, mapping: Mapping[str, str]) -> Caption:
    """Replace the mapping's terms in the caption's text, longest first; marks and weights stay.

    Chinese terms are found anywhere, terms in Latin letters as whole words and in any case.
    """
    known = mapping if isinstance(mapping, Terms) else Terms(mapping)
    terms = known.that_may_stand_in("\n".join(span.text for item in caption.items for span in item.spans))
    if not terms:
        return caption
    by_source = {escape(term).casefold(): escape(mapping[term]) for term in terms}
    pattern = re.compile("|".join(_whole_words(escape(term)) for term in terms), re.IGNORECASE)

    def english(match: re.Match[str]) -> str:
        # Chinese terms follow each other without spaces; English words must not.
        before = " " if match.start() and _is_word(match.string[match.start() - 1]) else ""
        after = " " if _is_word(match.string[match.end() : match.end() + 1]) else ""
        return before + by_source[match.group().casefold()] + after

    items = tuple(
        Item(tuple(replace(span, text=_single_spaces(span, pattern.sub(english, span.text))) for span in item.spans))
        for item in caption.items
    )
    return parse(format(Caption(items, caption.keep)), caption.wildcards)


def _read_yaml(path: Path, text: str) -> list[tuple[str, str]]:
    try:
        # BaseLoader reads every value as text: 'no' and '1990' are words here.
        content = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f", line {line + 1}" if line is not None else ""
        raise UserError(f"The mapping file {path}{where} is not YAML.", remedy=_REMEDY) from error
    if content in (None, ""):
        return []
    if not isinstance(content, dict):
        raise UserError(f"The mapping file {path} holds no 'term: translation' pairs.", remedy=_REMEDY)
    for term, english in content.items():
        if not isinstance(term, str) or not isinstance(english, str):
            raise UserError(f"The mapping file {path}: the translation of {term!r} is not a text.", remedy=_REMEDY)
    return list(content.items())


def _read_table(path: Path, text: str) -> list[tuple[str, str]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    pairs = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                if len(row) < 2:
                    raise UserError(
                        f"The mapping file {path}, line {reader.line_num}, has one column instead of two.",
                        remedy=_REMEDY,
                    )
                pairs.append((row[0], row[1]))
    except csv.Error as error:
        raise UserError(f"The mapping file {path}, line {reader.line_num}: {error}.", remedy=_REMEDY) from error
    return pairs


def _whole_words(source: str) -> str:
    before = r"(?<![A-Za-z0-9_])" if re.match(r"[A-Za-z0-9_]", source) else ""
    after = r"(?![A-Za-z0-9_])" if re.search(r"[A-Za-z0-9_]$", source) else ""
    return before + re.escape(source) + after


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _single_spaces(span: Span, text: str) -> str:
    """The blank between two terms that were both translated, once."""
    return text if text == span.text else re.sub(r"  +", " ", text)
