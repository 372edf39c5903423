"""Any-Depth Alignment (arXiv 2510.18081): the model's own generation prompt, put in again in the middle of an answer.

The tokens that open a model's turn carry its alignment. After a few response tokens they are put in once more, the
model begins its turn anew, and what it says from there is its answer. Training-free, and the baseline that an injected
prefix has to beat. The published method keeps the first answer where the second is no refusal; here the second answer
counts, so that safety and usefulness are those of one text.
"""

from __future__ import annotations

from collections.abc import Sequence

from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.generate.generation import Generation, generate
from pingscope.interp.generate.prompt_cache import PromptCache
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.hooks import Edit


def answer_again(
    model: HookedModel,
    rows: Sequence[Rendered],
    after: int,
    max_new_tokens: int,
    edits: Sequence[Edit] = (),
    prompts: PromptCache | None = None,
) -> list[Generation]:
    """Generate ``after`` tokens, put the generation prompt in again, and return what follows it.

    A row whose answer ends within ``after`` tokens gets the header behind that answer. ``edits`` see the header as
    part of the prompt.

    Raises:
        UserError: a chat template without a generation prompt.
    """
    begun = generate(model, rows, max_new_tokens=after, edits=edits, prompts=prompts) if after else None
    again = []
    for i, row in enumerate(rows):
        header = tuple(token for token, role in zip(row.ids, row.roles, strict=True) if role == "header")
        if not header:
            raise UserError(f"prompt {row.id!r}: its chat template has no generation prompt to put in again")
        said = begun[i].ids if begun is not None else ()
        ids, roles = row.ids + said + header, row.roles + ("prefix",) * (len(said) + len(header))
        again.append(Rendered(row.id, row.label, ids, roles))
    return generate(model, again, max_new_tokens=max_new_tokens, edits=edits, prompts=prompts)
