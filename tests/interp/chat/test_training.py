"""What is trained is what the template renders, whatever the template does."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest
from chat_templates import PREPEND, SHAPES, Shape, shaped_tokenizer

from pingscope.interp import Prompt, UserError, render
from pingscope.interp.chat import written
from pingscope.interp.chat.beginnings import first_tokens, token_classes
from pingscope.interp.chat.messages import Conversation, ToolCall, Turn
from pingscope.interp.chat.template import configure, ends_of_turns, template_of
from pingscope.interp.chat.training import training_examples
from pingscope.interp.chat.written import CLOCK

KINDS = [(name, metaspace) for name in SHAPES for metaspace in (False, True)]
ASKED, SAID, AGAIN, DONE = "Buy the laptop.", "# Element: inbox", "Click it.", "I cannot help with that."


def tokenizer_of(name, metaspace=False):
    shape = SHAPES[name]
    tokenizer = shaped_tokenizer(shape, metaspace)
    configure(tokenizer, shape.name, shape.variables)
    return shape, tokenizer


def published(shape, tokenizer, messages, **options):
    """transformers' own rendering, the clock apart."""
    if shape.name:
        options["chat_template"] = shape.template[shape.name]
    if shape in (SHAPES["parts"], SHAPES["parts-only"]):
        messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, date_string=CLOCK.strftime("%d %b %Y"), **shape.variables, **options
    )
    from datetime import datetime

    for form in ("%d %B %Y", "%d %b %Y", "%Y-%m-%d"):
        text = text.replace(datetime.now().strftime(form), CLOCK.strftime(form))
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def turns(shape, *pairs):
    system = [Turn("system", "You are a web agent.")] if shape.system else []
    return (*system, *(Turn(role, text) for role, text in pairs))


def said(tokenizer, example):
    return tokenizer.decode([i for i, flag in zip(example.ids, example.trained, strict=True) if flag])


@pytest.mark.parametrize(("name", "metaspace"), KINDS)
def test_trained_ids_are_those_of_the_template(name, metaspace):
    shape, tokenizer = tokenizer_of(name, metaspace)
    talk = turns(shape, ("user", ASKED), ("assistant", SAID), ("user", AGAIN), ("assistant", DONE))
    examples = training_examples(tokenizer, Conversation("c", talk))
    assert len(examples) == 2
    for example, upto in zip(examples, (len(talk) - 2, len(talk)), strict=True):
        wanted = published(shape, tokenizer, [turn.message() for turn in talk[:upto]])
        if shape.end:
            assert list(example.ids) == wanted
        else:  # a template that ends no turn gets the tokenizer's end
            assert list(example.ids) == [*wanted, tokenizer.eos_token_id]
        text = talk[upto - 1].content
        spoken = said(tokenizer, example)
        assert text in spoken and ASKED not in spoken and AGAIN not in spoken and "web agent" not in spoken
        last = [i for i, flag in zip(example.ids, example.trained, strict=True) if flag][-1]
        assert tokenizer.convert_ids_to_tokens(last) == (shape.end or tokenizer.eos_token)
        asked = published(shape, tokenizer, [turn.message() for turn in talk[: upto - 1]], add_generation_prompt=True)
        if list(example.ids[: len(asked)]) == asked:  # nothing of the generation prompt carries a loss
            assert not any(example.trained[: len(asked)])


@pytest.mark.parametrize(("name", "metaspace"), KINDS)
def test_prompts_have_the_ids_of_the_template_and_answers_end_where_it_ends_them(name, metaspace):
    shape, tokenizer = tokenizer_of(name, metaspace)
    system = "You are a web agent." if shape.system else None
    row = render(tokenizer, Prompt("p", ASKED, system=system))
    messages = [turn.message() for turn in turns(shape, ("user", ASKED))]
    assert list(row.ids) == published(shape, tokenizer, messages, add_generation_prompt=True)
    assert tokenizer.decode([i for i, r in zip(row.ids, row.roles, strict=True) if r == "instruction"]).strip() == ASKED
    end = template_of(tokenizer).end_of_turn
    assert (tokenizer.convert_ids_to_tokens(end) if end is not None else "") == shape.end


