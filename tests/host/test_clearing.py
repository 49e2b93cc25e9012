"""A language model on a WebUI's device: the WebUI's own model leaves it, and is back whatever happens."""

from __future__ import annotations

import hashlib
import threading
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file

from lora_trainer.config import from_mapping
from lora_trainer.errors import UserError
from lora_trainer.jobs.execution import lender_of
from lora_trainer.jobs.processes import own_config
from lora_trainer.run import train
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from tests.devices import pretended_gpu
from tests.jobs.fakes import wait_for
from tests.language_models import tiny_language_model, write_rows

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return {
        "task": "text", "base_model": str(tiny_language_model(folder / "base")), "output_name": "ward",
        "train_data_dir": str(write_rows(folder / "rows.jsonl")), "lora_rank": 2, "batch_size": 4, "max_train_steps": 2,
        "target_modules": ["q_proj"],
        "chat_template": "plain", "save_precision": "fp32", "learning_rate": 1e-2, "tensorboard": False,
        "mixed_precision": "no",
    }  # fmt: skip


class Watched(TrainCallbacks):
    """Calls ``look`` at every step."""

    def __init__(self, look):
        self.look, self.steps = look, 0

    def on_step(self, report):
        self.steps += 1
        self.look()


def run(host, settings, folder, look=lambda: None, commands=None):
    config = from_mapping({**settings, "output_dir": str(folder)})
    callbacks = Watched(look)
    return train(config, lender_of(host, config), callbacks=callbacks, commands=commands), callbacks


def places(parts):
    return {parameter.device.type for part in parts for parameter in part.parameters()}


@pytest.fixture(params=["a1111", "forge"])
def both(request):
    """A host, the WebUI that it stands for, and the parts of that one's model."""
    if request.param == "a1111":
        webui = request.getfixturevalue("webui")
        return request.getfixturevalue("a1111"), webui, lambda: [webui.model]
    webui = request.getfixturevalue("fake_forge")
    webui.generate("a cat")  # which loads the model
    return request.getfixturevalue("forge"), webui, webui.parts


def on_the_gpu(host, webui, gpu):
    if host.name == "forge":
        webui.device = webui.devices.device = gpu.device
        webui.memory_management.current_loaded_models.clear()
        webui.generate("a cat")
    else:
        webui.devices.device = CUDA
        webui.model.to(CUDA)


def bits(parts):
    """SHA-256 of every tensor of the WebUI's model, with its name and number format."""
    digest = hashlib.sha256()
    for part in parts():
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(f"{name} {tensor.dtype}".encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_the_two_models_change_places(both, settings):
    host, webui, parts = both
    with pretended_gpu() as gpu:
        on_the_gpu(host, webui, gpu)
        before, lender = places(parts()), lender_of(host, from_mapping(settings))
        assert "cuda" in before
        with lender.borrow() as model:
            with lender.turn():
                assert places(parts()) == {"cpu"} and places([model.network]) == {"cuda"}
            with lender.rest():  # as in a pause
                assert places(parts()) == before and places([model.network]) == {"cpu"}
            with lender.turn():
                assert places(parts()) == {"cpu"} and places([model.network]) == {"cuda"}
        assert places(parts()) == before


def test_processes_beside_it_learn_what_the_loaded_model_predicts(a1111, webui):
    """A1111 may know it from a YAML file beside the checkpoint, which says nothing of it."""
    config = from_mapping({"train_data_dir": ".", "base_model": "", "gpus": [0]})
    assert own_config(config, a1111).v_prediction is False
    webui.model.parameterization = "v"
    assert own_config(config, a1111).v_prediction is True


def test_the_webuis_model_leaves_its_card_for_processes_beside_it(both):
    host, webui, parts = both
    with pretended_gpu() as gpu:
        on_the_gpu(host, webui, gpu)
        before = places(parts())
        with host.device_left() as device:
            assert places(parts()) == {"cpu"} and not device.somebody_waits
            picture = threading.Thread(target=lambda: drawn.append((webui.generate("a cat"), places(parts()))))
            drawn: list = []
            picture.start()
            wait_for(lambda: device.somebody_waits, "somebody to wait")
            with device.rest():
                pass
            assert places(parts()) == {"cpu"} and drawn[0][1] == before
        picture.join()
        assert places(parts()) == before and not webui.call_queue.queue_lock._lock.locked()


@pytest.mark.parametrize("end", ["success", "failure", "stop"])
def test_the_webuis_model_is_bit_for_bit_what_it_was(both, settings, tmp_path, end):
    host, webui, parts = both
    before, commands = bits(parts), TrainCommands()

    def look():
        if end == "failure":
            raise RuntimeError("planted")
        if end == "stop":
            commands.stop()

    with suppress(RuntimeError):
        run(host, settings, tmp_path, look, commands)
    assert bits(parts) == before
    assert not webui.call_queue.queue_lock._lock.locked()


def test_a_model_that_was_changed_meanwhile_is_loaded_again(both, settings, tmp_path):
    host, _, parts = both
    before = bits(parts)

    @torch.no_grad()
    def spoil():
        for part in parts():
            with torch.inference_mode():
                next(part.parameters()).add_(1)

    run(host, settings, tmp_path, spoil)
    assert bits(parts) == before


def test_who_waits_gets_the_device_with_the_webuis_model_on_it_between_two_steps(both, settings, tmp_path):
    host, webui, _ = both
    alone = load_file(str(run(host, settings, tmp_path / "alone")[0].lora))
    picture, drawn, waiting = webui.generate("a cat"), [], threading.Event()

    def somebody():
        waiting.wait()
        drawn.append(webui.generate("a cat"))

    thread = threading.Thread(target=somebody)
    thread.start()

    def look():
        if not waiting.is_set():
            waiting.set()
            wait_for(lambda: webui.call_queue.queue_lock._pending_threads, "somebody to wait")
        elif len(seen) == 1:
            assert drawn, "it came before the second step"
        seen.append(1)

    seen = []
    result, _ = run(host, settings, tmp_path / "visited", look)
    thread.join()
    assert drawn[0].tobytes() == picture.tobytes()
    made = load_file(str(result.lora))
    assert all(torch.equal(made[name], alone[name]) for name in alone)


def test_another_device_is_refused(a1111, settings, monkeypatch):
    monkeypatch.setattr(a1111, "device", lambda: torch.device("cuda:0"))
    with pytest.raises(UserError) as caught:
        lender_of(a1111, from_mapping({**settings, "device": "cpu"}))
    assert caught.value.field == "device"
