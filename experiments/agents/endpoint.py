"""Agents behind an OpenAI-compatible endpoint: the same episodes and judges, and no activations.

A prefix is sent as the beginning of the assistant's message where the server can continue it (vLLM's
``continue_final_message``), and refused where it cannot (``transformers serve``): a server that starts a new turn
instead would be measured under the wrong name. The paper's way for such servers is the same text as a suffix.

The server renders the chat and reads the answer: markup in a prompt is the control token there and text in a local
model, and control tokens that the model says are left out of its answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from pingscope.experiments.agents.rollout import Episode, MakeEnvironment, run_pairs
from pingscope.experiments.tasks.records import Record
from pingscope.interp.chat.rendering import SEPARATOR, Prompt, Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.files import sha256_of
from pingscope.interp.generate.generation import Generation
from pingscope.steering.generators import (
    RateLimit,
    answer_text,
    content_text,
    first_message,
    openai_client,
    redacted,
    request,
)
from pingscope.steering.injection import Arm

CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}  # vLLM, SGLang


@dataclass
class Endpoint:
    """A chat model at a URL, as far as episodes need one.

    Args:
        prefill: whether the server continues a begun assistant message; tried with :meth:`check_prefill`.
        threads: requests at a time.
    """

    model: str
    base_url: str | None = None
    prefill: bool = False
    threads: int = 4
    per_minute: float = 0.0
    max_new_tokens: int = 64
    client: Any = None
    prompts: list[Prompt] = field(default_factory=list)
    _numbers: dict[Prompt, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.client = self.client or openai_client(self.base_url)
        self.wait = RateLimit(self.per_minute)

    @property
    def name(self) -> str:
        return f"openai:{self.model}"

    @property
    def fingerprint(self) -> str:
        """Of the name alone: a server does not say which weights it runs."""
        return sha256_of(["endpoint", self.model, self.base_url])

    template_hash = ""  # the server's own
    d_model = 0

    def render(self, prompt: Prompt) -> Rendered:
        """A row that stands for ``prompt``: its number is its only id."""
        if prompt not in self._numbers:
            self._numbers[prompt] = len(self.prompts)
            self.prompts.append(prompt)
        return Rendered(prompt.id, prompt.label, (self._numbers[prompt],), ("header",))

    def answer(self, rows: Sequence[Rendered]) -> list[Generation]:
        """Greedy continuations, several requests at a time; an answer without text stays empty."""
        prompts = [self.prompts[row.ids[0]] for row in rows]
        if not self.prefill and any(prompt.prefix for prompt in prompts):
            raise UserError(
                f"{self.name}: the server cannot continue a begun answer, so a prefix cannot be injected; "
                "use --arm suffix, or a server with continue_final_message (vLLM)"
            )
        with ThreadPoolExecutor(self.threads) as pool:
            said = list(pool.map(self._ask, prompts))
        return [  # a server gives the number of its tokens, not their ids
            Generation(row.id, text, (0,) * tokens, end) for row, (text, tokens, end) in zip(rows, said, strict=True)
        ]

    def check_prefill(self) -> bool:
        """Whether the server continues a begun answer: asked with and without :data:`CONTINUE`.

        Where the fields are heeded, the prompt lacks the end of the message and the header of a new one, and the
        server's own count of its tokens shows that whatever its model says. Where counts tell nothing (a server that
        always continues), the answer has to go on in the middle of a word, as no new answer does.

        Raises:
            UserError: a plain question fails as well, which says nothing about prefixes.
        """
        begun = Prompt("prefill", "Write the numbers from one to nine.", prefix="one two three fo")
        self._create(replace(begun, prefix=None))
        try:
            reply = self._create(begun, continued=True)
        except UserError:
            return False
        text = answer_text(reply)
        repeated = text.startswith("one two three fo")  # it would be judged as the agent's own words
        self.prefill = not repeated and (text.startswith("ur") or self._reads_less(reply, begun))
        return self.prefill

    def _reads_less(self, reply: Any, begun: Prompt) -> bool:
        """Whether the server read fewer tokens for ``reply`` than for a new answer after the same messages."""
        try:
            anew = self._create(begun)
        except UserError:
            return False
        ours, theirs = (getattr(getattr(each, "usage", None), "prompt_tokens", 0) or 0 for each in (reply, anew))
        return 0 < ours < theirs

    def _ask(self, prompt: Prompt) -> tuple[str, int, bool]:
        self.wait()
        reply = self._create(prompt, continued=bool(prompt.prefix))
        usage = getattr(reply, "usage", None)
        ended = reply.choices[0].finish_reason in ("stop", "tool_calls", "content_filter") if reply.choices else False
        return message_text(reply), max(0, int(getattr(usage, "completion_tokens", 0) or 0) - ended), ended

    def _create(self, prompt: Prompt, continued: bool = False) -> Any:
        more = {"extra_body": CONTINUE} if continued else {}
        return request(
            lambda: self.client.chat.completions.create(
                model=self.model, messages=messages_of(prompt), temperature=0.0, max_tokens=self.max_new_tokens, **more
            )
        )


def message_text(reply: Any) -> str:
    """A message with its fields as one text, in the marks that :func:`parse_actions` reads.

    Reasoning stands in ``<think>``, native calls in ``<tool_call>``, and what the server gives as the model's refusal,
    or says of a filter that kept the answer back, in ``<refusal>``. The same marks within a field are broken up: no
    field can end another.

    Raises:
        UserError: the reply is no chat completion.
    """
    message = first_message(reply)
    content = getattr(message, "content", None)
    parts = []
    if thought := content_text(getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)):
        parts.append(f"<think>\n{_broken(thought)}\n</think>")
    parts.append(content_text(content).replace("<refusal>", "< refusal>"))
    legacy = getattr(message, "function_call", None)
    for call in [*(getattr(message, "tool_calls", None) or []), *([legacy] if legacy else [])]:
        function = _field(call, "function") or _field(call, "custom") or call
        given = _field(function, "arguments") or _field(function, "input") or "{}"
        named = json.dumps({"name": _field(function, "name") or "", "arguments": given}, ensure_ascii=False)
        parts.append("<tool_call>" + named.replace("<", "\\u003c") + "</tool_call>")
    said = [_field(part, "refusal") for part in content if part] if isinstance(content, list) else []
    filtered = getattr(reply.choices[0], "finish_reason", None) == "content_filter"
    refusal = content_text(getattr(message, "refusal", None)) or " ".join(text for text in said if text)
    if refusal or filtered:
        parts.append(f"<refusal>{_broken(refusal) or 'the content filter of the server'}</refusal>")
    return redacted("\n".join(part for part in parts if part))


def _field(value: Any, name: str) -> Any:
    """A field of an object of the client's, or of a plain one."""
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)


