"""Forge's own traps, sprung in a fake."""

from __future__ import annotations

import dataclasses
import gc
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_trainer.errors import UserError
from lora_trainer.host import select
from lora_trainer.host.base import Card, PreviewRequest
from lora_trainer.models.base import ModelAwayError
from tests.host.a1111.fake import Info
from tests.host.conftest import OPTIONS, make_lora, storages
from tests.host.test_contract import answer

LORA = "a cat <lora:cat:1>"


def state(fake) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.clone()) for part in fake.parts() for name, tensor in part.state_dict().items()]


def same(one, two) -> bool:
    return len(one) == len(two) and all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(one, two))


@pytest.fixture
def lender(forge):
    return forge.lender("first", OPTIONS)


def test_aliases_share_memory_and_can_be_trained_through(lender, fake_forge):
    with lender.borrow() as model, lender.turn():
        bound = model.bound().values()
        assert storages(bound) <= {s for part in fake_forge.parts() for s in storages(part.parameters())}
        assert not any(tensor.is_inference() for tensor in bound)
        assert all(parameter.is_inference() for parameter in fake_forge.parts()[0].parameters())
        latents = torch.ones(1, 4, 8, 8, requires_grad=True)
        with torch.no_grad():
            prompts = model.encode_prompts(["a red cat"])
        model.predict(latents, torch.tensor([500]), prompts, None).sum().backward()
        assert torch.isfinite(latents.grad).all() and latents.grad.abs().sum() > 0


def test_a_model_is_loaded_when_there_is_none(lender, fake_forge):
    assert fake_forge.loads == []
    assert lender.describe().name == "first" and fake_forge.loads == []
    with lender.borrow(), lender.turn():
        assert fake_forge.loads == ["first"]


def test_what_is_selected_is_meant_and_only_what_is_loaded_is_called_so(forge, fake_forge):
    def marked(mark):
        return [one.path.stem for one in forge.checkpoints() if getattr(one, mark)]

    assert (marked("selected"), marked("loaded")) == (["first"], []), "Forge loads none by itself"
    fake_forge.generate("a cat")
    assert (marked("selected"), marked("loaded")) == (["first"], ["first"])
    fake_forge.select("second")  # which Forge loads for the next picture
    assert (marked("selected"), marked("loaded")) == (["second"], ["first"])
    assert (forge.selected().path.stem, forge.selected().loaded) == ("second", False)
    assert forge.lender("", OPTIONS).describe().name == "second"


def test_weights_that_forge_moved_are_bound_again(lender, fake_forge):
    with lender.borrow() as model:
        expected = answer(model)
        fake_forge.unload()
        with lender.turn():
            assert storages(model.bound().values()) <= {
                s for part in fake_forge.parts() for s in storages(part.parameters())
            }
            assert torch.equal(answer(model), expected)


def test_merged_loras_are_taken_out_and_merged_again(forge, lender, fake_forge, lora):
    forge.publish(lora, "cat", Card())
    plain, picture = fake_forge.generate("a cat"), fake_forge.generate(LORA)
    assert picture.tobytes() != plain.tobytes()
    before = state(fake_forge)
    with lender.borrow() as model:
        with lender.turn():
            expected = answer(model)
        assert fake_forge.generate(LORA).tobytes() == picture.tobytes()
        with lender.turn():
            assert torch.equal(answer(model), expected)
    assert same(state(fake_forge), before)
    assert fake_forge.generate(LORA).tobytes() == picture.tobytes()
    assert fake_forge.generate("a cat").tobytes() == plain.tobytes()


def test_loras_that_forge_could_not_finish_merging_are_taken_out(forge, lender, fake_forge, lora):
    """Of some formats of GGUF. Forge then takes the half merged model for one without LoRAs."""
    forge.publish(lora, "cat", Card())
    plain, before = fake_forge.generate("a cat"), state(fake_forge)
    with lender.borrow() as model:
        with lender.turn():
            expected = answer(model)
        loader = fake_forge.model.forge_objects_original.unet.lora_loader
        loader.unwritable = {list(layers_of(fake_forge, lora))[-1]}
        with pytest.raises(NotImplementedError):
            fake_forge.generate(LORA)
        assert not same(state(fake_forge), before)
        with lender.turn():
            assert torch.equal(answer(model), expected) and same(state(fake_forge), before)
        with pytest.raises(NotImplementedError):
            forge.draw(PreviewRequest("a cat", width=64, height=64, lora=lora))
        assert same(state(fake_forge), before)
        with pytest.raises(NotImplementedError):
            fake_forge.generate(LORA)
        with lender.turn():
            assert torch.equal(answer(model), expected)
    assert same(state(fake_forge), before), "what the prompt asked for is not merged again: it cannot be"
    assert fake_forge.generate("a cat").tobytes() == plain.tobytes()


