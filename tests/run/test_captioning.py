"""A folder captioned as a whole: modes, what people write meanwhile, cancelling, kills, the command, the training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from lora_trainer.captioning import registry
from lora_trainer.captioning.base import Description, HostCaptioner, Settings, Tag
from lora_trainer.captioning.postprocess import CaptionOptions
from lora_trainer.captioning.registry import Sources
from lora_trainer.captioning.weights import FOLDER_VARIABLE
from lora_trainer.cli import main
from lora_trainer.config.schema import TrainConfig
from lora_trainer.dataset.backups import list_backups
from lora_trainer.dataset.caption_files import read_captions
from lora_trainer.dataset.picture_edits import PictureEdit, save_edits
from lora_trainer.dataset.writing import CaptionFolder
from lora_trainer.errors import UserError
from lora_trainer.run import captioning, file_lender, summary, train
from lora_trainer.run.captioning import CaptionCallbacks, CaptionJob, caption_folder, caption_for_training
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from tests.captioning import models
from tests.pictures import draw_dataset

COLORS = {"a.png": "#ff0000", "b.png": "#00ff00", "sub/c.png": "#0000ff"}


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "pictures"
    for name, color in COLORS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 24), color).save(folder / name)
    return folder


def square(root):
    """Taggers pad with white, and the color of the padding would count."""
    for name, color in COLORS.items():
        Image.new("RGB", (24, 24), color).save(root / name)


class Fake:
    """Says the color of a picture's middle and its size; ``before`` runs ahead of every batch."""

    def __init__(self, before=lambda: None):
        self.before, self.batches, self.closed = before, [], False

    def describe(self, images):
        self.before()
        self.batches.append(len(images))
        return [
            Description(tags=(Tag("#{:02x}{:02x}{:02x}".format(*image.getpixel((5, 5)))), Tag(f"{image.width} wide")))
            for image in images
        ]

    def close(self):
        self.closed = True


def caption(folder, fake=None, *, callbacks=None, cancelled=lambda: False, **job):
    fake = fake or Fake()
    sources = Sources(host={"fake": HostCaptioner("Fake", lambda settings: fake)})
    folder = folder if isinstance(folder, CaptionFolder) else CaptionFolder(folder)
    return caption_folder(CaptionJob(folder, "fake", **job), sources, callbacks=callbacks, cancelled=cancelled)


def texts(root, **options):
    return {key: source.text for key, source in read_captions(root, **options).items()}


def test_pictures_without_captions_get_one_and_the_others_are_not_even_looked_at(root):
    (root / "a.txt").write_text("by hand")
    fake = Fake()
    result = caption(root, fake, options=CaptionOptions(trigger_word="sks"))
    assert texts(root) == {"a.png": "by hand", "b.png": "sks, #00ff00, 40 wide", "sub/c.png": "sks, #0000ff, 40 wide"}
    assert (result.written, result.kept, result.cancelled) == (2, 1, False) and fake.batches == [2] and fake.closed
    again = Fake()
    assert caption(root, again).written == 0 and not again.batches  # nothing left to do: not even loaded
    assert not list_backups(root)  # nothing was overwritten


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("replace", "#ff0000, 40 wide"),
        ("append", "40 wide, by hand, #ff0000"),
        ("prepend", "#ff0000, 40 wide, by hand"),
    ],
)
def test_modes(root, mode, expected):
    (root / "a.txt").write_text("40 wide, by hand" if mode == "append" else "by hand")
    result = caption(root, mode=mode)
    assert texts(root)["a.png"] == expected and result.written == 3
    assert list_backups(root)[0].files == ("a.txt",)
    if mode != "replace":
        assert caption(root, mode=mode).written == 0  # run again, it adds nothing twice


def test_a_metadata_file_is_complete_and_text_files_stay(root):
    (root / "a.txt").write_text("by hand, in a file")
    output = root / "metadata.csv"
    caption(CaptionFolder(root, output=output), copy_kept=True)
    assert (root / "a.txt").read_text() == "by hand, in a file"
    assert output.read_text() == (
        'filename,prompt\na.png,"by hand, in a file"\nb.png,"#00ff00, 40 wide"\nsub/c.png,"#0000ff, 40 wide"\n'
    )
    (root / "metadata.csv").write_text(output.read_text().replace("#00ff00", "green"))
    caption(CaptionFolder(root, output=output), copy_kept=True)
    assert texts(root)["b.png"] == "green, 40 wide"


