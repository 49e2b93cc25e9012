"""Language models from a folder: which ones this transformers can train, how they are built, what is refused."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

from lora_trainer.config import from_mapping
from lora_trainer.errors import UserError
from lora_trainer.models.families.causal_lm import families
from lora_trainer.models.families.causal_lm.families import LANGUAGE_FAMILIES, family_of, readable_config
from lora_trainer.models.families.causal_lm.folder import is_language_model, weights_digest
from lora_trainer.models.families.causal_lm.lender import LanguageModelLender
from lora_trainer.run import file_lender, train
from lora_trainer.training.objectives.causal_lm import CausalLmObjective, TokenBatch
from tests.language_models import tiny_language_model, write_rows

LLAMA = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 32}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_language_model(tmp_path_factory.mktemp("llama") / "base", shards=3)


@pytest.fixture
def release(monkeypatch):
    return lambda *numbers: monkeypatch.setattr(families, "transformers_release", lambda: numbers)


@pytest.mark.parametrize(
    ("asked", "since"),
    [
        ({"num_key_value_heads": 2}, (4, 31)), ({"rope_scaling": {"type": "linear", "factor": 2.0}}, (4, 31)),
        ({"rope_theta": 500000.0}, (4, 33)), ({"attention_bias": True}, (4, 35)), ({"mlp_bias": True}, (4, 42)),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, (4, 45)), ({"head_dim": 16}, (4, 46)),
    ],
)  # fmt: skip
def test_what_an_old_release_computes_wrongly_is_refused(asked, since, release):
    release(4, 30, 2)
    assert family_of(LLAMA, "base", False).name == "llama"
    assert family_of({**LLAMA, "num_key_value_heads": 4, "rope_theta": 10000.0, "head_dim": 8}, "base", False)
    with pytest.raises(UserError, match=f"needs transformers {since[0]}.{since[1]} or newer.*4.30.2 is installed"):
        family_of({**LLAMA, **asked}, "base", False)
    release(*since)
    assert family_of({**LLAMA, **asked}, "base", False).name == "llama"


@pytest.mark.parametrize("family", [one for one in LANGUAGE_FAMILIES.values() if one.since > (4, 30, 2)])
def test_families_that_a_release_does_not_know_are_refused_with_the_one_that_does(family, release):
    release(4, 30, 2)
    with pytest.raises(UserError, match=f"for {family.title}"):
        family_of({"model_type": family.name}, "base", False)
    release(*family.since)
    assert family_of({"model_type": family.name}, "base", False) is family


def test_other_models_and_code_of_their_own_are_refused():
    with pytest.raises(UserError, match="of the kind 'bloom'") as caught:
        family_of({"model_type": "bloom"}, "base", False)
    assert "Qwen 3" in caught.value.remedy
    chatglm = {"model_type": "chatglm", "auto_map": {"AutoModelForCausalLM": "modeling.X"}}
    with pytest.raises(UserError) as caught:
        family_of(chatglm, "base", False)
    assert caught.value.field == "trust_remote_code"
    assert family_of(chatglm, "base", True).template == "chatglm3"


def test_settings_of_rope_that_transformers_5_wrote_are_read_by_older_ones(release):
    new = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}}
    release(4, 46, 1)
    read = readable_config(new)
    assert read["rope_theta"] == 1e6 and read["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    release(5, 0, 0)
    assert readable_config(new) == new
    release(4, 30, 2)
    with pytest.raises(UserError, match="rope_theta"):
        family_of({**LLAMA, "rope_parameters": {"rope_theta": 1e6}}, "base", False)


def test_weights_are_frozen_and_other_weights_have_another_key(base, tmp_path):
    other = tiny_language_model(tmp_path / "other", seed=1, shards=3)
    assert is_language_model(base) and not is_language_model(base / "config.json") and not is_language_model("")
    assert weights_digest(base) == weights_digest(base) != weights_digest(other)
    with LanguageModelLender(base).borrow() as model:
        assert not any(parameter.requires_grad for parameter in model.network.parameters())
        assert not model.network.training
        assert {target.group for target in model.lora_targets()} == {"attention", "feed_forward"}
        assert len(model.lora_targets()) == 2 * 7
    assert all(parameter.is_meta for parameter in model.network.parameters()), (
        "whoever keeps the model keeps no weights"
    )


def test_a_tied_head_is_the_embedding(tmp_path):
    base = tiny_language_model(tmp_path / "base", tie_word_embeddings=True)
    with LanguageModelLender(base).borrow() as model:
        assert model.head.weight.data_ptr() == model.network.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("broken", ["shard", "config", "tokenizer", "shape"])
def test_a_damaged_folder_is_refused_with_a_sentence(base, tmp_path, broken):
    folder = tmp_path / "broken"
    shutil.copytree(base, folder)
    if broken == "shard":
        sorted(folder.glob("*.safetensors"))[1].unlink()
    elif broken == "config":
        (folder / "config.json").write_text(
            json.dumps({**LLAMA, "architectures": ["LlamaForCausalLM"], "hidden_act": 3})
        )
    elif broken == "shape":
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**said, "intermediate_size": 40}))
    else:
        (folder / "tokenizer.json").write_text("{")
        (folder / "tokenizer_config.json").write_text("{")
    settings = {"base_model": str(folder), "train_data_dir": str(write_rows(tmp_path / "rows.jsonl")),
                "output_dir": str(tmp_path / "out"), "max_train_steps": 1, "tensorboard": False}  # fmt: skip
    config = from_mapping(settings)
    with pytest.raises(UserError) as caught:
        train(config, file_lender(config))
    assert folder.name in str(caught.value) or "model-00002" in str(caught.value)


def test_gradient_checkpointing_gives_the_same_gradients(base):
    batch = TokenBatch(torch.arange(24).view(2, 12), torch.ones(2, 12).bool())
    found = []
    with LanguageModelLender(base).borrow() as model:
        weight = model.lora_targets()[0].module.weight.requires_grad_()
        objective, calls = CausalLmObjective(model), []
        layers = model.network.model.layers
        for layer in layers:
            layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
        for share in (0, 0.5, 1):
            model.set_gradient_checkpointing(share)
            calls.clear()
            loss = objective.loss(objective.inputs(batch))
            found.append(torch.autograd.grad(loss, weight)[0])
            assert len(calls) == (1 + share) * len(layers)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_rows_of_unequal_length_do_not_see_what_they_are_filled_up_with(base):
    rows, other = torch.arange(20).view(2, 10), torch.arange(20).view(2, 10)
    other[1, 6:] = 99
    with LanguageModelLender(base).borrow() as model, torch.no_grad():
        assert torch.equal(model.hidden_states(rows)[1, :6], model.hidden_states(other)[1, :6])


def test_nf4_without_bitsandbytes_is_refused(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError) as caught, LanguageModelLender(base, nf4=True).borrow():
        pass
    assert caught.value.field == "quantize" and "pip install bitsandbytes" in str(caught.value)


def test_nf4_computes_with_the_quantized_weights_in_both_passes(tmp_path):
    """Against the same network whose weights are what the 4 bits stand for."""
    functional = pytest.importorskip("bitsandbytes").functional
    from lora_trainer.adapters.inject import AdapterSet

    base = tiny_language_model(tmp_path / "base", hidden_size=64, intermediate_size=128)
    batch = TokenBatch(torch.arange(24).view(2, 12), torch.ones(2, 12).bool())
    config = from_mapping({"lora_rank": 2, "target_modules": ["attention"]})

    def gradients(model):
        adapters = AdapterSet.build(model.lora_targets(), config)
        for _, adapter in adapters.items():
            torch.nn.init.normal_(adapter.lora_up, 0, 0.1, generator=torch.Generator().manual_seed(0))
        objective = CausalLmObjective(model)
        with adapters:
            loss = objective.loss(objective.inputs(batch))
            return loss, torch.autograd.grad(loss, list(adapters.parameters()))

    with LanguageModelLender(base, nf4=True).borrow() as model:
        whole = {}
        for target in model.lora_targets():
            weight = target.module.weight
            assert (
                weight.dtype == torch.uint8
                and weight.numel() * 2 == target.module.in_features * target.module.out_features
            )
            whole[target.diffusers_name] = functional.dequantize_4bit(weight.detach(), weight.quant_state).float()
        loss, found = gradients(model)
    with LanguageModelLender(base).borrow() as model:
        exact, _ = gradients(model)
        for target in model.lora_targets():
            assert not torch.equal(target.module.weight, whole[target.diffusers_name])
            target.module.weight = torch.nn.Parameter(whole[target.diffusers_name], requires_grad=False)
        wanted, reference = gradients(model)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4) != exact.item()
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-4) for one, other in zip(found, reference))


def test_a_run_in_nf4_ends(tmp_path):
    pytest.importorskip("bitsandbytes")
    base = tiny_language_model(tmp_path / "base", hidden_size=64, intermediate_size=128)
    settings = {"base_model": str(base), "train_data_dir": str(write_rows(tmp_path / "rows.jsonl")), "quantize": "nf4",
                "output_dir": str(tmp_path / "out"), "max_train_steps": 4, "learning_rate": 1e-2, "batch_size": 8,
                "gradient_checkpointing": True, "tensorboard": False}  # fmt: skip
    config = from_mapping(settings)
    assert train(config, file_lender(config)).status == "finished"
