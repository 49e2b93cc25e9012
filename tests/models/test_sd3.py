"""Stable Diffusion 3: what it computes against diffusers and transformers, its files, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_trainer.config import from_mapping
from lora_trainer.errors import UserError
from lora_trainer.models.base import Conditioning
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.families import get_family
from lora_trainer.models.families.flow.tokenizer import FlowTokenizer, t5_tokenizer
from lora_trainer.models.tokenizer import load_tokenizer
from tests import sd3 as tiny
from tests.flux import TEXT
from tests.models.test_flux import lend

LATENTS, SIGMAS = torch.randn(2, 16, 6, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0.31, 1.0])
LONG_AND_SHORT = ["a red circle", "red " * 100, ""]
KINDS = {
    "3 medium": {},
    "3.5 medium": {"dual": 1, "normalized": True},
    "3.5 large": {"normalized": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.tiny_sd3(tmp_path_factory.mktemp("sd3"))


def reference(bfl: dict[str, torch.Tensor], dual: int = 0, normalized: bool = False):
    """diffusers' transformer with these weights, by a renaming of its own (scripts/convert_sd3_to_diffusers.py)."""
    diffusers = pytest.importorskip("diffusers")
    new = {"dual_attention_layers": tuple(range(dual)), "qk_norm": "rms_norm"} if normalized else {}
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=64, num_attention_heads=2, joint_attention_dim=TEXT,
        caption_projection_dim=tiny.WIDTH, pooled_projection_dim=tiny.CLIP_L + tiny.CLIP_G,
        pos_embed_max_size=tiny.SIDE, **new,
    )  # fmt: skip
    out = {"pos_embed.pos_embed": bfl["pos_embed"]}
    rename = {"x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder",
              "final_layer.linear": "proj_out"}  # fmt: skip
    for name, part in (("t_embedder", "timestep"), ("y_embedder", "text")):
        for place, number in ((0, 1), (2, 2)):
            rename[f"{name}.mlp.{place}"] = f"time_text_embed.{part}_embedder.linear_{number}"
    split, swap = {}, {"final_layer.adaLN_modulation.1": "norm_out.linear"}
    for i in range(2):
        x, context, theirs = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block", f"transformer_blocks.{i}"
        split[f"{x}.attn.qkv"] = [f"{theirs}.attn.to_{letter}" for letter in "qkv"]
        split[f"{context}.attn.qkv"] = [f"{theirs}.attn.add_{letter}_proj" for letter in "qkv"]
        rename |= {f"{x}.attn.proj": f"{theirs}.attn.to_out.0", f"{x}.mlp.fc1": f"{theirs}.ff.net.0.proj",
                   f"{x}.mlp.fc2": f"{theirs}.ff.net.2", f"{x}.adaLN_modulation.1": f"{theirs}.norm1.linear"}
        if i < dual:
            split[f"{x}.attn2.qkv"] = [f"{theirs}.attn2.to_{letter}" for letter in "qkv"]
            rename[f"{x}.attn2.proj"] = f"{theirs}.attn2.to_out.0"
        if i == 1:
            swap[f"{context}.adaLN_modulation.1"] = f"{theirs}.norm1_context.linear"
        else:
            rename |= {f"{context}.attn.proj": f"{theirs}.attn.to_add_out",
                       f"{context}.mlp.fc1": f"{theirs}.ff_context.net.0.proj",
                       f"{context}.mlp.fc2": f"{theirs}.ff_context.net.2",
                       f"{context}.adaLN_modulation.1": f"{theirs}.norm1_context.linear"}
        if normalized:
            for letter in "qk":
                out[f"{theirs}.attn.norm_{letter}.weight"] = bfl[f"{x}.attn.ln_{letter}.weight"]
                out[f"{theirs}.attn.norm_added_{letter}.weight"] = bfl[f"{context}.attn.ln_{letter}.weight"]
                if i < dual:
                    out[f"{theirs}.attn2.norm_{letter}.weight"] = bfl[f"{x}.attn2.ln_{letter}.weight"]
    for kind in ("weight", "bias"):
        out |= {f"{theirs}.{kind}": bfl[f"{ours}.{kind}"] for ours, theirs in rename.items()}
        for ours, names in split.items():
            out |= {f"{name}.{kind}": part for name, part in zip(names, bfl[f"{ours}.{kind}"].chunk(3))}
        for ours, theirs in swap.items():
            shift, scale = bfl[f"{ours}.{kind}"].chunk(2)
            out[f"{theirs}.{kind}"] = torch.cat([scale, shift])
    model.load_state_dict(out)
    return model.eval()


