"""Agents behind an OpenAI-compatible endpoint: the same episodes and judges, and no activations.

A prefix is sent as the beginning of the assistant's message where the server can continue it (vLLM's
``continue_final_message``), and refused where it cannot: a server that starts a new turn instead would be measured
under the wrong name. The paper's way for such servers is the same text as a suffix.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from experiments.agents.records import Record
from experiments.agents.rollout import Episode, MakeEnvironment, run_pairs
from interp.chat import SEPARATOR, Prompt, Rendered
from interp.errors import UserError
from interp.generate import Generation
from interp.io import sha256_of
from steering.generators import RateLimit, answer_text, openai_client, request
from steering.injection import Arm

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
        """Whether a begun answer is continued: asked with and without the field, the server must not start anew."""
        begun = Prompt("prefill", "Write the numbers from one to nine.", prefix="one two three four")
        try:
            reply = self._create(begun, continued=True)
        except UserError:
            return False
        text = answer_text(reply)
        # A server that ignores the field opens a new message; vLLM returns the continuation alone.
        self.prefill = bool(text) and not text.lstrip().lower().startswith(("one", "1"))
        return self.prefill

    def _ask(self, prompt: Prompt) -> tuple[str, int, bool]:
        self.wait()
        reply = self._create(prompt, continued=bool(prompt.prefix))
        usage = getattr(reply, "usage", None)
        ended = bool(reply.choices) and reply.choices[0].finish_reason == "stop"
        return answer_text(reply), max(0, int(getattr(usage, "completion_tokens", 0) or 0) - ended), ended

    def _create(self, prompt: Prompt, continued: bool) -> Any:
        more = {"extra_body": CONTINUE} if continued else {}
        return request(
            lambda: self.client.chat.completions.create(
                model=self.model, messages=messages_of(prompt), temperature=0.0, max_tokens=self.max_new_tokens, **more
            )
        )


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
    endpoint: Endpoint, records: Sequence[Record], make_env: MakeEnvironment, arm: Arm, *, max_turns: int = 6
) -> list[Episode]:
    """Episodes of one arm on a model behind an endpoint.

    Raises:
        UserError: an arm with edits: there are no activations to edit.
    """
    if arm.edits:
        raise UserError(f"{arm.name}: steering needs activations, which an endpoint does not give; use a local model")
    pairs = [(arm, record) for record in records]
    return run_pairs(pairs, make_env, endpoint.render, endpoint.answer, max_turns=max_turns)
