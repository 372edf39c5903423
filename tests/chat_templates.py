"""Chat templates in the shape of the published ones: the same markup, order, trimming and refusals, shortened.

``SHAPES[name]`` is the template, its control tokens, the token that ends a turn, and what it can say.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import transformers
from tiny_models import CORPUS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers


@dataclass(frozen=True)
class Shape:
    template: Any
    tokens: tuple[str, ...]
    end: str
    system: bool = True
    reasoning: bool = False
    tools: bool = False
    bos: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    name: str | None = None  # of the template, where there are several


_ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN3 = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}<think>\n"
    "{{ (m.reasoning_content or '') | trim }}\n</think>\n\n{% endif %}{{ m.content }}"
    '{% for c in m.tool_calls or [] %}\n<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if DATED %}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}<|eot_id|>{% endif %}"
    "{% for m in messages %}{% if not (DATED and loop.first and m.role == 'system') %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}SYSTEM{% endif %}{% for m in messages %}"
    + _ALTERNATE
    + "<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}{% set messages = messages[1:]"
    " %}{% endif %}{% for m in messages %}"
    + _ALTERNATE
    + "{% if m.role == 'user' %}OPEN{% if loop.first and sys is defined %}"
    "{{ sys }}\n\n{% endif %}{{ m.content }}CLOSE{% else %}SAID{{ eos_token }}{% endif %}{% endfor %}"
)


def _mistral(opens: str, closes: str, said: str) -> str:
    return _MISTRAL.replace("OPEN", opens).replace("CLOSE", closes).replace("SAID", said)


_LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_INST = ("[INST]", "[/INST]")
_IM = ("<|im_start|>", "<|im_end|>")
SHAPES: dict[str, Shape] = {
    "llama2": Shape(
        "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set sys = '' %}{% endif %}{% for m in messages %}"
        + _ALTERNATE
        + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (sys if loop.first else '') + m.content | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        "</s>",
        bos="<s>",
    ),
    "llama3.1": Shape(_LLAMA3.replace("DATED", "true"), _LLAMA_TOKENS, "<|eot_id|>", bos="<|begin_of_text|>"),
    "llama3": Shape(_LLAMA3.replace("DATED", "false"), _LLAMA_TOKENS, "<|eot_id|>", bos="<|begin_of_text|>"),
    "llama3.2": Shape(
        _LLAMA3.replace("DATED", "true").replace("not date_string is defined", "true"),
        _LLAMA_TOKENS,
        "<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "mistral-v1": Shape(_mistral("[INST] ", " [/INST]", " {{ m.content }}"), ("<s>", "</s>"), "</s>", bos="<s>"),
    "mistral-v3": Shape(
        _mistral("[INST] ", "[/INST]", " {{ m.content | trim }}"), ("<s>", "</s>", *_INST), "</s>", bos="<s>"
    ),
    "mistral-v7": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
        "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>", *_INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        "</s>",
        bos="<s>",
    ),
    "mistral-v11": Shape(
        "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}"
        "{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% elif m.role == 'user' %}[INST]"
        "{{ m.content }}[/INST]{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% else %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}"
        "{{ eos_token }}{% endif %}{% endfor %}",
        (
            "<s>",
            "</s>",
            *_INST,
            "[SYSTEM_PROMPT]",
            "[/SYSTEM_PROMPT]",
            "[TOOL_CALLS]",
            "[ARGS]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ),
        "</s>",
        tools=True,
        bos="<s>",
    ),
    "gemma2": Shape(
        _GEMMA.replace("SYSTEM", "{{ raise_exception('System role not supported') }}"),
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        system=False,
        bos="<bos>",
    ),
    "gemma3": Shape(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set messages = "
        "messages[1:] %}{% else %}{% set first = '' %}{% endif %}{% for m in messages %}"
        + _ALTERNATE
        + "<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first else '' }}{{ m.content | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        bos="<bos>",
    ),
    "gemma4": Shape(
        "{{ bos_token }}{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}",
        ("<bos>", "<eos>", "<|turn>", "<turn|>"),
        "<turn|>",
        bos="<bos>",
    ),
    "qwen2.5": Shape(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}" + _CHATML,
        (*_IM, "<|endoftext|>"),
        "<|im_end|>",
    ),
    "qwen3": Shape(_QWEN3, (*_IM, "<|endoftext|>"), "<|im_end|>", reasoning=True, tools=True),
    "qwen3-no-thinking": Shape(
        _QWEN3, (*_IM, "<|endoftext|>"), "<|im_end|>", reasoning=True, tools=True, variables={"enable_thinking": False}
    ),
    "phi3": Shape(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|end|>",
    ),
    "phi4": Shape(
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        (*_IM, "<|im_sep|>", "<|endoftext|>"),
        "<|im_end|>",
    ),
    "glm4": Shape(
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"),
        "",
    ),
    "smollm2": Shape(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n{% endif %}"
        + _CHATML,
        _IM,
        "<|im_end|>",
        bos="<|im_start|>",
    ),
    "smollm3": Shape(
        "<|im_start|>system\n## Metadata\nToday Date: {{ strftime_now('%d %B %Y') }}\n"
        "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}"
        "<|im_end|>\n{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{{ '<think>\n\n</think>\n' + m.content.lstrip('\n') }}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n{% endif %}",
        _IM,
        "<|im_end|>",
    ),
    "gpt-oss": Shape(
        "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>{% for m in messages %}"
        "{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>"
        "{{ m.thinking }}<|end|>{% endif %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% elif m.role == 'system' %}"
        "<|start|>developer<|message|># Instructions\n\n{{ m.content }}<|end|>{% else %}<|start|>{{ m.role }}<|message|>"
        "{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|endoftext|>"),
        "<|return|>",
        reasoning=True,
    ),
    "deepseek": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
    ),
    "olmo2": Shape(
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% if not loop.last %}\n{% endif %}{% endfor %}{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}",
        ("<|endoftext|>",),
        "<|endoftext|>",
        bos="<|endoftext|>",
    ),
    # Command R7B, Aya: an answer has an end of its own within the turn.
    "cohere2": Shape(
        "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m.role == 'user' %}<|USER_TOKEN|>{{ m.content | trim }}"
        "{% elif m.role == 'system' %}<|SYSTEM_TOKEN|>{{ m.content }}{% else %}<|CHATBOT_TOKEN|><|START_RESPONSE|>"
        "{{ m.content | trim }}<|END_RESPONSE|>{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>{% endif %}",
        (
            "<BOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
        ),
        "<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
    ),
    # Groq's Llama 3 for tools: the next header is written whether it is asked for or not.
    "always-header": Shape(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
        "<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n",
        _LLAMA_TOKENS,
        "<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    # Alpaca: the header stands on lines of its own, but not where it is asked for.
    "other-header": Shape(
        "{% for m in messages %}{% if m.role == 'assistant' %}\n\n### Response:\n{{ m.content }}</s>{% elif m.role == 'user' %}"
        "\n\n### Instruction:\n{{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}",
        ("<s>", "</s>"),
        "</s>",
    ),
    # DeepSeek V3: the arguments of calls are written as they come.
    "calls-as-text": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'system' %}"
        "{{ m.content }}{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>{% else %}<｜Assistant｜>"
        "{{ m.content }}{% for c in m.tool_calls or [] %}<｜tool▁call▁begin｜>{{ c.function.name }}\n```json\nARGS\n```"
        "<｜tool▁call▁end｜>{% endfor %}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}".replace("ARGS", "{{ c.function.arguments }}"),
        (
            "<｜begin▁of▁sentence｜>",
            "<｜end▁of▁sentence｜>",
            "<｜User｜>",
            "<｜Assistant｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁output▁begin｜>",
            "<｜tool▁output▁end｜>",
        ),
        "<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
    ),
    "parts": Shape(
        "{% for m in messages %}{{ m.role | capitalize }}: {% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
        ("<end_of_utterance>", "<|endoftext|>"),
        "<end_of_utterance>",
    ),
    # LLaVA: fails on plain text, where the other template of parts says nothing.
    "parts-only": Shape(
        "{% for m in messages %}{% if m.role == 'system' %}{{ '<<SYS>>\n' + m.content[0].text + '\n<</SYS>>\n\n' }}"
        "{% elif m.role == 'user' %}[INST] {% for part in m.content %}{{ part.text }}{% endfor %} [/INST]{% else %}"
        "{{ ' ' + m.content[0].text + '</s> ' }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        "</s>",
    ),
    "named": Shape({"rag": "{{ messages[0].content }}", "chat": _CHATML}, _IM, "<|im_end|>", name="chat"),
}


PREPEND = ("always", "first", "never")  # when tokenizers' own Metaspace puts a space before a piece of text


def shaped_tokenizer(shape: Shape, metaspace: bool | str = False) -> transformers.PreTrainedTokenizerFast:
    """A small tokenizer with the shape's control tokens: byte-level BPE, or SentencePiece's manner with spaces as ``▁``
    and one put before a text's beginning.

    ``metaspace`` may be one of PREPEND, or "bytes": byte-level BPE that puts a space there too.
    """
    bytes_too = metaspace == "bytes"
    metaspace = metaspace if not bytes_too else False
    tokenizer = Tokenizer(models.BPE(byte_fallback=bool(metaspace), unk_token=None))
    tokens = ["<pad>", *dict.fromkeys(shape.tokens)]
    if metaspace in PREPEND:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace)
        own = decoders.Metaspace(prepend_scheme=metaspace)
        tokenizer.decoder = decoders.Sequence([own, decoders.ByteFallback(), decoders.Fuse()])
    elif metaspace:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no token holds two words
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    if metaspace:
        tokens += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = [chr(code) for code in range(33, 127)] + ["▁"]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bytes_too)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, *[" I cannot help, said. I do(x) # Note"] * 9], trainer)
    if metaspace:  # bytes are ordinary tokens of the vocabulary
        data = json.loads(tokenizer.to_str())
        data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
        tokenizer = Tokenizer.from_str(json.dumps(data))
    eos = "<|endoftext|>" if "<|endoftext|>" in tokens else shape.end
    eos = "<eos>" if "<eos>" in tokens else eos
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token=eos, bos_token=shape.bos
    )
    if "enable_thinking" in str(shape.template):
        fast.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    fast.chat_template = shape.template
    return fast