def test_what_somebody_writes_meanwhile_counts(root, monkeypatch):
    monkeypatch.setattr(captioning, "SAVE_SECONDS", 0)
    written = []

    def meddle():
        (root / "sub" / "c.txt").write_text("a person was faster")
        if not written:
            (root / "b.png").unlink()
        written.append(1)

    result = caption(root, Fake(meddle), batch_size=2)
    assert texts(root) == {"a.png": "#ff0000, 40 wide", "sub/c.png": "a person was faster"}
    assert result.written == 1


def test_excluded_pictures_are_left_alone_and_edits_are_seen(root):
    save_edits(root, {"a.png": PictureEdit(excluded=True), "b.png": PictureEdit(rotate=90, crop=(0, 0, 1, 0.5))})
    caption(root)
    assert texts(root) == {"b.png": "#00ff00, 24 wide", "sub/c.png": "#0000ff, 40 wide"}
    assert caption(root, keys=["b.png"], mode="replace").kept == 1


def test_a_damaged_picture_is_told_and_left_out(root):
    (root / "b.png").write_bytes((root / "b.png").read_bytes()[:60])
    told, steps = [], []
    callbacks = CaptionCallbacks()
    callbacks.on_warning, callbacks.on_progress = told.append, lambda done, total: steps.append((done, total))
    result = caption(root, callbacks=callbacks, batch_size=1)
    assert [key for key, _ in result.skipped] == ["b.png"] and "b.png" in told[0] and steps[-1] == (3, 3)
    assert texts(root).keys() == {"a.png", "sub/c.png"} and not result.cancelled


def test_cancelled_and_failed_jobs_keep_what_they_have(root):
    fake = Fake()
    result = caption(root, fake, batch_size=1, cancelled=lambda: len(fake.batches) == 2)
    assert result.cancelled and texts(root).keys() == {"a.png", "b.png"} and fake.closed

    def fail():
        raise RuntimeError("a bug")

    broken = Fake(fail)
    with pytest.raises(RuntimeError, match="a bug"):
        caption(root, broken)
    assert broken.closed and len(texts(root)) == 2


