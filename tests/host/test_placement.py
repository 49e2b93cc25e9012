"""Runs on what a WebUI lends from a pretended GPU: whole, one part at a time (--medvram), or partly (Forge)."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_trainer.config import from_mapping
from lora_trainer.errors import UserError
from lora_trainer.host.base import LenderOptions
from lora_trainer.host.standalone import StandaloneHost
from lora_trainer.jobs.estimating import estimate_job
from lora_trainer.jobs.execution import lender_options
from lora_trainer.jobs.store import JobStore
from lora_trainer.models.base import Room
from lora_trainer.planning.cost import precision_of
from lora_trainer.planning.memory import free_memory
from lora_trainer.run import file_lender, train
from lora_trainer.training.callbacks import TrainCallbacks
from lora_trainer.training.precision import resolve
from tests.devices import assert_alike, pretended_gpu
from tests.pictures import draw_dataset

CUDA = torch.device("cuda")  # A1111's has no index
ADAPTERS = {
    "lora": {"conv_rank": 2, "dropout": 0.1},
    "loha": {"adapter": "loha"},
    "text": {"train_text_encoder": True, "gradient_checkpointing": True, "dora": True},
    "preserve": {"preserve": 0.5, "trigger_word": "zwx", "shuffle_tags": True, "cuda_graphs": "auto",
                 "preserve_pictures": 2},
    "words": {"task": "words", "original_prompt": "a disc", "target_prompt": "a ring", "denoised_steps": 3,
              "train_data_dir": "", "preview_prompts": ["a disc --s 1"]},
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("placement")
    return {
        "train_data_dir": str(draw_dataset(folder / "pictures", 2, lambda index: (64, 64))),
        "base_model": "",
        "output_name": "disc",
        "resolution": 64,
        "lora_rank": 2,
        "batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "save_precision": "fp32",
        "tensorboard": False,
        "export_diffusers": False,
    }


@pytest.fixture(scope="module")
def on_the_cpu(settings, models, tmp_path_factory):
    """The LoRA that a run on the CPU makes, by the name of the adapter."""
    made = {}

    def lora(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            config = from_mapping({
                **settings, **ADAPTERS[name], "base_model": str(models / "first.safetensors"),
                "output_dir": str(folder), "device": "cpu",
            })  # fmt: skip
            made[name] = load_file(str(train(config, file_lender(config), callbacks=TrainCallbacks()).lora))
        return made[name]

    return lora


def run(host, settings, folder, **changes):
    config = from_mapping({**settings, "output_dir": str(folder), "mixed_precision": "no", **changes})
    lender = host.lender("", lender_options(host, config))
    return load_file(str(train(config, lender, callbacks=TrainCallbacks()).lora))


def places(model):
    return {parameter.device.type for parameter in model.parameters()}


@pytest.mark.parametrize("name", ["lora", pytest.param("text", marks=pytest.mark.slow)])
def test_a_run_on_what_a1111_has_on_the_device(a1111, webui, settings, on_the_cpu, tmp_path, name):
    expected = on_the_cpu(name)
    with pretended_gpu():
        webui.devices.device = CUDA
        webui.model.to(CUDA)
        assert_alike(run(a1111, settings, tmp_path, **ADAPTERS[name]), expected)
        assert places(webui.model) == {"cuda"}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("lora", "preserve") else pytest.mark.slow) for name in ADAPTERS
])  # fmt: skip
def test_a_run_with_medvram(a1111, webui, settings, on_the_cpu, tmp_path, name):
    """Adapters live where the model computes, whatever part of it is in main memory when they are made; and what is
    computed anew for the gradients finds its weights there."""
    expected = on_the_cpu(name)
    with pretended_gpu():
        webui.devices.device, webui.model.lowvram = CUDA, True
        assert_alike(run(a1111, settings, tmp_path, **ADAPTERS[name]), expected)
        assert places(webui.model) == {"cpu"}
        assert webui.lowvram.module_in_gpu is None


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name == "lora" else pytest.mark.slow) for name in ADAPTERS if name != "loha"
])  # fmt: skip
def test_a_run_on_what_forge_has_partly_on_the_device(forge, fake_forge, settings, on_the_cpu, tmp_path, name):
    """Forge leaves in main memory what does not fit beside the pictures."""
    expected = on_the_cpu(name)
    with pretended_gpu() as gpu:
        fake_forge.device = gpu.device
        assert_alike(run(forge, settings, tmp_path, **ADAPTERS[name]), expected)
        assert all(places(part) == {"cuda", "cpu"} for part in fake_forge.parts())


# Number formats ------------------------------------------------------------------------------------------------------


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("capability", [(8, 9), (7, 5)], ids=str)
@pytest.mark.parametrize("lent", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_auto_computes_in_the_format_of_what_is_lent(a1111, webui, settings, tmp_path, lent, capability):
    """Or every layer would cast its weight twice a step."""
    config = from_mapping({**settings, "output_dir": str(tmp_path)})
    old, follows = capability < (8, 0), lent != torch.float32
    expected = torch.float16 if lent == torch.float16 or old else torch.bfloat16
    with pretended_gpu(capability=capability):
        webui.devices.device = CUDA
        webui.model.to(CUDA, lent)
        assert precision_of(config, a1111).compute_dtype == expected, "what the estimate rests on"
        with a1111.lender("", lender_options(a1111, config)).borrow() as model:
            assert model.compute_dtype == expected
            casts = [weight for weight in model.unet.parameters() if weight.dtype != expected]
            assert bool(casts) == (not follows or (old and lent == torch.bfloat16))
            assert resolve(model.device, config.mixed_precision, model.compute_dtype).compute_dtype == expected


@pytest.mark.parametrize("wanted, named", [("auto", "fp16"), ("bf16", "bf16")])
def test_a_run_on_lent_fp16(a1111, webui, settings, tmp_path, wanted, named):
    with pretended_gpu(capability=(9, 0)):
        webui.devices.device = CUDA
        webui.model.to(CUDA, torch.float16)
        config = from_mapping({**settings, "output_dir": str(tmp_path), "mixed_precision": wanted})
        result = train(config, a1111.lender("", lender_options(a1111, config)), callbacks=TrainCallbacks())
        assert metadata(result.lora)["ss_mixed_precision"] == named


# Where a device enters ------------------------------------------------------------------------------------------------


def test_a_device_has_its_index_from_where_it_enters(a1111, webui):
    with pretended_gpu() as gpu:
        webui.devices.device = CUDA
        assert a1111.device() == a1111.lender("", LenderOptions()).device == gpu.device
        for device in ("auto", "cuda", CUDA):
            assert resolve(device, "auto").device == gpu.device


def test_the_room_for_a_training_is_what_is_free_and_what_a_model_takes_there(a1111, webui, forge, fake_forge):
    assert a1111.lender("", LenderOptions()).room() is None, "the CPU's memory is not looked at"
    with pretended_gpu(memory=1 << 30) as gpu:
        webui.devices.device = CUDA
        webui.model.to(CUDA)
        weights = sum(weight.nbytes for weight in webui.model.parameters())
        room = a1111.lender("", LenderOptions()).room()
        assert room == Room(room.free, weights, True) and 0 < room.free <= (1 << 30) - weights
        webui.model.lowvram = True
        assert not a1111.lender("", LenderOptions()).room().together
        webui.model.lowvram = False
        fake_forge.device = fake_forge.devices.device = gpu.device
        lender = forge.lender("", LenderOptions())
        with lender.borrow():
            room = lender.room()
            assert room == Room(room.free, forge.model_bytes()) and room.there > 0


def test_what_a_run_takes_is_told_before_it(a1111, webui, settings, tmp_path):
    """The estimate and the reports of a job ask for the memory of A1111's device, which has no index."""
    webui.paths.models_path, webui.paths.paths = str(tmp_path), {}
    store = JobStore(tmp_path / "jobs.sqlite")
    with pretended_gpu() as gpu:
        webui.devices.device = CUDA
        webui.model.to(CUDA)
        told = estimate_job({**settings, "output_dir": ""}, a1111, store)
        assert told["minutes"] > 0 and told["memory"] > gpu.allocated
        assert free_memory(a1111) == gpu.memory - gpu.allocated


