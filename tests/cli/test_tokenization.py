"""What a fine-tuning run learns from: data in files, which tokens carry a label, how text is split and padded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from reslora_kernels.cli.examples import Chat, Completion, Example, Text, parse_record, read_examples
from reslora_kernels.cli.finetune import split_rows
from reslora_kernels.cli.tokenization import IGNORED, Encoded, Row, collate, encode

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
        ('{"text": null}\n', "line 1: a record must be"),
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
    for name, message in (("data.csv", r"must be JSON Lines .* or plain text"), ("data.txt", r"name it 'data\.jsonl'")):
        (tmp_path / name).write_text(GOOD)
        with pytest.raises(ValueError, match=message):
            read_examples("--data", str(tmp_path / name))
    with pytest.raises(ValueError, match=r"latin\.jsonl line 2: not UTF-8 text"):
        read_examples("--data", str(tmp_path / "latin.jsonl"))


def test_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert read_examples("--data", str(path)) == [Completion("a", "b", "data.jsonl line 1")]


def test_a_folder_by_a_bare_name_is_that_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By "text" or "json" alone datasets means builders of its own, which read whatever is below this folder."""
    for name in ("text", "private"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    monkeypatch.chdir(tmp_path)
    assert [example.text for example in read_examples("--data", "text")] == ["text"]
    for missing in ("json", "data.jsonl", "own/data.parquet"):
        with pytest.raises(FileNotFoundError, match=f"--data '{missing}' does not exist"):
            read_examples("--data", missing)
    (tmp_path / "text" / "a.txt").unlink()
    (tmp_path / "text" / "b.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match="--data 'text' cannot be read: JSON parse error"):
        read_examples("--data", "text")


def test_ids_of_datasets_may_have_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": [{"text": name}]})
    assert read_examples("--data", "teknium/OpenHermes-2.5") == [
        Text("teknium/OpenHermes-2.5", "teknium/OpenHermes-2.5 row 0")
    ]


def pipe_with(content: str, folder: Path) -> str:
    """A named pipe that is written to as soon as somebody reads."""
    os.mkfifo(folder / "pipe")
    Thread(target=(folder / "pipe").write_text, args=[content], daemon=True).start()
    return str(folder / "pipe")


@pytest.mark.parametrize(
    ("content", "expected"),
    [('\n{"text": "a"}\n{"text": "b"}\n', ["a", "b"]), ("prose\nof two lines\n", ["prose\nof two lines\n"])],
    ids=["JSON Lines", "text"],
)
def test_what_another_program_writes_into_a_pipe_is_read(content: str, expected: list[str], tmp_path: Path) -> None:
    assert [example.text for example in read_examples("--data", pipe_with(content, tmp_path))] == expected


def test_json_in_a_pipe_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is JSON: write its records as JSON Lines"):
        read_examples("--data", pipe_with('[{"text": "a"},\n {"text": "b"}]', tmp_path))


def test_one_dataset_has_no_other_split(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"text": "a", "messages": None}]).save_to_disk(tmp_path / "set")
    assert read_examples("--data", str(tmp_path / "set"))[0].text == "a"
    with pytest.raises(ValueError, match="is one dataset without splits, so that it has no split 'test'"):
        read_examples("--data", str(tmp_path / "set"), "test")


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


def chat() -> tuple[dict[str, str], ...]:
    return (
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "What is 2 plus 2?"},
        {"role": "assistant", "content": "It is 4."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "You are welcome."},
    )


def learned(row: Row, tokenizer: Any) -> str:
    """The text that the loss is on."""
    assert row.labels[row.labels != IGNORED].tolist() == row.input_ids[row.labels != IGNORED].tolist()
    return str(tokenizer.decode(row.labels[row.labels != IGNORED]))


def encode_one(example: Example, tokenizer: Any, max_length: int = 128) -> list[Row]:
    return encode([example], tokenizer, max_length, None).rows


def test_completion_alone_is_learned(tokenizer: Any) -> None:
    (row,) = encode_one(Completion("What is two plus two?", " Four. Größe 😀", "here"), tokenizer)
    assert learned(row, tokenizer) == " Four. Größe 😀<eos>"
    assert tokenizer.decode(row.input_ids) == "What is two plus two? Four. Größe 😀<eos>"


