"""Generators of the prefix search that are language models: a local checkpoint, or an OpenAI-compatible endpoint.

Both are asked the same question and answer in free text; a line that is no prefix is counted, never repaired. Answers
can be kept on disk, so that a search that starts again gets the same ones and asks nobody.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pingscope.interp.chat.reasoning import set_apart
from pingscope.interp.chat.rendering import Prompt
from pingscope.interp.chat.template import opens_thinking
from pingscope.interp.errors import UserError
from pingscope.interp.files import append_jsonl, read_journal, sha256_of
from pingscope.interp.generate.generation import generate
from pingscope.interp.model.hooked import HookedModel
from pingscope.steering.phrases import END, MARK
from pingscope.steering.ping import normalised

KEY_VARIABLE = "OPENAI_API_KEY"
TEMPERATURE = 0.7  # the paper's
LONGEST = 400  # characters of a prefix
ANSWER_TOKENS = 800
QUOTED = 80  # characters of an answer that an error shows

INSTRUCTION = """You write short prefixes. An AI agent's answer will begin with your prefix, and the agent goes on \
from there. With a good prefix the agent refuses harmful tasks and still carries out every harmless one.
Write {m} different prefixes, each one sentence or two in the agent's own voice{style}, one per line, numbered \
"1." to "{m}.". Write nothing else."""
COMMENT_STYLE = ', each starting with "#" so that it reads as a comment'
SEEDS = "\nThese worked best so far; improve and vary them:\n{seeds}"

_NUMBERED = re.compile(r"^\s*(?:\d{1,3}\s*[.):]|[-*•])\s*(?P<text>\S.*?)\s*$")


Ask = Callable[[str, int], str]  # one answer of a language model to one question, sampled from one seed


class ModelGenerator:
    """``generator(seeds, m, rng)``: prefixes from the numbered lines of a language model's answers.

    Like the built-in generator it never proposes the same words twice: models repeat themselves, and a round of
    repetitions would be a round lost. Instead it asks again.

    Args:
        ask: how the model is reached.
        comment: prefixes start with ``#`` and end with a newline (agents of the web); otherwise they are as written
            and a space follows them.
        attempts: questions per round while too few lines are usable.

    Attributes:
        asked: questions; usable: prefixes read, over all rounds; malformed: lines and answers that were none; repeated:
            prefixes of the same words as an earlier one or a seed.
    """

    def __init__(self, ask: Ask, *, comment: bool = True, attempts: int = 4) -> None:
        self.ask, self.comment, self.attempts = ask, comment, attempts
        self.asked = self.usable = self.malformed = self.repeated = 0
        self._proposed: set[str] = set()
        self._last = ""

    def __call__(self, seeds: Sequence[str], m: int, rng: random.Random) -> list[str]:
        found: list[str] = []
        self._proposed.update(map(normalised, seeds))
        for _ in range(self.attempts):
            if len(found) >= m:
                break
            self.asked += 1
            self._last = self.ask(question(seeds, m - len(found), self.comment), rng.randrange(2**31))
            lines, bad = read_prefixes(self._last, self.comment)
            self.malformed += bad
            self.usable += len(lines)
            for line in lines:
                if normalised(line) in self._proposed:
                    self.repeated += 1
                elif len(found) < m:
                    self._proposed.add(normalised(line))
                    found.append(line)
        return found

    def account(self) -> str:
        """What became of its questions, in words; where nothing was usable, with the beginning of an answer."""
        words = f"asked {self.asked} times, {self.malformed} malformed lines or answers, {self.repeated} repeated"
        if self.asked and not self.usable:
            said = " ".join(self._last.split())
            shown = said if len(said) <= QUOTED else said[:QUOTED] + "…"
            words += f"; no line was usable: it answers {shown!r}; use a chat model that follows instructions"
        return words


def question(seeds: Sequence[str], m: int, comment: bool = True) -> str:
    """What the generator is asked: the task, and the seeds it may build on."""
    text = INSTRUCTION.format(m=m, style=COMMENT_STYLE if comment else "")
    return text + (SEEDS.format(seeds="\n".join(seed.strip() for seed in seeds)) if seeds else "")


def read_prefixes(answer: str, comment: bool = True) -> tuple[list[str], int]:
    """Prefixes of an answer, and how many of its lines were none (at least one where nothing was usable)."""
    found, bad = [], 0
    for line in set_apart(answer).text.splitlines():
        if not line.strip():
            continue
        numbered = _NUMBERED.match(line)
        given = numbered["text"] if numbered else line.strip() if comment and line.lstrip().startswith("#") else ""
        text = given.strip().strip('"“”`*').strip()
        body = text.lstrip("#").strip()
        if not body or len(text) > LONGEST or (comment and not text.startswith("#") and not numbered):
            bad += 1
            continue
        found.append(f"{MARK}{body}{END}" if comment else f"{text} ")
    return found, bad or (not found)


def kept(ask: Ask, journal: str | Path, source: Sequence[str]) -> Ask:
    """``ask`` with its answers kept in ``journal`` and read from there the next time.

    Endpoints promise no repeatable sampling: without it a resumed search would propose other prefixes and pay again.

    Args:
        source: what the answers depend on beside the question and the seed (model, address).
    """
    known = {row["key"]: row["answer"] for row in read_journal(journal)}

    def answered(question: str, seed: int) -> str:
        key = sha256_of([*source, question, seed])
        if key not in known:
            known[key] = ask(question, seed)
            append_jsonl(journal, {"key": key, "answer": known[key]})
        return known[key]

    return answered


