"""Installs what the trainer needs into the WebUI's environment, without moving any package that is there.

The WebUI runs this at every start, so it must be quick when nothing is missing, and must never stop the start:
whatever goes wrong is printed, and the tab says it again. By hand: ``python install.py [--optional]``.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from lora_trainer import requirements

NAME = "LoRA trainer"


def main(arguments):
    if "--skip-install" in os.environ.get("COMMANDLINE_ARGS", "").split():
        return
    wanted = requirements.requirements() + (list(requirements.OPTIONAL) if "--optional" in arguments else [])
    absent = requirements.absent(wanted)
    for requirement, version in requirements.unfit(wanted):
        # Somebody wanted this version; changing it is the user's decision.
        print(f"{NAME}: needs {requirement}, but {version} is installed. It is left as it is.", flush=True)
    if not absent:
        return
    names = ", ".join(map(str, absent))
    print(f"{NAME}: installing {names}", flush=True)
    try:
        output, code = pip_install([str(requirement) for requirement in absent])
    except OSError as error:
        output, code = str(error), 1
    if code:
        print(f"{NAME}: pip could not install {names}. The WebUI starts without training.\n{tail(output)}", flush=True)
        return
    print(f"{NAME}: installed", flush=True)


def pip_install(specifiers):
    """pip with everything that is installed held fast; returns its output and exit code.

    Arguments go to pip as a list, so no shell ever sees "<" or ">".
    """
    with tempfile.TemporaryDirectory(prefix="lora-trainer-") as folder:
        constraints = os.path.join(folder, "constraints.txt")
        with open(constraints, "w", encoding="utf-8") as handle:
            handle.write("\n".join(frozen()) + "\n")
        command = [sys.executable, "-m", "pip", "install", "--prefer-binary", "--no-input"]
        command += ["--disable-pip-version-check", "--constraint", constraints, *specifiers]
        if os.environ.get("INDEX_URL"):  # as the WebUI's own installer honors it
            command += ["--index-url", os.environ["INDEX_URL"]]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return done.stdout.decode("utf-8", errors="replace"), done.returncode


def frozen():
    """Every installed distribution as ``name==version``, each once: pip gives up where two lines contradict.

    Of several versions the first on the path counts, as for ``import``. What pip cannot read as such a line is left
    out, and so are folders as "~orch-2.0.0.dist-info", which an update leaves behind on Windows.
    """
    lines = {}
    for distribution in importlib.metadata.distributions():
        name, version = distribution.metadata["Name"], distribution.version
        if not name or not version or os.path.basename(str(getattr(distribution, "_path", ""))).startswith("~"):
            continue
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) and re.fullmatch(r"[0-9][A-Za-z0-9.!+_-]*", version):
            lines.setdefault(re.sub(r"[-_.]+", "-", name).lower(), f"{name}=={version}")
    return sorted(lines.values(), key=str.lower)


def tail(text, lines=15):
    return "\n".join(text.strip().splitlines()[-lines:])


try:
    main(sys.argv[1:])
except Exception as error:  # noqa: BLE001 - the WebUI must start whatever happens here
    print(f"{NAME}: install.py failed: {type(error).__name__}: {error}", flush=True)
