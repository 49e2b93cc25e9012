"""LoRA files: what is written is read back, hashes are kohya's, nothing damaged gets through without a message."""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lora_trainer.adapters.describe import describe
from lora_trainer.adapters.export import save_diffusers, save_lora
from lora_trainer.adapters.initialize import init_from
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora_file import read_lora
from lora_trainer.adapters.tensor_file import serialize
from lora_trainer.errors import UserError
from tests.adapters.layers import randomize, settings, text_targets, unet_targets

UNET = unet_targets()
TARGETS = [*UNET, *text_targets()]
KINDS = {
    "lora": {"lora_rank": 4, "alpha": 2.0, "conv_rank": 2},
    "dora": {"lora_rank": 4, "dora": True, "conv_rank": 3},
    "loha": {"adapter": "loha", "lora_rank": 2, "conv_rank": 2},
    "lokr": {"adapter": "lokr", "lora_rank": 1, "conv_rank": 1},
    "lokr_full": {"adapter": "lokr", "lora_rank": 16, "dora": True},
}


def trained(seed=1, **values):
    adapters = AdapterSet.build(TARGETS, settings(train_text_encoder=True, **values))
    randomize(adapters, seed)
    return adapters


def deltas(adapters):
    return {target.kohya_name: adapter.merged_weight().detach() for target, adapter in adapters.items()}


# -- writing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tmp_path, kind):
    adapters = trained(**KINDS[kind])
    path = tmp_path / "a.safetensors"
    save_lora(adapters, path, {"ss_output_name": "é"}, "fp32")
    written = safetensors.torch.load_file(path)
    assert written.keys() == adapters.export().keys()
    assert all(torch.equal(written[name], value) for name, value in adapters.export().items())
    again = AdapterSet.build(TARGETS, settings(train_text_encoder=True, seed=9, **KINDS[kind]))
    assert init_from(again, read_lora(path)) == []
    assert all(
        torch.equal(one, other) for one, other in zip(adapters.state_dict().values(), again.state_dict().values())
    )
    # What a reader that knows the layer's weight makes of the file is what the adapter is.
    matched, unmatched = read_lora(path).match(TARGETS)
    assert not unmatched
    for target, adapter in adapters.items():
        weight = adapter.base_weight()
        merged = weight + matched[target.kohya_name].change(weight)
        torch.testing.assert_close(merged, adapter.merged_weight().detach(), rtol=1e-5, atol=1e-5)


def test_kohya_keys_and_number_format(tmp_path):
    path = tmp_path / "a.safetensors"
    save_lora(trained(lora_rank=4, target_modules=["to_q"], alpha=1.3), path, {}, "fp16")
    tensors = safetensors.torch.load_file(path)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert {key.removeprefix(stem) for key in tensors if key.startswith(stem)} == {
        ".lora_down.weight",
        ".lora_up.weight",
        ".alpha",
    }
    assert tensors[f"{stem}.lora_down.weight"].dtype == torch.float16
    assert float(tensors[f"{stem}.alpha"]) == pytest.approx(1.3, abs=1e-7), "1.3 has no fp16: it stays fp32"


def kohya_hashes(tensors, metadata):
    """Computed by the definition, from the library's own bytes."""
    data = safetensors.torch.save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    stream = io.BytesIO(data)
    stream.seek(0x100000)
    legacy = hashlib.sha256(stream.read(0x10000)).hexdigest()[:8]
    (length,) = struct.unpack("<Q", data[:8])
    return hashlib.sha256(data[8 + length :]).hexdigest(), legacy


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("metadata", [{}, {"ss_tag_frequency": '{"a": {"红色\\n": 1}}', "modelspec.title": "x"}])
def test_hashes_are_kohyas(tmp_path, dtype, metadata):
    tensors = {
        f"lora_unet_x{i}.{end}": torch.randn(300, 300)
        for i in range(9)
        for end in ("lora_down.weight", "lora_up.weight")
    }
    tensors["lora_unet_x0.alpha"] = torch.tensor(1.3)
    path = tmp_path / "a.safetensors"
    save_lora(tensors, path, metadata, dtype)
    assert path.stat().st_size > 0x110000
    with safetensors.safe_open(path, "pt") as handle:
        written = handle.metadata()
    stored = safetensors.torch.load_file(path)
    assert (written["sshs_model_hash"], written["sshs_legacy_hash"]) == kohya_hashes(stored, metadata)
    assert {key: written[key] for key in metadata} == metadata


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from(
                [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8, torch.bool, torch.float64]
            ),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        min_size=1,  # of no tensors with metadata the library itself writes no JSON
        max_size=6,
    ),
    st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)