def layers_of(fake_forge, lora: Path) -> dict[str, object]:
    """What Forge would merge, by the names of its parameters, in the order in which it does."""
    networks, unet = fake_forge.networks, fake_forge.model.forge_objects_original.unet.model
    return networks.load_lora(load_file(lora), networks.model_lora_keys_unet(unet, {}))[0]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_checkpoint_selected_while_another_is_loaded_stays_selected(forge, fake_forge, monkeypatch, moment):
    """Selecting does not wait for a turn."""
    fake_forge.select("first")
    picture = fake_forge.generate("a cat")
    build, selections = fake_forge._build, iter(["first"])

    def building(info, storage):
        for stem in selections if moment == "before" else ():
            fake_forge.select(stem)
        model = build(fake_forge.sd_models.model_data.forge_loading_parameters["checkpoint_info"], storage)
        for stem in selections:
            fake_forge.select(stem)
        return model

    fake_forge.select("third")
    with forge.lender("second", OPTIONS).borrow():
        monkeypatch.setattr(fake_forge, "_build", building)
        fake_forge.sd_models.model_data.forge_hash = ""
        with forge.lender("second", OPTIONS).borrow() as model:
            assert model.info.name == "second"
    assert fake_forge.generate("a cat").tobytes() == picture.tobytes()


def test_a_checkpoint_selected_while_a_preview_is_drawn_stays_selected(forge, fake_forge, monkeypatch):
    fake_forge.generate("a cat")
    draw, request = fake_forge.processing.process_images_inner, PreviewRequest("a cat", width=64, height=64)
    plain = forge.draw(request)

    def selecting(p):
        fake_forge.select("second")
        return draw(p)

    monkeypatch.setattr(fake_forge.processing, "process_images_inner", selecting)
    assert forge.draw(PreviewRequest("a cat", checkpoint="first", width=64, height=64)).tobytes() == plain.tobytes()
    assert [it.path.stem for it in forge.checkpoints() if it.selected] == ["second"]


def test_a_preview_leaves_no_lora_behind(forge, fake_forge, lora):
    plain = fake_forge.generate("a cat")
    before = state(fake_forge)
    forge.draw(PreviewRequest("a cat", width=64, height=64, lora=lora))
    assert same(state(fake_forge), before)
    assert fake_forge.generate("a cat").tobytes() == plain.tobytes()
    assert not any(name.startswith("lora-trainer") for name in fake_forge.networks.available_networks)


@pytest.mark.slow
def test_twenty_overwrites_show_the_newest_weights_each_time(forge, fake_forge, models, tmp_path):
    pictures = set()
    for index in range(20):
        path = make_lora(models / "first.safetensors", tmp_path / "again.safetensors", 0.1, seed=index)
        forge.publish(path, "cat", Card(), overwrite=True)
        picture = fake_forge.generate(LORA).tobytes()
        assert picture == forge_picture_of(forge, fake_forge, path, index)
        pictures.add(picture)
    assert len(pictures) == 20


def forge_picture_of(forge, fake_forge, path, index: int) -> bytes:
    forge.publish(path, f"once-{index}", Card())
    return fake_forge.generate(f"a cat <lora:once-{index}:1>").tobytes()


def test_another_checkpoint_pauses_the_run_and_is_not_held_back(lender, fake_forge):
    with lender.borrow() as model:
        expected = answer(model)
        former = weakref.ref(fake_forge.model)
        fake_forge.select("second")
        with pytest.raises(ModelAwayError, match="first"):
            fake_forge.generate("a dog")
            with lender.turn():
                pass
        gc.collect()
        assert former() is None, "the former model's memory is held"
        fake_forge.select("first")
        with lender.turn():
            assert torch.equal(answer(model), expected)


