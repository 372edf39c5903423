"""A tokenizer's chat template: its literal pieces, where contents land in it, and tokens with roles.

Contents are text, never markup: control tokens spelled inside them are cut apart before tokenising.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError

from pingscope.interp.errors import UserError
from pingscope.interp.files import sha256_of

ROLES = ("system", "instruction", "page", "suffix", "template", "header", "prefix", "response")

# Some templates print today's date where none is given: the same prompt would have other ids tomorrow.
TEMPLATE_DATE = "26 Jul 2024"

# Text without a role of its own (separators, demonstrations): shown as "template", yet never read as markup.
QUOTED = "quoted"
_KINDS = (*ROLES, QUOTED)
_MARKUP = bytes([ROLES.index("template"), ROLES.index("header")])
_SPEECH = bytes([ROLES.index("prefix"), ROLES.index("response")])

Span = tuple[int, int, str]  # start, end (exclusive, in characters), role or QUOTED


def locate(text: str, pieces: Sequence[str], contents: Sequence[str]) -> list[tuple[int, int]] | None:
    """Character range of every content in ``text``; contents may come stripped. None where one is missing."""
    for variant in (str, str.strip):
        shown = [variant(content) for content in contents]
        if text == pieces[0] + "".join(c + p for c, p in zip(shown, pieces[1:], strict=True)):
            ranges, cursor = [], len(pieces[0])
            for content, piece in zip(shown, pieces[1:], strict=True):
                ranges.append((cursor, cursor + len(content)))
                cursor += len(content) + len(piece)
            return ranges
    # The markup depends on the contents (or only some are stripped): match in order, preferring a hit that
    # follows the literal learned for that place, because a short content may also occur inside the markup.
    ranges, cursor = [], 0
    for content, piece in zip(contents, pieces, strict=False):
        for wanted in (content, content.strip()):
            anchored = text.find(piece + wanted, cursor)
            start = anchored + len(piece) if anchored >= 0 else text.find(wanted, cursor)
            if start >= 0 and wanted:
                break
        else:
            return None
        ranges.append((start, start + len(wanted)))
        cursor = start + len(wanted)
    return ranges


class Template:
    """One tokenizer's chat template: literal pieces per shape of conversation, and its control tokens."""

    def __init__(self, tokenizer: Any) -> None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{name}: this tokenizer gives no character offsets (slow tokenizer), so its tokens cannot "
                "have roles; convert it to a fast one (a folder with tokenizer.json)"
            )
        self.setting = tokenizer.chat_template
        try:
            self.source: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                f"{name}: the tokenizer has no chat template; pass one with --chat-template FILE (chat_template=)"
            ) from error
        # Weak, or the cache below would keep every tokenizer alive for ever.
        self._tokenizer = weakref.ref(tokenizer)
        # Tokens that steer the chat: special ones and those the template itself writes. Other added tokens
        # (Gemma's "<table>") are ordinary vocabulary; a single character cannot be cut. In the model's own
        # speech only special tokens are kept out: "<think>" or "<tool_call>" is what a model really says.
        added = {i: t for i, t in tokenizer.added_tokens_decoder.items() if len(t.content.strip()) > 1}
        self._control = {  # id → the kinds of character it may stand for
            i: _MARKUP if token.special else _MARKUP + _SPEECH
            for i, token in added.items()
            if token.special or token.content in self.source
        }
        self.skeleton = lru_cache(maxsize=64)(self._skeleton)
        # Small, since offsets are bulky; enough for some prompts rendered again and again with other prefixes.
        self._encode_cached = lru_cache(maxsize=256)(self._encode)

    def fill(self, chat_roles: Sequence[str], contents: Sequence[str]) -> str:
        """The chat as text, with the generation prompt."""
        tokenizer: Any = self._tokenizer()
        chat = [{"role": r, "content": c} for r, c in zip(chat_roles, contents, strict=True)]
        try:
            return tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, date_string=TEMPLATE_DATE
            )
        except TemplateError as error:
            what = "a system prompt" if "system" in chat_roles else "this conversation"
            raise UserError(
                f"the chat template refuses {what} ({error}); put the text in the "
                "instruction or pass another template with --chat-template FILE (chat_template=)"
            ) from error

    def _skeleton(self, chat_roles: tuple[str, ...]) -> tuple[list[str], list[int]]:
        """Literal pieces around the contents, and the order in which the contents appear."""
        sentinels = [f"Qzx{i}Jvw{sha256_of(f'{i}'.encode())[:12]}" for i in range(len(chat_roles))]
        text = self.fill(chat_roles, sentinels)
        for role, sentinel in zip(chat_roles, sentinels, strict=True):
            if text.count(sentinel) != 1:
                raise UserError(
                    f"the chat template {'repeats' if sentinel in text else 'drops'} the "
                    f"{role} message; pass another with --chat-template FILE (chat_template=)"
                )
        order = sorted(range(len(sentinels)), key=lambda i: text.index(sentinels[i]))
        pieces, cursor = [], 0
        for i in order:
            start = text.index(sentinels[i])
            pieces.append(text[cursor:start])
            cursor = start + len(sentinels[i])
        return [*pieces, text[cursor:]], order

    def tokenise(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[str]]:
        """Ids and roles of ``text`` whose characters ``spans`` cover; contents never yield control tokens."""
        codes = b"".join(bytes([_KINDS.index(role)]) * (end - start) for start, end, role in spans)
        cuts: tuple[int, ...] = ()
        while True:
            ids, offsets = self._encode_cached(text, cuts)
            forged = []
            for token, (start, end) in zip(ids, offsets, strict=True):
                if token not in self._control:
                    continue
                # Some control tokens swallow the white space beside them: only their own characters count.
                start += len(text[start:end]) - len(text[start:end].lstrip())
                own = codes[start : start + len(text[start:end].strip())]
                if own.strip(self._control[token]):
                    forged.append(start + 1)
            if not forged:
                break
            cuts = tuple(sorted({*cuts, *forged}))
        kinds = (_KINDS[_majority(codes, start, end)] for start, end in offsets)
        return ids, ["template" if kind == QUOTED else kind for kind in kinds]

    def _encode(self, text: str, cuts: tuple[int, ...]) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids with character offsets, tokenised apart at ``cuts``."""
        tokenizer: Any = self._tokenizer()
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end in zip((0, *cuts), (*cuts, len(text)), strict=True):
            encoded = tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids += encoded["input_ids"]
            offsets += [(start + a, start + b) for a, b in encoded["offset_mapping"]]
        return ids, offsets


def _majority(codes: bytes, start: int, end: int) -> int:
    """The role that most characters of a token have; the earlier one on a tie."""
    if end <= start:  # a token of no characters of its own (trimmed white space) belongs to what precedes it
        return codes[max(min(start, len(codes)) - 1, 0)]
    covered = codes[start:end]
    return covered[0] if covered[0] == covered[-1] else max(dict.fromkeys(covered), key=covered.count)


# Kept per live tokenizer; the template's text is part of the key because it may be set after loading.
_templates: weakref.WeakKeyDictionary[Any, Template] = weakref.WeakKeyDictionary()


def template_of(tokenizer: Any) -> Template:
    """The (cached) template of a tokenizer."""
    cached = _templates.get(tokenizer)
    if cached is None or tokenizer.chat_template != cached.setting:
        cached = _templates[tokenizer] = Template(tokenizer)
    return cached
