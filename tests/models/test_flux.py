"""FLUX.1: what it computes against diffusers and transformers, its files, and what it refuses."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_trainer.errors import UserError
from lora_trainer.models.base import Conditioning
from lora_trainer.models.casting import cast_layers
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.storage import Scaled, pack
from tests import flux as tiny

LATENTS, SIGMAS = torch.randn(2, 16, 6, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0.31, 1.0])
GUIDANCE = torch.tensor([3.5, 1.0])


def lend(settings, **options) -> FileLender:
    return FileLender(
        settings["base_model"], vae=settings.get("vae"), text_encoders=settings.get("text_encoders", ()), **options
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def theirs():
    """diffusers' transformer with the weights of ``tiny_flux``, by a renaming of its own."""
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "FluxTransformer2DModel"):
        pytest.skip("this diffusers has no FLUX.1")
    heads = {"num_attention_heads": tiny.HEADS, "attention_head_dim": tiny.WIDTH // tiny.HEADS}
    model = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, **heads, joint_attention_dim=tiny.TEXT,
        pooled_projection_dim=tiny.POOLED, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model.eval()


def diffusers_weights(bfl: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As diffusers' scripts/convert_flux_to_diffusers.py has it, written down anew."""
    out, width = {}, tiny.WIDTH
    rename = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    for name, part in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        for ours, number in (("in_layer", 1), ("out_layer", 2)):
            rename[f"{name}.{ours}"] = f"time_text_embed.{part}_embedder.linear_{number}"
    for i in range(2):
        d, t = f"double_blocks.{i}", f"transformer_blocks.{i}"
        rename |= {f"{d}.img_mod.lin": f"{t}.norm1.linear", f"{d}.txt_mod.lin": f"{t}.norm1_context.linear",
                   f"{d}.img_attn.proj": f"{t}.attn.to_out.0", f"{d}.txt_attn.proj": f"{t}.attn.to_add_out",
                   f"{d}.img_mlp.0": f"{t}.ff.net.0.proj", f"{d}.img_mlp.2": f"{t}.ff.net.2",
                   f"{d}.txt_mlp.0": f"{t}.ff_context.net.0.proj", f"{d}.txt_mlp.2": f"{t}.ff_context.net.2",
                   }  # fmt: skip
        s, u = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        rename |= {f"{s}.modulation.lin": f"{u}.norm.linear", f"{s}.linear2": f"{u}.proj_out"}
        for kind in ("weight", "bias"):
            for side, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
                for part, name in zip(bfl[f"{d}.{side}_attn.qkv.{kind}"].split(width), names):
                    out[f"{t}.attn.{name}.{kind}"] = part
            sizes = [width, width, width, tiny.HIDDEN]
            names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            for part, name in zip(bfl[f"{s}.linear1.{kind}"].split(sizes), names):
                out[f"{u}.{name}.{kind}"] = part
        for which, letter in (("query_norm", "q"), ("key_norm", "k")):
            out[f"{t}.attn.norm_{letter}.weight"] = bfl[f"{d}.img_attn.norm.{which}.scale"]
            out[f"{t}.attn.norm_added_{letter}.weight"] = bfl[f"{d}.txt_attn.norm.{which}.scale"]
            out[f"{u}.attn.norm_{letter}.weight"] = bfl[f"{s}.norm.{which}.scale"]
    for kind in ("weight", "bias"):
        out |= {f"{new}.{kind}": bfl[f"{old}.{kind}"] for old, new in rename.items()}
        shift, scale = bfl[f"final_layer.adaLN_modulation.1.{kind}"].chunk(2)
        out[f"norm_out.linear.{kind}"] = torch.cat([scale, shift])
    return out


@torch.no_grad()
def reference(theirs, conditioning: Conditioning) -> torch.Tensor:
    batch, channels, height, width = LATENTS.shape
    h, w = height // 2, width // 2
    packed = LATENTS.view(batch, channels, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, h * w, 4 * channels)
    ids = torch.stack(
        [torch.zeros(h, w), torch.arange(h)[:, None].expand(h, w), torch.arange(w)[None].expand(h, w)], dim=-1
    )
    out = theirs(
        hidden_states=packed, encoder_hidden_states=conditioning.context, pooled_projections=conditioning.pooled,
        timestep=SIGMAS, guidance=GUIDANCE, img_ids=ids.reshape(-1, 3),
        txt_ids=torch.zeros(conditioning.context.shape[1], 3), return_dict=False,
    )[0]  # fmt: skip
    return out.view(batch, h, w, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(LATENTS.shape)


def conditioned(length: int = 5) -> Conditioning:
    generator = torch.Generator().manual_seed(2)
    context = torch.randn(2, length, tiny.TEXT, generator=generator)
    return Conditioning(context, torch.randn(2, tiny.POOLED, generator=generator), {"guidance": GUIDANCE})


@torch.no_grad()
def test_the_transformer_equals_diffusers(base, theirs):
    theirs.load_state_dict(diffusers_weights(load_file(base["base_model"])))
    with lend(base).borrow() as model:
        assert model.info.family == "flux" and model.info.prediction_type == "flow"
        conditioning = conditioned()
        ours = model.predict(LATENTS, SIGMAS, conditioning, None)
        torch.testing.assert_close(ours, reference(theirs, conditioning), atol=1e-5, rtol=1e-5)
        unguided = model.predict(LATENTS, SIGMAS, Conditioning(conditioning.context, conditioning.pooled), None)
        told = Conditioning(conditioning.context, conditioning.pooled, {"guidance": torch.ones(2)})
        assert torch.equal(unguided, model.predict(LATENTS, SIGMAS, told, None))  # guidance 1 in training
        assert (unguided[0] - ours[0]).abs().max() > 1e-3
    with lend(base, compute_dtype=torch.bfloat16).borrow() as model:
        low = model.predict(LATENTS, SIGMAS, conditioning, None)
        assert (low - ours).norm() < 0.03 * ours.norm()


@torch.no_grad()
def test_a_diffusers_folder_is_the_same_model(base, theirs, tmp_path):
    theirs.load_state_dict(diffusers_weights(load_file(base["base_model"])))
    folder = tiny.write_folder(tmp_path / "FLUX.1-tiny", theirs)
    with lend(base).borrow() as one, FileLender(folder).borrow() as other:
        for conditioning in (conditioned(), one.encode_prompts(["a red circle", "the photo"])):
            assert torch.equal(*(m.predict(LATENTS, SIGMAS, conditioning, None) for m in (one, other)))
        prompts = one.encode_prompts(["a red circle"]), other.encode_prompts(["a red circle"])
        assert torch.equal(prompts[0].context, prompts[1].context) and torch.equal(prompts[0].pooled, prompts[1].pooled)
        pixels = torch.rand(1, 3, 32, 16) * 2 - 1
        assert torch.equal(one.encode_images(pixels), other.encode_images(pixels))


@torch.no_grad()
def test_text_is_encoded_as_transformers_does(base):
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip_file, t5_file = base["text_encoders"]
    t5 = T5EncoderModel(T5Config(
        vocab_size=32, d_model=tiny.TEXT, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )).eval()  # fmt: skip
    missing, unexpected = t5.load_state_dict(load_file(t5_file), strict=False)
    assert not unexpected and set(missing) <= {"encoder.embed_tokens.weight"}
    ids = [5, 4, 6, 1]  # "a red circle" would be 3, 4, 6; "blue red circle", then the end
    padded = torch.tensor([[*ids, *[0] * (256 - len(ids))]])
    with lend(base).borrow() as model:
        encoded = model.encode_prompts(["blue red circle", "", "red " * 400])
        assert encoded.context.shape == (3, 256, tiny.TEXT) and encoded.pooled.shape == (3, tiny.POOLED)
        expected = t5(input_ids=padded).last_hidden_state  # without a mask
        assert (encoded.context[:1] - expected).norm() < 1e-5 * expected.norm()
        assert model.count_tokens("blue red circle") == 3
        alone = model.encode_prompts(["blue red circle"])
        torch.testing.assert_close(alone.context, encoded.context[:1], atol=1e-6, rtol=1e-6)

    clip = CLIPTextModel(CLIPTextConfig(
        hidden_size=tiny.POOLED, intermediate_size=4 * tiny.POOLED, num_hidden_layers=2, num_attention_heads=1,
        hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407, vocab_size=49408,
    )).eval()  # fmt: skip
    weights = load_file(clip_file)
    if not any(name.startswith("text_model.") for name in clip.state_dict()):
        weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    clip.load_state_dict(weights, strict=False)
    words = [49406, 1746, 736, 7117, 49407]  # CLIP's own: start, "blue red circle", end
    pooled = clip(torch.tensor([words + [49407] * (77 - len(words))])).pooler_output
    torch.testing.assert_close(encoded.pooled[:1], pooled, atol=1e-5, rtol=1e-5)


def test_latents_have_flux_scale_and_shift(base):
    with lend(base).borrow() as model:
        moments = torch.randn(1, 32, 4, 4)
        latents = model.sample_latents(moments, None)
        torch.testing.assert_close(latents, (moments[:, :16] - 0.1159) * 0.3611)
        again = model.sample_latents(model.latent_moments(latents), torch.Generator().manual_seed(1))
        torch.testing.assert_close(again, latents, rtol=1e-5, atol=1e-5)
        decoded = model.decode_latents(latents)
        assert decoded.shape == (1, 3, 32, 32)


@torch.no_grad()
@pytest.mark.parametrize("form", ["bf16", "fp8", "scaled fp8"])
def test_weights_are_used_as_they_are_stored(base, tmp_path, form):
    weights = load_file(base["base_model"])
    stored, dense = {}, {}
    for name, tensor in weights.items():
        if form == "bf16":
            stored[name] = tensor.bfloat16()
            dense[name] = stored[name].float()
        elif form == "fp8":
            stored[name] = tensor.to(torch.float8_e4m3fn)
            dense[name] = stored[name].float()
        elif tensor.dim() == 2 and "blocks" in name:
            scale = tensor.abs().max() / 400
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.replace("weight", "scale_weight")] = scale.reshape(1)
            dense[name] = stored[name].float() * scale
        else:
            stored[name] = dense[name] = tensor
    if form == "scaled fp8":
        stored["scaled_fp8"] = torch.zeros(0).to(torch.float8_e4m3fn)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("stored", "dense")}
    save_file(stored, str(files["stored"]))
    save_file(dense, str(files["dense"]))
    with lend({**base, "base_model": files["stored"]}).borrow() as model:
        kept = {tuple(p.shape): p.dtype for p in model.unet.double_blocks.parameters()}
        assert torch.float32 not in kept.values() or form == "scaled fp8"
        ours = model.predict(LATENTS, SIGMAS, conditioned(), None)
    with lend({**base, "base_model": files["dense"]}).borrow() as model:
        assert torch.equal(ours, model.predict(LATENTS, SIGMAS, conditioned(), None))


def test_what_is_missing_is_named(base, tmp_path):
    with pytest.raises(UserError, match="no VAE") as caught:
        FileLender(base["base_model"]).describe()
    assert caught.value.field == "vae"
    with pytest.raises(UserError, match="no text encoder T5-XXL") as caught:
        FileLender(base["base_model"], vae=base["vae"], text_encoders=base["text_encoders"][:1]).describe()
    assert caught.value.field == "text_encoders" and "t5xxl" in caught.value.remedy
    with pytest.raises(UserError, match="holds no text encoder of this model"):
        FileLender(base["base_model"], text_encoders=[base["vae"]]).describe()
    (tmp_path / "t5").mkdir()
    alone = [shutil.copy(base[name] if name == "base_model" else base["text_encoders"][1], tmp_path / "t5")
             for name in ("base_model", "text_encoders")]  # fmt: skip
    elsewhere = {**base, "base_model": alone[0], "text_encoders": [base["text_encoders"][0], alone[1]]}
    clip = tmp_path / "clip"
    clip.mkdir()
    elsewhere["text_encoders"][0] = shutil.copy(base["text_encoders"][0], clip)
    with pytest.raises(UserError, match="T5's tokenizer was not found") as caught, lend(elsewhere).borrow():
        pass
    assert "tokenizer.json" in caught.value.remedy
    fill = {**load_file(base["base_model"]), "img_in.weight": torch.zeros(tiny.WIDTH, 384)}
    save_file(fill, str(tmp_path / "fill.safetensors"))
    with pytest.raises(UserError, match="also reads another picture"):
        FileLender(tmp_path / "fill.safetensors").describe()


def test_an_embedding_in_scaled_fp8_is_scaled():
    weight = torch.randn(5, 4).to(torch.float8_e4m3fn)
    layer = nn.Embedding(5, 4, _weight=weight).requires_grad_(False)
    pack(layer.weight, Scaled(torch.tensor([3.0])))
    cast_layers(layer, torch.float32)
    assert torch.equal(layer(torch.tensor([4, 1])), 3 * weight.float()[[4, 1]])


def test_fp8_with_a_scale_for_each_row_is_refused(base, tmp_path):
    weights = load_file(base["base_model"])
    name = next(name for name, tensor in weights.items() if tensor.dim() == 2 and "blocks" in name)
    weights[name.replace("weight", "scale_weight")] = torch.ones(len(weights[name]), 1)
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, str(tmp_path / "rows.safetensors"))
    with pytest.raises(UserError, match="a scale for each row"):
        lend({**base, "base_model": tmp_path / "rows.safetensors"}).borrow().__enter__()
