"""What goes in and comes out, for the reader of ``/docs``. Written so that pydantic 1 and 2 understand it alike."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from lora_trainer.errors import UserError


class ProblemModel(BaseModel):
    """What is wrong, the setting it concerns, and what to do about it."""

    message: str
    field: str | None = None
    remedy: str | None = None


class ErrorModel(ProblemModel):
    """The answer to a request that failed; ``problems`` has each of several by itself."""

    problems: list[ProblemModel] = []


class JobModel(BaseModel):
    """One job. Times are seconds since 1970; files are paths for ``/jobs/{id}/files/``.

    error: why it failed, or, of a job in the queue, what would stop it. saved_step: where a job that did not come to
    its end goes on; 0: from its beginning. fails_again: by its own settings, so resuming it does not help.
    switches_back: it waits for something in the host that the command switch-back ends. recommended_step: which of its
    LoRAs is better than the last one. advice: what held-out pictures say of the run. task: one of the setting ``task``.
    """

    id: int
    name: str
    status: str
    active: bool
    attempt: int
    position: float
    dataset: str
    base_model: str
    family: str
    host: str
    created: float
    started: float | None = None
    finished: float | None = None
    step: int
    total_steps: int
    epoch: int
    phase: str
    phase_done: int
    phase_total: int
    loss: float | None = None
    speed: float | None = None
    seconds_left: float | None = None
    memory: int | None = None
    seconds: float
    error: ProblemModel | None = None
    warnings: list[ProblemModel] = []
    lora: str | None = None
    diffusers: str | None = None
    thumbnail: str | None = None
    published: str | None = None
    published_step: int | None = None
    chosen_weight: float | None = None
    recommended_step: int | None = None
    advice: str = ""
    verified: bool | None = None
    saved_step: int | None = None
    fails_again: bool = False
    task: str = "image"
    switches_back: bool = False
    revision: int


class JobDetailModel(JobModel):
    """A job with its settings as YAML: as they were given, and as they ran."""

    config: str
    effective_config: str


class JobListModel(BaseModel):
    """counts: how many jobs have each status. total: how many pass the filter of the request."""

    jobs: list[JobModel]
    counts: dict[str, int]
    total: int


class JobsModel(BaseModel):
    """Jobs to be deleted, with ``confirm``."""

    jobs: list[int]
    confirm: bool = False


class DeletedModel(BaseModel):
    """deleted: these jobs. refused: why others stay."""

    deleted: list[int]
    refused: list[ProblemModel]


class DifferenceModel(BaseModel):
    """name: of the setting. one, other: its values."""

    name: str
    one: Any = None
    other: Any = None


class DifferencesModel(BaseModel):
    differences: list[DifferenceModel]


class NewJobModel(BaseModel):
    """Settings as a mapping, or as YAML text; exactly one of them. ``held`` jobs are paused until ``start``.

    shown: title of the base model that a person saw where the settings name none; another one is refused.
    """

    settings: dict[str, Any] | None = None
    yaml: str | None = None
    held: bool = False
    shown: str | None = None

    def given(self) -> dict[str, Any] | str:
        """Whichever was sent. Raises UserError for both or none."""
        if self.settings is None and self.yaml is not None:
            return self.yaml
        if self.settings is None or self.yaml is not None:
            raise UserError("Give settings or yaml.", field="settings", remedy="Send exactly one of them.")
        return self.settings


class ChangesModel(BaseModel):
    """Settings that differ from the job's. ``shown``: as with a new job."""

    changes: dict[str, Any] = {}
    held: bool = False
    shown: str | None = None


class OrderModel(BaseModel):
    """Queued jobs that go first, in this order."""

    jobs: list[int]


class ConfirmModel(BaseModel):
    confirm: bool = False


class PublishModel(BaseModel):
    """``name``: another name than the job's, where that is taken. ``step``: what was saved at it; ``weight``: which
    its card prefers. Without them, what was chosen so before, or the last and the usual weight."""

    name: str | None = None
    step: int | None = Field(None, ge=1)
    weight: float | None = None
    overwrite: bool = False


class CompareModel(BaseModel):
    """What a grid shows; what is left out is as usual: every saved step (eight of more than that), three weights, and
    the preview prompts."""

    steps: list[int] | None = None
    weights: list[float] | None = None
    prompts: list[str] | None = None


class ComparisonsModel(BaseModel):
    """status: of the grid that was asked for last: "" for none, waiting, running, finished, cancelled or failed, with
    done of total pictures. waits_for: name of the training in hand. steps: of the LoRAs that are there. weights,
    prompts: the usual ones. comparisons: those that were drawn, newest first; files are below ``folder``, which is a
    path for ``/jobs/{id}/files/``."""

    status: str
    done: int
    total: int
    error: ProblemModel | None = None
    waits_for: str | None = None
    steps: list[int]
    weights: list[float]
    prompts: list[str]
    comparisons: list[dict[str, Any]]


class EventModel(BaseModel):
    id: int
    job_id: int
    time: float
    kind: str
    text: str
    data: dict[str, Any]


class EventListModel(BaseModel):
    events: list[EventModel]


class MetricsModel(BaseModel):
    """points: one per step (step, epoch, loss, lr, …). offset: for the next request. follow: whether earlier points
    are still valid; false begins the curve anew."""

    points: list[dict[str, Any]]
    offset: int
    follow: bool


class CheckpointModel(BaseModel):
    """selected: a job that names none trains on it. loaded: it is in memory now."""

    title: str
    selected: bool
    loaded: bool


