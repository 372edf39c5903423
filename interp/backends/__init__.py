"""Other libraries behind the contract of :class:`interp.model.hooked.HookedModel`, imported only when asked for.

Every backend reads the residual stream at layers and positions, edits it, and generates with edits, with the
same numbers (:mod:`pingscope.interp.backends.parity`). ``hf`` is the model class itself.
"""

from __future__ import annotations

import copy as copying
import warnings
from typing import Any

from pingscope.interp.errors import UserError
from pingscope.interp.model.hooked import HookedModel

BACKENDS = ("hf", "transformer_lens", "nnsight")


def check_backend(backend: str, remote: bool | str = False) -> None:
    """Refuse an unknown backend, and ``remote`` where it has no meaning."""
    if backend not in BACKENDS:
        raise UserError(f"backend {backend!r}: unknown; use one of {', '.join(BACKENDS)}")
    if remote and backend != "nnsight":
        raise UserError(f"backend {backend!r} runs here; remote needs backend='nnsight'")


def adopt(source: Any, backend: str, *, copy: bool = True, remote: bool | str = False) -> HookedModel:
    """A model that is already loaded (a :class:`HookedModel` or a ``TransformerBridge``), behind a backend.

    Args:
        copy: transformer_lens rewrites the modules it is given: work on a copy of them. Without, the model
            passed in is changed, and a warning says so.
        remote: nnsight's: ``True`` runs on NDIF, ``"local"`` takes the same way through serialisation but stays here.
    """
    check_backend(backend, remote)
    if type(source).__name__ == "TransformerBridge":
        from pingscope.interp.backends.transformer_lens import BridgeModel

        if backend != "transformer_lens":
            raise UserError(f"a TransformerBridge cannot be used by backend {backend!r}; use 'transformer_lens'")
        return BridgeModel(source)
    if not isinstance(source, HookedModel):
        raise UserError(f"load_model: cannot use a {type(source).__name__}; give a folder, a hub id or a loaded model")
    if source.backend != "hf":
        raise UserError(f"{source.name} is loaded by backend {source.backend!r}; load it again for {backend!r}")
    if backend == "transformer_lens" and copy:
        hf = copying.deepcopy(source.hf)
        source = HookedModel(hf, source.tokenizer, source.name, blocks=source.family.blocks)
    elif backend == "transformer_lens":
        warnings.warn(
            f"{source.name}: TransformerLens rewrites this model in place (blocks replaced, attention eager); "
            "do not use it outside the bridge any more",
            stacklevel=3,
        )
    return wrap(source, backend, remote)


def wrap(model: HookedModel, backend: str, remote: bool | str = False) -> HookedModel:
    """``model`` behind a backend, given up to it: transformer_lens rewrites its modules."""
    if backend == "transformer_lens":
        from pingscope.interp.backends.transformer_lens import boot

        return boot(model)
    if backend == "nnsight":
        from pingscope.interp.backends.nnsight import TracedModel, trace_model

        return TracedModel(trace_model(model), model.tokenizer, model.name, remote=remote, blocks=model.family.blocks)
    return model
