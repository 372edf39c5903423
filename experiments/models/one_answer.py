"""One prompt and one answer of a checkpoint, tried: the template, every id, the end of a turn, and what comes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from jinja2 import TemplateError

from pingscope.interp.chat.rendering import Prompt, Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.generate.generation import end_ids, generate
from pingscope.interp.model.hooked import HookedModel

EXAMPLE = Prompt("example", "Send the invoice to the office.", system="You are a web agent.", page="inbox, notes")
ANSWER = "It is done."  # of the conversation whose end of turn is looked at
NEW_TOKENS, SHOWN = 32, 24  # tokens generated, characters of them shown
# What a foreign template can end in.
UNRENDERED = (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError)


@dataclass(frozen=True)
class Finding:
    """One line of the first table; ``warning`` is empty where all is well, ``fails`` where numbers would be wrong."""

    name: str
    value: str
    warning: str = ""
    fails: bool = False


def try_prompt(model: HookedModel) -> list[Finding]:
    """Render a prompt with and without a system message, check its ids and its end of turn, and generate once."""
    try:
        plain = model.render(EXAMPLE, system=None)
    except UserError as error:
        return [Finding("chat template", "cannot render", str(error), fails=True)]
    try:
        row, without = model.render(EXAMPLE), ""
    except UserError:
        row, without = plain, "refuses a system prompt; put it in the instruction"
    roles = Counter(row.roles)
    return [
        Finding("chat template", f"hash {model.template_hash[:12]}", without),
        _bos(model, row),
        Finding("roles", ", ".join(f"{name} {n}" for name, n in roles.items())),
        Finding("final token", repr(model.tokenizer.decode([row.ids[row.final]]))),
        _embedded(model, [*row.ids, *plain.ids]),
        _turn(model),
        _answer(model, row),
    ]


def _bos(model: HookedModel, row: Rendered) -> Finding:
    """Whether the text begins with it twice; where it opens every turn (ChatML of SmolLM2) it occurs more often."""
    bos = getattr(model.tokenizer, "bos_token_id", None)
    if bos is None:
        return Finding("BOS tokens", "no BOS in the vocabulary")
    first = next((at for at, token in enumerate(row.ids) if token != bos), len(row))
    doubled = f"{first} BOS tokens at the start; a template should write one or none" if first > 1 else ""
    return Finding("BOS tokens", str(row.ids.count(bos)), doubled, fails=bool(doubled))


def _embedded(model: HookedModel, ids: Iterable[int]) -> Finding:
    """Every id of the prompt and every token that the tokenizer names has to have an embedding."""
    tokenizer, n = model.tokenizer, model.n_embeddings
    value = f"{n} embeddings, {len(tokenizer)} tokens"
    named = [(f"{kind} token", getattr(tokenizer, f"{kind}_token_id", None)) for kind in ("bos", "eos", "pad")]
    named += [("end token", token) for token in end_ids(model)] + [("token of the prompt", token) for token in ids]
    beyond = {what: token for what, token in named if token is not None and token >= n}
    if beyond:
        text = ", ".join(f"{what} {tokenizer.convert_ids_to_tokens(t)!r} ({t})" for what, t in beyond.items())
        return Finding("vocabulary", value, f"no embedding for the {text}; use the tokenizer of these weights", True)
    lost = max((t for t in tokenizer.get_added_vocab().values() if t >= n), default=None)
    note = "" if lost is None else f"{tokenizer.convert_ids_to_tokens(lost)!r} ({lost}) has no embedding"
    return Finding("vocabulary", value, note)


def _turn(model: HookedModel) -> Finding:
    """What the template writes behind an answer, against the tokens that end generation."""
    tokenizer, ends = model.tokenizer, end_ids(model)
    shown = ", ".join(repr(tokenizer.convert_ids_to_tokens(t)) for t in ends if t < len(tokenizer)) or "none"
    chat = [{"role": "user", "content": "Do it."}, {"role": "assistant", "content": ANSWER}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except UNRENDERED as error:
        reason = " ".join(str(error).split())[:120]
        return Finding("end of a turn", f"generation ends at {shown}", f"cannot render an answer ({reason})", True)
    written = text.rpartition(ANSWER)[2] if ANSWER in text else ""
    ids = tokenizer(written, add_special_tokens=False)["input_ids"] if written.strip() else []
    value = f"template {written.strip()!r}, generation ends at {shown}"
    if not ids:
        return Finding("end of a turn", value, "the template writes nothing behind an answer")
    if not set(ids) & set(ends):
        remedy = "set eos_token_id in generation_config.json, or answers run to the limit"
        return Finding("end of a turn", value, f"generation does not end where a turn does; {remedy}", True)
    return Finding("end of a turn", value)


def _answer(model: HookedModel, row: Rendered) -> Finding:
    """One greedy answer: whether it can be computed, says anything, and ended by itself."""
    new = min(NEW_TOKENS, model.context_length - len(row))
    try:
        said = generate(model, [row], max_new_tokens=new)[0]
        spread = model.next_token_logits([row]).std()
    except UserError as error:
        return Finding("one answer", "none", str(error), fails=True)
    if spread == 0:
        return Finding("one answer", repr(said.text[:SHOWN]), "every token is equally likely; the head is empty", True)
    ending = "ended by itself" if said.finished else f"cut off at {new} tokens"
    empty = "the answer is empty" if not said.text.strip() else ""
    return Finding("one answer", f"{said.text[:SHOWN]!r}, {ending}", empty)