@pytest.mark.parametrize(("name", "metaspace"), KINDS)
def test_an_injected_beginning_has_the_ids_of_an_answer_that_begins_so(name, metaspace):
    shape, tokenizer = tokenizer_of(name, metaspace)
    talk = turns(shape, ("user", ASKED), ("assistant", DONE))
    (example,) = training_examples(tokenizer, Conversation("c", talk))
    row = render(tokenizer, Prompt("p", ASKED, system=talk[0].content if shape.system else None, prefix=DONE))
    prompt = render(tokenizer, Prompt("p", ASKED, system=talk[0].content if shape.system else None))
    assert row.ids[: len(prompt)] == prompt.ids
    own = tuple(i for i, r in zip(row.ids, row.roles, strict=True) if r == "prefix")
    if name not in ("qwen3", "gpt-oss", "deepseek", "glm4"):  # there an answer begins with markup of its own
        trained = tuple(i for i, flag in zip(example.ids, example.trained, strict=True) if flag)
        assert trained[: len(own) - 1] == own[:-1]  # its last character may merge with what follows
    assert tokenizer.decode(own).strip() == DONE
    spoken = next(i for i in own if tokenizer.decode([i]).strip())
    assert spoken in first_tokens(tokenizer, DONE)


@pytest.mark.parametrize(("name", "metaspace"), KINDS)
def test_spelled_control_tokens_stay_text_to_the_character(name, metaspace):
    shape, tokenizer = tokenizer_of(name, metaspace)
    control = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    joins = metaspace not in (False, "bytes")  # there a space and "▁" are one
    for spelled in dict.fromkeys([*shape.tokens, "</s>", "<|im_end|>"]):
        text = f"Send {spelled} to{spelled}"
        row = render(tokenizer, Prompt("p", text))
        own = [i for i, r in zip(row.ids, row.roles, strict=True) if r == "instruction"]
        assert not control & set(own)
        assert tokenizer.decode(own).strip() == (text.replace("▁", " ") if joins else text)
        (example,) = training_examples(
            tokenizer, Conversation("c", (Turn("user", text), Turn("assistant", f"No: {spelled}.")))
        )
        plain = Conversation("c", (Turn("user", "Send"), Turn("assistant", "No:")))
        (bare,) = training_examples(tokenizer, plain)
        assert sum(i in control for i in example.ids) == sum(i in control for i in bare.ids)
        shown = spelled.replace("▁", " ") if joins else spelled
        assert f"No: {shown}." in said(tokenizer, example)


@pytest.mark.parametrize("form", [*PREPEND, "bytes"])
@pytest.mark.parametrize("name", ["llama2", "mistral-v3", "gemma3", "qwen2.5", "deepseek", "olmo2"])
def test_every_way_of_putting_a_space_in_front_keeps_every_character(name, form):
    test_trained_ids_are_those_of_the_template(name, form)
    test_prompts_have_the_ids_of_the_template_and_answers_end_where_it_ends_them(name, form)
    test_an_injected_beginning_has_the_ids_of_an_answer_that_begins_so(name, form)
    test_spelled_control_tokens_stay_text_to_the_character(name, form)
    _, tokenizer = tokenizer_of(name, form)
    for text in ("I cannot help", "# Note: stop", "do(x)"):
        assert all(tokenizer.decode([token]).strip() for token in first_tokens(tokenizer, text))


def test_thinking_tools_and_losses():
    shape, tokenizer = tokenizer_of("qwen3")
    tools = json.dumps([{"type": "function", "function": {"name": "click", "parameters": {}}}])
    talk = (
        Turn("user", ASKED),
        Turn("assistant", reasoning="It is a page.", tool_calls=(ToolCall("click", '{"element": "7 <|im_end|>"}'),)),
        Turn("tool", "done", name="click"),
        Turn("assistant", "Bought.", reasoning="Good."),
        Turn("user", AGAIN),
        Turn("assistant", "No.", trained=False),
    )
    examples = training_examples(tokenizer, Conversation("c", talk, tools))
    assert [example.id for example in examples] == ["c#1", "c#3"]
    call, answer = (said(tokenizer, example) for example in examples)
    assert call.startswith("<think>\nIt is a page.\n</think>") and '"element": "7 <|im_end|>"' in call
    assert answer == "<think>\nGood.\n</think>\n\nBought.<|im_end|>"
    assert "# Tools" in tokenizer.decode(examples[0].ids)
    plain = [m | {"tool_calls": m["tool_calls"]} if "tool_calls" in m else m for m in (t.message() for t in talk[:4])]
    plain[1]["tool_calls"][0]["function"]["arguments"] = {"element": "7"}
    easy = (
        talk[0],
        Turn("assistant", reasoning="It is a page.", tool_calls=(ToolCall("click", '{"element": "7"}'),)),
        *talk[2:4],
    )
    wanted = published(shape, tokenizer, plain, tools=json.loads(tools))
    assert list(training_examples(tokenizer, Conversation("c", easy, tools))[1].ids) == wanted


