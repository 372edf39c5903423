"""Rendering one prompt with many prefixes: the prompt is tokenised once, and so is every prefix."""

from __future__ import annotations

from dataclasses import replace

from pingscope.interp.chat.rendering import Prompt, Rendered
from pingscope.interp.model.hooked import HookedModel


class PrefixRenderer:
    """``renderer(prompt)`` is ``model.render(prompt)``.

    A tokenizer cuts a text at its special tokens first. Where the header begins with one, the ids of a prefix depend
    on the header alone, and those found after one prompt hold after every other. Elsewhere each prompt is rendered
    with each prefix.
    """

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self._tails: dict[tuple[str, tuple[int, ...]], tuple[tuple[int, ...], tuple[str, ...]]] = {}
        special = getattr(model.tokenizer, "added_tokens_decoder", {})
        self._cuts = {number for number, token in special.items() if token.special}

    def __call__(self, prompt: Prompt) -> Rendered:
        if not prompt.prefix or prompt.response:
            return self.model.render(prompt)
        known = self.model.render(replace(prompt, prefix=None))
        header = known.ids[known.roles.index("header") :] if "header" in known.roles else ()
        if not header or header[0] not in self._cuts:
            return self.model.render(prompt)
        key = prompt.prefix, header
        if key not in self._tails:
            full = self.model.render(prompt)
            self._tails[key] = full.ids[len(known) :], full.roles[len(known) :]
        ids, roles = self._tails[key]
        return Rendered(prompt.id, prompt.label, known.ids + ids, known.roles + roles)
