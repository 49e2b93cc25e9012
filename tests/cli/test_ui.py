"""``python -m lora_trainer ui``: who may do what, and the page itself where gradio is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lora_trainer.cli.main import build_parser, main
from lora_trainer.cli.ui import ROOT, access, create_app
from lora_trainer.errors import UserError


def options(*arguments: str):
    return build_parser().parse_args(["ui", *arguments])


def test_on_this_machine_everything_is_allowed():
    policy = access(options())
    assert policy.roots is None and policy.api_credentials is None


def test_from_elsewhere_only_named_folders_are(tmp_path):
    assert access(options("--host", "0.0.0.0")).roots == ()
    assert access(options("--host", "0.0.0.0", "--folder", str(tmp_path))).roots == (tmp_path.resolve(),)


def test_credentials_are_pairs():
    assert access(options("--auth", "ann:secret,bob:a:b")).api_credentials == {"ann": "secret", "bob": "a:b"}
    for wrong in ("ann", "ann:", ":secret"):
        with pytest.raises(UserError):
            access(options("--auth", wrong))


def test_the_page_its_scripts_and_its_routes_are_served(tmp_path):
    pytest.importorskip("gradio")
    from fastapi.testclient import TestClient

    (tmp_path / "models").mkdir()
    app = create_app(options("--data", str(tmp_path / "data"), "--models", str(tmp_path / "models")))
    client = TestClient(app, base_url="http://127.0.0.1:7861")
    page = client.get("/").text
    for script in sorted(Path(ROOT / "javascript").glob("*.js")):
        assert script.name in page
        assert client.get(f"/lora-trainer/assets/javascript/{script.name}").text == script.read_text("utf-8")
    assert "lora_trainer_form" in page
    assert client.get("/lora-trainer/v1/checkpoints").json()["checkpoints"] == []


def test_a_missing_folder_of_models_is_said(tmp_path):
    pytest.importorskip("gradio")
    with pytest.raises(UserError, match="no folder"):
        create_app(options("--data", str(tmp_path), "--models", str(tmp_path / "none")))


@pytest.mark.parametrize("missing", ["gradio", "fastapi"])
def test_without_gradio_it_says_what_to_install(tmp_path, monkeypatch, capsys, missing):
    for name in (missing, "uvicorn"):  # uvicorn comes with gradio
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("lora_trainer.ui")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["ui", "--data", str(tmp_path)]) == 2
    assert f"The page needs {missing}" in capsys.readouterr().err
