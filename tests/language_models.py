"""Tiny language models with random weights, as transformers saves them, and rows of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TEXT = "the cat sat on a mat dog ran far away who what is where answer system user assistant instruction"
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>",
            "<|assistant|>"]  # fmt: skip
ROWS = [{"prompt": f"who is the {word}", "response": f"the {word} sat on a mat" + " far away" * (place % 3)}
        for place, word in enumerate(["cat", "dog", "mat", "system", "user", "cat", "dog", "answer"])]  # fmt: skip


def tiny_language_model(
    folder: Path, model_type: str = "llama", *, seed: int = 0, shards: int = 1, **sizes: Any
) -> Path:
    """Write a model with two blocks and its tokenizer, by the transformers that is installed; returns the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    count = save_tokenizer(folder)
    values = {
        "vocab_size": count, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    if model_type in ("glm", "glm4", "gemma2", "qwen3"):
        values["head_dim"] = 8
    config = AutoConfig.for_model(model_type, **{**values, **sizes})
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in network.named_parameters():  # far enough from zero for attention to matter
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15 if "embed" not in name else 1.0)
    size = sum(parameter.numel() * 4 for parameter in network.parameters())
    limit = {"max_shard_size": f"{size // shards // 1000}KB"} if shards > 1 else {}
    network.save_pretrained(folder, safe_serialization=True, **limit)
    return folder


def save_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer with a few whole words; returns the number of its tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=SPECIALS[3:],
    )  # fmt: skip
    fast.save_pretrained(folder)
    return len(fast)


def write_rows(path: Path, rows: list[Any] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