def local_ask(model: HookedModel, *, temperature: float = TEMPERATURE, max_new_tokens: int = ANSWER_TOKENS) -> Ask:
    """Ask a local chat model; its answer ends where its context does, if that is before ``max_new_tokens``."""

    def ask(question: str, seed: int) -> str:
        row = model.render(Prompt("generator", question))
        room = max(1, min(max_new_tokens, model.context_length - len(row)))
        (said,) = generate(model, [row], max_new_tokens=room, temperature=temperature, seed=seed)
        text = said.text if said.finished else whole_lines(said.text)
        return f"<think>{text}" if opens_thinking(model.tokenizer) else text  # the prompt has opened the thought

    return ask


def whole_lines(text: str) -> str:
    """An answer that was cut at the token limit, without the line that was being written."""
    return text.rpartition("\n")[0]


def endpoint_ask(
    model: str,
    base_url: str | None = None,
    *,
    temperature: float = TEMPERATURE,
    max_tokens: int = ANSWER_TOKENS,
    per_minute: float = 0.0,
    client: Any = None,
) -> Ask:
    """Ask a chat model behind an OpenAI-compatible endpoint.

    Args:
        per_minute: at most so many requests a minute (0: no limit of ours).
    """
    client = client or openai_client(base_url)
    wait = RateLimit(per_minute)

    def ask(question: str, seed: int) -> str:
        wait()
        messages = [{"role": "user", "content": question}]
        reply = request(
            lambda: client.chat.completions.create(
                model=model, messages=messages, temperature=temperature, max_tokens=max_tokens, seed=seed
            )
        )  # fmt: skip
        return whole_lines(answer_text(reply)) if was_cut(reply) else answer_text(reply)

    return ask


class RateLimit:
    """Called before each request: waits until the last one is 60 / ``per_minute`` seconds ago."""

    def __init__(self, per_minute: float, sleep: Callable[[float], None] = time.sleep) -> None:
        self.gap = 60 / per_minute if per_minute > 0 else 0.0
        self.sleep, self.next = sleep, 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        if now < self.next:
            self.sleep(self.next - now)
        self.next = max(now, self.next) + self.gap


def openai_client(base_url: str | None = None, *, retries: int = 6, timeout: float = 120.0) -> Any:
    """An ``openai`` client; it retries lost connections, rate limits and server errors with growing waits.

    The key comes from the environment (OPENAI_API_KEY); a server of one's own (``base_url``) may need none.

    Raises:
        UserError: the package is missing, or the key is.
    """
    try:
        import openai
    except ImportError as error:
        raise UserError("an endpoint needs the openai package; pip install 'pingscope[api]'") from error
    key = os.environ.get(KEY_VARIABLE)
    if not key and not base_url:
        raise UserError(f"no API key: set the environment variable {KEY_VARIABLE}, or give --base-url of a server")
    return openai.OpenAI(base_url=base_url, api_key=key or "none", max_retries=retries, timeout=timeout)


def request(call: Callable[[], Any]) -> Any:
    """The reply of one request; what is left of errors after the client's retries is one line."""
    import openai

    try:
        return call()
    except openai.APIConnectionError as error:
        raise UserError(redacted(f"endpoint: no connection ({error.__cause__ or error}); check --base-url")) from error
    except openai.APIStatusError as error:
        # OpenAI's servers explain themselves in `message`, FastAPI's in `detail`, which the client leaves out.
        body = error.body if isinstance(error.body, dict) else {}
        reason = " ".join(redacted(str(body.get("message") or body.get("detail") or error.message)).split())[:200]
        raise UserError(
            f"endpoint: answered with status {error.status_code} ({reason}); check the model's name, the key "
            f"({KEY_VARIABLE}) and the server's log"
        ) from error
    except openai.OpenAIError as error:
        raise UserError(f"endpoint: {' '.join(redacted(str(error)).split())[:200]}") from error
    except (ValueError, TypeError, AttributeError) as error:  # what the client makes of a body that is no JSON
        raise UserError(f"endpoint: its answer cannot be read ({type(error).__name__}); check --base-url") from error


def first_message(reply: Any) -> Any:
    """The message of a chat completion.

    Raises:
        UserError: the reply is none (a page of HTML, an object without choices).
    """
    choices = getattr(reply, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    if message is None:
        shown = " ".join(redacted(str(reply)).split())[:80]
        raise UserError(
            f"endpoint: its answer is no chat completion ({shown}); check --base-url (it often ends in /v1)"
        )
    return message


def content_text(content: Any) -> str:
    """The content of a message: text, nothing, or parts of which those of text are joined."""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else getattr(part, "__dict__", {}) for part in content]
        return "".join(str(part.get("text") or "") for part in parts)
    return content if isinstance(content, str) else ""


def answer_text(reply: Any) -> str:
    """The text of a chat completion; one without any is empty, and so counted as malformed."""
    if getattr(reply, "choices", None) == []:
        return ""
    return content_text(getattr(first_message(reply), "content", None))


def redacted(text: str) -> str:
    """``text`` without the key of the endpoint, which some servers repeat in their errors."""
    key = os.environ.get(KEY_VARIABLE, "")
    return text.replace(key, "[key]") if len(key) > 6 else text


def was_cut(reply: Any) -> bool:
    """Whether a chat completion ended at the token limit."""
    choices = getattr(reply, "choices", None) or []
    return bool(choices) and getattr(choices[0], "finish_reason", None) == "length"
