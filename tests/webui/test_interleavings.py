"""Anything in any order: no deadlock, no lost job, no lost memory, and every finished LoRA as if it had been alone."""

from __future__ import annotations

import os
import random
import threading

import numpy as np
import pytest

from tests.webui.server import FORGE
from tests.webui.test_borrowing import RSS, facts, same

COUNT = int(os.environ.get("LORA_TRAINER_INTERLEAVINGS", "100"))
ACTIONS = ("pause", "resume", "stop", "generate", "generate", "lora", "switch", "unload", "reload", "both")

TRIMMED = "import ctypes, gc; gc.collect(); ctypes.CDLL(None).malloc_trim(0)\n" + RSS
# What is in use, as the allocator counts it: what it keeps for later is no leak, and is resident in part.
IN_USE = """
import ctypes, gc
gc.collect()
fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in fields]
count = ctypes.CDLL(None).mallinfo2
count.restype = Mallinfo2
found = count()
result = found.uordblks + found.hblkhd
"""


@pytest.mark.slow
def test_random_interleavings(webui, settings):
    # Forge's smallest text encoder is a full one, and takes longer than all the rest.
    settings |= {"max_train_steps": 6, "train_text_encoder": not FORGE}
    first, second = webui.checkpoints()[:2]
    twin = webui.submit(**settings, output_name="twin")
    assert webui.wait(twin)["status"] == "finished"
    pictures = {prompt: webui.generate(prompt) for prompt in ("a circle", "a ring <lora:twin:1>")}
    for action in ("switch", "unload", "reload", "both", "lora", "generate"):  # what the WebUI takes for itself
        act(webui, twin, action, pictures, (first, second))
    before, memory, resident = facts(webui), webui.probe(IN_USE), webui.probe(TRIMMED)
    chance, counts, jobs = random.Random(1), {}, []
    for round_number in range(COUNT):
        job = webui.submit(**settings, output_name=f"r{round_number}")
        jobs.append(job)
        stopped = False
        for action in chance.choices(ACTIONS, k=chance.randint(1, 4)):
            # Reload UI costs seconds; a few of them say as much as many.
            if action == "reload" and chance.random() > 0.3:
                action = "generate"
            counts[action] = counts.get(action, 0) + 1
            if chance.random() < 0.5:
                webui.until(job, lambda job: job["step"] >= 1 or job["status"] in ("paused", "waiting", *OVER))
            stopped |= action == "stop"
            act(webui, job, action, pictures, (first, second))
        webui.command(job, "resume")
        done = webui.wait(job, timeout=240)
        assert done["status"] == ("stopped" if stopped and done["step"] < 6 else "finished"), (round_number, done)
        if done["status"] == "finished":
            assert same(webui.lora(twin), webui.lora(job)), f"round {round_number}"
        print(round_number, done["status"], f"{webui.probe(IN_USE) / 1e6:.0f} MB", flush=True)
    listed = [job["id"] for job in webui.get("/lora-trainer/v1/jobs?limit=5000")["jobs"]]
    assert sorted(listed) == [twin, *jobs], "no job is lost, and none is there twice"
    for prompt, picture in pictures.items():
        assert np.array_equal(webui.generate(prompt), picture)
    webui.generate("a circle")
    after = facts(webui)
    assert (after[0], after[2]) == (before[0], before[2])
    growth, resident_growth = webui.probe(IN_USE) / memory - 1, webui.probe(TRIMMED) / resident - 1
    print(f"\n{COUNT} rounds, {counts}; memory in use {growth:+.2%} of {memory / 1e6:.0f} MB, "
          f"resident {resident_growth:+.2%} of {resident / 1e6:.0f} MB")  # fmt: skip
    assert growth < 0.02


OVER = ("finished", "stopped", "failed", "interrupted")


def act(webui, job, action, pictures, checkpoints):
    if action in ("pause", "resume", "stop"):
        webui.command(job, action)
    elif action == "generate":
        assert np.array_equal(webui.generate("a circle"), pictures["a circle"])
    elif action == "lora":
        assert np.array_equal(webui.generate("a ring <lora:twin:1>"), pictures["a ring <lora:twin:1>"])
    elif action == "switch":
        webui.select(checkpoints[1])
        webui.generate("noise")
        webui.select(checkpoints[0])
    elif action == "unload":
        webui.post("/sdapi/v1/unload-checkpoint")
        webui.post("/sdapi/v1/reload-checkpoint")
    elif action == "reload":
        webui.reload_ui()
    else:
        threads = [threading.Thread(target=webui.generate, args=("a circle", seed)) for seed in (5, 6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
            assert not thread.is_alive()
