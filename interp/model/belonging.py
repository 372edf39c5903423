"""Which model an artefact (probes, a direction, a gate, a store) was made on, and whether it may be read on another.

The same vector read on other weights gives a number that looks like any other. So artefacts carry the fingerprint of
their model, and are refused elsewhere unless the transfer is asked for; results then say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pingscope.interp.errors import UserError
from pingscope.interp.model.hooked import HookedModel

LAYER_CONVENTION = "output of block l (resid_post); -1 is the stream before block 0 (embed)"


def origin(model: HookedModel) -> dict[str, Any]:
    """What an artefact fitted on ``model`` keeps of it."""
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "template": model.template_hash,
        "d_model": model.d_model,
        "n_layers": model.n_layers,
        "layer_convention": LAYER_CONVENTION,
    }


def check_belongs(
    meta: Mapping[str, Any], model: HookedModel, transfer: bool = False, what: str = "probes", path: str | Path = ""
) -> dict[str, Any]:
    """Refuse an artefact of another model, unless the transfer is asked for and possible.

    Args:
        meta: of the artefact, with the fields of :func:`origin`; what an artefact made by hand lacks is not compared.
        what: how messages call it; path: where it was read from.

    Returns:
        ``what``, ``path``, the fingerprints it was ``fitted_on`` and ``read_on``, and whether that is a ``transfer``
        (None: the artefact does not say where it is from); :func:`transfer_note` tells it in results.

    Raises:
        UserError: another width, depth or layer convention; other weights or another template without ``transfer``.
    """
    where = f"{path}: {what}" if str(path) else what
    for field, own in (("d_model", model.d_model), ("n_layers", model.n_layers)):
        if meta.get(field, own) != own:
            raise UserError(
                f"{where} of a model with {field} {meta[field]}, but {model.name} has {field} {own}; fit them on this "
                "model's own store (pingscope cache, pingscope probe)"
            )
    if meta.get("layer_convention", LAYER_CONVENTION) != LAYER_CONVENTION:
        raise UserError(f"{where} count layers otherwise ({meta['layer_convention']}); fit them again")
    fitted = meta.get("fingerprint") or None
    moved = fitted is not None and fitted != model.fingerprint
    if moved and not transfer:
        raise UserError(
            f"{where} were fitted on {named(meta)}, but {model.name} is {model.fingerprint[:12]}…; use that model, fit "
            "them on this one, or ask for the transfer (--transfer)"
        )
    if not transfer and meta.get("template") and meta["template"] != model.template_hash:
        raise UserError(
            f"{where} were fitted behind the chat template {meta['template'][:12]}…, but {model.name} has "
            f"{model.template_hash[:12]}…; pass that template, or ask for the transfer (--transfer)"
        )
    return {
        "what": what,
        "path": str(path),
        "fitted_on": fitted,
        "read_on": model.fingerprint,
        "transfer": moved if fitted else None,
    }


def transfer_note(found: Mapping[str, Any]) -> str:
    """The sentence that results carry of what :func:`check_belongs` found; empty where the artefact is the model's."""
    if found["transfer"] is None:
        return f"The {found['what']} {found['path']} do not say which model they were fitted on."
    if not found["transfer"]:
        return ""
    artefact = f"{found['what']} {found['path']}".strip()  # the path is not always known
    return (
        f"The {artefact} were fitted on another model ({found['fitted_on'][:12]}…) than they are "
        f"read on ({found['read_on'][:12]}…): readings mix the signal with that difference."
    )


def named(meta: Mapping[str, Any]) -> str:
    """The model of an artefact, as messages call it."""
    name, short = meta.get("model"), str(meta["fingerprint"])[:12]
    return f"{name} ({short}…)" if name else f"the model {short}…"
