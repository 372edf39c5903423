"""From a prompt's parts to token ids with a role each, through any tokenizer's own chat template.

The template is rendered once with sentinels as contents to learn its literal pieces; the real text is checked
against those pieces, tokenised once, and every token takes the role of the characters it covers. All contents
are text, never markup: a prompt that spells ``<|end|>`` gets the characters, not the control token.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from pingscope.interp.chat.template import QUOTED, ROLES, Span, Template, locate, locate_spoken, template_of
from pingscope.interp.errors import UserError
from pingscope.interp.files import sha256_of

__all__ = ["ROLES", "Prompt", "Rendered", "render", "template_hash"]

SEPARATOR = "\n"  # between the instruction, the page and the suffix of the user turn


@dataclass(frozen=True)
class Prompt:
    """One prompt before rendering: the only input unit of the toolkit. Empty parts count as absent.

    Attributes:
        id: unique within a run; label: ``harmful``, ``benign``, ``lookalike`` or empty.
        instruction, page, suffix: the user turn, joined by newlines.
        prefix: injected start of the response; response: what the model said after it.
        demonstrations: earlier (user, assistant) turns, role ``template``; shown as the template shows earlier turns.
    """

    id: str
    instruction: str
    label: str = ""
    system: str | None = None
    page: str | None = None
    suffix: str | None = None
    prefix: str | None = None
    response: str | None = None
    demonstrations: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Rendered:
    """A tokenised prompt: ``ids`` and ``roles`` run in parallel, without padding."""

    id: str
    label: str
    ids: tuple[int, ...]
    roles: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def mask(self) -> tuple[int, ...]:
        return (1,) * len(self.ids)

    @property
    def position_ids(self) -> tuple[int, ...]:
        return tuple(range(len(self.ids)))

    @property
    def n_prompt(self) -> int:
        """Number of tokens before the response."""
        return self.roles.index("response") if "response" in self.roles else len(self.ids)

    @property
    def final(self) -> int:
        """Position of the last token before the model speaks: the last ``prefix`` or else ``header``."""
        return self.n_prompt - 1


def render(tokenizer_or_model: Any, prompt: Prompt | str, **changes: Any) -> Rendered:
    """Render one prompt with the tokenizer's own chat template and generation prompt.

    Args:
        tokenizer_or_model: a fast Hugging Face tokenizer, or anything with a ``tokenizer`` attribute.
        prompt: a :class:`Prompt`, or the instruction itself.
        changes: fields of :class:`Prompt` to set or replace.

    A prefix or response is tokenised together with what precedes it unless that would change the prompt's own
    ids, so a prompt has the same ids and positions in every arm.

    Raises:
        UserError: no chat template, no character offsets, a part the template refuses, drops or rewrites.
    """
    tokenizer = getattr(tokenizer_or_model, "tokenizer", tokenizer_or_model)
    if isinstance(prompt, str):
        changes = {"instruction": prompt} | changes
        unknown = set(changes) - {field.name for field in fields(Prompt)}
        if unknown:
            raise UserError(f"render: unknown prompt field {sorted(unknown)[0]!r}; known: {_field_names()}")
        name = f"prompt-{sha256_of(ascii(changes).encode())[:8]}"
        parts: dict[str, Any] = {"id": name} | changes
        prompt = Prompt(**parts)
    elif changes:
        try:
            prompt = replace(prompt, **changes)
        except TypeError as error:
            raise UserError(f"render: {error}; known prompt fields: {_field_names()}") from error

    _check_characters(prompt)
    template = template_of(tokenizer)
    text, spans = _prompt_text(template, prompt)
    ids, roles = template.tokenise(text, spans)
    gap = template.gap(tuple(role for role, _, _ in _parts(prompt))) if prompt.prefix or prompt.response else ""
    for part, role in ((prompt.prefix, "prefix"), (prompt.response, "response")):
        if not part:
            continue
        part, gap = gap + part, ""  # white space that every answer begins with is the answer's
        longer, longer_spans = text + part, [*spans, (len(text), len(text) + len(part), role)]
        joint_ids, joint_roles = template.tokenise(longer, longer_spans)
        if joint_ids[: len(ids)] == ids and role not in joint_roles[: len(ids)]:
            ids, roles = joint_ids, joint_roles
        else:
            apart, apart_roles = template.tokenise(part, [(0, len(part), role)], follows=True)
            ids, roles = ids + apart, roles + apart_roles
        text, spans = longer, longer_spans
    return Rendered(prompt.id, prompt.label, tuple(ids), tuple(roles))


def template_hash(tokenizer: Any) -> str:
    """Hex SHA-256 of the chat template in use and its variables."""
    return template_of(tokenizer).identity


def _check_characters(prompt: Prompt) -> None:
    for name, value in vars(prompt).items():
        texts = [text for turn in value for text in turn] if name == "demonstrations" else [value or ""]
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"prompt {prompt.id!a}: {name} holds half of a surrogate pair (a cut emoji, \\ud83d); repair its file"
            ) from error


def _field_names() -> str:
    return ", ".join(field.name for field in fields(Prompt))


def _parts(prompt: Prompt) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Messages as (chat role, name for errors, [(text, token role), …])."""
    turns: list[tuple[str, str, list[tuple[str, str]]]] = []
    if prompt.system:
        turns.append(("system", "system prompt", [(prompt.system, "system")]))
    for user, assistant in prompt.demonstrations:
        turns.append(("user", "demonstration", [(user, QUOTED)]))
        turns.append(("assistant", "demonstration", [(assistant, QUOTED)]))
    user_turn: list[tuple[str, str]] = []
    for text, role in ((prompt.instruction, "instruction"), (prompt.page, "page"), (prompt.suffix, "suffix")):
        if text:
            user_turn += [(SEPARATOR, QUOTED)] if user_turn else []
            user_turn.append((text, role))
    if not user_turn:
        raise UserError(f"prompt {prompt.id!r}: no instruction, page or suffix; give at least one")
    turns.append(("user", "user turn", user_turn))
    return turns


