"""Captioners small enough for a test: the real classes and files, random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

WORDS = ("a", "red", "blue", "disc", "square", "on", "plain", "ground", "with", "light", "dark", "cat")


def pictures(count: int = 5, size: tuple[int, int] = (40, 28)) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    colors = rng.integers(0, 200, (count, 1, 1, 3))
    noise = rng.integers(0, 56, (count, size[1], size[0], 3))
    return [Image.fromarray(pixels.astype(np.uint8)) for pixels in colors + noise]


def tiny_blip(folder: Path) -> Path:
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
    )

    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), bos_token="[DEC]", eos_token="[SEP]")
    image_processor = BlipImageProcessor(size={"height": 16, "width": 16})
    for part in (tokenizer, image_processor):  # one by one: the files as they lie in the real repository
        part.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {**sizes, "vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 64,
            "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}  # fmt: skip
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # far from each other, so that no two beams tie
            parameter.normal_(0, 3 if "crossattention" in name else 0.7)
            if name.endswith("predictions.bias"):
                parameter[:6] = -1000  # words only
    model.save_pretrained(folder)
    return folder


def tiny_clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["-"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=40)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    for part in (tokenizer, image_processor):
        part.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 40,
            "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=8)
    )
    model.save_pretrained(folder)
    return folder


TAGS = (
    ("general", "9"), ("explicit", "9"), ("1girl", "0"), ("long_hair", "0"), ("red_dress", "0"), ("dress", "0"),
    ("^_^", "0"), ("hatsune_miku_(vocaloid)", "4"),
)  # fmt: skip


def tiny_tagger(folder: Path, side: int = 16, batch: int | str = "batch") -> Path:
    """scores = sigmoid(mean over the picture of B, G, R × weights), so that the colors and their order count."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(parents=True, exist_ok=True)
    weights = np.zeros((3, len(TAGS)), np.float32)
    weights[2, 2] = weights[2, 4] = 0.02  # red: 1girl, red_dress
    weights[0, 3] = 0.02  # blue: long_hair
    weights[1, 7] = 0.02  # green: the character
    bias = np.array([1, -1, -1, -1, -1, -0.5, -3, -1], np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["input", "axes"], ["mean"], keepdims=0),
            helper.make_node("MatMul", ["mean", "weights"], ["raw"]),
            helper.make_node("Add", ["raw", "bias"], ["logits"]),
            helper.make_node("Sigmoid", ["logits"], ["output"]),
        ],
        "tagger",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, side, side, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, len(TAGS)])],
        [
            numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(bias, "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, str(folder / "model.onnx"))
    rows = [f"{index},{name},{category},1" for index, (name, category) in enumerate(TAGS)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]) + "\n")
    return folder
