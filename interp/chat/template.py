"""A tokenizer's chat template: its literal pieces, where contents land in it, and tokens with roles.

Contents are text, never markup: control tokens spelled inside them are cut apart before tokenising. The clock that a
template may read stands still. Its variables (``enable_thinking``, …) belong to the tokenizer: see :func:`configure`.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from pingscope.interp.chat.written import written
from pingscope.interp.errors import UserError
from pingscope.interp.files import sha256_of

ROLES = ("system", "instruction", "page", "suffix", "template", "header", "prefix", "response")

# Text without a role of its own (separators, demonstrations): shown as "template", yet never read as markup.
QUOTED = "quoted"
_KINDS = (*ROLES, QUOTED)
# Put in front of a piece that is tokenised apart and taken off again, so that the piece is not a text's beginning.
_GUARDS = ("\n", "|", ".", "a")
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


def shared_start(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two texts or lists have in common from their beginning on."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def locate_spoken(text: str, pieces: Sequence[str], contents: Sequence[str]) -> list[tuple[int, int]] | None:
    """The same where the template cuts the thinking that ends with ``</think>`` in earlier answers (Qwen 3, DeepSeek).

    Every character must be accounted for: thinking that is kept in another shape would be taken for markup.
    """
    ranges, cursor = [], len(pieces[0]) if text.startswith(pieces[0]) else len(text)
    for content, piece in zip(contents, pieces[1:], strict=True):
        spoken = content.rpartition("</think>")[2]
        shown = (content, content.strip(), spoken, spoken.lstrip("\n"), spoken.strip())
        found = next((part for part in shown if text.startswith(part + piece, cursor)), None)
        if found is None:
            return None
        ranges.append((cursor, cursor + len(found)))
        cursor += len(found) + len(piece)
    return ranges if cursor == len(text) else None


@dataclass(frozen=True)
class Settings:
    """Which of a tokenizer's templates is used, and with which variables; see :func:`configure`."""

    name: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