def test_a_switch_can_wait_until_the_run_is_over(forge, fake_forge):
    lender = forge.lender("first", dataclasses.replace(OPTIONS, wait_for_model=True))
    with lender.borrow():
        fake_forge.select("second")
        fake_forge.generate("a dog")
        with lender.turn():
            assert fake_forge.model.sd_checkpoint_info.name_for_extra == "first"
    assert "second" in fake_forge.shared.opts.data["sd_model_checkpoint"]
    fake_forge.generate("a dog")
    assert fake_forge.model.sd_checkpoint_info.name_for_extra == "second"


def test_the_former_model_comes_back_after_another_was_trained(forge, fake_forge):
    picture = fake_forge.generate("a cat")
    with forge.lender("second", OPTIONS).borrow():
        assert fake_forge.model.sd_checkpoint_info.name_for_extra == "second"
        assert "first" in fake_forge.shared.opts.data["sd_model_checkpoint"]
    assert fake_forge.model.sd_checkpoint_info.name_for_extra == "first"
    assert fake_forge.generate("a cat").tobytes() == picture.tobytes()


def test_after_a_failed_load_forge_loads_again(forge, fake_forge, monkeypatch):
    fake_forge.generate("a cat")
    build = fake_forge._build

    def fail_for_second(info, storage):
        if info.name_for_extra == "second":
            raise OSError("not enough memory")
        return build(info, storage)

    monkeypatch.setattr(fake_forge, "_build", fail_for_second)
    with pytest.raises(UserError) as error, forge.lender("second", OPTIONS).borrow():
        pass
    assert error.value.field == "base_model" and error.value.remedy
    assert fake_forge.model.sd_checkpoint_info.name_for_extra == "first"


def test_low_bits_are_refused_with_the_option_to_change(forge, fake_forge):
    fake_forge.shared.opts.forge_unet_storage_dtype = "bnb-nf4"
    with pytest.raises(UserError) as error:
        forge.lender("first", OPTIONS).describe()
    assert error.value.field == "base_model" and "Diffusion in Low Bits" in error.value.remedy


def choose(fake_forge, option, value):
    """As the fields at the top do it: Forge loads for the next picture."""
    fake_forge.shared.opts.data[option] = value
    fake_forge._refresh_model_loading_parameters()


CHOICES = [("forge_unet_storage_dtype", "bnb-nf4", "Automatic"), ("forge_additional_modules", ["/a/vae.pt"], [])]


@pytest.mark.parametrize("option, other, first", CHOICES)
def test_a_run_goes_on_without_a_picture_when_the_choice_is_as_before(lender, fake_forge, option, other, first):
    with lender.borrow() as model:
        expected = answer(model)
        choose(fake_forge, option, other)
        fake_forge.generate("a cat")
        for _ in range(2):
            with pytest.raises(ModelAwayError, match="Diffusion in Low Bits") as away, lender.turn():
                pass
        assert away.value.returns
        loads = len(fake_forge.loads)
        choose(fake_forge, option, first)
        with lender.turn():
            assert torch.equal(answer(model), expected)
        assert len(fake_forge.loads) == loads + 1


@pytest.mark.parametrize("option, other, first", [*CHOICES, ("sd_model_checkpoint", "second.safetensors", None)])
def test_what_was_chosen_instead_can_be_switched_back(lender, fake_forge, option, other, first):
    with lender.borrow() as model:
        expected = answer(model)
        before = dict(fake_forge.shared.opts.data)
        if option == "sd_model_checkpoint":
            fake_forge.select("second")
        else:
            choose(fake_forge, option, other)
        fake_forge.generate("a cat")
        with pytest.raises(ModelAwayError) as away, lender.turn():
            pass
        assert away.value.returns
        lender.switch_back()
        with lender.turn():
            assert torch.equal(answer(model), expected)
        assert fake_forge.shared.opts.data[option] == before[option]


def test_a_list_of_checkpoints_that_is_read_again_changes_nothing(lender, fake_forge):
    with lender.borrow() as model:
        expected = answer(model)
        choose(fake_forge, "forge_unet_storage_dtype", "bnb-nf4")
        fake_forge.generate("a cat")
        entries = fake_forge.sd_models.checkpoints_list
        entries.update({title: Info(Path(entry.filename)) for title, entry in entries.items()})
        choose(fake_forge, "forge_unet_storage_dtype", "Automatic")
        with lender.turn():
            assert torch.equal(answer(model), expected)


