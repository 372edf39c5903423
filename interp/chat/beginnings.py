"""How answers begin: first tokens of example texts, read behind the header that every answer follows.

Tokenised alone, a text begins differently with many tokenizers: SentencePiece's first word carries a space that it has
not behind a chat's header.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pingscope.interp.chat.rendering import Prompt, render

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
        if not getattr(tokenizer, "chat_template", None):
            said = tokenizer(spelling, add_special_tokens=False)["input_ids"]
        else:
            row = render(tokenizer, Prompt("beginning", "x", response=spelling))
            said = row.ids[row.n_prompt :]
        blank = next((k for k, token in enumerate(said) if tokenizer.decode([token]).strip()), len(said))
        # White space that is a token of its own says nothing: what the template puts before every answer is skipped,
        # while a text whose spelling after a space begins with a bare one gives no token.
        if blank < len(said) and (blank == 0 or spelling == text):
            found.add(said[blank])
    return found


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