def test_the_device_of_the_run_is_that_of_the_lender(models, settings, tmp_path):
    """device: cpu, in a program that would compute on a GPU: weights, computation and adapters agree."""
    with pretended_gpu() as gpu:
        host = StandaloneHost(tmp_path / "data", checkpoints=models)
        config = from_mapping({**settings, "device": "cpu", "output_dir": str(tmp_path)})
        with host.lender("first", lender_options(host, config)).borrow() as model:
            assert model.device == torch.device("cpu")
            assert {weight.dtype for weight in model.unet.parameters()} == {torch.float32}
        config = from_mapping({**settings, "output_dir": str(tmp_path)})
        with host.lender("first", lender_options(host, config)).borrow() as model:
            assert model.device == gpu.device
            assert {weight.dtype for weight in model.unet.parameters()} == {torch.bfloat16}


def test_a_webui_refuses_another_device_than_its_own(a1111, settings, tmp_path):
    with pretended_gpu():
        for device in ("cuda", "cuda:0"):
            config = from_mapping({**settings, "device": device, "output_dir": str(tmp_path)})
            with pytest.raises(UserError, match="is on cpu") as caught:
                a1111.lender("", lender_options(a1111, config))
            assert caught.value.field == "device"
    config = from_mapping({**settings, "device": "cpu", "output_dir": str(tmp_path)})
    assert a1111.lender("", lender_options(a1111, config)).describe().family == "sd1"


