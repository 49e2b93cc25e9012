"""``ui``: the tab as a page of its own, without any WebUI."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_trainer.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ASSETS = "/lora-trainer/assets"
_LOCAL = ("127.0.0.1", "localhost", "::1")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("ui", help="serve the Train LoRA tab without any WebUI", description=run.__doc__)
    parser.add_argument("--models", type=Path, help="folder with base models (.safetensors, .ckpt, diffusers folders)")
    parser.add_argument("--data", type=Path, default=Path("lora_trainer_data"),
                        help="folder for data sets, jobs and logs (lora_trainer_data)")  # fmt: skip
    parser.add_argument("--output", type=Path, help="folder for finished LoRAs (loras in the data folder)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (127.0.0.1)")
    parser.add_argument("--port", type=int, default=7865, help="port to listen at (7865)")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="what callers must present; several with commas")
    parser.add_argument("--folder", type=Path, action="append", default=[], metavar="DIR",
                        help="folder that callers from other machines may train on; repeatable")  # fmt: skip
    parser.add_argument("--name", action="append", default=[], metavar="NAME",
                        help="name under which a proxy makes the page known; repeatable")  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve the Train LoRA tab on a page of its own: for servers, and for people who train elsewhere than they draw.
    Base models are files; finished LoRAs go to a folder. Needs gradio, nothing else of a WebUI."""
    app = create_app(options)
    import uvicorn  # comes with gradio, whose absence create_app explains

    print(f"Train LoRA: http://{options.host}:{options.port}/")
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")
    return 0


def create_app(options: argparse.Namespace) -> Any:
    """The FastAPI app: page, scripts, routes. Raises UserError when a folder or a package is missing."""
    try:
        from fastapi import FastAPI
        from fastapi.staticfiles import StaticFiles

        from lora_trainer.ui import compat, create_tab
    except ImportError as error:
        raise UserError(
            f"The page needs {error.name}, which is not installed.", remedy='Install it with: pip install "gradio<5"'
        ) from error
    from lora_trainer import api, jobs, requirements
    from lora_trainer.host.standalone import StandaloneHost

    if (problem := requirements.problem()) is not None:
        raise UserError(problem)
    if options.models is not None and not options.models.is_dir():
        raise UserError(f"There is no folder {options.models}.", remedy="Name a folder of base models with --models.")
    if not (ROOT / "javascript").is_dir():
        raise UserError("The page's scripts are not there.", remedy="Start it from a checkout of the whole project.")
    data = options.data.expanduser().resolve()
    host = StandaloneHost(
        data,
        checkpoints=options.models,
        lora=options.output or data / "loras",
        device=options.device,
        access=access(options),
    )
    manager = jobs.manager(host)
    app = FastAPI(title="Train LoRA")
    for folder in ("javascript", "localizations"):
        app.mount(f"{ASSETS}/{folder}", StaticFiles(directory=ROOT / folder))
    api.add_routes(app, manager, host)
    # In the order in which the WebUIs load an extension's scripts.
    scripts = [f".{ASSETS}/javascript/{path.name}" for path in sorted((ROOT / "javascript").glob("*.js"))]
    style = (ROOT / "style.css").read_text(encoding="utf-8")
    languages = {"zh": f".{ASSETS}/localizations/zh_CN.json"}
    return compat.serve_alone(app, create_tab(host, manager), "Train LoRA", style, scripts, languages)


def access(options: argparse.Namespace) -> Any:
    """Everything is allowed from this machine alone; from others, what was named."""
    from lora_trainer.host.base import AccessPolicy

    credentials = None
    if options.auth:
        pairs = [pair.partition(":") for pair in options.auth.split(",")]
        if not all(user and password for user, _, password in pairs):
            raise UserError("--auth needs a user and a password.", remedy="Give it as --auth user:password")
        credentials = {user: password for user, _, password in pairs}
    if options.host in _LOCAL:
        return AccessPolicy(credentials, names=tuple(options.name))
    return AccessPolicy(credentials, tuple(folder.expanduser().resolve() for folder in options.folder))
