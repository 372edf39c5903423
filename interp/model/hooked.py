"""A Hugging Face causal language model with its tokenizer, read and edited through hooks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pingscope.interp.chat import rendering as chat
from pingscope.interp.chat.batching import Batch, collate, token_budget_batches
from pingscope.interp.chat.rendering import Prompt, Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.files import sha256_of
from pingscope.interp.model.check import Findings, LogitsWatch, check_best, check_forward, refuse_numbers
from pingscope.interp.model.contract import Past
from pingscope.interp.model.discovery import find_base, takes, text_config, text_model
from pingscope.interp.model.families import block_parts, check_layout, find_module, layer_heads, resolve_family
from pingscope.interp.model.hooks import (
    Edit,
    Handle,
    Sink,
    capture,
    check_edits,
    edit,
    live_edits,
    on_residual,
    side_by_side,
)
from pingscope.interp.model.selection import LayerSpec, Selection, find_matches, resolve_layers
from pingscope.interp.recent import Recent

# Slots (prompts x longest) of one forward pass. A GPU wants large batches; on a CPU small ones stay in its cache
# (measured: 1.4-1.8 times faster at 2048 than at 16384; at width 512 another 1.1 at 1024, for less padding), while
# generation is quicker the more rows share a step.
TOKEN_BUDGET = 16_384
CPU_TOKEN_BUDGET, CPU_LEAST, CPU_NUMBERS = 2_048, 512, 2**19  # slots, slots, slots x d_model
REMEMBERED = 2**20  # tokens of rendered prompts


class HookedModel:
    """A loaded model. ``hf`` stays an ordinary module: nothing is wrapped, renamed or changed.

    Args:
        hf: a ``transformers`` causal language model (a PEFT model is used through its base, adapters active).
        tokenizer: its fast tokenizer.
        name: shown in results; default: where the model came from.
        blocks: path of the list of decoder blocks, for an architecture that is not known.

    Attributes:
        backend: ``hf``, or the name of the subclass's.
        blocks: the decoder blocks; base: the module without the language-model head.
        heads: of every layer; n_heads, head_dim: the most of any layer, for the many families whose layers are equal.
        family, n_layers, d_model, n_embeddings, context_length, device, pad_id: as found.
        parts_problem: why :meth:`part` refuses; empty if the parts of every block add up to its output.
        pads: whether rows may be padded in front; else a batch that would be holds rows of one length.
        keeps_keys: whether it continues from keys and values; else from a state of its own, as RWKV and Mamba.
        n_streams: residual streams; several (hyper-connections, AltUp) are read and edited as one, side by side, and
            d_model is their total width. stream_axis: that counts them in a block's tensors, if one does.
        first_state, idle: see :class:`pingscope.interp.model.check.Findings`.

    Raises:
        UserError: an architecture that is not known, not what its configuration says, or whose blocks do not
            put out the residual stream (see :func:`pingscope.interp.model.check.check_forward`).
    """

    backend = "hf"
    stream_axis: int | None
    precision = ""  # of a model loaded with dtype "fast": which one was chosen, and why
    remote: bool | str = False  # ``True`` where the weights are on another machine

    def __init__(self, hf: Any, tokenizer: Any, name: str | None = None, *, blocks: str | None = None) -> None:
        if hasattr(hf, "peft_config") and hasattr(hf, "get_base_model"):
            hf = hf.get_base_model()
        self.hf = hf = text_model(hf)
        self.tokenizer = tokenizer
        self.name = name or getattr(hf, "name_or_path", "") or type(hf).__name__
        self.family = resolve_family(hf, blocks)
        self.blocks, self.d_model = check_layout(hf, self.family)
        self.n_layers = len(self.blocks)
        self.parts = [block_parts(block) for block in self.blocks]
        base = find_module(hf, self.family.base or find_base(hf, self.family.blocks))
        assert base is not None  # a part of the path that was just resolved
        self.base: nn.Module = base
        config = text_config(hf)
        self.vocab_size: int = config.vocab_size
        self.heads = layer_heads(hf, self.n_layers, self.d_model)
        self.n_heads: int = max(one.count for one in self.heads)
        self.head_dim: int = max(one.size for one in self.heads)
        self.context_length: int = getattr(config, "max_position_embeddings", None) or 1 << 30
        rows = getattr(self.embedding, "weight", None)
        self.n_embeddings: int = self.vocab_size if rows is None or rows.ndim != 2 else rows.shape[0]
        # Padding is never read, so any id will do that has an embedding (some checkpoints' own one has none).
        pads = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
        self.pad_id: int = next(int(p) for p in pads if p is not None and p < self.n_embeddings)
        # Generation passes on what the whole model takes; reading and answering must count alike.
        self.takes_positions = takes(self.base, "position_ids") and takes(hf, "position_ids")
        self.keeps_keys = takes(self.base, "past_key_values")
        self.head_takes_last = takes(hf, "logits_to_keep")
        self._fingerprint: tuple[tuple[int, ...], str] | None = None
        self._rendered: Recent[Rendered] = Recent(REMEMBERED)
        self.n_streams, self.stream_axis = 1, None
        self.idle: frozenset[int] = frozenset()
        # What runs elsewhere cannot be tried here.
        there = Findings("its weights are on another machine", norm=self.family.norm)
        found = there if self.remote is True else check_forward(self)
        self.parts_problem, self.pads, self.idle = found.parts_problem, found.pads, found.idle
        self.first_state = found.first_state
        self.family = replace(self.family, norm=found.norm)

    def __repr__(self) -> str:
        return f"HookedModel({self.name}, {self.family.name}, {self.n_layers} layers x {self.d_model})"

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the first weights that are in memory."""
        devices = (tensor.device for tensor in self.hf.parameters())
        return next((device for device in devices if device.type != "meta"), torch.device("cpu"))

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm between the last block and the head; none where several streams are collapsed before it."""
        return find_module(self.hf, self.family.norm)

    @property
    def embedding(self) -> nn.Module | None:
        """The token embedding; the stream before block 0 (layer -1) may add positions and scaling to it."""
        return find_module(self.hf, self.family.embed)

    def part(self, layer: int, name: str) -> nn.Module:
        """A module of a block: ``attn_out`` and ``mlp_out`` put out what is added to the residual stream,
        ``projection`` takes the attention heads side by side, ``attention`` and ``mlp`` are the modules themselves.

        Raises:
            UserError: parts that are not known, or that do not add up to the output of their block.
        """
        found = self.parts[layer]
        if self.parts_problem or found is None:
            raise UserError(f"{self.name}: {self.parts_problem}; use the residual stream, or another backend")
        if name not in found:
            raise UserError(f"{self.name}: a block has no part {name!r}; parts are {', '.join(found)}")
        return found[name]

    def on_residual(self, layer: int, function: Callable[[Tensor], Tensor | None]) -> Handle:
        """Call ``function`` on the stream after ``layer`` in every forward pass, until the handle is removed."""
        while layer in self.idle:
            layer -= 1
        return on_residual(self.blocks, layer, function, self.stream_axis)

    def beside(self, x: Tensor) -> Tensor:
        """A tensor of this model's blocks as (batch, pos, d_model)."""
        return side_by_side(x, self.stream_axis)

    @property
    def template_hash(self) -> str:
        """Hex SHA-256 of the chat template."""
        return chat.template_hash(self.tokenizer)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of configuration and weights; computed once, and again after a training step.

        Weights that are not all in memory (on another machine, or offloaded to the disk) are identified by the
        files they came from, or by hub id and commit.

        Raises:
            UserError: such weights from a hub id whose commit is not known.
        """
        tensors = {**dict(self.hf.named_parameters()), **dict(self.hf.named_buffers())}
        if any(tensor.is_meta for tensor in tensors.values()):
            return self._source_fingerprint
        versions = tuple(t._version for t in tensors.values() if not t.is_inference())
        if self._fingerprint is None or self._fingerprint[0] != versions:
            self._fingerprint = versions, _fingerprint(self.hf.config, tensors)
        return self._fingerprint[1]

    @cached_property
    def _source_fingerprint(self) -> str:
        settings = _settings(self.hf.config)
        if Path(self.name).is_dir():
            with ThreadPoolExecutor() as pool:
                files = sorted(Path(self.name).glob("*.safetensors"))
                return sha256_of([settings, *pool.map(_file_digest, files)])
        commit = getattr(self.hf.config, "_commit_hash", None)
        if not commit:
            raise UserError(f"{self.name}: its weights are not here and its commit is unknown; pass revision=…")
        return sha256_of([settings, self.name, commit])

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
        """Ids and roles of one prompt; see :func:`interp.chat.rendering.render`. The latest prompts are remembered."""
        key = (prompt, tuple(sorted(changes.items())), self.tokenizer.chat_template)
        row = self._rendered.get(key)
        if row is None:
            row = chat.render(self.tokenizer, prompt, **changes)
            self._rendered.put(key, row, len(row))
        return row

    def check_context(self, rows: Sequence[Rendered], new_tokens: int = 0) -> None:
        """Refuse prompts that do not fit, in length or in their ids.

        Raises:
            UserError: names the first prompt that is too long, its length and the limit; or the token without an
                embedding.
        """
        for row in rows:
            if (last := max(row.ids, default=0)) >= self.n_embeddings:
                token = self.tokenizer.convert_ids_to_tokens(last)
                raise UserError(
                    f"prompt {row.id!r}: token {token!r} has id {last}, but {self.name} has {self.n_embeddings} "
                    "embeddings; use the tokenizer that belongs to these weights"
                )
            if len(row) + new_tokens > self.context_length:
                room = f" + {new_tokens} new tokens" if new_tokens else ""
                raise UserError(
                    f"prompt {row.id!r}: {len(row)} tokens{room} but the context of {self.name} is "
                    f"{self.context_length}; shorten it or use another model"
                )

    @property
    def token_budget(self) -> int:
        """Default slots of one forward pass without generation."""
        if self.device.type != "cpu":
            return TOKEN_BUDGET
        return min(CPU_TOKEN_BUDGET, max(CPU_LEAST, CPU_NUMBERS // self.d_model))

    def batch(self, rows: Sequence[Rendered], side: Literal["left", "right"] = "right") -> Batch:
        """``rows`` padded, on the model's device."""
        return collate(rows, self.pad_id, side).to(self.device)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of a forward pass: ids, mask and explicit positions."""
        positions = {"position_ids": batch.position_ids} if self.takes_positions else {}
        return {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False} | positions

    def _orders(self, rows: Sequence[Rendered], token_budget: int | None, padded: bool = True) -> list[list[int]]:
        budget = self.token_budget if token_budget is None else token_budget
        return token_budget_batches([len(row) for row in rows], budget, padded=padded)

    def residuals(
        self,
        rows: Sequence[Rendered],
        layers: LayerSpec = "all",
        edits: Sequence[Edit] = (),
        *,
        where: Selection | None = None,
        token_budget: int | None = None,
    ) -> dict[int, list[Float[Tensor, "token d_model"]]]:
        """The residual stream after ``layers`` of every row, in the order of ``rows``.

        Args:
            where: positions to keep, in their order (default: every token).

        Batches are cut by length; padding is gone from the result. The forward pass ends at the deepest
        layer, so edits beyond it have no effect. Tensors are in the model's dtype, on its device.

        Raises:
            UserError: a prompt too long, or whose activations are not finite.
        """
        wanted = resolve_layers(layers, self.n_layers)
        out: dict[int, list[Any]] = {layer: [None] * len(rows) for layer in wanted}
        masks = find_matches(where, rows) if where else None
        kept = [[p for p, flag in enumerate(mask) if flag] for mask in masks] if masks else None

        def keep(layer: int, x: Tensor) -> None:
            for j, i in enumerate(order):  # copies: a view would pin the padded block
                out[layer][i] = x[j, kept[i]] if kept else x[j, : len(rows[i])].clone()
                sound.append(torch.isfinite(out[layer][i]).all())

        self.check_context(rows)
        check_edits(self, edits, rows)
        for order in self._orders(rows, token_budget):
            sound: list[Tensor] = []  # asked about once a batch: each answer waits for the device
            with torch.no_grad():
                self.read(self.batch([rows[i] for i in order]), wanted, keep, edits)
            if not all(bool(one) for one in sound):
                first = next(k for k, one in enumerate(sound) if not bool(one))
                refuse_numbers(self.name, rows[order[first % len(order)]].id, "activations")
        return out

    def read(self, batch: Batch, layers: Sequence[int], sink: Sink, edits: Sequence[Edit] = ()) -> None:
        """One forward pass of a padded batch; ``sink(layer, residual)`` gets a view of the stream after each layer.

        The pass ends after the deepest layer. Edits that match nothing here, or come later, are left out.
        """
        live = live_edits([e for e in edits if e.layer <= max(layers)], batch.rows)
        with self.evaluating(), edit(self, batch.rows, live), capture(self, layers, sink):
            self.base(**self.inputs(batch))

    def last_logits(self, batch: Batch, edits: Sequence[Edit] = (), past: Any = None) -> Float[Tensor, "row vocab"]:
        """Logits after the last token of every row of a batch padded on the left; the head runs there alone.

        ``past`` holds keys and values of the batch's first columns.
        """
        given = self.inputs(batch) | ({"logits_to_keep": 1} if self.head_takes_last else {})
        if past is not None:
            known = past.get_seq_length()
            given |= {name: given[name][:, known:] for name in ("input_ids", "position_ids") if name in given}
            given |= {"past_key_values": past, "use_cache": True}
        with self.evaluating(), edit(self, batch.rows, edits):
            return self.hf(**given).logits[:, -1]

    def continuations(
        self, batch: Batch, settings: Any, edits: Sequence[Edit] = (), past: Any = None
    ) -> Int[Tensor, "row new"]:
        """Ids generated after a batch padded on the left, by a ``GenerationConfig`` that nothing is added to.

        ``past`` holds keys and values of the batch's first columns.
        """
        own = self.hf.generation_config
        watch = LogitsWatch(self.name, [row.id for row in batch.rows], bool(settings.do_sample))
        # The checkpoint's own settings fill every gap of those passed in, so they step aside for the call.
        self.hf.generation_config = settings
        try:
            with self.evaluating(), edit(self, batch.rows, edits, settings.max_new_tokens - 1):
                said = self.hf.generate(
                    batch.ids, attention_mask=batch.mask, past_key_values=past, logits_processor=[watch]
                )
            watch.check()
            return said[:, batch.ids.shape[1] :]
        finally:
            self.hf.generation_config = own

    def next_token_logits(
        self,
        rows: Sequence[Rendered],
        edits: Sequence[Edit] = (),
        *,
        token_budget: int | None = None,
        prompts: Past | None = None,
    ) -> Float[Tensor, "row vocab"]:
        """Logits after each row's last token, float32 on the CPU; the head runs at that token alone.

        ``prompts`` keeps what was read of these prompts for the next call, where edits leave their beginning alone.

        Raises:
            UserError: a prompt too long, or whose logits are NaN or infinite.
        """
        logits = torch.empty((len(rows), self.vocab_size))
        self.check_context(rows)
        check_edits(self, edits, rows)
        for order in self._orders(rows, token_budget, self.pads):
            batch = self.batch([rows[i] for i in order], side="left")
            live = live_edits(edits, batch.rows)
            past = prompts.past(batch.rows, live) if prompts else None
            with torch.no_grad():
                found = self.last_logits(batch, live, past)
            logits[order] = found[:, : self.vocab_size].float().cpu()
            check_best(self.name, [row.id for row in batch.rows], logits[order].amax(-1))
        return logits


def _fingerprint(config: Any, tensors: dict[str, Tensor]) -> str:
    """Hash of what decides the activations; hashing runs in threads, since hashlib releases the lock."""

    def digest(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        return f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"

    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(digest, sorted(tensors.items())))
    return hashlib.sha256("\n".join([_settings(config), *parts]).encode()).hexdigest()


def _settings(config: Any) -> str:
    """The configuration without what does not change a forward pass."""
    volatile = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
    return json.dumps({k: v for k, v in config.to_dict().items() if k not in volatile}, sort_keys=True, default=str)


def _file_digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