def _broken(text: str) -> str:
    return re.sub(r"<(?=/?(?:think|refusal|tool_call))", "< ", text)


def messages_of(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as chat messages; an injected prefix is a begun assistant message at the end."""
    turns = [{"role": "system", "content": prompt.system}] if prompt.system else []
    for user, said in prompt.demonstrations:
        turns += [{"role": "user", "content": user}, {"role": "assistant", "content": said}]
    parts = [part for part in (prompt.instruction, prompt.page, prompt.suffix) if part]
    turns.append({"role": "user", "content": SEPARATOR.join(parts)})
    if prompt.prefix:
        turns.append({"role": "assistant", "content": prompt.prefix})
    return turns


def run_endpoint(
    endpoint: Endpoint,
    records: Sequence[Record],
    make_env: MakeEnvironment,
    arm: Arm,
    *,
    max_turns: int = 6,
    progress: Callable[[int], None] | None = None,
) -> list[Episode]:
    """Episodes of one arm on a model behind an endpoint.

    Raises:
        UserError: an arm with edits: there are no activations to edit.
    """
    if arm.edits:
        raise UserError(f"{arm.name}: steering needs activations, which an endpoint does not give; use a local model")
    pairs = [(arm, record) for record in records]
    return run_pairs(pairs, make_env, endpoint.render, endpoint.answer, max_turns=max_turns, progress=progress)