def test_a_choice_that_forge_has_not_loaded_yet_counts_as_it_is_asked(forge, fake_forge):
    choose(fake_forge, "forge_unet_storage_dtype", "bnb-nf4")
    fake_forge.generate("a cat")
    choose(fake_forge, "forge_unet_storage_dtype", "Automatic")
    lender = forge.lender("first", OPTIONS)
    assert lender.describe().name == "first"
    with lender.borrow(), lender.turn():
        assert fake_forge.model.forge_objects_original.unet.model.storage_dtype is torch.float32


def test_the_family_is_told_before_the_format(forge, fake_forge, tmp_path):
    path = tmp_path / "flux-nf4.safetensors"
    name = "double_blocks.0.img_attn.qkv.weight"
    state = {name: torch.zeros(4, 1).byte(), f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(8)}
    save_file(state, str(path))
    fake_forge.sd_models.checkpoints_list["flux"] = Info(path)
    fake_forge.shared.opts.forge_unet_storage_dtype = "bnb-nf4"
    with pytest.raises(UserError) as error:
        forge.lender("flux-nf4", OPTIONS).describe()
    assert error.value.message.startswith("flux-nf4.safetensors is FLUX.1, quantized (bitsandbytes nf4), which")
    assert "Low Bits" not in error.value.remedy and "fp8" in error.value.remedy


def test_what_is_loaded_is_called_what_its_file_is(forge, fake_forge, tmp_path):
    fake_forge.generate("a cat")
    path = tmp_path / "auraflow.safetensors"
    save_file({"double_layers.0.attn.w1q.weight": torch.zeros(4, 4)}, str(path))
    info = Info(path)
    fake_forge.sd_models.checkpoints_list["auraflow"] = fake_forge.model.sd_checkpoint_info = info
    fake_forge.model.forge_objects_original.unet.model.predictor.prediction_type = "const"
    fake_forge.sd_models.model_data.forge_loading_parameters["checkpoint_info"] = info
    fake_forge.sd_models.model_data.forge_hash = str(fake_forge.sd_models.model_data.forge_loading_parameters)
    with pytest.raises(UserError, match=r"^base_model: auraflow\.safetensors is AuraFlow, which"):
        forge.lender("auraflow", OPTIONS).describe()


@pytest.mark.parametrize("option, flags, remedy", [
    ("bnb-nf4", {}, "Diffusion in Low Bits"),
    ("Automatic", {"unet_in_fp8_e4m3fn": True, "always_cpu": True}, "without --unet-in-fp8-e4m3fn."),
    ("Automatic", {"unet_in_fp8_e4m3fn": False}, "fp16, bf16 or fp32 version"),
])  # fmt: skip
def test_coarse_weights_are_refused_with_what_made_them_so(forge, fake_forge, option, flags, remedy):
    fake_forge.generate("a cat")
    fake_forge.memory_management.args = SimpleNamespace(**flags)
    fake_forge.model.forge_objects_original.unet.model.storage_dtype = torch.float8_e4m3fn
    fake_forge.shared.opts.forge_unet_storage_dtype = option
    with pytest.raises(UserError, match="float8_e4m3fn") as error:
        forge.lender("first", OPTIONS).describe()
    assert remedy in error.value.remedy


def test_whoever_waits_finds_our_aliases_gone(lender, fake_forge, monkeypatch):
    with lender.borrow() as model:
        expected = answer(model)
        monkeypatch.setattr(lender._turns, "_waiting", lambda: True)
        with lender.turn():
            pass
        assert all(tensor.is_meta for tensor in model.bound().values())
        monkeypatch.undo()
        with lender.turn():
            assert torch.equal(answer(model), expected)


def test_a_fork_that_is_not_known_is_refused_in_a_sentence(monkeypatch):
    for present in (
        {"ldm_patched.modules.model_management": SimpleNamespace()},
        {"backend.memory_management": SimpleNamespace(load_models_gpu=lambda models, force_full_load=False: None)},
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "modules.sd_models", SimpleNamespace(forge_model_reload=None))
            for name, module in present.items():
                patch.setitem(sys.modules, name, module)
            with pytest.raises(UserError) as error:
                select._make()
            assert error.value.remedy