# Room ---------------------------------------------------------------------------------------------------------------


def test_a1111_makes_room_in_turns_and_has_everything_between_them(a1111, webui):
    with pretended_gpu() as gpu:
        webui.devices.device = CUDA
        webui.model.to(CUDA)
        other = copy.deepcopy(webui.model.first_stage_model).to(CUDA)
        other.lowvram = False
        webui.sd_models.model_data.loaded_sd_models = [webui.model, other]
        full = gpu.allocated
        lender = a1111.lender("", LenderOptions())
        with lender.borrow() as model:
            with lender.turn():
                model.release("vae", "text_encoders")
                lender.make_room()
                assert places(webui.model.model) == {"cuda"} and places(other) == {"cpu"}
                assert places(webui.model.first_stage_model) == places(webui.model.cond_stage_model) == {"cpu"}
                assert gpu.allocated < full
            assert places(webui.model) == {"cuda"}, "the WebUI may draw now"
            with lender.turn():
                assert places(webui.model.first_stage_model) == {"cpu"}
        assert places(webui.model) == places(other) == {"cuda"}


def test_forge_makes_room(forge, fake_forge):
    with pretended_gpu() as gpu:
        fake_forge.device = gpu.device
        lender = forge.lender("", LenderOptions())
        with lender.borrow() as model:
            with lender.turn():
                pass
            model.release("vae", "text_encoders")
            with lender.turn():
                unet, vae, clip = fake_forge.parts()
                assert places(clip) == {"cuda", "cpu"}
                lender.make_room()
                assert places(unet) == {"cuda", "cpu"} and places(vae) == places(clip) == {"cpu"}
        fake_forge.generate("a disc")
        assert "cuda" in places(vae) and "cuda" in places(clip)


def test_an_own_vae_follows_the_webuis_with_medvram(a1111, webui, models):
    with pretended_gpu():
        webui.devices.device, webui.model.lowvram = CUDA, True
        lender = a1111.lender("", LenderOptions(vae=str(models / "second.safetensors")))
        with lender.borrow() as model, lender.turn():
            assert model.encode_images(torch.zeros(1, 3, 64, 64)).device.type == "cuda"


@pytest.mark.parametrize("part", ["model", "first_stage_model", "cond_stage_model"])
def test_a_part_may_lie_on_the_device_as_a_run_with_medvram_begins(a1111, webui, part):
    """A1111 leaves the text encoder there when it has loaded a model, and any part when a picture is broken off."""
    with pretended_gpu():
        webui.devices.device, webui.model.lowvram = CUDA, True
        webui.lowvram.module_in_gpu = getattr(webui.model, part).to(CUDA)
        lender = a1111.lender("", LenderOptions())
        with lender.borrow() as model, lender.turn():
            pixels = torch.zeros(1, 3, 64, 64)
            assert model.encode_images(pixels).device.type == "cuda"
            with torch.no_grad():
                conditioning = model.encode_prompts(["a disc"])
                latents = torch.zeros(1, 4, 8, 8)
                assert model.predict(latents, torch.tensor([500]), conditioning, None).device.type == "cuda"


def test_an_own_vae_is_used_though_the_webuis_stayed_on_the_device(a1111, webui, models):
    with pretended_gpu():
        webui.devices.device, webui.model.lowvram = CUDA, True
        lender = a1111.lender("", LenderOptions(vae=str(models / "second.safetensors")))
        with lender.borrow() as model:
            with lender.turn():
                expected = model.encode_images(torch.zeros(1, 3, 64, 64)).cpu()
            webui.model.first_stage_model.to(CUDA)
            webui.lowvram.module_in_gpu = webui.model.first_stage_model
            with lender.turn():
                assert torch.equal(model.encode_images(torch.zeros(1, 3, 64, 64)).cpu(), expected)


def test_parts_that_made_room_are_back_after_a_turn_that_could_not_begin(a1111, webui, monkeypatch):
    with pretended_gpu():
        webui.devices.device = CUDA
        webui.model.to(CUDA)
        lender = a1111.lender("", LenderOptions())
        with pytest.raises(torch.cuda.OutOfMemoryError), lender.borrow() as model:
            with lender.turn():
                model.release("vae", "text_encoders")
                lender.make_room()

            def short(tensors):
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")

            monkeypatch.setattr(lender._snapshot, "moved", short)
            with lender.turn():
                pass
        assert places(webui.model) == {"cuda"}
