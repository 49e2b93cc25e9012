"""Chroma: what it computes against diffusers, its prompts without padding, its files and its LoRAs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from lora_trainer.adapters.describe import describe
from lora_trainer.adapters.initialize import init_from
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora_file import read_lora
from lora_trainer.cli.main import main
from lora_trainer.config import from_mapping
from lora_trainer.errors import UserError
from lora_trainer.models.base import Conditioning
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.families import family_of_lora, get_family
from tests import chroma as tiny
from tests import flux
from tests.models.test_flux import lend

LATENTS, SIGMAS = torch.randn(2, 16, 6, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0.31, 1.0])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.tiny_chroma(tmp_path_factory.mktemp("chroma"))


@pytest.fixture(scope="module")
def theirs(base):
    """diffusers' transformer with the weights of ``tiny_chroma``, by a renaming of its own."""
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "ChromaTransformer2DModel"):
        pytest.skip("this diffusers has no Chroma")
    model = diffusers.ChromaTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=flux.WIDTH // flux.HEADS,
        num_attention_heads=flux.HEADS, joint_attention_dim=flux.TEXT, axes_dims_rope=(4, 6, 6),
        approximator_num_channels=64, approximator_hidden_dim=tiny.MAKER, approximator_layers=tiny.MAKER_LAYERS,
    )  # fmt: skip
    ours, out, width = load_file(base["base_model"]), {}, flux.WIDTH
    rename = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    maker = "distilled_guidance_layer"
    rename |= {f"{maker}.{name}": f"{maker}.{name}" for name in ("in_proj", "out_proj")}
    for i in range(tiny.MAKER_LAYERS):
        rename |= {f"{maker}.layers.{i}.in_layer": f"{maker}.layers.{i}.linear_1",
                   f"{maker}.layers.{i}.out_layer": f"{maker}.layers.{i}.linear_2"}  # fmt: skip
        out[f"{maker}.norms.{i}.weight"] = ours[f"{maker}.norms.{i}.scale"]
    for i in range(2):
        d, t = f"double_blocks.{i}", f"transformer_blocks.{i}"
        s, u = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        rename |= {f"{d}.img_attn.proj": f"{t}.attn.to_out.0", f"{d}.txt_attn.proj": f"{t}.attn.to_add_out",
                   f"{d}.img_mlp.0": f"{t}.ff.net.0.proj", f"{d}.img_mlp.2": f"{t}.ff.net.2",
                   f"{d}.txt_mlp.0": f"{t}.ff_context.net.0.proj", f"{d}.txt_mlp.2": f"{t}.ff_context.net.2",
                   f"{s}.linear2": f"{u}.proj_out"}  # fmt: skip
        for kind in ("weight", "bias"):
            for side, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
                for part, name in zip(ours[f"{d}.{side}_attn.qkv.{kind}"].split(width), names):
                    out[f"{t}.attn.{name}.{kind}"] = part
            names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            for part, name in zip(ours[f"{s}.linear1.{kind}"].split([width, width, width, flux.HIDDEN]), names):
                out[f"{u}.{name}.{kind}"] = part
        for which, letter in (("query_norm", "q"), ("key_norm", "k")):
            out[f"{t}.attn.norm_{letter}.weight"] = ours[f"{d}.img_attn.norm.{which}.scale"]
            out[f"{t}.attn.norm_added_{letter}.weight"] = ours[f"{d}.txt_attn.norm.{which}.scale"]
            out[f"{u}.attn.norm_{letter}.weight"] = ours[f"{s}.norm.{which}.scale"]
    out |= {f"{new}.{kind}": ours[f"{old}.{kind}"] for old, new in rename.items() for kind in ("weight", "bias")}
    model.load_state_dict(out)
    return model.eval()


