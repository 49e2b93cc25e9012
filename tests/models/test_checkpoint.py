"""What a file that can be trained is, and how a damaged one is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_trainer.devices import torch_version
from lora_trainer.errors import UserError
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.detect import detect
from lora_trainer.models.header import read_header
from lora_trainer.models.hints import folder_hints
from lora_trainer.models.tensors import SafetensorsSource
from tests.devices import pretended_gpu
from tests.models import reference
from tests.tiny import (
    SD1,
    SD2,
    SDXL,
    random_tensors,
    sd1_shapes,
    sd2_shapes,
    sdxl_shapes,
    tiny_sd1,
    tiny_sd2,
    vae_shapes,
)

UNET = "model.diffusion_model."

needs_safe_pickles = pytest.mark.skipif(torch_version() < (2, 6), reason="this torch could run a pickle's code")



@pytest.mark.parametrize(
    ("shapes", "family", "channels", "depths", "text"),
    [
        (sd1_shapes(**SD1), "sd1", (32, 32, 64, 64), (1, 1, 1, 0), ((32, 2),)),
        (sd2_shapes(**SD2), "sd2", (32, 32, 64, 64), (1, 1, 1, 0), ((32, 1),)),
        (sdxl_shapes(**SDXL), "sdxl", (32, 64, 64), (0, 2, 10), ((32, 2), (32, 3))),
        (sd1_shapes(**{**SD1, "channels": 64, "mult": (1, 3), "depths": (0, 3), "layers": 3}),
         "sd1", (64, 192), (0, 3), None),
        (sdxl_shapes(**{**SDXL, "channels": 96, "mult": (1, 2, 4, 4), "depths": (1, 0, 2, 3)}),
         "sdxl", None, (1, 0, 2, 3), None),
        (sd2_shapes(**{**SD2, "layers": 1, "text": ((64, 5),)}), "sd2", None, None, ((64, 4),)),
    ],
)  # fmt: skip
def test_any_width_and_depth_is_read_from_the_shapes(shapes, family, channels, depths, text):
    found = detect(shapes)
    assert found.family == family
    assert channels is None or found.unet.channels == channels
    assert depths is None or found.unet.depths == depths
    assert text is None or tuple((shape.width, shape.layers) for shape in found.text_encoders) == text


def test_an_unusual_depth_computes(tmp_path):
    path = tiny_sd1(tmp_path / "odd.safetensors", mult=(1, 3), depths=(0, 3), layers=1)
    with FileLender(path).borrow() as model, torch.no_grad():
        prompts = model.encode_prompts(["a cat"])
        assert model.predict(torch.randn(1, 4, 8, 8), torch.tensor([1]), prompts, None).isfinite().all()


def test_a_missing_file_and_a_plain_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        FileLender(tmp_path / "missing.safetensors").describe()
    with pytest.raises(UserError, match="not a diffusers model folder"):
        FileLender(tmp_path).describe()
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    (tmp_path / "unet").mkdir()
    with pytest.raises(UserError, match="PixArtAlphaPipeline"):
        FileLender(tmp_path).describe()
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UserError, match="holds no weights"):
        FileLender(tmp_path).describe()
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        FileLender(tmp_path).describe()


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "table",
    [
        {"a": 5},
        {"a": {"dtype": "F32"}},
        {"a": entry(shape=(-2,))},
        {"a": entry(shape=(3,))},
        {"a": entry(dtype="F7")},
        {"a": entry(dtype=["F32"])},
        {"a": entry(shape=("x",))},
        {"a": entry(offsets=(8, 0))},
        {"a": entry(offsets=(0, 8, 16))},
        {"a": entry(offsets=(4, 12))},
        {"a": entry(offsets=(0, 8.0))},
        {"a": entry(offsets=(0, True))},
        {"a": entry(), "b": entry(offsets=(4, 12))},
        {"a": entry(shape=(1 << 62, 1 << 62))},
        {"__metadata__": "text", "a": entry()},
        {"__metadata__": {}},
    ],
)
def test_malformed_tables(tmp_path, table):
    raw = json.dumps(table).encode()
    path = tmp_path / "file.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(16))
    with pytest.raises(UserError):
        read_header(path)


@pytest.fixture(scope="module")
def sound_bytes(scratch):
    save_file({"a.weight": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.float16)}, str(scratch), {"key": "value"})
    return scratch.read_bytes()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_leads_to_anything_but_a_message(scratch, sound_bytes, data):
    damaged = bytearray(sound_bytes)
    for _ in range(data.draw(st.integers(0, 6))):
        position = data.draw(st.integers(0, len(damaged) - 1))
        damaged[position] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    scratch.write_bytes(bytes(damaged))
    with pytest.raises(UserError) as caught:  # even the sound one is no base model
        FileLender(scratch).describe()
    assert scratch.name in str(caught.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_a_truncated_download_is_called_that(checkpoints, scratch, share):
    size = checkpoints["sd1"].stat().st_size
    with open(checkpoints["sd1"], "rb") as handle:
        scratch.write_bytes(handle.read(max(40, int(size * share))))
    with pytest.raises(UserError, match="truncated"):
        FileLender(scratch).describe()


@needs_safe_pickles
def test_ckpt_files_are_read_without_running_code(checkpoints, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(str(checkpoints["sd1"])), "epoch": 3}, path)
    with FileLender(path).borrow() as model, FileLender(checkpoints["sd1"]).borrow() as same:
        assert model.text_key == same.text_key and model.vae_key == same.vae_key
    torch.save(load_file(str(checkpoints["sd1"])), path)
    assert FileLender(path).describe().family == "sd1"


@pytest.mark.parametrize("version", ["2.1.2+cu121", "2.5.1", "2.6.0"])
def test_ckpt_files_are_not_opened_where_torch_would_run_their_code(checkpoints, tmp_path, monkeypatch, version):
    """CVE-2025-32434: before torch 2.6 ``weights_only`` does not keep a file from it."""
    path, opened = tmp_path / "model.ckpt", []
    torch.save(load_file(str(checkpoints["sd1"])), path)
    load = torch.serialization.load
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.serialization, "load", lambda *args, **more: opened.append(args) or load(*args, **more))
    if version == "2.6.0":
        assert FileLender(path).describe().family == "sd1" and opened
        return
    with pytest.raises(UserError, match="could run code") as caught:
        FileLender(path).describe()
    assert "safetensors" in caught.value.remedy and not opened


class Dangerous:
    def __reduce__(self):
        return (pytest.fail, ("the pickle ran",))


@needs_safe_pickles
@pytest.mark.parametrize("content", [None, b"<!DOCTYPE html><title>404</title>"])
def test_a_file_under_the_ending_of_another_is_not_said_to_run_code(checkpoints, tmp_path, content):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content or checkpoints["sd1"].read_bytes())
    with pytest.raises(UserError, match="no PyTorch checkpoint"):
        FileLender(path).describe()


@needs_safe_pickles
def test_ckpt_files_that_hold_more_are_refused(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}, "callbacks": Dangerous()}, path)
    with pytest.raises(UserError, match="could run code"):
        FileLender(path).describe()
    torch.save({"string_to_param": {"*": torch.zeros(4, 768)}, "name": "x"}, path)
    with pytest.raises(UserError, match="textual inversion"):
        FileLender(path).describe()
    for content in (b"", b"garbage", b"PK\x03\x04garbage", b"\x80\x02"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.ckpt"):
            FileLender(path).describe()


SGM_V = "model: {params: {denoiser_config: {params: {scaling_config: {target: sgm.x.VScaling}}}}}"


@pytest.mark.parametrize(
    ("metadata", "markers", "yaml", "prediction", "zero"),
    [
        (None, (), None, "epsilon", False),
        ({"modelspec.prediction_type": "v"}, (), None, "v_prediction", False),
        ({"modelspec.prediction_type": "epsilon"}, (), None, "epsilon", False),
        ({"modelspec.predict_key": "v"}, (), None, "v_prediction", False),
        ({"modelspec.predict_key": "epsilon"}, (), None, "epsilon", False),
        ({"modelspec.prediction_type": "V-Prediction"}, (), None, "v_prediction", False),
        ({"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, (), None, "v_prediction", True),
        ({"ss_v_parameterization": "true", "ss_zero_terminal_snr": "true"}, (), None, "v_prediction", True),
        ({"ss_v_parameterization": "False"}, (), None, "epsilon", False),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, (), None, "v_prediction", False),
        (None, ("v_pred", "ztsnr"), None, "v_prediction", True),
        (None, (), "model: {params: {parameterization: v}}", "v_prediction", False),
        ({"modelspec.prediction_type": "v"}, (), "model: {params: {parameterization: eps}}", "epsilon", False),
        (None, (), SGM_V, "v_prediction", False),
        ({"modelspec.prediction_type": "v"}, (), SGM_V.replace("VScaling", "EpsScaling"), "epsilon", False),
        (None, (), "- nothing\n- of use", "epsilon", False),
    ],
)  # fmt: skip
def test_what_the_model_predicts(checkpoints, tmp_path, metadata, markers, yaml, prediction, zero):
    path = tmp_path / "base.safetensors"
    save_file(
        {**load_file(str(checkpoints["sd1"])), **{name: torch.tensor([]) for name in markers}}, str(path), metadata
    )
    if yaml is not None:
        path.with_suffix(".yaml").write_text(yaml)
    info = FileLender(path).describe()
    assert (info.prediction_type, info.zero_terminal_snr) == (prediction, zero)
    assert FileLender(path, v_prediction=True).describe().prediction_type == "v_prediction"
    assert FileLender(path, v_prediction=False).describe().prediction_type == "epsilon"
    assert not FileLender(path, zero_terminal_snr=False).describe().zero_terminal_snr


EDM_SCALING = "model: {params: {denoiser_config: {params: {scaling_config: {target: sgm.x.EDMScaling}}}}}"


@pytest.mark.parametrize(
    ("metadata", "markers", "yaml", "what"),
    [
        (None, ("edm_mean", "edm_std"), None, "Playground"),
        (None, ("edm_vpred.sigma_max", "edm_vpred.sigma_min"), None, "CosXL"),
        ({"modelspec.predict_key": "x0"}, (), None, "'x0'"),
        ({"modelspec.prediction_type": "flow"}, (), None, "'flow'"),
        (None, (), EDM_SCALING, "EDM"),
        (None, (), EDM_SCALING.replace("scaling_config", "discretization_config"), "EDM"),
        (None, (), EDM_SCALING.replace("EDMScaling", "VScalingWithEDMcNoise"), "EDM"),
        (None, (), EDM_SCALING.replace("EDMScaling", "RectifiedFlowScaling"), "'RectifiedFlowScaling'"),
        (None, (), SGM_V.replace("VScaling", "VScalingOfOthers"), "'VScalingOfOthers'"),
        (None, (), "model: {params: {parameterization: x0}}", "'x0'"),
    ],
)
def test_a_variant_that_predicts_something_else_is_refused(checkpoints, tmp_path, metadata, markers, yaml, what):
    path = tmp_path / "base.safetensors"
    tensors = {**load_file(str(checkpoints["sd1"])), **{name: torch.ones(4) for name in markers}}
    save_file(tensors, str(path), metadata)
    if yaml is not None:
        path.with_suffix(".yaml").write_text(yaml)
    with pytest.raises(UserError, match=what) as caught:
        FileLender(path).describe()
    assert caught.value.field == "base_model" and "epsilon" in str(caught.value)


@pytest.mark.parametrize(
    "scheduler",
    [
        {"_class_name": "EDMDPMSolverMultistepScheduler"},
        {"prediction_type": "sample"},
        {"prediction_type": "flow_prediction"},
    ],
)
def test_a_folder_for_another_scheduler_is_refused(tmp_path, scheduler):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    with pytest.raises(UserError, match="can be trained"):
        folder_hints(tmp_path)


def test_a_broken_yaml_beside_the_file_is_named(checkpoints, tmp_path):
    path = shutil.copy(checkpoints["sd1"], tmp_path / "base.safetensors")
    path.with_suffix(".yaml").write_text("model: [")
    with pytest.raises(UserError, match=r"base\.yaml"):
        FileLender(path).describe()


def test_heads_come_from_the_yaml_or_the_metadata(checkpoints, tmp_path):
    path = tmp_path / "base.safetensors"
    tensors = load_file(str(checkpoints["sdxl"]))
    save_file(tensors, str(path), {"lora_trainer.architecture": '{"head_dim": 16, "text_heads": [4, 2]}'})
    with FileLender(path).borrow() as model:
        assert model.architecture.unet.heads == (2, 4, 4)
        assert [shape.heads for shape in model.architecture.text_encoders] == [4, 2]
    path.with_suffix(".yaml").write_text("model: {params: {network_config: {params: {num_head_channels: 8}}}}")
    with FileLender(path).borrow() as model:
        assert model.architecture.unet.heads == (4, 8, 8)
    path.with_suffix(".yaml").write_text("model: {params: {network_config: {params: {num_heads: 5}}}}")
    with pytest.raises(UserError, match="heads"), FileLender(path).borrow():
        pass


@pytest.mark.parametrize("layout", ["ldm", "prefixed", "diffusers"])
def test_another_vae(checkpoints, tmp_path, layout):
    other = random_tensors(vae_shapes(32), 7, torch.float32)
    path = tmp_path / "vae.safetensors"
    if layout == "diffusers":
        save_file(reference.vae(other).state_dict(), str(path))
    else:
        prefix = "first_stage_model." if layout == "prefixed" else ""
        save_file(
            {prefix + name.removeprefix("first_stage_model."): tensor for name, tensor in other.items()}, str(path)
        )
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    with FileLender(checkpoints["sd1"]).borrow() as model:
        key, text_key = model.vae_key, model.text_key
    with FileLender(checkpoints["sd1"], vae=path).borrow() as model, torch.no_grad():
        assert model.vae_key != key and model.text_key == text_key
        expected = reference.vae(other).encode(pixels).latent_dist.parameters
        torch.testing.assert_close(model.encode_images(pixels), expected, atol=1e-5, rtol=1e-5)
    save_file({"a": torch.zeros(1)}, str(path))
    with pytest.raises(UserError, match="not a VAE"):
        FileLender(checkpoints["sd1"], vae=path).describe()


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_the_vae_keeps_its_stored_precision(tmp_path, stored):
    """It computes in fp32: rounded to bf16, its latents would be off, and kept under another key for each format."""
    path = tiny_sd1(tmp_path / "base.safetensors", dtype=stored)
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    answers = {}
    for dtype in (None, torch.float16, torch.bfloat16):
        with FileLender(path, weight_dtype=dtype).borrow() as model:
            assert {weight.dtype for weight in model.vae.parameters()} == {stored}
            assert {weight.dtype for weight in model.unet.parameters()} == {dtype or stored}
            answers[dtype] = model.vae_key, model.encode_images(pixels)
    for key, moments in answers.values():
        assert key == answers[None][0] and torch.equal(moments, answers[None][1])


class OldAutocast(torch.autocast):
    """torch 2.1 to 2.3 know it for few kinds of devices."""

    def __init__(self, device_type: str, *args, **options):
        if device_type not in ("cuda", "cpu", "xpu", "ipu", "hpu", "xla"):
            raise RuntimeError(f"User specified an unsupported autocast device_type '{device_type}'")
        super().__init__(device_type, *args, **options)


def test_pictures_are_encoded_and_decoded_where_torch_has_no_autocast(checkpoints, monkeypatch):
    monkeypatch.setattr(torch, "autocast", OldAutocast)
    with pretended_gpu("mps:0") as gpu, FileLender(checkpoints["sd1"], device=gpu.device).borrow() as model:
        moments = model.encode_images(torch.zeros(1, 3, 32, 32))
        assert moments.device == gpu.device
        assert model.decode_latents(model.sample_latents(moments, None)).shape == (1, 3, 32, 32)


def test_names_of_old_and_of_turbo_files(checkpoints, tmp_path):
    path = tmp_path / "base.safetensors"
    tensors = load_file(str(checkpoints["sd1"]))
    save_file({name.replace(".text_model.", "."): tensor for name, tensor in tensors.items()}, str(path))
    assert FileLender(path).describe().family == "sd1"
    tensors = load_file(str(checkpoints["sd2"]))
    tensors = {
        name.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): value
        for name, value in tensors.items()
    }
    save_file(tensors, str(path))
    with FileLender(path).borrow() as model:
        assert model.info.family == "sd2"


def test_the_hash_is_that_of_the_file(checkpoints):
    lender = FileLender(checkpoints["sd1"])
    assert lender.model_hash() == hashlib.sha256(checkpoints["sd1"].read_bytes()).hexdigest()


def test_an_sd2_that_nobody_describes_is_asked_itself(tmp_path):
    path = tiny_sd2(tmp_path / "base.safetensors")
    tensors = load_file(str(path))
    assert FileLender(path).describe().prediction_type == "epsilon"
    # Answers all the way down the scale, as a v-prediction model does for pure gray at the noisiest step.
    tensors[f"{UNET}out.2.weight"].zero_()
    tensors[f"{UNET}out.2.bias"].fill_(-1.5)
    save_file(tensors, str(path))
    assert FileLender(path).describe().prediction_type == "v_prediction"
    assert FileLender(path, v_prediction=False).describe().prediction_type == "epsilon"
    save_file(tensors, str(path), {"modelspec.prediction_type": "epsilon"})
    assert FileLender(path).describe().prediction_type == "epsilon"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_what_is_released_leaves_memory(tmp_path):
    path = tiny_sd1(tmp_path / "base.safetensors")

    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(path))

    with FileLender(path).borrow() as model:
        everything = maps()
        model.release("vae", "text_encoders")
        assert len(list(model.unet.parameters())) == maps() < everything
    assert maps() == 0


def test_tensors_that_are_not_aligned_are_read(tmp_path):
    path = tmp_path / "odd.safetensors"
    value = torch.arange(6.0).reshape(2, 3)
    header = json.dumps({"value": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    header += b" " * (3 - len(header) % 4)  # the data begin at an address that floats cannot have
    path.write_bytes(struct.pack("<Q", len(header)) + header + value.numpy().tobytes())
    assert torch.equal(SafetensorsSource(path).read("value", torch.device("cpu"), None), value)