class StatusModel(BaseModel):
    """Everything a page shows. Send ``cursor`` back as ``since``; ``unchanged`` says that nothing differs.

    running: the job in hand. queue: jobs that wait. changed: jobs over that changed since. interrupted: jobs that were
    cut off as the server ended, to be resumed or stopped. base: the host's selected base model.
    points: new points of the curve of ``metrics_job``; ``points_follow`` is false when the curve begins anew with them.
    """

    cursor: str
    unchanged: bool
    running: JobModel | None = None
    queue: list[JobModel] = []
    changed: list[JobModel] = []
    interrupted: list[JobModel] = []
    base: CheckpointModel | None = None
    metrics_job: int | None = None
    points: list[dict[str, Any]] = []
    points_follow: bool = True
    events: list[EventModel] = []
    counts: dict[str, int] = {}
    trouble: ProblemModel | None = None


class LogModel(BaseModel):
    """The end of a job's log. ``truncated``: there is more before it."""

    text: str
    truncated: bool


class FileModel(BaseModel):
    path: str
    size: int
    changed: float


class FileListModel(BaseModel):
    files: list[FileModel]


class DatasetModel(BaseModel):
    """size: bytes on the disk. cover: a picture, for ``/datasets/{name}/thumbnails/``. own: it was made by the trainer,
    and can be renamed and deleted. resumable: trainings on it that were not finished."""

    name: str
    pictures: int
    changed: float
    size: int
    cover: str | None = None
    own: bool
    resumable: int = 0
    texts: int = 0


class DatasetListModel(BaseModel):
    datasets: list[DatasetModel]


class NewDatasetModel(BaseModel):
    name: str


class PictureModel(BaseModel):
    file: str
    caption: str
    size: int
    excluded: bool = False


class PictureListModel(BaseModel):
    name: str
    pictures: list[PictureModel]


class UploadModel(BaseModel):
    """One picture: ``data`` is its file in base64 (a data: URL is understood)."""

    name: str
    data: str
    caption: str = ""


class UploadsModel(BaseModel):
    pictures: list[UploadModel]


class UploadedModel(BaseModel):
    """added: the names the pictures have now. refused: those that are not there, and why."""

    added: list[str]
    refused: list[ProblemModel]


class ExcludeModel(BaseModel):
    """files: of one dataset. excluded: false takes them in again."""

    files: list[str]
    excluded: bool = True


class CaptionsModel(BaseModel):
    """Caption by picture."""

    captions: dict[str, str]


class PresetModel(BaseModel):
    """task: the kind of training that it is for, one of the setting ``task``."""

    kind: str
    task: str
    title: str
    hint: str
    settings: dict[str, Any]


class PresetListModel(BaseModel):
    presets: list[PresetModel]


class OwnPresetModel(BaseModel):
    """kind: the preset of ``/presets`` that the other settings follow; null where these are all. problem: why the file
    of the preset cannot be used."""

    name: str
    kind: str | None = None
    settings: dict[str, Any] = {}
    problem: str | None = None


class OwnPresetListModel(BaseModel):
    presets: list[OwnPresetModel]


class NewPresetModel(BaseModel):
    """What belongs to one LoRA (its name, pictures, base model and every path) is left out of settings."""

    name: str
    kind: str | None = None
    settings: dict[str, Any]
    overwrite: bool = False


class NameModel(BaseModel):
    name: str


class CheckpointListModel(BaseModel):
    """has_one: a job that names none trains on the model that the host has loaded or selected."""

    checkpoints: list[CheckpointModel]
    has_one: bool


class SettingModel(BaseModel):
    name: str
    group: str
    default: Any = None
    explanation: str


class SettingListModel(BaseModel):
    settings: list[SettingModel]
    gpus: int


class ConfigModel(BaseModel):
    """A checked configuration, every setting named, and as YAML. given: the names that were in what was checked.
    translation: what became of another trainer's settings; None where they were ours."""

    settings: dict[str, Any]
    given: list[str]
    yaml: str
    translation: dict[str, Any] | None = None


class RefusedPictureModel(BaseModel):
    file: str
    reason: str


class EstimateModel(BaseModel):
    """minutes (between minutes_low and minutes_high) and memory (bytes): as the jobs ``basis`` (called ``basis_name``)
    and ``memory_basis`` took them, or a forecast where that is null; null while the device is too busy for one. parts:
    minutes of training, previews, encoding, loading, saving and ending. shorter: minutes with other settings.
    captioner: will describe the pictures first, as they have no captions. problems: would stop the run.

    task: one of the setting ``task``. For a language model there are rows instead of pictures: those that are learned
    from, held_out ones among them; tokens, learned and longest are counts of tokens of the rows that are trained."""

    task: str = "image"
    rows: int = 0
    held_out: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0
    pictures: int = 0
    regularization_pictures: int = 0
    refused: list[RefusedPictureModel] = []
    warnings: list[str]
    captioner: str | None = None
    problems: list[ProblemModel] = []
    buckets: list[dict[str, Any]] = []
    visits_per_epoch: int
    repeats: int | None = None
    epochs: int
    batch_size: int
    accumulation: int
    stops_at: int | None = None
    steps_per_epoch: int
    steps: int
    base_model: str
    family: str
    name_taken: str | None = None
    resolution: str = ""
    minutes: float | None = None
    minutes_low: float | None = None
    minutes_high: float | None = None
    parts: dict[str, float] = {}
    shorter: list[dict[str, Any]] = []
    memory: int | None = None
    basis: int | None = None
    basis_name: str | None = None
    memory_basis: int | None = None
