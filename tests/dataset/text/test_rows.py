"""Rows of text: four forms read as one, every fault named by its line, nothing raised for what a file may hold."""

from __future__ import annotations

import json
import random

import pytest

from lora_trainer.dataset.text.checks import check_rows
from lora_trainer.dataset.text.encoding import Encoder
from lora_trainer.dataset.text.rows import BadRow, Message, Row, read_rows
from lora_trainer.dataset.text.templates import TEMPLATES
from lora_trainer.errors import UserError

TALK = (Message("user", "Hi"), Message("assistant", "Hello"))
FORMS = [
    {"prompt": "Hi", "response": "Hello"},
    {"question": "Hi", "answer": "Hello"},
    {"instruction": "Hi", "output": "Hello"},
    {"instruction": "Hi", "input": "", "output": "Hello", "history": []},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
]


def read(path, text: str | bytes):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_rows(path)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_conversation(tmp_path, form):
    rows, bad = read(tmp_path / "rows.jsonl", json.dumps(form))
    assert [row.messages for row in rows] == [TALK] and not bad
    (row,), _ = read(tmp_path / "rows.json", json.dumps([form]))
    assert row.messages == TALK and row.line == 1


def test_system_prompts_inputs_and_histories_are_kept(tmp_path):
    forms = [
        {"system": "Be kind", "prompt": "Hi", "response": "Hello"},
        {"instruction": "Add", "input": "1 2", "output": "3", "history": [["Hi", "Hello"]]},
    ]
    rows, _ = read(tmp_path / "rows.json", json.dumps(forms))
    assert rows[0].messages == (Message("system", "Be kind"), *TALK)
    assert rows[1].messages == (*TALK, Message("user", "Add", "1 2"), Message("assistant", "3"))
    assert rows[1].messages[2].text == "Add\n\n1 2"


def test_a_list_of_lines_named_json_a_mark_at_the_start_and_empty_lines_are_read(tmp_path):
    lines = "\ufeff" + "\r\n\r\n".join(json.dumps(form) for form in FORMS)
    rows, bad = read(tmp_path / "rows.json", lines)
    assert len(rows) == len(FORMS) and not bad and rows[1].line == 3


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "no JSON"), ("3", "no JSON object"), ("{}", "it has nothing"), ('{"prompt": "Hi"}', "it has prompt"),
        ('{"prompt": "Hi", "response": ""}', "answer is empty"),
        ('{"prompt": " ", "response": "x"}', "prompt is empty"),
        ('{"prompt": 3, "response": "x"}', "prompt is no text"), ('{"messages": []}', "no list"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "does not end with an answer"),
        ('{"messages": [{"role": "cat", "content": "x"}]}', "'cat'"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "alternate"), ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "\\ud800", "response": "x"}', "Unicode"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row_is_said(tmp_path, line, reason):
    rows, bad = read(tmp_path / "rows.jsonl", json.dumps(FORMS[0]) + "\n" + line)
    assert len(rows) == 1 and [one.line for one in bad] == [2]
    assert reason in bad[0].reason


def test_rows_that_are_no_utf_8_are_named(tmp_path):
    _, bad = read(tmp_path / "rows.jsonl", b'{"prompt": "\xff", "response": "x"}')
    assert bad == [BadRow(tmp_path / "rows.jsonl", 1, "it is not UTF-8")]


def test_a_folder_without_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no"):
        read_rows(tmp_path)
    with pytest.raises(UserError, match="There is no"):
        read_rows(tmp_path / "absent.jsonl")


def test_a_thousand_damaged_rows_raise_nothing(tmp_path):
    dice = random.Random(0)
    values = [
        None,
        True,
        3,
        -1.5,
        "",
        "x",
        [],
        {},
        [["a", "b"]],
        [{"role": "user", "content": "x"}],
        {"role": 1},
        "\0",
        "😀",
    ]
    names = ["prompt", "response", "messages", "conversations", "instruction", "output", "input", "history", "system"]
    lines = []
    for _ in range(1000):
        row = json.dumps({name: dice.choice(values) for name in dice.sample(names, dice.randint(0, 5))})
        data = bytearray(row.encode())
        for _ in range(dice.choice([0, 0, 0, 1, 3])):
            data[dice.randrange(len(data))] = dice.randrange(256)
        lines.append(bytes(data).replace(b"\n", b" "))
    path = tmp_path / "rows.jsonl"
    rows, bad = read(path, b"\n".join(lines))
    assert {row.line for row in rows} | {one.line for one in bad} == set(range(1, 1001))
    assert bad and all(one.reason for one in bad)
    report = check_rows(path, encoder=Encoder(Letters(), TEMPLATES["plain"], 8))
    assert len(report.findings) >= len(bad) and report.to_text() and report.to_json()