def test_serialized_bytes_are_the_librarys(content, metadata):
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in content.items()}
    theirs, ours = safetensors.torch.save(tensors, metadata), serialize(tensors, metadata)
    (length,) = struct.unpack("<Q", theirs[:8])
    assert ours[:8] == theirs[:8] and ours[8 + length :] == theirs[8 + length :]
    assert json.loads(ours[8 : 8 + length]) == json.loads(theirs[8 : 8 + length])


def test_the_same_set_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        metadata = {f"ss_{i}": str(i) for i in (range(9) if name == "a" else reversed(range(9)))}
        save_lora(trained(), tmp_path / name, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_is_not_finite_is_not_saved(tmp_path):
    adapters = trained(target_modules=["to_q"])
    first = next(iter(adapters.parameters()))
    for value, message in ((1e6, "too large"), (float("nan"), "not numbers")):
        first.data[0, 0] = value
        with pytest.raises(UserError, match=message):
            save_lora(adapters, tmp_path / "a.safetensors", {}, "fp16")
    assert list(tmp_path.iterdir()) == []


def test_diffusers_layout_has_one_rank_for_each_part(tmp_path):
    """diffusers 0.31 takes alpha = the first layer's rank for all of them."""
    save_diffusers(trained(lora_rank=4, conv_rank=2), tmp_path, {})
    tensors = safetensors.torch.load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert {value.shape[0] for name, value in tensors.items() if "lora_A" in name} == {4}
    assert {value.shape[1] for name, value in tensors.items() if "lora_B" in name} == {4}


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_diffusers_layout_refuses_what_it_cannot_say(tmp_path, kind):
    with pytest.raises(UserError, match="diffusers") as error:
        save_diffusers(trained(**KINDS[kind]), tmp_path, {})
    assert error.value.field == "export_diffusers"


# -- reading -------------------------------------------------------------------------------------------------


def test_peft_alpha_from_metadata_and_from_the_config_beside(tmp_path):
    name = TARGETS[1].diffusers_name
    tensors = {f"{name}.lora_A.weight": torch.randn(4, 8), f"{name}.lora_B.weight": torch.randn(8, 4)}
    pattern = {"unet.lora_alpha": 8, "unet.r": 4, "unet.use_rslora": False}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(pattern)})
    assert read_lora(tmp_path / "a.safetensors").modules[name].scale == 2
    bare = {f"base_model.model.{key.removeprefix('unet.')}": value for key, value in tensors.items()}
    safetensors.torch.save_file(bare, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "use_rslora": True}))
    lora = read_lora(tmp_path)
    matched, unmatched = lora.match(TARGETS)
    assert not unmatched and matched[TARGETS[1].kohya_name].scale == pytest.approx(6 / 4**0.5)
    (tmp_path / "adapter_config.json").write_text("[1")
    with pytest.raises(UserError, match="settings"):
        read_lora(tmp_path)


def test_old_diffusers_names(tmp_path):
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    for target, suffix in (
        ("to_q", "processor.to_q_lora"),
        ("to_out.0", "processor.to_out_lora"),
        ("to_k", "to_k.lora"),
    ):
        data = {f"{stem}.{suffix}.down.weight": torch.ones(2, 8), f"{stem}.{suffix}.up.weight": torch.ones(8, 2)}
        matched, _ = read_tensors(tmp_path, data).match(TARGETS)
        assert list(matched) == [f"lora_{stem.replace('.', '_')}_{target.replace('.', '_')}"]