@torch.no_grad()
def reference(theirs, told: Conditioning) -> torch.Tensor:
    batch, channels, height, width = LATENTS.shape
    h, w = height // 2, width // 2
    packed = LATENTS.view(batch, channels, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, h * w, 4 * channels)
    ids = torch.stack(
        [torch.zeros(h, w), torch.arange(h)[:, None].expand(h, w), torch.arange(w)[None].expand(h, w)], dim=-1
    )
    length = told.context.shape[1]
    counts = torch.arange(length) < told.extra["lengths"][:, None] if told.extra else torch.ones(batch, length)
    mask = torch.cat([counts.float(), torch.ones(batch, h * w)], dim=1)
    out = theirs(
        hidden_states=packed, encoder_hidden_states=told.context, timestep=SIGMAS, img_ids=ids.reshape(-1, 3),
        txt_ids=torch.zeros(length, 3), attention_mask=mask.bool(), return_dict=False,
    )[0]  # fmt: skip
    return out.view(batch, h, w, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(LATENTS.shape)


@torch.no_grad()
def test_the_transformer_equals_diffusers(base, theirs):
    context = torch.randn(2, 5, flux.TEXT, generator=torch.Generator().manual_seed(2))
    with lend(base).borrow() as model:
        assert model.info.family == "chroma" and model.info.prediction_type == "flow"
        for told in (Conditioning(context), Conditioning(context, None, {"lengths": torch.tensor([5, 3])})):
            ours = model.predict(LATENTS, SIGMAS, told, None)
            torch.testing.assert_close(ours, reference(theirs, told), atol=1e-5, rtol=1e-5)
        model.set_gradient_checkpointing(True)
        assert torch.equal(model.predict(LATENTS, SIGMAS, told, None), ours)


@torch.no_grad()
def test_a_caption_in_a_batch_is_what_it_is_alone(base):
    family = get_family("chroma")
    with lend(base).borrow() as model:
        texts = ["a red circle", "the photo of a blue square", ""]
        alone = [model.encode_prompts([text]) for text in texts]
        assert [one.context.shape[1] for one in alone] == [4, 7, 1] and not alone[0].extra
        collated, together = family.collate(alone, alone[2]), model.encode_prompts(texts)
        for batch in (collated, together):
            assert batch.extra["lengths"].tolist() == [4, 7, 1] and torch.equal(batch.context, together.context)
        latents, sigmas = LATENTS[:1], SIGMAS[:1]
        for index, one in enumerate(alone):
            expected = model.predict(latents, sigmas, one, None)
            predicted = model.predict(latents, sigmas, together[index], None)
            torch.testing.assert_close(predicted, expected, atol=1e-5, rtol=1e-5)
        again = family.collate([collated[0], collated[2]], alone[2])
        assert again.extra["lengths"].tolist() == [4, 1]


@torch.no_grad()
def test_a_diffusers_folder_is_the_same_model(base, theirs, tmp_path):
    folder = tiny.write_folder(tmp_path / "chroma-tiny", theirs)
    with lend(base).borrow() as one, FileLender(folder).borrow() as other:
        told = [model.encode_prompts(["a red circle", "the photo"]) for model in (one, other)]
        assert torch.equal(told[0].context, told[1].context)
        assert torch.equal(*(model.predict(LATENTS, SIGMAS, told[0], None) for model in (one, other)))


def test_what_is_missing_is_named(base):
    with pytest.raises(UserError, match="no text encoder T5-XXL") as caught:
        FileLender(base["base_model"], vae=base["vae"]).describe()
    assert caught.value.field == "text_encoders"
    with pytest.raises(UserError) as caught:
        get_family("chroma").check_settings(from_mapping({"base_model": "x", "train_data_dir": "x",
                                                          "train_text_encoder": True}))  # fmt: skip
    assert caught.value.field == "train_text_encoder"


def test_it_is_trained_and_its_lora_is_read_again(base, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index, caption in enumerate(("a red circle", "the photo of a red circle")):
        Image.fromarray(np.full((64, 64, 3), (220, 30 + 60 * index, 20), np.uint8)).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text(caption)
    settings = {
        **base, "train_data_dir": str(pictures), "output_dir": str(tmp_path / "out"), "output_name": "taught",
        "resolution": "64", "bucket_step": 16, "min_bucket_resolution": 64, "learning_rate": 5e-3, "lora_rank": 4,
        "batch_size": 2, "max_train_steps": 2, "save_precision": "fp32", "tensorboard": False,
        "preview_prompts": ["a red circle --s 2"], "preview_steps": 2,
    }  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(tmp_path / "train.yaml")]) == 0
    lora = tmp_path / "out" / "taught.safetensors"
    described = describe(lora)
    assert described.modules == {"unet": 20} and described.base_version == "chroma" and not described.problems
    assert family_of_lora(read_lora(lora).metadata) == "chroma"
    assert Image.open(next((tmp_path / "out").rglob("*.png"))).size == (64, 64)
    with lend(base).borrow() as model, torch.no_grad():
        told = model.encode_prompts(["a red circle"])
        bare = model.predict(LATENTS[:1], SIGMAS[:1], told, None)
        config = from_mapping({"base_model": "x", "train_data_dir": "x", "lora_rank": 4})
        adapters = AdapterSet.build(model.lora_targets(), config, model.device)
        assert init_from(adapters, read_lora(lora)) == []
        with adapters:
            adapters.eval()
            assert (model.predict(LATENTS[:1], SIGMAS[:1], told, None) - bare).abs().max() > 1e-4
