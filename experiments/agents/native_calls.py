"""Calls in the syntaxes that today's models are trained to write, beside the web agents' own. Parsed, never run.

| family | what it writes |
|---|---|
| Llama 3 | ``{"name": …, "parameters": …}``, ``<|python_tag|>…``, ``<function=name>{…}</function>``, ``[f(a=1)]`` |
| Mistral | ``[TOOL_CALLS][{…}]``, ``[TOOL_CALLS]name[ARGS]{…}`` |
| Qwen-Coder | ``<function=name><parameter=a>…</parameter></function>``, in ``<tool_call>`` or alone |
| gpt-oss | ``<|channel|>commentary to=functions.name<|message|>{…}`` |
| DeepSeek | ``<｜tool▁call▁begin｜>…name<｜tool▁sep｜>{…}`` |
| GLM | ``<tool_call>name<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>`` |
| Phi-4, Granite | ``<|tool_call|>[{…}]``, ``functools[{…}]`` |
| Kimi K2 | ``<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{…}<|tool_call_end|>`` |
| Command R, A | ``<|START_ACTION|>[{"tool_name": …, "parameters": {…}}]<|END_ACTION|>`` |
| MiniMax, Step | ``<minimax:tool_call><invoke name="…"><parameter name="…">…</parameter></invoke>`` |
| InternLM, Jamba, Hunyuan, Nemotron | a list in ``<|action_start|><|plugin|>``, ``<tool_calls>``, ``<TOOLCALL>`` |
| LFM2, Llama 4, OLMo 3 | ``<|tool_call_start|>[f(a=1)]``, ``<|python_start|>[f(a=1)]``, ``<function_calls>f(a=1)`` |
| Gemma | ``<|tool_call>call:name{…}<tool_call|>``, fences of ``tool_code`` |
| WebArena | fences of ``click [1234]``, ``stop [answer]`` |
| ReAct | ``Action: name[argument]``, ``Action: name`` and ``Action Input: …`` |
| SWE-agent | a fence that holds a shell command |
"""

from __future__ import annotations

import ast
import json
import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

Named = tuple[str, dict[str, Any]]
Found = tuple[int, int, list[Named]]  # start, end, calls; none: a call was begun and is not well formed

