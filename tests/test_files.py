from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import pytest

from lora_trainer import files
from lora_trainer.errors import UserError
from lora_trainer.files import atomic_write, is_of_the_system


class Windows:
    """Replacing or deleting a file that is open fails there; one that is only mapped into memory can be renamed."""

    def __init__(self, monkeypatch):
        self.opened, self.mapped = {}, set()
        replace, rename, unlink = os.replace, os.rename, os.unlink

        def refuse(path, *kinds):
            if any(str(path) in kind for kind in kinds):
                raise PermissionError(13, "Access is denied", str(path))

        def replacing(source, target):
            left = self.opened.get(str(target), 0)
            self.opened[str(target)] = left - 1
            if left <= 0:
                del self.opened[str(target)]
            refuse(target, self.opened, self.mapped)
            replace(source, target)

        def renaming(source, target):
            refuse(source, self.opened)
            rename(source, target)
            if str(source) in self.mapped:
                self.mapped = self.mapped - {str(source)} | {str(target)}

        def unlinking(path, *args, **more):
            refuse(path, self.opened, self.mapped)
            unlink(path, *args, **more)

        monkeypatch.setattr(files, "_WINDOWS", True)
        monkeypatch.setattr(files, "_PAUSE", 0.001)
        for name, function in (("replace", replacing), ("rename", renaming), ("unlink", unlinking)):
            monkeypatch.setattr(os, name, function)


@pytest.fixture
def windows(monkeypatch):
    return Windows(monkeypatch)


def test_a_file_that_is_open_for_a_moment_is_replaced(tmp_path, windows):
    path = tmp_path / "a.csv"
    path.write_text("old")
    windows.opened[str(path)] = 3
    atomic_write(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.csv"]


def test_a_mapped_file_goes_out_of_the_way_and_is_deleted_when_it_is_free(tmp_path, windows):
    path = tmp_path / "cat [1].safetensors"
    path.write_text("old")
    windows.mapped.add(str(path))
    atomic_write(path, "new")
    aside = Path(next(iter(windows.mapped)))
    assert path.read_text() == "new" and aside.read_text() == "old" and aside.suffix != ".safetensors"
    windows.mapped.clear()
    atomic_write(path, "newer")
    assert path.read_text() == "newer" and os.listdir(tmp_path) == [path.name]


def test_a_file_that_stays_open_is_left_as_it_is_and_said(tmp_path, windows):
    path = tmp_path / "a.csv"
    path.write_text("old")
    windows.opened[str(path)] = 1000
    with pytest.raises(UserError, match="Close what has it open"):
        atomic_write(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.csv"]


@pytest.mark.parametrize("place, expected", [
    ("/home/me/.config/chromium/a", True), ("/home/me/.ssh", True), ("/home/me/.local/share/keyrings/a", True),
    ("/Users/me/Library/Keychains", True), ("/data/keychains", False), ("/data/keyrings/brass", False),
    ("/home/me/.config/StabilityMatrix/Images", False), ("/home/me/.configs/a", False),
])  # fmt: skip
def test_what_is_of_the_system(place, expected):
    assert is_of_the_system(PurePosixPath(place)) is expected


@pytest.mark.skipif(os.name == "nt", reason="such folders are not Windows'")
def test_a_webui_in_a_folder_of_settings_reads_its_own_pictures(monkeypatch):
    monkeypatch.setattr(files, "__file__", "/home/me/.config/webui/extensions/trainer/lora_trainer/files.py")
    assert not is_of_the_system(Path("/home/me/.config/webui/data"))
    assert is_of_the_system(Path("/home/me/.config/chromium"))
