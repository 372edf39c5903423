"""A Hugging Face causal language model with its tokenizer, read and edited through hooks."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp import chat
from interp.batching import Batch, collate, token_budget_batches
from interp.chat import Prompt, Rendered
from interp.errors import UserError
from interp.families import check_layout, find_module, resolve_family, text_config
from interp.hooks import Edit, capture, check_edits, edit, matches
from interp.selection import LayerSpec, resolve_layers

# Slots (prompts x longest) of one forward pass. A GPU wants large batches; on a CPU small ones stay in its cache
# (measured: 1.4-1.8 times faster at 2048 than at 16384), while generation is quicker the more rows share a step.
TOKEN_BUDGET = 16_384
CPU_TOKEN_BUDGET = 2_048


class HookedModel:
    """A loaded model. ``hf`` stays an ordinary module: nothing is wrapped, renamed or changed.

    Args:
        hf: a ``transformers`` causal language model (a PEFT model is used through its base, adapters active).
        tokenizer: its fast tokenizer.
        name: shown in results; default: where the model came from.
        blocks: path of the list of decoder blocks, for an architecture that is not known.

    Attributes:
        blocks: the decoder blocks; base: the module without the language-model head.
        family, n_layers, d_model, context_length, device, pad_id: as found.

    Raises:
        UserError: an architecture that is not known, or not what its configuration says.
    """

    def __init__(self, hf: Any, tokenizer: Any, name: str | None = None, *, blocks: str | None = None) -> None:
        if hasattr(hf, "peft_config") and hasattr(hf, "get_base_model"):
            hf = hf.get_base_model()
        self.hf = hf
        self.tokenizer = tokenizer
        self.name = name or getattr(hf, "name_or_path", "") or type(hf).__name__
        self.family = resolve_family(hf, blocks)
        self.blocks, self.d_model = check_layout(hf, self.family)
        self.n_layers = len(self.blocks)
        base = find_module(hf, self.family.base or self.family.blocks.split(".")[0])
        assert base is not None  # a part of the path that was just resolved
        self.base: nn.Module = base
        config = text_config(hf)
        self.vocab_size: int = config.vocab_size
        self.context_length: int = getattr(config, "max_position_embeddings", None) or 1 << 30
        pads = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
        self.pad_id: int = next(int(p) for p in pads if p is not None)
        self._takes_positions = "position_ids" in inspect.signature(self.base.forward).parameters
        # Arguments that make the head run at the last column alone, where the model knows such.
        self.head_at_last = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(hf.forward).parameters else {}
        )
        self._fingerprint: tuple[tuple[int, ...], str] | None = None

    def __repr__(self) -> str:
        return f"HookedModel({self.name}, {self.family.name}, {self.n_layers} layers x {self.d_model})"

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embeddings."""
        return next(self.hf.parameters()).device

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm between the last block and the head."""
        return find_module(self.hf, self.family.norm)

    @property
    def template_hash(self) -> str:
        """Hex SHA-256 of the chat template."""
        return chat.template_hash(self.tokenizer)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of configuration and weights; computed once, and again after a training step."""
        tensors = {**dict(self.hf.named_parameters()), **dict(self.hf.named_buffers())}
        versions = tuple(t._version for t in tensors.values() if not t.is_inference())
        if self._fingerprint is None or self._fingerprint[0] != versions:
            self._fingerprint = versions, _fingerprint(self.hf.config, tensors)
        return self._fingerprint[1]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout and the like off inside the block, so that a model in training can be read between steps."""
        training = self.hf.training
        if training:
            self.hf.eval()
        try:
            yield
        finally:
            if training:
                self.hf.train()

    def render(self, prompt: Prompt | str, **changes: Any) -> Rendered:
        """Ids and roles of one prompt; see :func:`interp.chat.render`."""
        return chat.render(self.tokenizer, prompt, **changes)

    def check_context(self, rows: Sequence[Rendered], new_tokens: int = 0) -> None:
        """Refuse prompts that do not fit.

        Raises:
            UserError: names the first prompt that is too long, its length and the limit.
        """
        for row in rows:
            if len(row) + new_tokens > self.context_length:
                room = f" + {new_tokens} new tokens" if new_tokens else ""
                raise UserError(
                    f"prompt {row.id!r}: {len(row)} tokens{room} but the context of {self.name} is "
                    f"{self.context_length}; shorten it or use another model"
                )

    @property
    def token_budget(self) -> int:
        """Default slots of one forward pass without generation."""
        return CPU_TOKEN_BUDGET if self.device.type == "cpu" else TOKEN_BUDGET

    def batch(self, rows: Sequence[Rendered], side: Literal["left", "right"] = "right") -> Batch:
        """``rows`` padded, on the model's device."""
        return collate(rows, self.pad_id, side).to(self.device)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of a forward pass: ids, mask and explicit positions."""
        positions = {"position_ids": batch.position_ids} if self._takes_positions else {}
        return {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False} | positions

    def _orders(self, rows: Sequence[Rendered], token_budget: int | None) -> list[list[int]]:
        budget = self.token_budget if token_budget is None else token_budget
        return token_budget_batches([len(row) for row in rows], budget)

    def residuals(
        self,
        rows: Sequence[Rendered],
        layers: LayerSpec = "all",
        edits: Sequence[Edit] = (),
        *,
        token_budget: int | None = None,
    ) -> dict[int, list[Float[Tensor, "token d_model"]]]:
        """The residual stream after ``layers`` at every token of every row, in the order of ``rows``.

        Batches are cut by length; padding is gone from the result. The forward pass ends at the deepest
        layer, so edits beyond it have no effect. Tensors are in the model's dtype, on its device.
        """
        wanted = resolve_layers(layers, self.n_layers)
        out: dict[int, list[Any]] = {layer: [None] * len(rows) for layer in wanted}

        def keep(layer: int, x: Tensor) -> None:
            for j, i in enumerate(order):
                out[layer][i] = x[j, : len(rows[i])].clone()  # a view would pin the padded block

        self.check_context(rows)
        check_edits(self, edits, rows)
        edits = [e for e in edits if e.layer <= max(wanted)]
        for order in self._orders(rows, token_budget):
            batch = self.batch([rows[i] for i in order])
            live = [e for e in edits if matches(e.where, batch.rows)]
            with torch.no_grad(), self.evaluating(), edit(self, batch.rows, live), capture(self, wanted, keep):
                self.base(**self.inputs(batch))
        return out

    def next_token_logits(
        self, rows: Sequence[Rendered], edits: Sequence[Edit] = (), *, token_budget: int | None = None
    ) -> Float[Tensor, "row vocab"]:
        """Logits after each row's last token, float32 on the CPU; the head runs at that token alone."""
        logits = torch.empty((len(rows), self.vocab_size))
        self.check_context(rows)
        check_edits(self, edits, rows)
        for order in self._orders(rows, token_budget):
            batch = self.batch([rows[i] for i in order], side="left")
            live = [e for e in edits if matches(e.where, batch.rows)]
            with torch.no_grad(), self.evaluating(), edit(self, batch.rows, live):
                found = self.hf(**self.inputs(batch), **self.head_at_last).logits[:, -1]
            logits[order] = found[:, : self.vocab_size].float().cpu()
        return logits