def test_nothing_is_touched_when_something_is_wrong_from_the_start(root, tmp_path):
    with pytest.raises(UserError, match="no mode"):
        caption(root, mode="destroy")
    with pytest.raises(UserError, match="caption"):
        caption(root, options=CaptionOptions(template="x"))
    (root / "b.txt").write_bytes(b"\xff\xfehalf")
    with pytest.raises(UserError, match="UTF-16"):
        caption(root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        caption(tmp_path / "empty")
    assert not (root / "a.txt").exists()


KILLED = """
import sys, time
from pathlib import Path
from lora_trainer.captioning.base import Description, HostCaptioner
from lora_trainer.captioning.registry import Sources
from lora_trainer.dataset.writing import CaptionFolder
from lora_trainer.run import captioning

class Slow:
    def describe(self, images):
        time.sleep(0.02)
        print("batch", flush=True)
        return [Description("new words " + "x" * 3000) for _ in images]
    def close(self): pass

captioning.SAVE_SECONDS = 0
root = Path(sys.argv[1])
folder = CaptionFolder(root, output=root / "metadata.csv" if sys.argv[2] == "csv" else None)
job = captioning.CaptionJob(folder, "slow", mode="replace", batch_size=1)
captioning.caption_folder(job, Sources(host={"slow": HostCaptioner("", lambda settings: Slow())}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "txt"])
def test_killed_in_the_middle_every_caption_is_old_or_new_and_the_job_goes_on(tmp_path, kind):
    for index in range(30):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{index:02}.png")
    old = {f"{index:02}.png": f"old words {index} " + "y" * 3000 for index in range(30)}
    folder = CaptionFolder(tmp_path, output=tmp_path / "metadata.csv" if kind == "csv" else ".txt")
    folder.write(old)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path, kind], stdout=subprocess.PIPE, env=environment)
    for _ in range(8):
        assert process.stdout.readline() == b"batch\n"
    time.sleep(0.013)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = texts(tmp_path)
    new = {key for key, text in found.items() if text == "new words " + "x" * 3000}
    assert found.keys() == old.keys() and 5 <= len(new) < 30
    assert all(found[key] == old[key] for key in old.keys() - new)


def test_the_command_with_a_tagger(root, capsys, tmp_path):
    weights = models.tiny_tagger(tmp_path / "captioners" / "tagger")
    output = root / "metadata.csv"
    square(root)
    arguments = ["caption", "--input", root, "--output", output, "--captioner", "tagger", "--weights", weights,
                 "--template", "**{caption}**, high quality, detailed"]  # fmt: skip
    assert main([*map(str, arguments), "--trigger", "sks", "--kind", "character"]) == 0
    assert texts(root) == {
        "a.png": "sks, **1girl**, **red dress**, high quality, detailed",
        "b.png": "sks, **dress**, high quality, detailed",
        "sub/c.png": "sks, **dress**, high quality, detailed",
    }
    assert "3 captions by tagger, 0 kept" in capsys.readouterr().out
    assert main(["caption", "--input", str(root), "--format", "txt", "--captioner", "tagger", "--weights", str(weights),
                 "--mode", "append", "--replace", "dress=gown", "--blacklist", "1*, red*"]) == 0  # fmt: skip
    assert (root / "b.txt").read_text() == "sks, **dress**, high quality, detailed, hatsune miku \\(vocaloid\\), gown\n"


def test_the_command_where_nothing_is_left_to_describe(root, capsys):
    for name in COLORS:
        (root / name).with_suffix(".txt").write_text("by hand")
    assert main(["caption", "--input", str(root)]) == 0
    assert "All 3 pictures have their caption; --mode append" in capsys.readouterr().out
    assert not (root / "metadata.csv").exists(), "the text files go on counting"
    assert main(["caption", "--input", str(root), "--format", "csv"]) == 0
    assert (root / "metadata.csv").read_text().count("by hand") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--captioner", "florence"], "no captioner 'florence'"),
        (["--captioner", "blip"], "Salesforce/blip-image-captioning-base"),
        ([], "No captioner can run here"),
        (["--template", "x"], "{caption}"),
        (["--replace", "x"], "TAG=TEXT"),
        (["--batch-size", "0"], "batch-size"),
        (["--output", "captions.xls"], "metadata.csv"),
        (["--kind", "portrait"], "no kind"),
        (["--threshold", "nan"], "from 0 to 1"),
        (["--character-threshold", "35"], "from 0 to 1"),
    ],
)
def test_bad_arguments_of_the_command(root, capsys, arguments, message):
    assert main(["caption", "--input", str(root), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not read_captions(root)


def test_a_training_that_is_stopped_while_it_captions_is_stopped(tmp_path, tiny_base):
    pictures = draw_dataset(tmp_path / "bare", 12, caption=lambda index: None)
    config = TrainConfig(
        base_model=str(tiny_base), train_data_dir=str(pictures), output_dir=str(tmp_path / "out"), device="cpu"
    )
    commands = TrainCommands()
    sources = Sources(host={"fake": HostCaptioner("Fake", lambda settings: Fake(commands.stop_and_save))})
    result = train(config, file_lender(config), commands=commands, captioners=sources)
    assert (result.status, result.step, result.lora) == ("stopped", 0, None)
    assert len(read_captions(pictures)) == 8 and "same command" not in summary(result)


def test_training_captions_a_folder_without_captions_when_it_can(root, tmp_path, monkeypatch):
    square(root)
    config = TrainConfig(train_data_dir=str(root), output_dir=str(tmp_path / "output"), device="cpu")
    assert caption_for_training(config, TrainCallbacks(), TrainCommands()) is None  # no weights: as before
    assert not (root / "metadata.csv").exists()
    models.tiny_tagger(tmp_path / "captioners" / "tagger")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "captioners"))
    told = []

    class Told(TrainCallbacks):
        def on_warning(self, text):
            told.append(text)

        def on_phase(self, name, done, total):
            told.append((name, done, total))

    for words in ({"trigger_word": "sks"}, {"metadata_path": str(root / "other.csv")}):
        changed = TrainConfig(train_data_dir=str(root), device="cpu", **words)
        assert caption_for_training(changed, Told(), TrainCommands()) is None
    assert caption_for_training(config, Told(), TrainCommands()).written == 3
    assert texts(root)["a.png"] == "1girl, red dress" and "metadata.csv" in told[0] and told[-1] == ("captioning", 3, 3)
    assert caption_for_training(config, Told(), TrainCommands()) is None  # they are there now
    assert Settings().threshold == 0.35 and registry.AUTO == "auto"
