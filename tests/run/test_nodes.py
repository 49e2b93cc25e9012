"""Two nodes, each a network namespace of Linux: the cable between them is pulled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from lora_trainer.config import from_mapping, to_yaml
from tests.language_models import tiny_language_model, write_rows
from tests.run.test_ranks import same, weights
from tests.several import ROOT, runs

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PATIENCE = 18  # seconds; a third of it without a sign of life is a death


@pytest.fixture
def nodes():
    """Of each node what to put before a command, so that it runs there. They end with the processes that hold them."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))) or os.geteuid() != 0:
        pytest.skip("needs network namespaces")
    holders = [subprocess.Popen(["unshare", "--net", "sleep", "900"]) for _ in ADDRESSES]
    try:
        while any(holder.poll() is None and not apart(holder) for holder in holders):
            time.sleep(0.05)
        if any(holder.poll() is not None for holder in holders):
            pytest.skip("may not make network namespaces")
        first, second = (str(holder.pid) for holder in holders)
        cable = ["ip", "link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second]
        if subprocess.run(cable).returncode:
            pytest.skip("may not join network namespaces")
        inside = [["nsenter", "--target", pid, "--net"] for pid in (first, second)]
        for node, address in zip(inside, ADDRESSES):
            for what in ("link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up"):
                subprocess.run([*node, "ip", *what.split()], check=True)
        yield inside
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def apart(holder: subprocess.Popen) -> bool:
    with suppress(OSError):  # it has ended
        return os.readlink(f"/proc/{holder.pid}/ns/net") != os.readlink("/proc/self/ns/net")
    return False


@pytest.mark.slow
def test_both_nodes_end_when_the_cable_is_pulled_and_one_alone_goes_on(nodes, tmp_path):
    model, rows = tiny_language_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    settings = {
        "task": "text", "base_model": str(model), "train_data_dir": str(rows), "output_name": "disc", "lora_rank": 2,
        "learning_rate": 1e-3, "save_precision": "fp32", "batch_size": 1, "dropout": 0.1, "epochs": 60,
        "save_steps": 20, "gradient_accumulation_steps": 2, "keep_checkpoints": 1, "tensorboard": False,
    }  # fmt: skip
    pulled, whole = ({**settings, "output_dir": str(tmp_path / name)} for name in ("pulled", "whole"))
    (tmp_path / "run.yaml").write_text(to_yaml(from_mapping(pulled)), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "eth0",
                   "LORA_TRAINER_PATIENCE": str(PATIENCE)}  # fmt: skip
    options = f"--nnodes 2 --nproc-per-node 1 --master-addr {ADDRESSES[0]} --master-port 29500 --node-rank"
    launcher = [sys.executable, "-m", "torch.distributed.run", *options.split()]
    command = ["-m", "lora_trainer", "train", "--config", str(tmp_path / "run.yaml")]
    logs, both = [tmp_path / f"node{number}.log" for number in range(2)], []
    try:
        for number, (node, log) in enumerate(zip(nodes, logs)):
            with log.open("wb") as file:
                started = [*node, *launcher, str(number), *command]
                both.append(subprocess.Popen(started, env=environment, stdout=file, stderr=subprocess.STDOUT))
        while not list(tmp_path.glob("pulled/state/*-step00000020.state")):
            assert [one.poll() for one in both] == [None, None], "\n".join(log.read_text() for log in logs)
            time.sleep(0.05)
        subprocess.run([*nodes[1], "ip", "link", "set", "eth0", "down"], check=True)
        since = time.monotonic()
        assert [one.wait(120) for one in both] == [1, 1]
        assert time.monotonic() - since < 60
    finally:
        for one in both:
            one.kill()
    said, here = [log.read_text() for log in logs], re.escape(os.uname().nodename)
    # Which of the two a node sees first depends on when the cable is pulled.
    seen = rf"error: Rank [01] on {here} has (given no sign of life|lost the connection to Rank [01] on {here})"
    assert all(re.search(seen, one) for one in said), said
    assert not list(tmp_path.glob("pulled/disc/*"))
    (alone,) = runs(tmp_path, {"alone": (1, [pulled, whole])})["alone"]
    assert [run["step"] for run in alone["results"]] == [240, 240], alone["said"]
    assert same(weights(tmp_path / "pulled"), weights(tmp_path / "whole"))
