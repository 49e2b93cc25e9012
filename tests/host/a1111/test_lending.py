"""A1111's traps, sprung in the fake: what the host does between two turns, and what must be as it was."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_trainer.errors import UserError
from lora_trainer.host.base import LenderOptions, PreviewRequest
from lora_trainer.models.base import ModelAwayError
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.run.waiting import patient_turns
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from tests.flux import tiny_flux
from tests.host.a1111.fake import Info
from tests.host.conftest import OPTIONS, sha, storages
from tests.host.test_contract import answer

REQUEST = PreviewRequest("a cat", width=64, height=64, steps=2)


@pytest.fixture
def lender(a1111):
    return a1111.lender("", OPTIONS)


@pytest.fixture
def installed(webui, lora):
    """The LoRA, where prompts find it as <lora:cat:1>."""
    (webui.folder / "models" / "Lora" / "cat.safetensors").write_bytes(lora.read_bytes())
    webui.networks.update_available_networks_by_names(["cat"])


# Borrowing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", ["first", "third"])
def test_no_tensor_is_copied(a1111, webui, checkpoint):
    webui.select(checkpoint)
    with a1111.lender("", OPTIONS).borrow() as model:
        host = storages(webui.model.parameters())
        assert model.bound() and all(t.untyped_storage().data_ptr() in host for t in model.bound().values())


def test_a_turn_in_which_nothing_happened_binds_nothing(lender):
    with lender.borrow() as model:
        before = {name: id(tensor) for name, tensor in model.bound().items()}
        with lender.turn():
            assert {name: id(tensor) for name, tensor in model.bound().items()} == before


def test_weights_that_the_host_moved_are_bound_again(lender, webui):
    with lender.borrow() as model:
        expected = answer(model)
        webui.unload()
        with lender.turn():
            assert storages(model.bound().values()) <= storages(webui.model.parameters())
            assert torch.equal(answer(model), expected)


@pytest.mark.parametrize("what", ["half", "another's weights"])
def test_weights_that_something_changed_are_loaded_again(lender, webui, models, what):
    before = sha(webui)
    with lender.borrow() as model:
        expected = answer(model)
        if what == "half":
            webui.model.half()
        else:
            with torch.no_grad():
                for parameter in webui.model.model.parameters():
                    parameter.mul_(1.01)
        with lender.turn():
            assert torch.equal(answer(model), expected)
    assert sha(webui) == before


def test_a_model_that_cannot_be_made_right_is_away(lender, webui, monkeypatch):
    with lender.borrow():
        with torch.no_grad():
            webui.model.model.diffusion_model.input_blocks._modules["0"]._modules["0"].weight.add_(1)
        monkeypatch.setattr(webui.sd_models, "reload_model_weights", lambda *arguments, **named: webui.model)
        with pytest.raises(ModelAwayError), lender.turn():
            pass
        assert not webui.call_queue.queue_lock._lock.locked()


# LoRAs ----------------------------------------------------------------------------------------------------------------


def test_loras_of_prompts_do_not_leak_into_the_training(lender, webui, installed):
    plain = webui.generate("a")
    with_lora = webui.generate("a <lora:cat:1>")
    assert with_lora.tobytes() != plain.tobytes()
    with lender.borrow() as model:
        expected = answer(model)
        webui.generate("a")
        with lender.turn():
            assert torch.equal(answer(model), expected)
        for _ in range(2):
            assert webui.generate("a <lora:cat:1>").tobytes() == with_lora.tobytes()
            with lender.turn():
                assert torch.equal(answer(model), expected)
    assert webui.generate("a").tobytes() == plain.tobytes()


@pytest.mark.parametrize("fails", [False, True])
def test_loras_that_were_merged_are_merged_again(lender, webui, installed, fails):
    webui.generate("a <lora:cat:1>")
    before = sha(webui)
    try:
        with lender.borrow():
            assert sha(webui) != before
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert sha(webui) == before


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_the_model_is_away_while_the_user_has_another_one(lender, webui):
    with lender.borrow() as model:
        with lender.turn():
            expected = answer(model)
        for other in ("second", "third"):  # of the same layout, which overwrites the weights in place, and of another
            webui.select(other)
            with pytest.raises(ModelAwayError, match=f"{other}.*first"), lender.turn():
                pass
        webui.select("first")
        with lender.turn():
            assert torch.equal(answer(model), expected)
    assert webui.model.sd_checkpoint_info.name_for_extra == "first"


def test_what_the_user_switched_to_stays_when_the_run_ends(lender, webui):
    with lender.borrow():
        webui.select("second")
    assert webui.model.sd_checkpoint_info.name_for_extra == "second"
    assert webui.loads == ["first", "second"]


def test_a_switch_can_wait_for_the_end(a1111, webui):
    with a1111.lender("", LenderOptions(wait_for_model=True)).borrow() as model:
        expected = answer(model)
        lender = a1111.lender("", LenderOptions(wait_for_model=True))
    lender = a1111.lender("", LenderOptions(wait_for_model=True))
    with lender.borrow() as model:
        webui.select("second")
        with lender.turn():
            assert torch.equal(answer(model), expected)
        assert webui.select_checkpoint().name_for_extra == "first"
    assert webui.select_checkpoint().name_for_extra == "second"
    assert webui.model.sd_checkpoint_info.name_for_extra == "second"


def test_a_checkpoint_that_drew_a_single_picture_is_replaced(lender, webui):
    with lender.borrow() as model:
        expected = answer(model)
        with webui.call_queue.queue_lock:  # override_settings: loads another one and leaves the setting alone
            webui.sd_models.SkipWritingToConfig().__enter__()
            second = next(i for i in webui.sd_models.checkpoints_list.values() if i.name_for_extra == "second")
            webui.sd_models.reload_model_weights(info=second)
            webui.sd_models.SkipWritingToConfig().__exit__()
        with lender.turn():
            assert torch.equal(answer(model), expected)


@pytest.mark.parametrize("other", ["second", "third"])
def test_another_checkpoint_is_trained_while_pictures_stay_the_same(a1111, webui, other):
    before, picture, options = sha(webui), webui.generate("a"), dict(webui.shared.opts.data)
    lender = a1111.lender(other, OPTIONS)
    with lender.borrow() as model:
        assert model.info.name == other
        for _ in range(2):
            assert webui.generate("a").tobytes() == picture.tobytes()
            with lender.turn():
                assert webui.model.sd_checkpoint_info.name_for_extra == other
    assert sha(webui) == before
    assert webui.shared.opts.data == options


def test_a_failing_load_is_an_error_that_names_the_field(a1111, webui, monkeypatch):
    def broken(*arguments, **named):
        raise RuntimeError("out of disk")

    lender = a1111.lender("second", OPTIONS)
    monkeypatch.setattr(webui.sd_models, "reload_model_weights", broken)
    with pytest.raises(UserError) as error, lender.borrow():
        pass
    assert error.value.field == "base_model" and "out of disk" in str(error.value)
    assert not webui.call_queue.queue_lock._lock.locked()


def test_a_schedule_that_the_host_only_rounded_is_the_usual_one(a1111, webui):
    with a1111.lender("", OPTIONS).borrow() as model:
        usual = model.schedule.alphas_cumprod
    webui.model.alphas_cumprod_original = usual.half().float()
    with a1111.lender("", OPTIONS).borrow() as model:
        assert torch.equal(model.schedule.alphas_cumprod, usual)
    webui.model.alphas_cumprod_original = usual**2
    with a1111.lender("", OPTIONS).borrow() as model:
        assert torch.equal(model.schedule.alphas_cumprod, usual**2)


# VAE ------------------------------------------------------------------------------------------------------------------


def test_a_vae_changed_meanwhile_does_not_change_the_training(lender, webui):
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    with lender.borrow() as model:
        expected = model.encode_images(pixels)
        with torch.no_grad():
            for parameter in webui.model.first_stage_model.parameters():
                parameter.mul_(0.9)
        theirs = sha(webui)
        for _ in range(2):
            with lender.turn():
                assert torch.allclose(model.encode_images(pixels), expected, atol=1e-6)
    assert sha(webui) == theirs


def test_a_vae_file_replaces_the_hosts(a1111, webui, models, tmp_path):
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    with a1111.lender("second", OPTIONS).borrow() as model:
        expected, key = model.encode_images(pixels), model.vae_key
    lender = a1111.lender("first", dataclasses.replace(OPTIONS, vae=str(models / "second.safetensors")))
    with lender.borrow() as model, lender.turn():
        assert torch.allclose(model.encode_images(pixels), expected, atol=1e-6)
        assert model.vae_key == key


def test_what_was_released_may_change_as_it_likes(lender, webui):
    with lender.borrow() as model:
        model.release("vae", "text_encoders")
        with torch.no_grad():
            for root in (webui.model.first_stage_model, webui.model.cond_stage_model):
                for parameter in root.parameters():
                    parameter.mul_(2)
        with lender.turn():
            assert webui.loads == ["first"]


# Refusals -------------------------------------------------------------------------------------------------------------


def lowvram(webui):
    webui.shared.cmd_opts.lowvram = True


def accelerated(webui):
    webui.sd_unet.current_unet = SimpleNamespace(option=SimpleNamespace(label="[TRT] first"))


def fp8(webui):
    webui.devices.fp8 = True


def inpainting(webui):
    webui.model.model.conditioning_key = "hybrid"


def nine_channels(webui):
    stem = webui.model.model.diffusion_model.input_blocks._modules["0"]._modules["0"]
    stem.weight = torch.nn.Parameter(torch.zeros(stem.weight.shape[0], 9, 3, 3), requires_grad=False)


@pytest.mark.parametrize("fault, word", [(lowvram, "--medvram"), (accelerated, "SD Unet"), (fp8, "fp8"),
                                         (inpainting, "inpainting"), (nine_channels, "inpainting")])  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_a_sentence(a1111, webui, fault, word):
    fault(webui)
    lender = a1111.lender("", OPTIONS)
    for attempt in (lender.describe, lambda: lender.borrow().__enter__()):
        with pytest.raises(UserError) as error:
            attempt()
        assert word in str(error.value) and error.value.remedy
    assert not webui.call_queue.queue_lock._lock.locked()


def test_a_setting_that_forbids_training_in_the_middle_makes_the_model_away(lender, webui):
    with lender.borrow():
        accelerated(webui)
        with pytest.raises(ModelAwayError, match=r"^The WebUI draws.*SD Unet"), lender.turn():
            pass


def test_an_accelerated_unet_that_was_switched_off_does_not_wait_for_a_picture(lender, webui):
    with lender.borrow() as model:
        expected = answer(model)
        accelerated(webui)
        with pytest.raises(ModelAwayError), lender.turn():
            pass
        webui.shared.opts.data["sd_unet"] = "None"
        with lender.turn():
            assert torch.equal(answer(model), expected)
        assert webui.sd_unet.current_unet is None


def choose_fp8(webui):
    webui.shared.opts.data["fp8_storage"] = "Enable"
    webui.sd_models.reload_model_weights()


def choose_another(webui):
    webui.shared.opts.data["sd_model_checkpoint"] = next(t for t in webui.sd_models.checkpoints_list if "second" in t)
    webui.sd_models.reload_model_weights()


@pytest.mark.parametrize("choice", [choose_fp8, choose_another])
def test_what_was_chosen_instead_can_be_switched_back(lender, webui, choice):
    with lender.borrow() as model:
        expected, before = answer(model), dict(webui.shared.opts.data)
        choice(webui)
        for _ in range(2):
            with pytest.raises(ModelAwayError) as away, lender.turn():
                pass
        assert away.value.returns
        lender.switch_back()
        with lender.turn():
            assert torch.equal(answer(model), expected)
        assert webui.shared.opts.data == before


def test_fp8_with_the_hosts_own_fp16_copy_is_trained_on_that_copy(a1111, webui):
    webui.devices.fp8 = True
    for module in [*webui.model.model.modules(), *webui.model.cond_stage_model.modules()]:
        if "weight" in module._parameters:
            module.fp16_weight = module.weight.data.half()
            module.weight.data = module.weight.data.to(torch.float8_e4m3fn)
    lender = a1111.lender("", OPTIONS)
    with lender.borrow() as model, lender.turn():
        assert model.unet.conv_in.weight.dtype == torch.float16
        assert torch.isfinite(answer(model)).all()


# Turns ----------------------------------------------------------------------------------------------------------------


def test_the_host_draws_between_turns_but_not_within_one(lender, webui):
    done = threading.Event()
    thread = threading.Thread(target=lambda: (webui.generate("a"), done.set()))
    with lender.borrow():
        with lender.turn():
            thread.start()
            assert not done.wait(0.1)
        assert done.wait(10)
    thread.join(10)


def test_the_model_can_be_held_for_the_whole_run(a1111, webui):
    lender = a1111.lender("", LenderOptions(hold=True))
    done = threading.Event()
    thread = threading.Thread(target=lambda: (webui.generate("a"), done.set()))
    with lender.borrow():
        thread.start()
        with lender.turn():
            pass
        a1111.draw(REQUEST)
        assert not done.wait(0.1)
    assert done.wait(10)
    thread.join(10)


def test_a_run_that_holds_the_model_and_is_paused_lets_the_host_draw(a1111, webui):
    with a1111.lender("", LenderOptions()).borrow() as model:
        expected = answer(model)
    lender, commands = a1111.lender("", LenderOptions(hold=True)), TrainCommands()
    commands.resting = lender.rest
    with lender.borrow() as model:
        commands.pause()
        waiting = threading.Thread(target=lambda: (webui.generate("a"), webui.select("second"), commands.resume()))
        waiting.start()
        commands.wait_while_paused(10)
        waiting.join(10)
        assert not waiting.is_alive() and not commands.paused
        assert webui.call_queue.queue_lock._lock.locked()
        back = threading.Timer(0.2, lambda: webui.select("first"))
        back.start()
        with patient_turns(lender, TrainCallbacks(), commands)():  # waits until the user has the first one again
            assert torch.equal(answer(model), expected)
        back.join(10)


def test_captions_take_their_turn_on_the_hosts_device(a1111, webui):
    lender = a1111.lender("", LenderOptions())
    lock = webui.call_queue.queue_lock
    for turn in (a1111.device_turn, lender.device_turn):
        with turn():
            assert lock._lock.locked() if hasattr(lock, "_lock") else lock.locked()
        assert not (lock._lock.locked() if hasattr(lock, "_lock") else lock.locked())


def test_a_flow_model_is_refused_for_what_it_is(a1111, webui, tmp_path):
    info = Info(Path(str(tiny_flux(tmp_path)["base_model"])))
    webui.sd_models.checkpoints_list[info.title] = info
    with pytest.raises(UserError, match=r"is FLUX\.1, which this WebUI does not load"):
        a1111.lender(info.title, OPTIONS).describe()


def test_a_file_is_read_once_to_be_described(a1111, monkeypatch):
    read, calls = FileLender._read, []
    monkeypatch.setattr(FileLender, "_read", lambda lender: calls.append(lender.path) or read(lender))
    assert a1111.lender("third", OPTIONS).describe().name == "third"
    assert len(calls) == 1