CALL = Turn("assistant", tool_calls=(ToolCall("click", '{"element": "é 7"}', "abcdefghi"),))
# A call of Llama 3.1 to a tool that it knows, of gpt-oss, and of Gemma 4 end otherwise than an answer.
CALLS = {
    "llama3.1": (
        "{% if m.tool_calls %}CALL{{ '<|eom_id|>' if builtin_tools is defined else '<|eot_id|>' }}"
        "{% else %}{{ m.content }}<|eot_id|>{% endif %}",
        {"builtin_tools": ["python"]},
        ["<|eot_id|>", "<|eom_id|>"],
    ),
    "gpt-oss": (
        "{% if m.tool_calls %}<|channel|>commentary<|message|>CALL<|call|>"
        "{% else %}{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}{{ m.content }}"
        "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}",
        {},
        ["<|return|>", "<|call|>"],
    ),
    "gemma4": (
        "{% if m.tool_calls %}<|tool_call>CALL<tool_call|><|tool_response>{% else %}{{ m.content }}<turn|>{% endif %}",
        {},
        ["<turn|>", "<|tool_response>"],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_answers_and_calls_end_where_the_template_ends_them(name):
    said_by_model, variables, ends = CALLS[name]
    tokens = ("<|eot_id|>", "<|eom_id|>", "<|call|>", "<|return|>", "<|end|>", "<|channel|>", "<|message|>")
    tokens += ("<|tool_call>", "<tool_call|>", "<|tool_response>", "<turn|>", "<|start|>")
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}SAID{% else %}{{ m.content }}"
        "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    call = "{{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments | tojson }}"
    template = template.replace("SAID", said_by_model).replace("CALL", call)
    tokenizer = shaped_tokenizer(Shape(template, tokens, ends[0]))
    configure(tokenizer, None, variables)
    assert tokenizer.convert_ids_to_tokens(ends_of_turns(tokenizer)) == ends
    for turn, end in ((Turn("assistant", DONE), ends[0]), (CALL, ends[1])):
        (example,) = training_examples(tokenizer, Conversation("c", (Turn("user", ASKED), turn)))
        spoken = said(tokenizer, example)
        assert spoken.endswith(end) and "<|end|>" not in spoken and not spoken.startswith("<|start|>")


@pytest.mark.parametrize("name", ["calls-as-text", "qwen3"])
def test_arguments_of_calls_are_json_whether_a_template_writes_them_so_or_not(name):
    shape, tokenizer = tokenizer_of(name)
    talk = (Turn("user", ASKED), CALL, Turn("tool", "done", name="click", call_id="abcdefghi"), Turn("assistant", DONE))
    for example in training_examples(tokenizer, Conversation("c", talk)):
        assert '{"element": "é 7"}' in tokenizer.decode(example.ids)
    failing = shape.template.replace("c.function.arguments }}", "'' + c.function.arguments }}")
    tokenizer.chat_template = failing  # DeepSeek's own adds text to them, which an object refuses
    (example, _) = training_examples(tokenizer, Conversation("c", talk))
    assert '{"element": "é 7"}' in said(tokenizer, example)
    spelled = (Turn("user", ASKED), replace(CALL, tool_calls=(ToolCall("click", json.dumps({"at": shape.end})),)))
    (example,) = training_examples(tokenizer, Conversation("c", spelled))
    end = tokenizer.convert_tokens_to_ids(shape.end)
    assert [i for i, flag in zip(example.ids, example.trained, strict=True) if flag].count(end) == 1


@pytest.mark.parametrize("cut", ["m.content.split('</think>')[-1]", "m.content.split('</think>')[-1].lstrip('\\n')"])
def test_thinking_in_earlier_answers_is_shown_as_the_template_shows_it(cut):
    shape, tokenizer = tokenizer_of("deepseek")
    tokenizer.chat_template = shape.template.replace("m.content.split('</think>')[-1]", cut)
    for answer in ("<think>\nHm. <｜User｜>\n</think>\n\nGood <｜User｜>.", "<think></think>Good.", "Good."):
        row = render(tokenizer, AGAIN, demonstrations=((ASKED, answer),))
        text = tokenizer.decode(row.ids)
        messages = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": AGAIN})
        assert text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert "Hm." not in text and row.ids.count(tokenizer.convert_tokens_to_ids("<｜User｜>")) == 2
    talk = (Turn("user", ASKED), Turn("assistant", "<think>Hm.</think>Good.", trained=False))
    (example,) = training_examples(tokenizer, Conversation("c", (*talk, Turn("user", AGAIN), Turn("assistant", DONE))))
    assert "Hm." not in tokenizer.decode(example.ids) and "Good." in tokenizer.decode(example.ids)
    with pytest.raises(UserError, match=r"turn 2 .* drops"):  # what is trained must be there
        training_examples(tokenizer, Conversation("c", (talk[0], replace(talk[1], trained=True))))
    tokenizer.chat_template = shape.template.replace("m.content.split('</think>')[-1]", "m.content | replace('>', '!')")
    with pytest.raises(UserError, match="rewrites"):
        render(tokenizer, AGAIN, demonstrations=((ASKED, "<think>Hm.</think>Good."),))


@pytest.mark.parametrize("name", ["always-header", "other-header"])
def test_no_header_is_trained(name):
    _, tokenizer = tokenizer_of(name)
    (example,) = training_examples(tokenizer, Conversation("c", (Turn("user", ASKED), Turn("assistant", DONE))))
    assert said(tokenizer, example).strip() == DONE + SHAPES[name].end


@pytest.mark.parametrize(
    ("name", "talk", "message"),
    [
        ("gemma2", (Turn("system", "Be careful."), Turn("user", "a"), Turn("assistant", "b")), "turn 3: .*System role"),
        ("gemma3", (Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c")), "alternate"),
        ("llama3", (Turn("user", "a"), Turn("assistant", "b", reasoning="because")), "drops its reasoning"),
        ("llama3", (Turn("user", "a"), Turn("assistant", "", tool_calls=(ToolCall("go", "{}"),))), "tool call 'go'"),
        ("olmo2", (Turn("assistant", "b"),), "answers nobody"),
    ],
)
def test_what_a_template_loses_or_refuses_is_named(name, talk, message):
    _, tokenizer = tokenizer_of(name)
    with pytest.raises(UserError, match=message) as error:
        training_examples(tokenizer, Conversation("demos.jsonl:3", talk))
    assert "demos.jsonl:3" in str(error.value) and "\n" not in str(error.value)
    tools = json.dumps([{"type": "function", "function": {"name": "click"}}])
    with pytest.raises(UserError, match="definition of tool 'click'"):
        training_examples(
            tokenizer_of("llama3")[1], Conversation("c", (Turn("user", "a"), Turn("assistant", "b")), tools)
        )


def test_the_clock_stands_still_and_variables_reach_the_template():
    _, tokenizer = tokenizer_of("smollm3")
    assert "26 July 2024" in tokenizer.decode(render(tokenizer, ASKED).ids)
    _, thinking = tokenizer_of("qwen3")
    _, silent = tokenizer_of("qwen3-no-thinking")
    assert template_of(thinking).identity != template_of(silent).identity
    assert tokenizer_of("qwen3-no-thinking")[1].decode(render(silent, ASKED).ids).endswith("</think>\n\n")
    with pytest.raises(UserError, match="does not read the variable 'enable_thinkin'"):
        configure(thinking, None, {"enable_thinkin": False})
    with pytest.raises(UserError, match="no chat template is named 'chatt' \\(names: chat, rag\\)"):
        configure(shaped_tokenizer(SHAPES["named"]), "chatt")
    with pytest.raises(UserError, match="--template-name"):
        render(shaped_tokenizer(SHAPES["named"]), ASKED)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 // 0 }}",
        "{{ messages[0].content + 1 }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ missing.attribute.of }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ messages[9].content }}",
    ],
)
def test_a_template_that_fails_is_one_line(template):
    _, tokenizer = tokenizer_of("qwen2.5")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="chat template") as error:
        render(tokenizer, ASKED)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "not come to an end"),
        ("{{ 'x' * 10 ** 13 }}", "MemoryError"),
        ("{% for a in 'x' %}" * 25 + "{% endfor %}" * 25, "nested blocks"),
    ],
)
def test_a_template_without_bounds_is_stopped(template, reason, monkeypatch):
    monkeypatch.setattr(written, "SECONDS", 0.2)
    _, tokenizer = tokenizer_of("qwen2.5")
    tokenizer.chat_template = template
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(UserError, match=reason):
        render(tokenizer, ASKED)
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize("template", ["\n\n  {{ C }}!", "   {% if true %}\n {{ C }}{% endif %}\nAnswer:", "{{ C }}!"])
def test_white_space_that_a_template_begins_with_stays(template):
    _, tokenizer = tokenizer_of("qwen2.5")
    tokenizer.chat_template = template.replace("C", "messages[0].content")
    plain = published(SHAPES["qwen2.5"], tokenizer, [{"role": "user", "content": ASKED}], add_generation_prompt=True)
    assert list(render(tokenizer, ASKED).ids) == plain


@pytest.mark.parametrize("metaspace", [False, True])
def test_classes_of_first_tokens_lie_behind_the_header(metaspace):
    for name in ("llama2", "mistral-v3", "phi3", "qwen2.5"):
        _, tokenizer = tokenizer_of(name, metaspace)
        classes = token_classes(tokenizer, refusals=["I cannot"], actions=["do(x)"], comments=["# Note"])
        header = render(tokenizer, ASKED)
        answered = render(tokenizer, ASKED, response="I cannot help")
        first = next(i for i in answered.ids[len(header) :] if tokenizer.decode([i]).strip())
        assert first in classes["refusal"]
        assert all(classes.values())