def test_assistant_turns_alone_are_learned(tokenizer: Any) -> None:
    (row,) = encode_one(Chat(chat(), "here"), tokenizer)
    assert learned(row, tokenizer) == "It is 4.<eos>\n\nYou are welcome.<eos>\n\n"
    text = tokenizer.decode(row.input_ids)
    assert text.startswith("### System:\nAdd.\n\n### User:\nWhat is 2 plus 2?\n\n### Assistant:\nIt is 4.<eos>")


def test_the_tokenizers_own_template_is_used(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (row,) = encode_one(Chat(chat(), "here"), tokenizer)
    assert learned(row, tokenizer) == "It is 4.<eos>You are welcome.<eos>"


def test_one_of_several_templates_is_that_for_tools(tokenizer: Any) -> None:
    """As Command-R and Hermes 2 Pro have them: by name, which is how the tokenizer holds them."""
    plain = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.chat_template = {"default": plain, "tool_use": "{{ tools | tojson }}" + plain}
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    for given, expected in (({}, "<user>a<assistant>b"), ({"tools": tools}, json.dumps(tools) + "<user>a<assistant>b")):
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        (row,) = encode([parse_record({"messages": messages, **given}, "here")], tokenizer, 512, None).rows
        assert tokenizer.decode(row.input_ids).removesuffix("<eos>") == expected


def test_template_that_rewrites_earlier_turns_gives_a_sequence_per_turn(tokenizer: Any) -> None:
    """As templates of reasoning models do: what is generated last looks different from what is history."""
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{% if loop.last and m.role == 'assistant' %}(thought){% endif %}"
        "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant](think){% endif %}"
    )
    first, second = encode_one(Chat(chat(), "here"), tokenizer)
    assert learned(first, tokenizer).endswith("ought)It is 4.<eos>")
    assert learned(second, tokenizer).endswith("ought)You are welcome.<eos>")
    assert "[assistant]It is 4.<eos>[user]Thanks" in tokenizer.decode(second.input_ids)


def test_template_that_changes_the_history_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"data\.jsonl line 3: the chat template changes what came before"):
        encode_one(Chat(chat(), "data.jsonl line 3"), tokenizer)


