"""A discrete bound of the prefix search: tokens exchanged one at a time, along the gradient, towards the same loss.

Greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043) with a fluency penalty: the objective is the loss of
:mod:`pingscope.steering.answer_loss` plus :data:`FLUENCY` times the mean negative log-likelihood of the prefix as a
text, in nats a token. Candidates come from the linearised objective, a random few are measured, and the best is kept; a
prefix counts only if its text is tokenised back into its tokens, so that what is found can be typed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.chat.tokenizer import tokenizer_identity
from pingscope.interp.errors import UserError
from pingscope.interp.generate.embedded import check_embedded, token_embeddings
from pingscope.interp.generate.prompt_cache import PromptCache
from pingscope.interp.generate.shared_prompts import SharedPrefill
from pingscope.interp.model.hooked import HookedModel
from pingscope.steering.answer_loss import Example, balanced, loss_gradient, sides
from pingscope.steering.injection import prefix_ids
from pingscope.steering.soft_prefix import KEPT

FLUENCY = 0.1  # weight of the penalty: ten nats a token of fluency are worth one nat a token of the answers
CHUNK = 4096  # embeddings multiplied with the gradient at a time
LONGEST = 256  # tokens of a prefix

Ids = tuple[int, ...]


@dataclass(frozen=True)
class DiscretePrefix:
    """The best prefix found, and what the search saw.

    ``objectives`` are those of the best prefix so far, the start's first and then one a step. ``answers`` and
    ``fluency`` are its two parts, in nats a token. A pass is one prompt read behind one candidate, or back.
    """

    text: str
    ids: Ids
    start: str
    objectives: tuple[float, ...]
    answers: float
    fluency: float
    weight: float
    passes: int


@dataclass
class _Objective:
    """What is minimised, measured on the same examples throughout."""

    model: HookedModel
    examples: Sequence[Example]
    fluent: HookedModel
    weight: float
    passes: int = 0
    known: dict[Ids, tuple[float, float]] = field(default_factory=dict)  # answers, fluency

    def __post_init__(self) -> None:
        self.engine = SharedPrefill(self.model, memory=KEPT)
        self.prompts = PromptCache(self.model, KEPT)

    def __call__(self, ids: Ids) -> float:
        answers, fluency = self.known[ids]
        return answers + self.weight * fluency

    def measure(self, candidates: Sequence[Ids]) -> None:
        """Read the answers behind every candidate, all candidates of a prompt together."""
        fresh = [ids for ids in dict.fromkeys(candidates) if ids not in self.known]
        pairs = [(ids, one) for ids in fresh for one in self.examples]
        rows = [_behind(one.row, ids) for ids, one in pairs]
        likely, _ = self.engine.answer_log_probs(rows, [one.target for _, one in pairs])
        losses = [-x / len(one.target) for x, (_, one) in zip(likely.tolist(), pairs, strict=True)]
        self.passes += len(pairs)
        fluency = self.texts(fresh)
        for i, ids in enumerate(fresh):
            mine = losses[i * len(self.examples) : (i + 1) * len(self.examples)]
            self.known[ids] = balanced(self.examples, mine), fluency[i]

    def texts(self, candidates: Sequence[Ids]) -> list[float]:
        """Mean negative log-likelihood of each prefix as a text of its own, in nats a token."""
        out = []
        for ids in candidates:
            logs = self.log_probs(ids)
            out.append(-float(logs[torch.arange(len(ids)), torch.tensor(ids)].mean()))
        return out

    def log_probs(self, ids: Ids) -> Float[Tensor, "k vocab"]:
        """What the fluent model expects at every position of a text, behind the beginning of text."""
        first = next(
            (t for t in (self.fluent.tokenizer.bos_token_id, self.fluent.tokenizer.eos_token_id) if t is not None),
            self.fluent.pad_id,
        )
        row = Rendered("fluency", "", (first, *ids), ("response",) * (len(ids) + 1))
        with torch.no_grad(), self.fluent.evaluating():
            logits = self.fluent.hf(**self.fluent.inputs(self.fluent.batch([row]))).logits[0, :-1]
        return logits.float().log_softmax(-1).cpu()

    def linearised(self, ids: Ids) -> Float[Tensor, "k token"]:
        """By how much the objective changes, to first order, if a position's token becomes another."""
        own = token_embeddings(self.model, ids).detach().float()
        gradient = loss_gradient(self.model, self.examples, own, self.prompts)
        self.passes += 2 * len(self.examples)  # a pass back costs at least one forward
        parts = [
            token_embeddings(self.model, torch.arange(start, min(start + CHUNK, self.size))).detach().float()
            @ gradient.T
            for start in range(0, self.size, CHUNK)
        ]
        slopes = torch.cat(parts).T.cpu() - (own * gradient).sum(-1, keepdim=True).cpu()
        return slopes - self.weight / len(ids) * self.log_probs(ids)[:, : self.size]

    @cached_property
    def size(self) -> int:
        """Tokens that have an embedding, a logit and a text."""
        return min(self.model.n_embeddings, self.model.vocab_size, len(self.model.tokenizer))

    @cached_property
    def usable(self) -> Bool[Tensor, " token"]:
        """Tokens that may stand in a prefix: printable text, no control tokens, tokenised back into themselves."""
        tokenizer = self.model.tokenizer
        special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
        texts = [_decode(self.model, (token,)) for token in range(self.size)]
        return torch.tensor([t not in special and _printable(text) for t, text in enumerate(texts)], dtype=torch.bool)


