"""Training data read from files: what is accepted, and the message for everything that is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reslora_kernels.cli.examples import Chat, Completion, read_examples

USER, ANSWER = '{"role": "user", "content": "a"}', '{"role": "assistant", "content": "b"}'
GOOD = json.dumps({"prompt": "a", "completion": "b"}) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + "\n{bad\n", "data.jsonl line 3: not valid JSON"),
        ("[1, 2]\n", "data.jsonl line 1: a record must be an object such as"),
        (GOOD + '{"question": "a"}\n', 'line 2: a record must be {"messages": [...]}, {"prompt": ...'),
        ('{"question": "a", "answer": "b"}\n', "this one has the keys ['answer', 'question']"),
        ('{"prompt": 3, "completion": "b"}\n', "line 1: prompt must be a str, got 3"),
        ('{"prompt": "a", "completion": ""}\n', "line 1: completion is empty"),
        ('{"text": null}\n', "line 1: text must be a str, got None"),
        ('{"messages": []}\n', "line 1: messages must be a list of at least one message"),
        ('{"messages": [{"from": "human", "value": "a"}]}\n', 'messages[0] must be {"role": ..., "content": ...}'),
        ('{"messages": [{"role": "gpt", "content": "a"}]}\n', "role of system, developer, user, assistant, tool, got"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}\n', "must have a str as content"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "no assistant message"),
        (f'{{"messages": [{USER}, {{"role": "assistant", "content": null}}]}}\n', "a str as content, got None"),
        (f'{{"messages": [{USER}, {{"role": "assistant", "content": "b", "weight": 0}}]}}\n', "no assistant message"),
        (f'{{"messages": [{USER}, {{"role": "assistant", "content": "b", "weight": 2}}]}}\n', "a weight of 0 or 1"),
        (f'{{"messages": [{USER}, {ANSWER}], "images": ["a.png"]}}\n', "line 1: 'images' cannot be given to the model"),
        (f'{{"messages": [{USER}, {ANSWER}], "tools": "[{{"}}\n', "line 1: tools are not valid JSON"),
        (f'{{"prompt": [{USER}], "completion": [{USER}]}}\n', "no assistant message"),
        (GOOD + '{"text": "ok \\ud83d"}\n', "line 2: no Unicode text: half a character ('\\ud83d') at position 3"),
        ("", "holds no examples: it is empty"),
        ("\n\n", "holds no examples: it is empty"),
    ],
)  # fmt: skip
def test_malformed_data_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError) as refusal:
        read_examples("--data", str(path))
    assert message in str(refusal.value)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"Gr\xf6\xdfe")
    (tmp_path / "latin.jsonl").write_bytes(GOOD.encode() + b'{"text": "Gr\xf6"}')
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8 text \(byte 2 is 0xf6\)"):
        read_examples("--data", str(tmp_path / "latin.txt"))
    with pytest.raises(ValueError, match=r"latin\.jsonl line 2: not UTF-8 text"):
        read_examples("--data", str(tmp_path / "latin.jsonl"))


def test_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert read_examples("--data", str(path)) == [Completion("a", "b", "data.jsonl line 1")]


def test_nulls_that_a_table_puts_into_objects_are_taken_out(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    tools = [{"name": "add", "parameters": {"a": "int"}}, {"name": "say", "parameters": {"text": "str"}}]
    messages = json.loads(f"[{USER}, {ANSWER}]")
    datasets.Dataset.from_list([{"messages": messages, "tools": [tool]} for tool in tools]).save_to_disk(
        tmp_path / "set"
    )
    examples = read_examples("--data", str(tmp_path / "set"))
    assert [example.tools for example in examples if isinstance(example, Chat)] == [(tool,) for tool in tools]
    assert all(example.messages == tuple(messages) for example in examples if isinstance(example, Chat))