def conditioned(clip: int = 77, t5: int = 5) -> Conditioning:
    generator = torch.Generator().manual_seed(2)
    pooled = torch.randn(2, tiny.CLIP_L + tiny.CLIP_G, generator=generator)
    context = torch.randn(2, clip, tiny.CLIP_L + tiny.CLIP_G, generator=generator)
    return Conditioning(context, pooled, {"t5": torch.randn(2, t5, TEXT, generator=generator)})


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_transformer_equals_diffusers(tmp_path, kind):
    settings = tiny.tiny_sd3(tmp_path, **KINDS[kind])
    theirs, told = reference(load_file(settings["base_model"]), **KINDS[kind]), conditioned()
    clip = torch.nn.functional.pad(told.context, (0, TEXT - told.context.shape[-1]))
    expected = theirs(
        hidden_states=LATENTS, encoder_hidden_states=torch.cat([clip, told.extra["t5"]], dim=1),
        pooled_projections=told.pooled, timestep=1000 * SIGMAS, return_dict=False,
    )[0]  # fmt: skip
    with lend(settings).borrow() as model:
        assert model.info.family == "sd3" and model.info.prediction_type == "flow"
        ours = model.predict(LATENTS, SIGMAS, told, None)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        for share in (1, 0.5, 0):
            model.set_gradient_checkpointing(share)
            assert torch.equal(model.predict(LATENTS, SIGMAS, told, None), ours)
    with lend(settings, compute_dtype=torch.bfloat16).borrow() as model:
        assert (model.predict(LATENTS, SIGMAS, told, None) - ours).norm() < 0.03 * ours.norm()