def coordinate_search(
    model: HookedModel,
    text: str,
    examples: Sequence[Example],
    *,
    fluent: HookedModel | None = None,
    weight: float = FLUENCY,
    steps: int = 20,
    candidates: int = 24,
    top: int = 64,
    budget: int = 0,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> DiscretePrefix:
    """Improve ``text`` as a prefix, token by token; never worse than it, and the same for a seed.

    Args:
        fluent: whose likelihood the penalty is, by default the model's own; the base where there is one. It needs the
            model's tokenizer.
        candidates: exchanges measured in every step, drawn from the ``top`` tokens of every position.
        budget: most passes (0: as many as the steps take); no step begins that could exceed it.
        progress: called with the best objective after every step.

    Raises:
        UserError: a text that is not tokenised back into its tokens, a model that takes no embeddings, examples of one
            side alone.
    """
    check_embedded(model)
    sides(examples)
    fluent = fluent or model
    if tokenizer_identity(fluent.tokenizer) != tokenizer_identity(model.tokenizer):
        raise UserError(f"{fluent.name}: judges fluency with another tokenizer than {model.name}'s; leave it out")
    best = prefix_ids(model, text)
    if not best or len(best) > LONGEST:
        raise UserError(f"coordinate search: a start of {len(best)} tokens; give a text of 1 to {LONGEST}")
    objective = _Objective(model, examples, fluent, weight)
    objective.measure([best])
    texts, history = {best: text}, [objective(best)]
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        if budget and objective.passes + (candidates + 2) * len(examples) > budget:
            break
        found = _exchanges(objective, best, candidates, top, rng)
        if found:
            objective.measure(list(found))
            texts |= found
            best = min([best, *found], key=objective)
        history.append(objective(best))
        if progress is not None:
            progress(history[-1])
    answers, fluency = objective.known[best]
    return DiscretePrefix(texts[best], best, text, tuple(history), answers, fluency, weight, objective.passes)


def _exchanges(objective: _Objective, ids: Ids, n: int, top: int, rng: torch.Generator) -> dict[Ids, str]:
    """``n`` prefixes with one token of ``ids`` exchanged, at random among the most promising, as ids and text."""
    change = objective.linearised(ids).masked_fill(~objective.usable, torch.inf)
    change[torch.arange(len(ids)), torch.tensor(ids).clamp(max=objective.size - 1)] = torch.inf
    promising = change.topk(min(top, int(objective.usable.sum())), largest=False).indices
    found: dict[Ids, str] = {}
    for _ in range(8 * n):  # most are lost where a tokenizer would join the pieces otherwise
        if len(found) == n:
            break
        at = int(torch.randint(len(ids), (), generator=rng))
        token = int(promising[at, int(torch.randint(promising.shape[1], (), generator=rng))])
        changed = (*ids[:at], token, *ids[at + 1 :])
        if changed not in objective.known and changed not in found:
            text = typed(objective.model, changed)
            if text is not None:
                found[changed] = text
    return found


def typed(model: HookedModel, ids: Ids) -> str | None:
    """The text of these tokens, if it is tokenised back into them behind a chat's header."""
    text = _decode(model, ids)
    try:
        return text if text.strip() and prefix_ids(model, text) == ids else None
    except UserError:  # half a character, or one that a template rewrites
        return None


def _decode(model: HookedModel, ids: Ids) -> str:
    return str(model.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _printable(text: str) -> bool:
    return bool(text) and all(c.isprintable() or c == "\n" for c in text) and "\ufffd" not in text


def _behind(row: Rendered, ids: Ids) -> Rendered:
    return Rendered(row.id, row.label, row.ids + ids, row.roles + ("prefix",) * len(ids))