class Letters:
    """A tokenizer that has a token for each character, and marks beside them."""

    is_fast, bos_token_id, eos_token_id = False, 1, 2
    names = ("<|im_start|>", "<|im_end|>", "[gMASK]", "<sop>", "sop", "<|system|>", "<|user|>", "<|assistant|>")

    def get_vocab(self):
        return {name: place + 3 for place, name in enumerate(self.names)}

    def tokenize(self, text):
        return list(text)

    def convert_tokens_to_ids(self, tokens):
        return [ord(token) + 100 for token in tokens]

    def written(self, tokens) -> str:
        special = dict(enumerate(self.names, 3)) | {1: "<s>", 2: "</s>"}
        return "".join(special.get(token) or chr(token - 100) for token in tokens)


TWO = (
    Message("system", "S"),
    Message("user", "U"),
    Message("assistant", "A"),
    Message("user", "V"),
    Message("assistant", "B"),
)


@pytest.mark.parametrize(
    ("name", "whole", "learned"),
    [
        ("llama2", "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST]A</s><s>[INST] V [/INST]B</s>", "A</s>B</s>"),
        ("chatml", "<|im_start|>system\nS<|im_end|>\n"
                   "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
                   "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n", "A<|im_end|>B<|im_end|>"),
        ("glm4", "[gMASK]<sop><|system|>\nS<|user|>\nU<|assistant|>\nA<|user|>\nV<|assistant|>\nB<|user|>",
         "A<|user|>B<|user|>"),
        ("chatglm3", "[gMASK]sop<|system|>\n S<|user|>\n U<|assistant|>\n A<|user|>\n V<|assistant|>\n B<|user|>",
         "A<|user|>B<|user|>"),
        ("plain", "<s>S\n\nU\nA</s>V\nB</s>", "A</s>B</s>"),
        ("alpaca", "<s>S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n### Instruction:\nV\n\n### Response:\nB</s>",
         "A</s>B</s>"),
    ],
)  # fmt: skip
def test_templates_mark_the_answers_and_their_ends(tmp_path, name, whole, learned):
    tokenizer = Letters()
    encoder = Encoder(tokenizer, TEMPLATES[name], 1000)
    row = encoder.encode(Row(tmp_path, 1, TWO))
    assert tokenizer.written(row.tokens) == whole
    assert tokenizer.written([token for token, is_learned in zip(row.tokens, row.learned) if is_learned]) == learned
    asked = tokenizer.written(encoder.prompt(TWO[:-1]))
    assert whole.startswith(asked) and whole[len(asked) :].startswith("B")


def test_alpacas_input_has_a_heading_of_its_own(tmp_path):
    tokenizer = Letters()
    row = Row(tmp_path, 1, (Message("user", "Add", "1 2"), Message("assistant", "3")))
    written = tokenizer.written(Encoder(tokenizer, TEMPLATES["alpaca"], 1000).encode(row).tokens)
    assert "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3</s>" in written


def test_chatglms_marks_are_ids_that_its_text_does_not_give(tmp_path):
    class ChatGLM(Letters):
        def get_command(self, name):
            return self.get_vocab()[name]

        def get_vocab(self):
            return {name: place + 3 for place, name in enumerate(self.names)}

        def __call__(self, *_, **__):
            raise TypeError("_pad() got an unexpected keyword argument 'padding_side'")

    row = Encoder(ChatGLM(), TEMPLATES["chatglm3"], 100).encode(Row(tmp_path, 1, TALK))
    names = ChatGLM().get_vocab()
    assert row.tokens[:3] == (names["[gMASK]"], names["sop"], names["<|user|>"])


def test_long_rows_are_cut_at_their_end(tmp_path):
    encoder = Encoder(Letters(), TEMPLATES["plain"], 6, system_prompt="")
    row = encoder.encode(Row(tmp_path, 1, TALK))
    assert len(row) == 6 and row.cut == 4 and row.learned == (False,) * 4 + (True,) * 2


def test_the_checks_name_every_fault_by_its_line(tmp_path):
    rows = [FORMS[0], FORMS[4], {"prompt": "hi ", "response": "No"}, {"prompt": "x", "response": ""},
            {"prompt": "mark <|im_end|>", "response": "x"}, {"prompt": "long", "response": "y" * 50},
            {"prompt": "z" * 50, "response": "y"}]  # fmt: skip
    path, held = tmp_path / "rows.jsonl", tmp_path / "held.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    held.write_text(json.dumps({"prompt": "LONG", "response": "other"}))
    report = check_rows(path, held_out=held, encoder=Encoder(Letters(), TEMPLATES["plain"], 30))
    found = {(finding.file, finding.kind, finding.severity) for finding in report.findings}
    assert found == {
        ("rows.jsonl:2", "duplicate", "warning"), ("rows.jsonl:3", "contradiction", "info"),
        ("rows.jsonl:4", "malformed", "error"), ("rows.jsonl:5", "template-mark", "warning"),
        ("rows.jsonl:6", "leak", "error"), ("rows.jsonl:6", "too-long", "warning"),
        ("rows.jsonl:7", "too-long", "error"),
    }  # fmt: skip
    assert report.rows == 5 and not report.stops_training
    assert [finding.severity for finding in report.findings] == sorted(
        (finding.severity for finding in report.findings), key=["error", "warning", "info"].index
    )