@torch.no_grad()
def test_one_file_a_folder_and_files_of_parts_are_the_same_model(base, tmp_path):
    whole = tiny.tiny_sd3(tmp_path / "whole", whole=True)
    folder = tiny.write_folder(tmp_path / "sd3-tiny", reference(load_file(base["base_model"])))
    found = []
    for lender in (lend(base), lend(whole), FileLender(folder)):
        with lender.borrow() as model:
            told = model.encode_prompts(["a red circle", "the photo"])
            pixels = torch.rand(1, 3, 32, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
            found.append([told.context, told.pooled, told.extra["t5"], model.encode_images(pixels),
                          model.predict(LATENTS, SIGMAS, told, None)])  # fmt: skip
    for other in found[1:]:
        assert all(torch.equal(one, another) for one, another in zip(found[0], other))


@torch.no_grad()
def test_text_is_encoded_as_diffusers_pipeline_does(base):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    words = [49406, 1746, 736, 7117, 49407]  # CLIP's own: start, "blue red circle", end
    hidden, pooled = [], []
    for file, width, layers, pad, activation in (
        (base["text_encoders"][1], tiny.CLIP_L, 2, 49407, "quick_gelu"),
        (base["text_encoders"][0], tiny.CLIP_G, tiny.CLIP_G_LAYERS, 0, "gelu"),
    ):
        clip = CLIPTextModelWithProjection(CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=1,
            hidden_act=activation, projection_dim=width, bos_token_id=49406, eos_token_id=49407, vocab_size=49408,
        )).eval()  # fmt: skip
        weights = {"text_projection.weight": torch.eye(width), **load_file(file)}  # as diffusers has it of CLIP-L
        if not any(name.startswith("text_model.") for name in clip.state_dict()):
            weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
        clip.load_state_dict(weights, strict=False)
        out = clip(torch.tensor([words + [pad] * (77 - len(words))]), output_hidden_states=True)
        hidden.append(out.hidden_states[-2])
        pooled.append(out.text_embeds)
    with lend(base).borrow() as model:
        encoded = model.encode_prompts(["blue red circle"])
        torch.testing.assert_close(encoded.context, torch.cat(hidden, dim=-1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(encoded.pooled, torch.cat(pooled, dim=-1), atol=1e-5, rtol=1e-5)
        assert encoded.extra["t5"].shape == (1, 256, TEXT) and encoded.extra["t5"].any()
        assert model.count_tokens("blue red circle") == 3
        long = model.encode_prompts(["blue red circle", "red " * 100])
        assert long.context.shape == (2, 154, tiny.CLIP_L + tiny.CLIP_G)
        torch.testing.assert_close(long.pooled[:1], encoded.pooled, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_without_t5_its_place_is_filled_with_zeros(tmp_path):
    settings = tiny.tiny_sd3(tmp_path, t5=False)
    with lend(settings).borrow() as model:
        told = model.encode_prompts(["a red circle"])
        assert "t5" not in told.extra
        ours = model.predict(LATENTS[:1], SIGMAS[:1], told, None)
        zeros = Conditioning(told.context, told.pooled, {"t5": torch.zeros(1, 256, TEXT)})
        assert torch.equal(ours, model.predict(LATENTS[:1], SIGMAS[:1], zeros, None))


@torch.no_grad()
def test_a_webuis_way_with_prompts(base):
    """A1111: T5's prompts are as long as CLIP's. Forge: CLIP's last state, and nothing for an empty prompt."""
    family = get_family("sd3")
    lender = lend(base)
    tensors, info = lender._open()
    own = family.tokenizer([Path(base["base_model"]).parent])
    made = {}
    for name, more in {"file": {}, "a1111": {"length": None}, "forge": {"hidden": -1, "zero_empty": True}}.items():
        tokenizer = FlowTokenizer(load_tokenizer(), own.t5, **more)
        model = family.build(tensors, info.architecture, tokenizer, info=info)
        made[name] = [model.encode_prompts([text]) for text in LONG_AND_SHORT]
        batch, together = family.collate(made[name], made[name][2]), model.encode_prompts(LONG_AND_SHORT)
        torch.testing.assert_close(batch.context, together.context)  # filled up with an encoded empty chunk
        if name != "a1111":  # whose T5 reads as many tokens as the batch's CLIP
            latents, sigmas = LATENTS[:1].expand(3, -1, -1, -1), SIGMAS[:1].expand(3)
            read = [model.predict(latents, sigmas, one, None) for one in (batch, together)]
            torch.testing.assert_close(*read, atol=1e-5, rtol=1e-5)
        nothing = made[name][2]
        zeros = Conditioning(nothing.context * 0, nothing.pooled * 0, {"t5": nothing.extra["t5"] * 0})
        read, none = (model.predict(LATENTS[:1], SIGMAS[:1], one, None) for one in (nothing, zeros))
        assert torch.equal(read, none) == (name == "forge"), "an empty caption alone is read as zeros"
        assert batch.context.shape[1] == 154 and batch.extra["t5"].shape[1] == (154 if name == "a1111" else 256)
        assert model.predict(LATENTS[:1], SIGMAS[:1], batch[:1], None).isfinite().all()
        made[name].append(model.text_key)
    assert [one.extra["t5"].shape[1] for one in made["a1111"][:3]] == [77, 154, 77]
    assert not torch.equal(made["forge"][0].context, made["file"][0].context)
    assert len({one[3] for one in made.values()}) == 3


def test_latents_have_their_scale_and_shift(base):
    with lend(base).borrow() as model:
        moments = torch.randn(1, 32, 4, 4)
        latents = model.sample_latents(moments, None)
        torch.testing.assert_close(latents, (moments[:, :16] - 0.0609) * 1.5305)
        assert model.decode_latents(latents).shape == (1, 3, 32, 32)


def test_the_tokenizer_of_t5_is_known_by_its_tokens(tmp_path):
    clip, t5 = tmp_path / "tokenizer" / "tokenizer.json", tmp_path / "tokenizer_3" / "tokenizer.json"
    clip.parent.mkdir()
    clip.write_text('{"model": {"type": "BPE", "vocab": {"a</w>": 0, "<|endoftext|>": 1}, "merges": []}}')
    tiny.write_tokenizer(t5.parent)
    assert t5_tokenizer([clip.parent, tmp_path]) == t5
    clip.write_bytes(t5.read_bytes())  # a model with T5 alone has it there
    assert t5_tokenizer([clip.parent, tmp_path]) == t5
    t5.unlink()
    assert t5_tokenizer([clip.parent, tmp_path]) == clip


def test_what_is_missing_is_named(base, tmp_path):
    with pytest.raises(UserError, match="no VAE") as caught:
        FileLender(base["base_model"]).describe()
    assert caught.value.field == "vae"
    clip_g, clip_l, _ = base["text_encoders"]
    for given, missing in ((clip_l, "CLIP-G"), (clip_g, "CLIP-L")):
        with pytest.raises(UserError, match=f"no text encoder {missing}") as caught:
            FileLender(base["base_model"], vae=base["vae"], text_encoders=[given]).describe()
        assert caught.value.field == "text_encoders"


def test_settings_that_a1111_could_not_read_the_lora_of_are_refused():
    family = get_family("sd3")
    for setting, field in ({"adapter": "loha"}, "adapter"), ({"dora": True}, "adapter"), (
        {"train_text_encoder": True}, "train_text_encoder"
    ):
        with pytest.raises(UserError) as caught:
            family.check_settings(from_mapping({"base_model": "x", "train_data_dir": "x", **setting}))
        assert caught.value.field == field
    family.check_settings(from_mapping({"base_model": "x", "train_data_dir": "x"}))
