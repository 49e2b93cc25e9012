"""What goes into and comes out of the editor's routes. Written so that pydantic 1 and 2 understand it alike."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from lora_trainer.api.schemas import ProblemModel


class OpenModel(BaseModel):
    """folder: a dataset's name or, where callers may name them, a path. trigger_word: for checks and previews."""

    folder: str
    metadata_path: str | None = None
    trigger_word: str = ""


class TaskModel(BaseModel):
    """kind: check or caption. status: running, finished, cancelled or failed."""

    kind: str
    status: str
    done: int
    total: int
    error: ProblemModel | None = None
    warnings: list[str] = []
    result: dict[str, Any] = {}


class EditorModel(BaseModel):
    """An open folder. revision grows with every change; unsaved: how many pictures differ from the files; undo, redo:
    what the next one would do, null when there is none. caption_problems: what is wrong with the caption files.
    report_stale: captions changed since the last check."""

    id: str
    name: str
    pictures: int
    captioned: int
    excluded: int
    revision: int
    unsaved: int
    undo: str | None = None
    redo: str | None = None
    trigger_word: str = ""
    caption_problems: list[str] = []
    task: TaskModel | None = None
    has_report: bool = False
    report_stale: bool = False


class FilterModel(BaseModel):
    """All that is given must hold."""

    text: str = ""
    tags: list[str] = []
    missing: list[str] = []
    core: str = ""
    mood: str = ""
    problem: str = ""
    state: str = ""


class RowModel(BaseModel):
    """problems: kinds of the last report's findings. crop: left, top, right, bottom as shares of the turned picture."""

    file: str
    caption: str
    unsaved: bool
    excluded: bool
    rotate: int
    crop: list[float] | None = None
    problems: list[str] = []
    version: str


class PageModel(BaseModel):
    total: int
    offset: int
    rows: list[RowModel]
    state: EditorModel


class EditModel(BaseModel):
    """kind: set, add, remove, replace, move, mark or regex; see the documentation of ``dataset.edits.Edit``.

    files: these pictures; or filter: those that pass it; an empty filter is all of them.
    """

    kind: str
    value: str = ""
    tags: list[str] = []
    place: str = "end"
    pattern: str = ""
    ignore_case: bool = False
    files: list[str] | None = None
    filter: FilterModel | None = None


class SetModel(BaseModel):
    """Captions by picture, as one step."""

    captions: dict[str, str]


class PicturesEditModel(BaseModel):
    """What is null stays; ``clear_crop`` takes the crop away. rotate is absolute, in degrees clockwise."""

    files: list[str]
    excluded: bool | None = None
    rotate: int | None = None
    crop: list[float] | None = None
    clear_crop: bool = False


class ChangedModel(BaseModel):
    """rows: the pictures that the step changed, as they are now (at most 200); changed: how many there are."""

    changed: int
    label: str
    rows: list[RowModel]
    state: EditorModel


class SaveModel(BaseModel):
    """force: write over what somebody else changed in the same captions."""

    force: bool = False


class ConflictModel(BaseModel):
    file: str
    yours: str
    theirs: str


class SavedModel(BaseModel):
    """conflicts: captions that somebody else changed as well; nothing was written then. backup: its number."""

    saved: bool
    files: int = 0
    backup: int | None = None
    conflicts: list[ConflictModel] = []
    state: EditorModel


class FilesModel(BaseModel):
    files: list[str]


class ThumbnailsModel(BaseModel):
    pictures: dict[str, str]


class TagModel(BaseModel):
    text: str
    count: int
    share: float
    weight: float
    core: bool
    mood: bool


class SuggestionModel(BaseModel):
    file: str
    tag: str
    because: str
    confidence: float
    support: int


class SynonymModel(BaseModel):
    often: str
    seldom: str
    reason: str


class TagsModel(BaseModel):
    """tags: frequency table and cloud. suggestions: tags that pictures likely lack; nothing is applied by itself."""

    total: int
    tags: list[TagModel]
    suggestions: list[SuggestionModel]
    synonyms: list[SynonymModel]


class CheckModel(BaseModel):
    """resolution: side in pixels, or ``768x512``. trigger_word: that captions should have; "" for the one known."""

    resolution: str = "512"
    trigger_word: str = ""


class FixModel(BaseModel):
    name: str
    label: str
    safe: bool


class FindingModel(BaseModel):
    index: int
    file: str
    kind: str
    severity: str
    message: str
    remedy: str
    files: list[str] = []
    fixes: list[FixModel] = []


class ReportModel(BaseModel):
    findings: list[FindingModel]
    images: int
    captions: int
    buckets: list[dict[str, Any]]
    steps_preview: dict[str, int]
    stops_training: bool
    stale: bool


class ApplyFixModel(BaseModel):
    """index: of the finding in the last report, and the fix's name; or all that is safe."""

    index: int | None = None
    name: str = ""
    all_safe: bool = False


class CaptionModel(BaseModel):
    """How to caption; the words are those of ``python -m lora_trainer caption --help``. files: null for all."""

    captioner: str = "auto"
    mode: str = "keep"
    files: list[str] | None = None
    template: str = "{caption}"
    trigger_word: str = ""
    kind: str = ""
    keep_all: bool = False
    blacklist: list[str] = []
    replacements: dict[str, str] = {}
    max_tags: int = 40
    threshold: float = 0.35
    character_threshold: float = 0.6
    batch_size: int = 8


class CaptionerModel(BaseModel):
    name: str
    title: str
    problem: str | None = None
    remedy: str | None = None


class KindModel(BaseModel):
    kind: str
    title: str
    hint: str


class CaptionersModel(BaseModel):
    captioners: list[CaptionerModel]
    kinds: list[KindModel]
    modes: list[str]
    template: str


class PreviewModel(BaseModel):
    caption: str
    trigger_word: str = ""
    weighted: bool = False


class PreviewedModel(BaseModel):
    """train: what the tokenizer reads; prompt: for the WebUI. tokens: its pieces; null, and count an estimate, without
    CLIP's vocabulary. chunks: of 75 tokens."""

    train: str
    prompt: str
    core: list[str]
    tokens: list[str] | None = None
    count: int
    chunks: int
    warnings: list[str]


class ExportModel(BaseModel):
    """format: csv, jsonl, txt or caption."""

    format: str


class ExportedModel(BaseModel):
    files: int
    backup: int | None = None
    note: str = ""
    state: EditorModel


class BackupModel(BaseModel):
    number: int
    time: float
    files: list[str]


class BackupsModel(BaseModel):
    backups: list[BackupModel]


class RestoreModel(BaseModel):
    number: int