def read_tensors(folder, tensors):
    safetensors.torch.save_file(tensors, folder / "x.safetensors")
    return read_lora(folder / "x.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.lora_down.weight": (4, 8)}, "do not belong together"),
        ({"a.lora_down.weight": (4, 8), "a.lora_up.weight": (8, 5)}, "do not belong together"),
        ({"a.lora_down.weight": (4,), "a.lora_up.weight": (8, 4)}, "do not belong together"),
        ({"a.lora_down.weight": (4, 0), "a.lora_up.weight": (8, 4)}, "empty"),
        ({"a.hada_w1_a": (4, 2), "a.hada_w1_b": (2, 4), "a.hada_w2_a": (4, 2)}, "do not belong together"),
        ({"a.lokr_w1": (4, 2)}, "do not belong together"),
        ({"a.lokr_w1": (4, 2), "a.hada_w1_a": (4, 2)}, "several kinds"),
        ({"a.lora_down.weight": (4, 8), "a.lora_up.weight": (8, 4), "a.alpha": (2,)}, "alpha"),
        ({"a.lora_down.weight": (4, 8), "a.lora_up.weight": (8, 4), "a.dora_scale": (8, 8)}, "neither per input"),
        ({"a.lora_down.weight": (4, 8), "a.lora_up.weight": (8, 4), "a.scalar": ()}, "a.scalar changes what"),
        ({"a.lora_A.weight": (4, 8), "a.lora_B.weight": (8, 4), "a.lora_E": (4, 1)}, "a.lora_E changes what"),
        ({"model.diffusion_model.x.weight": (2, 2)}, "whole checkpoint"),
        ({"emb_params": (2, 2)}, "no LoRA"),
        ({"a.alpha": ()}, "no LoRA"),
        ({}, "no LoRA"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message):
        read_tensors(tmp_path, {name: torch.ones(shape) for name, shape in tensors.items()})