def load_model(
    path_or_id: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    chat_template: str | Path | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    blocks: str | None = None,
) -> HookedModel:
    """Load a folder or hub id: weights from safetensors only, no code from the checkpoint unless asked for.

    Args:
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda:1``, …; ``sharded`` spreads the layers.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        chat_template: a file with a Jinja template, or the template itself.
        blocks: path of the decoder blocks, for an architecture that is not known.

    Raises:
        UserError: a folder that does not exist or lacks weights, an unknown hub id, a bad option.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = str(path_or_id)
    folder = Path(name).expanduser()
    local = folder.exists()
    # "runs/base" reads as a hub id too: it is a folder to whoever has a folder "runs".
    folder_like = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not local and (folder_like or ("/" in name and folder.parent.is_dir())):
        raise UserError(f"{name}: no such model folder; give a folder with config.json or a hub id")
    if local and not (folder / "config.json").is_file():
        raise UserError(f"{name}: not a model folder (no config.json); give the folder that holds it")
    dtypes = {"auto": "auto"} | {d: getattr(torch, d) for d in ("float32", "bfloat16", "float16")}
    if dtype not in dtypes:
        raise UserError(f"dtype {dtype!r}: unknown; use one of {', '.join(dtypes)}")
    source = str(folder) if local else name
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    placement = {"device_map": "auto"} if device == "sharded" else {}
    hf: Any
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        hf = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtypes[dtype],
            use_safetensors=True,  # never a pickle
            attn_implementation=attn_implementation,
            **placement,
            **common,
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:240]
        raise UserError(f"{name}: cannot load the model ({reason})") from error
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    if device != "sharded":
        try:
            hf.to(_device(device))
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r}: {str(error).splitlines()[0]}; use auto or cpu") from error
    return HookedModel(hf, tokenizer, name=name, blocks=blocks)


def _device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _read_template(chat_template: str | Path) -> str:
    text = str(chat_template)
    if "{%" in text or "{{" in text:
        return text
    try:
        return Path(text).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat template {text}: cannot read the file ({error}); give a Jinja file") from error


def _fingerprint(config: Any, tensors: dict[str, Tensor]) -> str:
    """Hash of what decides the activations; hashing runs in threads, since hashlib releases the lock."""
    volatile = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
    settings = {k: v for k, v in config.to_dict().items() if k not in volatile}

    def digest(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        return f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"

    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(digest, sorted(tensors.items())))
    head = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256("\n".join([head, *parts]).encode()).hexdigest()