def _prompt_text(template: Template, prompt: Prompt) -> tuple[str, list[Span]]:
    """The rendered chat up to and with the generation prompt, and which characters play which role."""
    turns = _parts(prompt)
    chat_roles = tuple(role for role, _, _ in turns)
    contents = ["".join(text for text, _ in parts) for _, _, parts in turns]
    try:
        pieces, order = template.skeleton(chat_roles)
        text = template.fill(chat_roles, contents)
    except UserError as error:
        raise UserError(f"prompt {prompt.id!r}: {error}") from error
    shown = [contents[i] for i in order]
    ranges = locate(text, pieces, shown)
    if ranges is None and any("</think>" in answer for _, answer in prompt.demonstrations):
        ranges = locate_spoken(text, pieces, shown)
    if ranges is None:
        raise UserError(
            f"prompt {prompt.id!r}: the chat template rewrites or drops the text it is given "
            f"({', '.join(sorted({turns[i][1] for i in order}))}); pass another with --chat-template FILE "
            "(chat_template=) or remove that part"
        )
    spans: list[Span] = []
    cursor = 0
    for index, (start, end) in zip(order, ranges, strict=True):
        if start > cursor:
            spans.append((cursor, start, "template"))
        content = contents[index]
        offset = start - (0 if end - start == len(content) else content.find(text[start:end]))
        for part, role in turns[index][2]:
            a, b = max(offset, start), min(offset + len(part), end)
            if b > a:
                spans.append((a, b, role))
            offset += len(part)
        cursor = end
    if cursor < len(text):
        # What follows the last user turn is the header; a template that ends elsewhere has none.
        spans.append((cursor, len(text), "header" if order[-1] == len(turns) - 1 else "template"))
    return text, spans