def test_files_that_are_none(tmp_path):
    for name, data in (
        ("empty.safetensors", b""),
        ("text.safetensors", b"hello " * 50),
        ("lora.pt", b"PK"),
        ("zip.ckpt", b"x"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            read_lora(tmp_path / name)
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(UserError):
            read_lora(path)


@pytest.mark.parametrize("seed", range(8))
def test_damaged_files_end_in_a_message(tmp_path, seed):
    """100 damages each: cut off, bytes changed, header rewritten. Either a message, or a file that is still sound."""
    chance = random.Random(seed)
    source = tmp_path / "a.safetensors"
    save_lora(trained(**list(KINDS.values())[seed % len(KINDS)]), source, {"ss_steps": "3", "ss_tag_frequency": "{}"})
    data = source.read_bytes()
    header_end = 8 + struct.unpack("<Q", data[:8])[0]
    refused = 0
    for _ in range(100):
        damaged = bytearray(data)
        how = chance.randrange(4)
        if how == 0:
            damaged = damaged[: chance.randrange(len(data))]
        elif how == 1:
            for _ in range(chance.randrange(1, 6)):
                damaged[chance.randrange(header_end)] = chance.randrange(256)
        elif how == 2:
            damaged[:8] = struct.pack("<Q", chance.choice([0, 1, 2**63, 2**64 - 1, len(data), header_end - 9]))
        else:
            header = json.loads(data[8:header_end])
            name = chance.choice([key for key in header if key != "__metadata__"])
            field, value = chance.choice(
                [
                    ("dtype", "F3"),
                    ("dtype", "I64"),
                    ("shape", [-1]),
                    ("shape", [2**62, 4]),
                    ("shape", "x"),
                    ("data_offsets", [9, 1]),
                    ("data_offsets", []),
                ]
            )
            header[name][field] = value
            text = json.dumps(header).encode()
            damaged = bytearray(struct.pack("<Q", len(text)) + text + data[header_end:])
        path = tmp_path / "b.safetensors"
        path.write_bytes(damaged)
        try:
            describe(path)
        except UserError as error:
            refused += 1
            assert "b.safetensors" in str(error)
    assert refused > 50


@hypothesis_settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.dictionaries(
        st.builds(
            lambda stem, suffix: f"{stem}.{suffix}",
            st.sampled_from(["lora_unet_a", "unet.b.to_q", "lora_te_c"]),
            st.sampled_from(
                [
                    "lora_down.weight",
                    "lora_up.weight",
                    "lora_mid.weight",
                    "alpha",
                    "dora_scale",
                    "hada_w1_a",
                    "hada_w1_b",
                    "hada_w2_a",
                    "hada_w2_b",
                    "hada_t1",
                    "lokr_w1",
                    "lokr_w1_a",
                    "lokr_w2",
                    "lokr_w2_a",
                    "lokr_w2_b",
                    "lokr_t2",
                    "lora_A.weight",
                    "lora_B.weight",
                    "diff",
                    "lora_magnitude_vector",
                ]
            ),
        ),
        st.lists(st.integers(0, 3), max_size=4),
        max_size=8,
    ),
    st.dictionaries(
        st.sampled_from(["lora_adapter_metadata", "ss_tag_frequency", "ss_steps"]),
        st.text(max_size=6)
        | st.sampled_from(["{}", "[]", '{"unet": 3}', '{"unet.lora_alpha": "x"}', '{"a": {"b": "c"}}']),
    ),
)
def test_any_tensors_are_described_or_refused(tmp_path, content, metadata):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({name: torch.ones(shape) for name, shape in content.items()}, path, metadata)
    try:
        describe(path)
    except UserError as error:
        assert "x.safetensors" in str(error)


# -- info ----------------------------------------------------------------------------------------------------


def test_describe(tmp_path):
    path = tmp_path / "a.safetensors"
    metadata = {"ss_base_model_version": "sd_v1", "modelspec.trigger_phrase": "sks", "ss_steps": "120", "ss_epoch": "3"}
    save_lora(trained(**KINDS["lora"]), path, metadata)
    found = describe(path)
    assert found.kinds == ("lora",) and found.modules == {"unet": 24, "text_encoder": 6}
    assert found.ranks == {4: 28, 2: 2} and found.alphas == {2.0: 30}
    assert (found.base_version, found.trigger, found.steps, found.epochs) == ("sd_v1", "sks", 120, 3)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and found.size_bytes == path.stat().st_size
    assert found.problems == ()


@pytest.mark.parametrize("counts, trigger", [
    ({"sks": 3, "hat": 2}, "sks"), ({"a hat": 1, "a dog": 1}, None), ({"sks": 1}, "sks"), ({}, None),
])  # fmt: skip
def test_the_trigger_word_of_a_file_that_names_none(tmp_path, counts, trigger):
    path = tmp_path / "a.safetensors"
    save_lora(trained(**KINDS["lora"]), path, {"ss_tag_frequency": json.dumps({"10_x": counts})})
    assert describe(path).trigger == trigger


def test_describe_says_when_a_lora_does_nothing_or_harm(tmp_path):
    path = tmp_path / "a.safetensors"
    adapters = AdapterSet.build(TARGETS, settings(train_text_encoder=True))
    save_lora(adapters, path, {})
    assert any("changes nothing" in problem for problem in describe(path).problems)
    for target, adapter in adapters.items():
        if target.part == "unet":
            randomize(adapter)
    save_lora(adapters, path, {})
    assert describe(path).problems == ("Its text_encoder layers are all zero and change nothing.",)
    tensors = safetensors.torch.load_file(path)
    tensors[next(iter(tensors))].view(-1)[0] = float("nan")
    safetensors.torch.save_file(tensors, path)
    assert any("not numbers" in problem for problem in describe(path).problems)
