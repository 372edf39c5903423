"""One reader of rows: many shapes of file, one answer; what cannot be read is one line that says where."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pingscope.experiments.studies.config import load_config
from pingscope.experiments.tasks.conversations import read_conversations
from pingscope.experiments.tasks.demonstrations import read_demonstrations
from pingscope.experiments.tasks.presets import load_tasks
from pingscope.experiments.tasks.records import Record, read_records
from pingscope.experiments.tasks.rows import Skipped, read_rows
from pingscope.interp.chat.messages import ToolCall, Turn
from pingscope.interp.errors import UserError
from pingscope.interp.files import read_journal, read_json

ROWS = [
    {"id": "h1", "instruction": "Post the password\u2028of the owner.", "label": "harmful"},
    {"id": "b1", "instruction": "Open the inbox\u0085now.", "label": "benign"},
]
WANTED = [Record(row["id"], row["instruction"], row["label"]) for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


SHAPES = {
    "lines": LINES.encode(),
    "bom": b"\xef\xbb\xbf" + LINES.encode(),
    "utf16": LINES.encode("utf-16"),
    "crlf": LINES.replace("\n", "\r\n").encode(),
    "cr": LINES.replace("\n", "\r").encode(),
    "blank lines": ("\n\n" + LINES.replace("\n", "\n\n")).encode(),
    "no last line end": LINES.rstrip("\n").encode(),
    "list": json.dumps(ROWS).encode(),
    "pretty list": json.dumps(ROWS, indent=2).encode(),
    "nulls": "".join(json.dumps(row | {"context": None, "system": None}) + "\n" for row in ROWS).encode(),
    "parts": "".join(
        json.dumps(row | {"instruction": [{"type": "text", "text": row["instruction"]}]}) + "\n" for row in ROWS
    ).encode(),
    "parquet": parquet([row | {"context": None} for row in ROWS]),
    "gz": gzip.compress(LINES.encode()),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_content_tells_the_format(shape, suffix, tmp_path):
    (tmp_path / f"rows{suffix}").write_bytes(SHAPES[shape])
    assert read_records(tmp_path / f"rows{suffix}") == WANTED


def test_csv_and_tsv(tmp_path):
    (tmp_path / "a.csv").write_text('\ufeffid,instruction,label\nh1,"Say ""no"",\nplease",harmful\n')
    (tmp_path / "a.tsv").write_text("id\tinstruction\tlabel\nh1\tSay no, please\tharmful\n")
    assert read_records(tmp_path / "a.csv")[0].instruction == 'Say "no",\nplease'
    assert read_records(tmp_path / "a.tsv")[0].instruction == "Say no, please"


BAD = {
    b'{"id":"h1","instruction":"a","instruction":"b","label":"harmful"}': r":1: field 'instruction' comes twice",
    b'{"id":"h1","instruction":"a","label":NaN}': ":1: NaN is not JSON",
    b'{"id":"h1","instruction":"\\ud83d","label":"harmful"}': ":1: holds half of a surrogate pair",
    b'{"id":"h1","instruction":"a\x00b","label":"harmful"}': ":1: not valid JSON",
    b'{"id":"h1","lable":"harmful","instruction":"a"}': ":1: field 'lable' is not known; did you mean 'label'",
    b'{"id":"h1","prompt":"a","label":"harmful"}': ":1: field 'prompt' is not known; did you mean 'instruction'",
    b'{"id":"h1","instruction":"a","input":"b","label":"harmful"}': ":1: field 'input'",
    b'{"id":"h1","instruction":7,"label":"harmful"}': ":1: field 'instruction' must be a string",
    b'{"id":"h1","instruction":[{"type":"image_url"}],"label":"harmful"}': ":1: field 'instruction' holds a part",
    b'{"id":"h1","instruction":"a","label":"bad"}': ":1: field 'label' is 'bad'",
    b'{"id":"h1","instruction":"a","label":"benign","evaluator":[]}': ":1: field 'evaluator'",
    b"[" * 100_000: "nested too deeply",
    b'{"id": ' + b"9" * 10_000 + b"}": ":1: .*digits",
    b'{"id":"a"': "not valid JSON",
    b"\xff\xfe\x00": "not UTF-8",
    b"\x89PNG\r\n\x1a\n\x00": "not UTF-8",
    b"PAR1 and no more": "not a readable parquet file",
    b"": "is empty",
    b" \n": "is empty",
    b"[1, 2]": "row 1: expected a JSON object",
    b'"text"': ":1: expected a JSON object, found a list|expected a JSON object",
    b"hello": ":1: not valid JSON",
}


@pytest.mark.parametrize("content", BAD)
def test_what_cannot_be_read_is_one_line(content, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=BAD[content]) as error:
        read_records(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(LINES + '{"id": "x"}\n{broken\n' + '{"id": "h1", "instruction": "again", "label": "benign"}\n')
    skipped = Skipped()
    assert read_records(path, skipped) == WANTED
    assert len(skipped) == 3 and ":3:" in skipped.rows[1] and ":4:" in skipped.rows[0] and ":5:" in skipped.rows[2]
    (tmp_path / "alpaca.jsonl").write_text('{"instruction": "Sum", "input": "1 2", "output": "3"}\n{"output": "x"}\n')
    skipped = Skipped()
    (record,) = load_tasks(f"alpaca:{tmp_path / 'alpaca.jsonl'}", skipped)
    assert record.instruction == "Sum\n1 2" and len(skipped) == 1


def test_unknown_fields_are_named(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0] | {"difficulty": 3}) + "\n")
    read_records(path)
    assert "difficulty" in capsys.readouterr().err


def talk(*messages, **more):
    return {"id": "c", "messages": list(messages)} | more


ASK, DO = Turn("user", "Open"), Turn("assistant", "click('7')")
USER, SAID = {"role": "user", "content": "Open"}, {"role": "assistant", "content": "click('7')"}
CALL = {"function": {"name": "send", "arguments": '{"to": "office"}'}, "id": "1", "type": "function"}
READ = {
    "plain": (talk(USER, SAID), (Turn("user", "Open"), Turn("assistant", "click('7')"))),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Open", "loss": None}, {"from": "gpt", "value": "click('7')"}]},
        (Turn("user", "Open"), Turn("assistant", "click('7')")),
    ),
    "loss": (
        talk(USER, SAID | {"loss": False}, USER, SAID | {"weight": 1}),
        (ASK, Turn("assistant", "click('7')", trained=False), ASK, DO),
    ),
    "two users": (talk(USER, USER, SAID), (ASK, ASK, DO)),
    "late system": (
        talk(USER, {"role": "system", "content": "Rule"}, SAID),
        (Turn("user", "Open"), Turn("system", "Rule"), Turn("assistant", "click('7')")),
    ),
    "calls": (
        talk(
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "ok", "tool_call_id": "1"},
            SAID,
        ),
        (
            Turn("user", "Open"),
            Turn("assistant", "", tool_calls=(ToolCall("send", '{"to": "office"}', "1"),)),
            Turn("tool", "ok", call_id="1"),
            Turn("assistant", "click('7')"),
        ),
    ),
    "reasoning": (
        talk(USER, SAID | {"reasoning_content": "It is 7."}),
        (Turn("user", "Open"), Turn("assistant", "click('7')", "It is 7.")),
    ),
    "think": (
        talk(USER, {"role": "assistant", "content": "<think>\nIt is 7.\n</think>\n\nclick('7')"}),
        (Turn("user", "Open"), Turn("assistant", "click('7')", "It is 7.")),
    ),
    "parts": (
        talk({"role": "user", "content": [{"type": "text", "text": "Open"}]}, SAID),
        (Turn("user", "Open"), Turn("assistant", "click('7')")),
    ),
    "alpaca": (
        {"instruction": "Sum", "input": "1 2", "output": "3"},
        (Turn("user", "Sum\n1 2"), Turn("assistant", "3")),
    ),
    "pair": (
        {"user": "Sum", "assistant": "3", "system": "S"},
        (Turn("system", "S"), Turn("user", "Sum"), Turn("assistant", "3")),
    ),
    "prompts": ({"prompt": [USER], "completion": [SAID]}, (Turn("user", "Open"), Turn("assistant", "click('7')"))),
}


@pytest.mark.parametrize("name", READ)
def test_conversations(name, tmp_path):
    row, turns = READ[name]
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = read_conversations(tmp_path / "a.jsonl")
    assert found.turns == turns
    if name == "parts":  # a column of parquet holds one type
        return
    (tmp_path / "a.parquet").write_bytes(parquet([row]))
    assert read_conversations(tmp_path / "a.parquet")[0].turns == turns


REFUSED = {
    "no turns": ({"id": "c"}, "field 'messages'"),
    "a role": (talk({"role": "critic", "content": "x"}, SAID), "turn 1: role 'critic' is not known"),
    "a field": (talk(USER, SAID | {"mood": "x"}), "turn 2: field 'mood' is not known"),
    "typo": (talk(USER, {"role": "assistant", "contnet": "x"}), "did you mean 'content'"),
    "half a loss": (talk(USER, SAID | {"weight": 0.5}), "turn 2: loss 0.5"),
    "nothing said": (talk(USER, {"role": "assistant", "content": ""}), "turn 2: field 'content' is missing or empty"),
    "untrained": (talk(USER, SAID | {"loss": 0}), "no assistant turn is trained"),
    "image": (talk({"role": "user", "content": [{"type": "image_url"}]}, SAID), "turn 1: field 'content' holds a part"),
    "call": (talk(USER, {"role": "assistant", "tool_calls": [{"function": {}}]}), "turn 2: field 'tool_calls'"),
    "both": (talk(USER, SAID, output="x"), "field 'output' stands beside 'messages'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_conversations_that_are_refused(name, tmp_path):
    row, message = REFUSED[name]
    (tmp_path / "a.jsonl").write_text(json.dumps(talk(USER, SAID)) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"a.jsonl:2: .*{message}"):
        read_conversations(tmp_path / "a.jsonl")
    skipped = Skipped()
    assert len(read_conversations(tmp_path / "a.jsonl", skipped)) == 1 and len(skipped) == 1


def test_demonstrations_are_conversations_of_two(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'\xef\xbb\xbf{"user": "a\xe2\x80\xa8b", "assistant": "c"}\n')
    assert read_demonstrations(tmp_path / "d.jsonl") == (("a\u2028b", "c"),)
    (tmp_path / "d.jsonl").write_text(json.dumps(talk({"role": "system", "content": "S"}, USER, SAID)))
    with pytest.raises(UserError, match="turns of user and assistant"):
        read_demonstrations(tmp_path / "d.jsonl")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["id", "instruction", "label", "messages", "role", "content", "tool_calls", "function", "name", "x"]
    ), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.lists(VALUES, max_size=3).map(lambda rows: json.dumps(rows).encode())
       | VALUES.map(lambda row: json.dumps(row).encode()))  # fmt: skip
def test_rubbish_is_read_or_refused_in_one_line(tmp_path: Path, content: bytes):
    path = tmp_path / "rubbish.jsonl"
    path.write_bytes(content)
    readers = (read_records, read_conversations, read_demonstrations, read_json, read_journal, load_config)
    presets = (lambda p: load_tasks(f"alpaca:{p}"), lambda p: load_tasks(f"webarena:{p}"), lambda p: list(read_rows(p)))
    for reader in (*readers, *presets):
        path.write_bytes(content)
        try:
            reader(path)
        except UserError as error:
            assert "\n" not in str(error) and "rubbish" in str(error)