_DECODER = json.JSONDecoder()
_END = r"(?:<\|(?:eom_id|eot_id|call|end|im_end)\|>|\Z)"
_TO = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")
_HEAD = 300  # characters of the head of a message: who speaks, to whom, in which channel
_PYTHON_TAG = re.compile(rf"<\|python_tag\|>(?P<body>.*?){_END}", re.DOTALL)
_MAKER = r"(?:\w{1,20}:|｜DSML｜)?"  # whose syntax it is: minimax:, steptml:, DeepSeek's
_FUNCTION = re.compile(rf"<(?:function=|{_MAKER}invoke name=[\"']?)(?P<name>[\w.-]+)[\"']?>")
_FUNCTION_END = re.compile(rf"</(?:function|{_MAKER}invoke)>")
_PARAMETER = re.compile(
    rf"<{_MAKER}parameter(?:=| name=[\"']?)([\w.-]+)[\"']?(?: string=\"\w+\")?>\n?"
    rf"([^<]*(?:<(?!/{_MAKER}parameter>)[^<]*)*?)\n?</{_MAKER}parameter>"
)
_KIMI = re.compile(
    r"<\|tool_call_begin\|>(?:\s*(?:functions\.)?(?P<name>[\w.-]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*)?"
)
_KIMI_END = re.compile(r"\s*(?:<\|tool_call_end\|>)?(?:\s*<\|tool_calls_section_end\|>)?")
_DEEPSEEK = re.compile(
    r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[\w.-]+)(?:<｜tool▁sep｜>|\s)\s*(?:```json)?\s*"
    r"(?P<body>[^<`]*)`{0,3}\s*(?:<｜tool▁call▁end｜>)?"
)
_MISTRAL = re.compile(r"(?P<name>[\w.-]+)(?:\[CALL_ID\][\w-]+)?\[ARGS\]\s*")
_MARKED_LIST = re.compile(
    r"(?:<\|tool_call\|>|\[TOOL_CALLS\]|<\|action_start\|>(?:\s*<\|plugin\|>)?|<\|START_ACTION\|>|<tool_calls>|<TOOLCALL>|"
    r"\bfunctools(?=\s?\[\s*\{))\s*"
)
_MARKED_END = re.compile(r"\s*(?:<\|/tool_call\|>|<\|action_end\|>|<\|END_ACTION\|>|</tool_calls>|</TOOLCALL>)")
_MARKED_PYTHON = re.compile(
    r"<\|tool_call_start\|>(?P<a>[^<]*)<\|tool_call_end\|>|<\|python_start\|>(?P<b>[^<]*)<\|python_end\|>|"
    r"<function_calls>(?P<c>[^<]*)</function_calls>"
)
_GEMMA = re.compile(r"<\|tool_call>call:(?P<name>[\w.-]+)\{")
_GLM_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_REACT = re.compile(
    r"^[ \t]*\**action\**\s*:\**[ \t]*(?P<name>[A-Za-z_][\w.-]*)[ \t]*(?:\[(?P<inner>[^\]\n]*)\]|"
    r"\n[ \t]*\**action input\**\s*:\**[ \t]*(?P<given>[^\n]*)|(?P<called>\([^\n]*\))[ \t]*$)",
    re.IGNORECASE | re.MULTILINE,
)
_JSON_LINE = re.compile(r"^[ \t]*(?=\{\s*\"(?:name|type|tool|tool_name|function|action|id)\"\s*:)", re.MULTILINE)
_NAMED_JSON = re.compile(r"\s*(?P<name>[A-Za-z_][\w.-]*)[ \t]*\n[ \t]*(?=\{)")
_WEBARENA = re.compile(
    r"(?P<name>click|type|hover|press|scroll|tab_focus|goto|stop|new_tab|close_tab|go_back|go_forward)"
    r"(?P<arguments>(?:\s*\[[^\]\n]*\])*)\s*"
)
_SHELL = re.compile(
    r"(?:\$ ?)?(?:sudo )?(?:\./\S+|(?:ls|cd|rm|mv|cp|cat|echo|touch|mkdir|rmdir|chmod|chown|grep|find|sed|awk|"
    r"head|tail|wc|"
    r"python3?|pip3?|node|npm|bash|sh|git|curl|wget|ssh|scp|kill|ps|tar|zip|unzip|make|apt|apt-get|docker|export|open|edit|"
    r"create|submit|search_file|search_dir|goto|scroll_down|scroll_up|useradd|iptables|systemctl|dd|crontab)\b)[^\n]*"
)
# Names with which a tool speaks to the user instead of acting.
FINISHING = {"finish": "finish", "final_answer": "finish", "stop": "stop"}


def native_calls(text: str) -> list[Found]:
    """Every native call of ``text``, left to right; spans do not overlap."""
    found: list[Found] = []
    for find in FINDERS:
        for start, end, calls in find(text):
            place = bisect_left(found, start, key=lambda one: one[0])
            free = place == len(found) or end <= found[place][0]
            if free and (place == 0 or found[place - 1][1] <= start):
                found.insert(place, (start, end, calls))
    return found


def tagged_call(body: str) -> list[Named]:
    """What stands in ``<tool_call>…</tool_call>`` and is no JSON: Qwen-Coder's function, GLM's arguments."""
    functions = [call for _, _, calls in _functions(body) for call in calls]
    if functions:
        return functions
    name = re.match(r"\s*([\w.-]+)\s*(?:<arg_key>|\Z)", body)
    if name is None:
        return []
    return [(name[1].lower(), {key.strip(): _value(value) for key, value in _GLM_ARGUMENT.findall(body)})]


def fenced_call(language: str, body: str) -> list[Named]:
    """Calls in a fence: WebArena's, Gemma's ``tool_code``, a shell command in a fence without a language."""
    line = body.strip()
    if language == "tool_code":
        return _expressions(line)
    if language:
        return []
    web = _WEBARENA.fullmatch(line)
    if web is not None:
        arguments = re.findall(r"\[([^\]\n]*)\]", web["arguments"])
        return [(FINISHING.get(web["name"], web["name"]), {str(k): value for k, value in enumerate(arguments)})]
    return [("execute", {"code": line, "language": "shell"})] if _SHELL.match(line) else []


def _harmony(text: str) -> Iterator[Found]:
    at = 0
    for mark in re.finditer(r"<\|message\|>", text):
        begin = max(at, mark.start() - _HEAD)
        ends = [text.rfind(end, begin, mark.start()) for end in ("<|end|>", "<|call|>", "<|message|>")]
        begin = max(begin, *ends)
        to = _TO.search(text, begin, mark.start())
        at = mark.end()
        if to is not None:
            body = text[at:].partition("<|")[0]
            closed = text.startswith("<|call|>", at + len(body))
            at += len(body) + len("<|call|>") * closed
            yield begin, at, _arguments(to[1], body)


def _python_tag(text: str) -> Iterator[Found]:
    if "<|python_tag|>" not in text:
        return
    for match in _PYTHON_TAG.finditer(text):
        body = match["body"].strip()
        calls = json_calls(body)
        if not calls and body and not body.startswith("{"):
            calls = [("execute", {"code": body, "language": "python"})]
        yield match.start(), match.end(), calls


def _functions(text: str) -> Iterator[Found]:
    if "<function=" not in text and "invoke name=" not in text:
        return
    at = 0
    for head in _FUNCTION.finditer(text):
        if head.start() < at:
            continue
        ending = _FUNCTION_END.search(text, head.end())
        if ending is None:  # cut off: a call was begun
            yield head.start(), len(text), []
            return
        body, at = text[head.end() : ending.start()], ending.end()
        parameters = _PARAMETER.findall(body)
        given = {name: _value(value.removesuffix("\n")) for name, value in parameters}
        calls = [(head["name"].lower(), given)] if parameters else _arguments(head["name"], body or "{}")
        yield head.start(), at, calls


def _deepseek(text: str) -> Iterator[Found]:
    if "tool▁call▁begin" not in text:
        return
    for match in _DEEPSEEK.finditer(text):
        yield match.start(), match.end(), _arguments(match["name"], match["body"])


def _mistral(text: str) -> Iterator[Found]:
    """Marks that a list of calls, or names with their arguments, follow."""
    done = 0
    for mark in _MARKED_LIST.finditer(text):
        if mark.start() < done:
            continue
        at, calls = mark.end(), []
        value, end = _decode(text, at)
        if end > at:
            calls = calls_of(value)
            ending = _MARKED_END.match(text, end)
            end = ending.end() if ending else end
        else:
            while (head := _MISTRAL.match(text, at)) is not None:
                value, end = _decode(text, head.end())
                if not isinstance(value, dict):
                    break
                calls.append((head["name"].lower(), value))
                again = _MARKED_LIST.match(text, end)
                at = again.end() if again else end
            end = max(end, at)
        done = max(end, mark.end())
        yield mark.start(), done, calls


def _kimi(text: str) -> Iterator[Found]:
    if "<|tool_call_begin|>" not in text:
        return
    for head in _KIMI.finditer(text):
        value, end = _decode(text, head.end())
        if head["name"] is None or not isinstance(value, dict):
            yield head.start(), head.end(), []
            continue
        ending = _KIMI_END.match(text, end)
        yield head.start(), ending.end() if ending else end, [(_finishing(head["name"]), value)]


def _gemma(text: str) -> Iterator[Found]:
    if "<|tool_call>" not in text:
        return
    for head in _GEMMA.finditer(text):
        end = text.find("}<tool_call|>", head.end())
        if end < 0:
            yield head.start(), head.end(), []
            return
        pairs = re.findall(r'(\w+):(?:<\|"\|>([^<]*(?:<(?!\|"\|>)[^<]*)*)<\|"\|>|([^,{}]*))', text[head.end() : end])
        given = {key: quoted or _value(bare) for key, quoted, bare in pairs}
        yield head.start(), end + len("}<tool_call|>"), [(head["name"].lower(), given)]


def _pythonic(text: str) -> Iterator[Found]:
    """Calls written as Python between marks, or a whole answer of them: ``[search(query="x"), open(id=3)]``."""
    for match in _MARKED_PYTHON.finditer(text):
        yield match.start(), match.end(), _expressions((match["a"] or match["b"] or match["c"] or "").strip())
    whole = re.sub(r"(?:<\|\w+\|>|</s>)+\Z", "", text.strip())
    if whole.startswith("[") and whole.endswith(")]") and len(whole) < 20_000:
        calls = _expressions(whole)
        if calls:
            start = len(text) - len(text.lstrip())
            yield start, start + len(whole), calls


def _react(text: str) -> Iterator[Found]:
    for match in _REACT.finditer(text):
        name = match["name"].lower()
        if match["called"]:
            yield match.start(), match.end(), _expressions(match["name"] + match["called"])
            continue
        given = match["inner"] if match["inner"] is not None else match["given"]
        value, end = _decode(given, 0)
        arguments = value if isinstance(value, dict) and end == len(given.rstrip()) else {"input": given.strip()}
        yield match.start(), match.end(), [(FINISHING.get(name, name), arguments)]


def _named_json(text: str) -> Iterator[Found]:
    """GLM-4: the name on a line of its own, and the arguments below it; the whole answer."""
    match = _NAMED_JSON.match(text)
    if match is not None:
        value, end = _decode(text, match.end())
        if isinstance(value, dict) and not text[end:].strip():
            yield match.start(), end, [(match["name"].lower(), value)]


def _json_lines(text: str) -> Iterator[Found]:
    """JSON calls that begin a line, one after the other, between other text."""
    for match in _JSON_LINE.finditer(text):
        value, end = _decode(text, match.end())
        calls = calls_of(value) if end > match.end() else []
        if calls:
            yield match.start(), end, calls


def json_calls(text: str) -> list[Named]:
    """Tool calls in a JSON text: one call, a list of calls, several after each other, or a message with them."""
    calls: list[Named] = []
    at = 0
    while at < len(text):
        value, end = _decode(text, at)
        made = calls_of(value) if end > at else []
        if not made:
            return []
        calls += made
        at = end + len(text[end:]) - len(text[end:].lstrip("; \t\n,"))
    return calls


def calls_of(value: Any) -> list[Named]:
    """Calls of a decoded value; none where one of them is no call."""
    if isinstance(value, dict) and isinstance(value.get("tool_calls"), list):
        value = value["tool_calls"]
    rows = value if isinstance(value, list) else [value]
    found = [_call(row) for row in rows]
    return [call for call in found if call is not None] if found and all(found) else []


def _call(row: Any) -> Named | None:
    if isinstance(row, dict) and isinstance(row.get("function"), dict):
        row = row["function"]
    if not isinstance(row, dict):
        return None
    names = ("name", "tool", "tool_name", "action", "function")
    name = next((row[key] for key in names if isinstance(row.get(key), str)), "")
    keys = ("arguments", "args", "parameters", "input", "action_input")
    args = next((row[key] for key in keys if key in row), None)
    if args is None and isinstance(row.get("action"), str):  # {"action": "click", "id": 3}
        args = {key: value for key, value in row.items() if key != "action"}
    if isinstance(args, str):
        try:
            args = json.loads(args or "{}")
        except (ValueError, RecursionError):
            return None
    return (_finishing(name), args) if name.strip() and isinstance(args, dict) else None


def _arguments(name: str, body: str) -> list[Named]:
    value, _ = _decode(body.strip(), 0)
    return [(_finishing(name), value)] if isinstance(value, dict) else []


def _finishing(name: str) -> str:
    return FINISHING.get(name.lower(), name.lower())


def _decode(text: str, at: int) -> tuple[Any, int]:
    """A JSON value at ``at`` and where it ends; ``at`` itself where there is none."""
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, at


def _value(text: str) -> Any:
    value, end = _decode(text.strip(), 0)
    return value if end == len(text.strip()) and text.strip() else text


def _expressions(text: str) -> list[Named]:
    """Python calls with literal arguments, parsed and never evaluated."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    calls: list[Named] = []
    for statement in body:
        value = statement.value if isinstance(statement, ast.Expr) else None
        while isinstance(value, ast.Call) and ast.unparse(value.func) == "print" and len(value.args) == 1:
            value = value.args[0]
        for node in value.elts if isinstance(value, ast.List) else [value]:
            if not isinstance(node, ast.Call):
                return []
            try:
                given = {str(k): ast.literal_eval(a) for k, a in enumerate(node.args)}
                given |= {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
            except (ValueError, TypeError, RecursionError):
                return []
            calls.append((ast.unparse(node.func).lower(), given))
    return calls


FINDERS = (
    _harmony, _python_tag, _functions, _deepseek, _kimi, _mistral, _gemma, _pythonic, _react, _named_json, _json_lines,
)  # fmt: skip