class Template:
    """One tokenizer's chat template: literal pieces per shape of conversation, and its control tokens."""

    def __init__(self, tokenizer: Any, settings: Settings) -> None:
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{self.name}: this tokenizer gives no character offsets (slow tokenizer), so its tokens cannot "
                "have roles; convert it to a fast one (a folder with tokenizer.json)"
            )
        self.setting = tokenizer.chat_template, settings
        self.variables = dict(settings.variables)
        self.source: str = _source(tokenizer, settings.name, self.name)
        # Weak, or the cache below would keep every tokenizer alive for ever.
        self._tokenizer: Callable[[], Any] = weakref.ref(tokenizer)
        # Tokens that steer the chat: special ones and those the template itself writes. Other added tokens
        # (Gemma's "<table>") are ordinary vocabulary; a single character cannot be cut. In the model's own
        # speech only special tokens are kept out: "<think>" or "<tool_call>" is what a model really says.
        added = {i: t for i, t in tokenizer.added_tokens_decoder.items() if len(t.content.strip()) > 1}
        self._control = {  # id → the kinds of character it may stand for
            i: _MARKUP if token.special else _MARKUP + _SPEECH
            for i, token in added.items()
            if token.special or token.content in self.source
        }
        self._spelled = {i: added[i].content for i in self._control}
        self._as_parts = False  # whether contents are lists of parts; found out at the first rendering
        self.skeleton = lru_cache(maxsize=64)(self._skeleton)
        self.gap = lru_cache(maxsize=64)(self._gap)
        # Small, since offsets are bulky; enough for some prompts rendered again and again with other prefixes.
        self._encode_cached = lru_cache(maxsize=256)(self._encode)

    @property
    def identity(self) -> str:
        """Hex SHA-256 of what decides the text: the template and its variables (the clock stands still)."""
        return sha256_of([self.source, self.variables] if self.variables else self.source.encode())

    def fill(self, chat_roles: Sequence[str], contents: Sequence[str], *, answer: bool = True) -> str:
        """The chat as text; with the generation prompt where an ``answer`` is to follow."""
        return self.text([{"role": r, "content": c} for r, c in zip(chat_roles, contents, strict=True)], answer=answer)

    def text(self, messages: Sequence[Mapping[str, Any]], tools: Any = None, *, answer: bool = True) -> str:
        """Messages as the template writes them.

        Raises:
            UserError: the template refuses them, or fails.
        """
        chat = [dict(m) | {"content": self._content(m["content"])} for m in messages]
        return written(self._tokenizer(), self.source, chat, tools, self.variables, answer=answer)

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._as_parts else text

    def _gap(self, chat_roles: tuple[str, ...]) -> str:
        """White space that the template puts between its generation prompt and an answer (Llama 2: one space)."""
        sentinels = [_sentinel(i) for i in range(len(chat_roles) + 1)]
        asked = self.fill(chat_roles, sentinels[:-1])
        try:
            answered = self.fill((*chat_roles, "assistant"), sentinels, answer=False)
        except UserError:  # a template for prompts alone
            return ""
        between = answered.removeprefix(asked).partition(sentinels[-1])[0]
        return between if answered.startswith(asked) and not between.strip() else ""

    @cached_property
    def end_of_turn(self) -> int | None:
        """The token that the template ends an assistant's turn with, None where it writes no control token there."""
        said, again = _sentinel(1), _sentinel(2)
        plain = self._tried(("user", "assistant"), answer=False)
        last = self._specials_behind(said, plain)
        # A turn may end in several (Command R7B: response, then turn). Those that stand there when others speak next
        # are its own; what closes the whole conversation (Phi-3), or opens the next turn unasked, is not.
        earlier = "" if self.opens_turns_unasked else self._tried(("user", "assistant", "user"))
        between = self._specials_behind(said, earlier.partition(again)[0])
        shared = shared_start(last, between)
        return last[max(shared, 1) - 1] if last else None

    @cached_property
    def opens_turns_unasked(self) -> bool:
        """Whether an answer is followed by the same, asked for another one or not: old templates know no difference."""
        return self._tried(("user", "assistant"), answer=False) == self._tried(("user", "assistant"))

    @cached_property
    def end_of_call(self) -> int | None:
        """The token that ends a turn with a tool call, where it is another one than :attr:`end_of_turn` (gpt-oss)."""
        name, said = "look", _sentinel(1)
        tool = {"name": name, "description": name, "parameters": {"type": "object", "properties": {}}}
        call = {"type": "function", "id": "look00000", "function": {"name": name, "arguments": {"at": said}}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": _sentinel(0)},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            text = self.text(messages, [{"type": "function", "function": tool}], answer=False)
        except UserError:  # it knows no tools
            return None
        found = self._specials_behind(said, text)
        return None if not found or self.end_of_turn in found else found[-1]

    def _tried(self, chat_roles: tuple[str, ...], *, answer: bool = True) -> str:
        """A conversation of sentinels, empty where the template refuses it."""
        try:
            return self.fill(chat_roles, [_sentinel(i) for i in range(len(chat_roles))], answer=answer)
        except UserError:
            return ""

    def _specials_behind(self, sentinel: str, text: str) -> list[int]:
        _, found, tail = text.rpartition(sentinel)
        return [token for token in self._encode(tail, ())[0] if self.is_special(token)] if found else []

    @cached_property
    def opens_thinking(self) -> bool:
        """Whether the generation prompt ends within a thought, so that answers begin in the middle of one."""
        return self._tried(("user",)).rstrip().endswith(("<think>", "<thinking>", "[THINK]", "◁think▷"))

    def is_special(self, token: int) -> bool:
        """Whether a token is one of the chat's own: special, as its tokenizer says."""
        return token in self._control and self._control[token] == _MARKUP

    def eos(self, where: str) -> int:
        """The tokenizer's end of text, for templates that end a turn with nothing."""
        end = self._tokenizer().eos_token_id
        if end is None:
            raise UserError(f"{where}: neither the chat template nor the tokenizer ends a turn; set its eos_token")
        return end

    def decode(self, ids: Sequence[int]) -> str:
        """The characters of tokens, control tokens included."""
        return self._tokenizer().decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def spelled_in(self, text: str, *, speech: bool = False) -> list[tuple[int, int]]:
        """Ranges of ``text`` that spell a control token; those that are not special are a model's to ``speak``."""
        kinds = _MARKUP if speech else None
        names = [self._spelled[i] for i, allowed in self._control.items() if kinds is None or allowed == kinds]
        return [(start, start + len(name)) for name in names for start in _occurrences(text, name)]

    def _skeleton(self, chat_roles: tuple[str, ...]) -> tuple[list[str], list[int]]:
        """Literal pieces around the contents, and the order in which the contents appear."""
        sentinels = [_sentinel(i) for i in range(len(chat_roles))]
        text = self._shown(chat_roles, sentinels)
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

    def _shown(self, chat_roles: tuple[str, ...], sentinels: Sequence[str]) -> str:
        """The conversation, with contents as the template takes them: text, or else lists of parts.

        Templates of vision-language models walk over parts; of plain text they say nothing, or fail.
        """
        refusal: UserError | None = None
        try:
            text = self.fill(chat_roles, sentinels)
        except UserError as error:
            text, refusal = "", error
        if self._as_parts or all(sentinel in text for sentinel in sentinels):
            if refusal:
                raise refusal
            return text
        self._as_parts = True
        try:
            with_parts = self.fill(chat_roles, sentinels)
        except UserError:
            with_parts = ""
        self._as_parts = all(sentinel in with_parts for sentinel in sentinels)
        if not self._as_parts and refusal:
            raise refusal
        return with_parts if self._as_parts else text

    def tokenise(self, text: str, spans: Sequence[Span], *, follows: bool = False) -> tuple[list[int], list[str]]:
        """Ids and roles of ``text`` whose characters ``spans`` cover; contents never yield control tokens.

        Where it ``follows`` other tokens it is no beginning: no tokenizer may put a space in front of it.
        """
        codes = b"".join(bytes([_KINDS.index(role)]) * (end - start) for start, end, role in spans)
        cuts: tuple[int, ...] = ()
        while True:
            ids, offsets = self._encode_cached(text, cuts, follows)
            forged = []
            for token, (start, end) in zip(ids, offsets, strict=True):
                if token not in self._control:
                    continue
                # Some control tokens swallow the white space beside them: only their own characters count.
                start += len(text[start:end]) - len(text[start:end].lstrip())
                own = codes[start : start + len(text[start:end].strip())]
                if own.strip(self._control[token]):
                    forged.append(start + 1)
            if not set(forged) - set(cuts):
                break
            cuts = tuple(sorted({*cuts, *forged}))
        kinds = (_KINDS[_majority(codes, start, end)] for start, end in offsets)
        return ids, ["template" if kind == QUOTED else kind for kind in kinds]

    def _encode(
        self, text: str, cuts: tuple[int, ...], follows: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids with character offsets, tokenised apart at ``cuts``."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end in zip((0, *cuts), (*cuts, len(text)), strict=True):
            piece = self._piece(text[start:end], follows or start > 0)
            ids += piece[0]
            offsets += [(start + a, start + b) for a, b in piece[1]]
        return ids, offsets

    def _piece(self, text: str, follows: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """One piece; a tokenizer that puts a space before a text's beginning (SentencePiece) must not put it here."""
        plain = self._tokens(text)
        if not follows or not text or not self._adds_a_space:
            return plain
        for guard in _GUARDS:
            ids, offsets = self._tokens(guard + text)
            first = next((k for k, (_, end) in enumerate(offsets) if end > len(guard)), len(ids))
            if first < len(ids) and offsets[first][0] == len(guard):
                return ids[first:], [(a - len(guard), b - len(guard)) for a, b in offsets[first:]]
        return plain

    @property
    def _adds_a_space(self) -> bool:
        return (
            self._tokenizer().decode(self._tokens("a")[0]) != "a" or self._tokens("a")[0] != self._tokens("\na")[0][-1:]
        )

    def _tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self._tokenizer()(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], encoded["offset_mapping"]


def _sentinel(number: int) -> str:
    """A word that no template writes and no template changes."""
    return f"Qzx{number}Jvw{sha256_of(f'{number}'.encode())[:12]}"


def _occurrences(text: str, name: str) -> list[int]:
    found, start = [], text.find(name)
    while start >= 0:
        found.append(start)
        start = text.find(name, start + 1)
    return found


def _source(tokenizer: Any, name: str | None, owner: str) -> str:
    """The text of a tokenizer's template, of those with names the one that is asked for."""
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if name is not None:
        if name not in named:
            known = ", ".join(sorted(named)) or "none"
            raise UserError(f"{owner}: no chat template is named {name!r} (names: {known}); mend --template-name")
        return named[name]
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        if named:
            raise UserError(
                f"{owner}: its chat templates are named {', '.join(sorted(named))} and none is the default; choose "
                "one with --template-name (template_name=)"
            ) from error
        raise UserError(
            f"{owner}: the tokenizer has no chat template; pass one with --chat-template FILE (chat_template=)"
        ) from error


def _majority(codes: bytes, start: int, end: int) -> int:
    """The role that most characters of a token have; the earlier one on a tie."""
    if end <= start:  # a token of no characters of its own (trimmed white space) belongs to what precedes it
        return codes[max(min(start, len(codes)) - 1, 0)]
    covered = codes[start:end]
    return covered[0] if covered[0] == covered[-1] else max(dict.fromkeys(covered), key=covered.count)


# Kept per live tokenizer; the template's text is part of the key because it may be set after loading.
_templates: weakref.WeakKeyDictionary[Any, Template] = weakref.WeakKeyDictionary()
_settings: weakref.WeakKeyDictionary[Any, Settings] = weakref.WeakKeyDictionary()


def configure(tokenizer: Any, name: str | None = None, variables: Mapping[str, Any] | None = None) -> None:
    """Choose one of a tokenizer's named templates, and variables that every rendering with it passes on.

    Raises:
        UserError: no such name, or a variable that the template does not read.
    """
    settings = Settings(name, dict(variables or {}))
    template = Template(tokenizer, settings)
    for variable in settings.variables:
        if not re.search(rf"\b{re.escape(variable)}\b", template.source):
            raise UserError(
                f"{template.name}: the chat template does not read the variable {variable!r}; remove it from "
                "--template-var (template_variables=)"
            )
    _settings[tokenizer], _templates[tokenizer] = settings, template


def template_of(tokenizer: Any) -> Template:
    """The (cached) template of a tokenizer."""
    cached, settings = _templates.get(tokenizer), _settings.get(tokenizer, Settings())
    if cached is None or cached.setting != (tokenizer.chat_template, settings):
        cached = _templates[tokenizer] = Template(tokenizer, settings)
    return cached


def opens_thinking(tokenizer: Any) -> bool:
    """Whether answers behind a tokenizer's chat template begin in the middle of a thought."""
    return bool(getattr(tokenizer, "chat_template", None)) and template_of(tokenizer).opens_thinking


def ends_of_turns(tokenizer: Any) -> list[int]:
    """Tokens that a tokenizer's chat template ends an assistant's turns with; none without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    template = template_of(tokenizer)
    return [token for token in (template.end_of_turn, template.end_of_call) if token is not None]
