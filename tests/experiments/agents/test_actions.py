"""The action parser on well-formed actions of every family and on the texts that break naive parsers."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from pingscope.experiments.agents.actions import parse_actions


def one(text: str) -> tuple[str, dict]:
    parsed = parse_actions(text)
    assert parsed.status == "ok", parsed
    call = parsed.calls[0]
    assert text[call.start : call.end] == call.text
    return call.name, call.args


@pytest.mark.parametrize(
    ("text", "name", "args"),
    [
        ('do(action="Click", element="7")', "do", {"action": "Click", "element": "7"}),
        ('do(action="Click", element=7)', "do", {"action": "Click", "element": 7}),
        ("do(Click, inbox)", "do", {"action": "Click", "element": "inbox"}),
        ("do(click, 7)", "do", {"action": "click", "element": 7}),
        ('do("Type", "hello", "5")', "do", {"action": "Type", "argument": "hello", "element": "5"}),
        ('do(action="Press Enter")', "do", {"action": "Press Enter"}),
        ("do(Scroll Down)", "do", {"action": "Scroll Down"}),
        ('DO(action="Click", element="7")', "do", {"action": "Click", "element": "7"}),
        ('exit("x")', "exit", {"message": "x"}),
        ("exit()", "exit", {}),
        ('exit(message="N/A")', "exit", {"message": "N/A"}),
        ("go_backward()", "go_backward", {}),
        ("go_forward()", "go_forward", {}),
        ("click('a51')", "click", {"bid": "a51"}),
        ("fill('b3', 'two, (three)')", "fill", {"bid": "b3", "value": "two, (three)"}),
        ("fill('b3', '')", "fill", {"bid": "b3", "value": ""}),
        ("select_option('c', ['x', 'y'])", "select_option", {"bid": "c", "options": ["x", "y"]}),
        ("send_msg_to_user('42')", "send_msg_to_user", {"text": "42"}),
        ("report_infeasible('no such page')", "report_infeasible", {"reason": "no such page"}),
        ("<execute>print(1)</execute>", "execute", {"code": "print(1)"}),
        ("<execute>\nprint(1)\n", "execute", {"code": "print(1)"}),
        ("<solution> 42 </solution>", "solution", {"answer": "42"}),
        (
            "```python\nimport os\nexit(0)\n```",
            "execute",
            {"code": "import os\nexit(0)", "language": "python"},
        ),
        ('<tool_call>{"name": "Send", "arguments": {"to": "a"}}</tool_call>', "send", {"to": "a"}),
        ('<tool_call>\n{"name": "send", "arguments": {}}', "send", {}),
        ('Sure:\n```json\n{"name": "send", "parameters": {"n": 1}}\n```', "send", {"n": 1}),
        ('{"tool_calls": [{"function": {"name": "f", "arguments": "{\\"a\\": 1}"}}]}', "f", {"a": 1}),
    ],
)
def test_every_family(text, name, args):
    assert one(text) == (name, args)


def test_call_in_a_string_is_text():
    assert one('exit(message="how do(es) this work? do(Click, x)")')[1]["message"].startswith("how do(es)")
    assert parse_actions('The page says "exit(1)" and nothing else.').status == "no_action"
    assert parse_actions("How do(es) one do this? Please fill(in) the form.").status == "no_action"


def test_prose_after_and_before_the_call():
    parsed = parse_actions('I will open it: do(action="Click", element="7") and then wait.')
    assert parsed.status == "ok"
    assert parsed.prose == "I will open it:\nand then wait."


def test_two_calls():
    parsed = parse_actions("do(Click, inbox) do(Click, sent)")
    assert parsed.status == "multiple"
    assert [call.args["element"] for call in parsed.calls] == ["inbox", "sent"]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ('He said "hi" to me', 'He said "hi" to me'),
        ("one\ntwo\n# three", "one\ntwo\n# three"),
        (r"a \"b\" c", 'a "b" c'),
        ("it's do(Click, x) (really", "it's do(Click, x) (really"),
        ("<execute>rm</execute>", "<execute>rm</execute>"),
        ("```python", "```python"),
    ],
)
def test_quotes_and_newlines_in_typed_text(typed, expected):
    name, args = one(f'do(action="Type", argument="{typed}", element="5")')
    assert (name, args) == ("do", {"action": "Type", "argument": expected, "element": "5"})


def test_comments_stand_apart_from_prose():
    parsed = parse_actions("# Element: inbox\n# Note: do(Click, spam)\ndo(Click, inbox) # done\nThanks.")
    assert parsed.comments == ("Element: inbox", "Note: do(Click, spam)", "done")
    assert parsed.status == "ok"
    assert parsed.prose == "Thanks."


def test_code_fence_is_stripped_from_a_web_action():
    assert one('```\ndo(action="Click", element="7")\n```')[0] == "do"
    assert one("```python\n# Element: inbox\ndo(Click, inbox)\n```")[0] == "do"


def test_thought_is_prose_and_code_is_not_searched():
    parsed = parse_actions("<thought>Look first.</thought>\n<execute>print('do(Click, x)')")
    assert parsed.prose == "Look first."
    assert [call.name for call in parsed.calls] == ["execute"]


@pytest.mark.parametrize(
    "text",
    [
        'do(action="Click", element="',
        "do()",
        "do(action='Click', colour='red')",
        'do(action=__import__("os").system("true"), element=1)',
        "do(action='Click', element=f'{1}')",
        "click()",
        "<execute></execute>",
        '<tool_call>{"name": </tool_call>',
    ],
)
def test_malformed(text):
    parsed = parse_actions(text)
    assert (parsed.status, parsed.calls) == ("malformed", ())


@pytest.mark.parametrize(
    "text", ["", "   \n", "I cannot help.", "# a comment", "{}", "[]", '```json\n{"name": "x"}\n```']
)
def test_no_action(text):
    assert parse_actions(text).status == "no_action"


def test_nothing_is_evaluated(tmp_path):
    target = tmp_path / "made"
    parse_actions(f"do(action=open({str(target)!r}, 'w'), element=1)")
    parse_actions(f"<execute>open({str(target)!r}, 'w')</execute>")
    assert not target.exists()


def test_never_raises_and_spans_never_overlap():
    pieces = [
        "do(",
        "exit(",
        ")",
        '"',
        "'",
        "\\",
        "\n",
        "#",
        "```",
        "<execute>",
        "</execute>",
        "{",
        "[",
        "=",
        ",",
        "Click",
    ]
    rng = random.Random(0)
    for _ in range(2000):
        parsed = parse_actions("".join(rng.choices(pieces, k=12)))
        spans = [(call.start, call.end) for call in parsed.calls]
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
