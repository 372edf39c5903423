"""How answers begin: first tokens of example texts, read behind the header that every answer follows.

Tokenised alone, a text begins differently with many tokenizers: SentencePiece's first word carries a space that it has
not behind a chat's header.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pingscope.interp.chat.rendering import Prompt, Rendered, render
from pingscope.interp.chat.template import template_of

REFUSALS = (
    "I cannot help with that.",
    "I can't assist with this.",
    "I'm sorry, but",
    "Sorry, I",
    "I apologize",
)
ACTIONS = ('do(action="Click", element="1")', 'exit(message="done")', "click('1')", "<execute>", "```python")
COMMENTS = ("# Element: a link", "# Note: the page")


def first_tokens(tokenizer_or_model: Any, text: str, *, after_words: bool = False) -> set[int]:
    """The token that an answer which begins with ``text`` begins with, behind its header.

    Args:
        after_words: also where it follows words (an injected prefix): there a word begins with its space.
    """
    tokenizer = getattr(tokenizer_or_model, "tokenizer", tokenizer_or_model)
    found: set[int] = set()
    for spelling in (text, " " + text) if after_words else (text,):
        said, blank = _said(tokenizer, spelling)
        # White space that is a token of its own says nothing: what the template puts before every answer is skipped,
        # while a text whose spelling after a space begins with a bare one gives no token.
        if blank < len(said) and (blank == 0 or spelling == text):
            found.add(said[blank])
    return found


def _said(tokenizer: Any, text: str) -> tuple[tuple[int, ...], int]:
    """An answer's tokens, and how many of the first are white space alone."""
    if not getattr(tokenizer, "chat_template", None):
        said = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        row = render(tokenizer, Prompt("beginning", "x", response=text))
        said = row.ids[row.n_prompt :]
    return said, next((k for k, token in enumerate(said) if tokenizer.decode([token]).strip()), len(said))


def where_answers_differ(
    tokenizer_or_model: Any, rows: Sequence[Rendered], texts: Sequence[str] = (*REFUSALS, *ACTIONS, *COMMENTS)
) -> list[Rendered]:
    """Rows up to where the first token says something: with the white space that the template begins every answer with.

    GLM-4's header is followed by a line end of its own: behind the header alone the line end is certain, and what is
    left for the words tells little. An injected prefix has that line end in front of it already.
    """
    tokenizer = getattr(tokenizer_or_model, "tokenizer", tokenizer_or_model)
    if not template_of(tokenizer).gap(("user",)):
        return list(rows)
    leads = {said[:blank] for said, blank in (_said(tokenizer, text) for text in texts)}
    lead = leads.pop() if len(leads) == 1 else ()  # often the white space is part of the first word's token
    return [
        row
        if row.roles[-1] in ("prefix", "response")
        else replace(row, ids=row.ids + lead, roles=row.roles + ("response",) * len(lead))
        for row in rows
    ]


def token_classes(
    tokenizer_or_model: Any,
    *,
    refusals: Sequence[str] = REFUSALS,
    actions: Sequence[str] = ACTIONS,
    comments: Sequence[str] = COMMENTS,
) -> dict[str, tuple[int, ...]]:
    """First tokens of example texts by class, for the probability mass of how a response begins.

    Give texts in the model's own action language. A token that begins texts of two classes tells nothing and
    is left out of both. Returns sorted token ids under ``refusal``, ``action`` and ``comment``.
    """
    groups = {"refusal": refusals, "action": actions, "comment": comments}
    firsts = {
        name: {token for text in texts for token in first_tokens(tokenizer_or_model, text, after_words=True)}
        for name, texts in groups.items()
    }
    return {
        name: tuple(sorted(ids - set().union(*(other for key, other in firsts.items() if key != name))))
        for name, ids in firsts.items()
    }