def test_template_that_refuses_a_conversation_says_where(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"data\.jsonl line 3: .*no system role"):
        encode_one(Chat(chat(), "data.jsonl line 3"), tokenizer)


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
TOOLS_TEMPLATE = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}"
    "{% if m.name is defined %} {{ m.name }}{% endif %}]"
    "{% if m.reasoning_content is defined %}<{{ m.reasoning_content }}>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}({{ call.function.name }} {{ call.function.arguments.a }}){% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def with_tools() -> dict[str, Any]:
    """As OpenAI's format writes it."""
    return {
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "messages": [
            {"role": "user", "content": "2 and 2?", "name": "Ada"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "a sum"},
            {"role": "tool", "content": "4", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Five.", "weight": 0},
            {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
            {"role": "assistant", "content": "Four.", "weight": 1},
        ],
    }


def test_calls_tools_and_reasoning_reach_the_template_and_weight_0_is_not_learned(tokenizer: Any) -> None:
    tokenizer.chat_template = TOOLS_TEMPLATE
    (row,) = encode_one(parse_record(with_tools(), "here"), tokenizer, max_length=512)
    assert tokenizer.decode(row.input_ids) == (
        '[tools][{"type": "function", "function": {"name": "add"}}][user Ada]2 and 2?<eos>'
        "[assistant]<a sum>(add 2)<eos>[tool]4<eos>[assistant]Five.<eos>[user]Sure?<eos>[assistant]Four.<eos>"
    )
    assert learned(row, tokenizer) == "<a sum>(add 2)<eos>Four.<eos>"


@pytest.mark.parametrize(
    ("unknown", "key"),
    [("m.tool_calls or []", "tool_calls"), ("m.name is defined", "name"), ("if tools", "tools"),
     ("m.reasoning_content is defined", "reasoning_content")],
)  # fmt: skip
def test_what_the_template_does_not_show_is_refused(unknown: str, key: str, tokenizer: Any) -> None:
    tokenizer.chat_template = TOOLS_TEMPLATE.replace(unknown, "if false" if unknown == "if tools" else "[]")
    with pytest.raises(ValueError, match=rf"data line 4: .*does not show '{key}'"):
        encode_one(parse_record(with_tools(), "data line 4"), tokenizer)


def test_arguments_are_given_in_the_form_that_the_template_takes(tokenizer: Any) -> None:
    """An object to a template that prints JSON, text to one that joins it to its own."""
    messages = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    for printed in ("call.function.arguments | tojson", "'' + call.function.arguments", "call.function.arguments"):
        tokenizer.chat_template = TOOLS_TEMPLATE.replace("call.function.arguments.a", printed)
        for arguments in ('{"a": 2}', {"a": 2}):
            call = {**CALL, "function": {"name": "add", "arguments": arguments}}
            messages[1]["tool_calls"] = [call]
            (row,) = encode_one(parse_record({"messages": messages}, "here"), tokenizer, max_length=512)
            assert learned(row, tokenizer) == '(add {"a": 2})<eos>'


@pytest.mark.parametrize("heading", ["<pad>", "[{{ m.role }}]"])
def test_every_turn_is_stopped(heading: str, tokenizer: Any) -> None:
    """By the next message's heading, where the template has no other end of a turn, and at last by the end token."""
    tokenizer.chat_template = "{% for m in messages %}" + heading + "{{ m.content }}{% endfor %}"
    (row,) = encode_one(Chat(chat(), "here"), tokenizer)
    learnt = learned(row, tokenizer)
    assert learnt.endswith("You are welcome.<eos>")
    assert ("It is 4.<pad>" in learnt) == (heading == "<pad>")


def test_prompt_and_completion_as_conversations(tokenizer: Any) -> None:
    prompt, completion = chat()[:4], chat()[4:]
    (row,) = encode_one(parse_record({"prompt": list(prompt), "completion": list(completion)}, "here"), tokenizer)
    assert learned(row, tokenizer) == "You are welcome.<eos>\n\n"


@pytest.mark.parametrize("spans_of_spaces", [True, False])
def test_an_end_token_that_the_tokenizer_adds_is_learned(spans_of_spaces: bool, tokenizer: Any) -> None:
    processors = pytest.importorskip("tokenizers.processors")
    end = processors.TemplateProcessing(single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)])
    spaces = processors.ByteLevel(trim_offsets=not spans_of_spaces)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([spaces, end])
    (row,) = encode_one(Completion("two", "\n\n four \n", "here"), tokenizer)
    assert row.labels.tolist()[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row.input_ids) == "<pad>two\n\n four \n<eos>"
    assert learned(row, tokenizer) == "\n\n four \n<eos>"


def test_text_is_split_and_nothing_is_lost(tokenizer: Any) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 20
    rows = encode_one(Text(text, "here"), tokenizer, max_length=16)
    assert all(len(row.input_ids) == 16 and torch.equal(row.input_ids, row.labels) for row in rows[:-1])
    assert tokenizer.decode(torch.cat([row.input_ids for row in rows])) == text + "<eos>"


def test_completion_beyond_the_length_is_dropped_and_counted(tokenizer: Any) -> None:
    encoded = encode(
        [Completion("two plus two is " * 40, "four", "a"), Completion("two", " four", "b")], tokenizer, 16, None
    )
    assert (len(encoded.rows), encoded.dropped) == (1, 1)
    with pytest.raises(ValueError, match="no example has a token to learn within --max-length 16"):
        encode([Completion("two plus two is " * 40, "four", "a")], tokenizer, 16, None)


def test_batch_is_padded_outside_the_loss() -> None:
    rows = [Row(torch.tensor([5, 6, 7]), torch.tensor([-100, 6, 7])), Row(torch.tensor([8, 9]), torch.tensor([8, 9]))]
    batch = collate(rows, pad=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, 9, -100]]


def test_split_keeps_examples_whole_and_is_reproducible() -> None:
    groups = tuple(tuple(Row(torch.tensor([i, j]), torch.tensor([i, j])) for j in range(3)) for i in range(10))
    train, evaluation = split_rows(Encoded(groups, 0), 0.3, seed=1)
    assert (len(train), len(evaluation)) == (21, 9)
    assert not {int(row.input_ids[0]) for row in train} & {int(row.input_ids[0]) for row in evaluation}
    again = split_rows(Encoded(groups, 0), 0.3, seed=1)[1]
    assert [row.input_ids.tolist() for row in again] == [row.input_ids.tolist() for row in evaluation]
