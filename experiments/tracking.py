"""Where the safety signal is: probes, tracks over positions, and the readings of the collapse.

Probes are fitted on chat instructions and read on agent prompts, as in the paper (section 5). The first arm is
the reference that every other arm is compared with, on the same prompts. Activations are kept in stores (a second
run finds them), with the probes and the per-prompt values beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.agents.records import Record
from experiments.noise_floor import Floor, pooled_in_memory, random_weights
from interp.chat import Prompt, Rendered
from interp.errors import UserError
from interp.extract import extract
from interp.io import atomic_write, sha256_of
from interp.model import HookedModel
from interp.selection import LayerSpec, resolve_layers
from interp.store import ActivationStore
from probes.collapse import POSITIONS, Reference, label_controls, placed_scores, readings
from probes.controls import evaluate, text_baselines
from probes.logistic import C_DEFAULT, LayerProbes, is_harmful
from probes.pooling import POOLINGS, Pooled, pool, read_tokens
from probes.statistics import Estimate, auroc, difference
from probes.tracks import by_role, curves, summarise, token_logits, token_rows, values_table
from probes.verdict import READINGS, noise_floor, verdict

if TYPE_CHECKING:
    from steering.injection import Arm

SHUFFLED_PROBES = 3
LABELS = ("harmful", "benign", "lookalike")


@dataclass(frozen=True)
class Tracking:
    """What every step below shares."""

    models: Mapping[str, HookedModel]
    arms: Sequence[Arm]
    chat: Sequence[Record]
    tasks: Sequence[Record]
    out: Path
    layers: list[int]
    C: float
    seed: int

    @property
    def origin(self) -> HookedModel:
        """The reference arm's model: its probes do the reading."""
        return self.models[self.arms[0].model]

    def rows(self, arm: Arm) -> list[Rendered]:
        return [self.models[arm.model].render(arm.apply(task.prompt())) for task in self.tasks]

    def store(self, name: str, model: HookedModel, rows: Sequence[Rendered]) -> ActivationStore:
        # Named by content: a changed model or prompt gets a store of its own, an unchanged one is found again.
        content = sha256_of([model.fingerprint, self.layers, [[row.id, row.label, row.ids] for row in rows]])
        return extract(model, rows, self.out / "activations" / f"{name}-{content[:8]}", layers=self.layers)


def track(
    models: Mapping[str, HookedModel],
    arms: Sequence[Arm],
    chat: Sequence[Record],
    tasks: Sequence[Record],
    out_dir: str | Path,
    *,
    layers: LayerSpec = "all",
    pooling: str = "mean_prompt",
    C: float = C_DEFAULT,
    probes: LayerProbes | None = None,
    floor: int = 20,
    floor_texts: Sequence[Prompt] | None = None,
    examples: int = 6,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Fit probes on ``chat`` for every model, then read every arm on ``tasks``.

    Args:
        models: by the names that the arms use.
        arms: the first is the reference, without an injection. Arms with edits have no track.
        pooling: of the probes that tracks and readings use; all poolings are fitted, evaluated and saved.
        probes: read with these instead of newly fitted ones.
        floor: number of updates without behaviour change; ``floor_texts`` are what they train on (default: the
            chat prompts).
        examples: prompts whose tokens are kept for display.

    Returns:
        The sections ``probes, baselines, tracks, curves, tokens, collapse, collapse_claims, floor`` of
        ``results.json`` as plain JSON values. Writes ``activations/``, ``probes/`` and ``tracks.parquet``.

    Raises:
        UserError: arms with edits, no harmful or no benign chat prompt, and whatever extraction refuses.
    """
    steered = [arm.name for arm in arms if arm.edits]
    if steered:
        raise UserError(f"track: arm {steered[0]!r} edits activations; track only arms that change the text")
    wanted = resolve_layers(layers, models[arms[0].model].n_layers)
    job = Tracking(models, arms, chat, tasks, Path(out_dir), wanted, C, seed)

    say("probes: chat activations")
    pooled_chat, fitted, table = fit_probes(job)
    probes = probes or fitted[arms[0].model, pooling]
    say("tracks: agent activations")
    stores = {arm.name: job.store(arm.name, models[arm.model], job.rows(arm)) for arm in arms}
    sections = read_tracks(job, stores, probes, examples)
    say("collapse: noise floor and readings")
    sections |= read_collapse(job, stores, probes, pooled_chat[arms[0].model][pooling], floor, floor_texts)
    lengths = {"chat": _chat_rows(job, job.origin), "agent_prompts": job.rows(arms[0])}
    records = {"chat": chat, "agent_prompts": tasks}
    baselines = {name: _baselines(records[name], rows, seed) for name, rows in lengths.items()}
    return plain({"probes": table, "baselines": baselines, **sections})


def fit_probes(
    job: Tracking,
) -> tuple[dict[str, dict[str, Pooled]], dict[tuple[str, str], LayerProbes], dict[str, Any]]:
    """Fit, save and evaluate the probes of every model and pooling on the chat prompts.

    Returns:
        Pooled chat activations by model and pooling, probes by (model, pooling), and the ``probes`` section.
    """
    names = list(dict.fromkeys(arm.model for arm in job.arms))
    pooled: dict[str, dict[str, Pooled]] = {}
    for name in names:
        store = job.store(f"chat-{name}", job.models[name], _chat_rows(job, job.models[name]))
        pooled[name] = {pooling: pool(store, pooling) for pooling in POOLINGS}
    labels, groups = [record.label for record in job.chat], group_ids(job.chat)
    fitted, table = {}, {}
    for name in names:
        others = [other for other in names if other != name]
        table[name] = {}
        for pooling in POOLINGS:
            features = pooled[name][pooling].features
            model = job.models[name]
            meta = {"pooling": pooling, "model": model.name, "fingerprint": model.fingerprint}
            found = LayerProbes.fit(features, labels, groups=groups, C=job.C, seed=job.seed, meta=meta)
            found.save(job.out / "probes" / f"{name}-{pooling}")
            fitted[name, pooling] = found
            transfer = pooled[others[0]][pooling].features if others else None
            scores = evaluate(features, labels, groups=groups, transfer=transfer, C=job.C, seed=job.seed)
            table[name][pooling] = {layer_key(layer): row for layer, row in scores.items()}
    return pooled, fitted, table


def read_tracks(
    job: Tracking, stores: Mapping[str, ActivationStore], probes: LayerProbes, examples: int
) -> dict[str, Any]:
    """The sections ``tracks``, ``curves`` and ``tokens``; per-prompt values go to ``tracks.parquet``."""
    summaries: dict[str, Any] = {}
    lines: dict[str, Any] = {}
    tables, shown = [], []
    for name, store in stores.items():
        tokens = read_tokens(store.index)
        summaries[name], lines[name] = {}, {}
        for layer in job.layers:
            logits = token_logits(store, probes, layer)
            roles = by_role(tokens, logits)
            summaries[name][layer_key(layer)] = summarise(roles, seed=job.seed)
            lines[name][layer_key(layer)] = curves(tokens, logits, seed=job.seed)
            tables.append(values_table(name, layer, roles))
        for row in token_rows(store, probes, _examples(job.tasks, examples), job.layers):
            logits_by_key = {layer_key(layer): values for layer, values in row["logits"].items()}
            shown.append({"arm": name, **row, "logits": logits_by_key})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(tables), sink)
    atomic_write(job.out / "tracks.parquet", sink.getvalue().to_pybytes())
    return {"tracks": summaries, "curves": lines, "tokens": shown}


def read_collapse(
    job: Tracking,
    stores: Mapping[str, ActivationStore],
    probes: LayerProbes,
    chat: Pooled,
    floor: int,
    floor_texts: Sequence[Prompt] | None,
) -> dict[str, Any]:
    """The sections ``collapse``, ``collapse_claims`` and ``floor``; ``chat`` trains the shuffled-label probes."""
    first = job.arms[0].name
    pooled = {name: {at: pool(store, kind) for at, kind in POSITIONS.items()} for name, store in stores.items()}
    reference = Reference(pooled[first], probes, group_ids(job.tasks), job.C, job.seed)
    texts = floor_texts or [record.prompt() for record in job.chat]
    floors = Floor(job.origin, job.rows(job.arms[0]), texts, floor, job.layers, job.seed)
    limits = noise_floor(reference, floors.updates(), job.layers)
    untrained = _untrained(job, reference)
    rng = np.random.default_rng(job.seed)
    labels = is_harmful([record.label for record in job.chat])
    mixed = [LayerProbes.fit(chat.features, rng.permutation(labels), C=job.C) for _ in range(SHUFFLED_PROBES)]
    collapse: dict[str, dict[str, Any]] = {arm.name: {} for arm in job.arms}
    for layer in job.layers:
        base = readings(reference, reference.pooled, layer)
        for name, positions in pooled.items():
            own = base if name == first else readings(reference, positions, layer)
            shuffled = label_controls(reference, positions, mixed, layer)
            collapse[name][layer_key(layer)] = {
                **own,
                "floor": limits[layer],
                "controls": {"random_weights": untrained[layer], "shuffled_labels": shuffled},
                "verdict": verdict(base, own, limits[layer]),
            }
    claims = collapse_claims(collapse, [arm.name for arm in job.arms if arm.model != job.arms[0].model])
    return {"collapse": collapse, "collapse_claims": claims, "floor": floors.summary()}


def collapse_claims(collapse: Mapping[str, Any], arms: Sequence[str]) -> list[dict[str, Any]]:
    """One statement per reading for the first of ``arms``: in which layers it shows a collapse, if in any."""
    claims = []
    for reading in READINGS if arms else ():
        verdicts = {layer: row["verdict"][reading] for layer, row in collapse[arms[0]].items()}
        layers = [layer for layer, found in verdicts.items() if found["verdict"] == "collapse"]
        where = f"in {len(layers)} of {len(verdicts)} layers ({', '.join(layers)})" if layers else "in no layer"
        claims.append(
            {
                "id": f"collapse-{reading}",
                "text": f"{arms[0]}: the reading '{reading}' shows a collapse beyond the noise floor {where}.",
                "holds": bool(layers),
                "evidence": {f"layer {layer}": found["reason"] for layer, found in verdicts.items()},
            }
        )
    return claims


def final_gap(
    model: HookedModel, tasks: Sequence[Record], probes: LayerProbes, *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """``[layer]`` -> harmful minus benign logit at the final token, an estimate as plain JSON."""
    rows = [model.render(task.prompt()) for task in tasks]
    pooled = pooled_in_memory(model, rows, list(probes.layers), {"final": "final"})["final"]
    labels = np.array(pooled.labels)
    result = {}
    for layer in probes.layers:
        z = probes.logits(pooled.features[layer], layer)
        result[layer_key(layer)] = difference(z[labels == "harmful"], z[labels == "benign"], seed=seed).to_dict()
    return result


def residual_norms(model: HookedModel, tasks: Sequence[Record], layers: LayerSpec = "all") -> dict[int, float]:
    """Mean norm of the residual at the final token, per layer: the unit of steering doses."""
    rows = [model.render(task.prompt()) for task in tasks]
    wanted = resolve_layers(layers, model.n_layers)
    pooled = pooled_in_memory(model, rows, wanted, {"final": "final"})["final"]
    return {layer: float(np.linalg.norm(x, axis=1).mean()) for layer, x in pooled.features.items()}


def layer_key(layer: int) -> str:
    """A layer's name in results: ``embed`` before block 0, else its number."""
    return "embed" if layer < 0 else str(layer)


def group_ids(records: Sequence[Record]) -> list[str] | None:
    """What may not be split: ``pair_id``, else the record itself; ``None`` when nothing is shared."""
    groups = [record.pair_id or record.id for record in records]
    return groups if len(set(groups)) < len(groups) else None


def plain(value: Any) -> Any:
    """Nested results as JSON values: estimates as dicts, NaN as ``None``."""
    if isinstance(value, Estimate):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _chat_rows(job: Tracking, model: HookedModel) -> list[Rendered]:
    return [model.render(record.prompt()) for record in job.chat]


def _baselines(records: Sequence[Record], rows: Sequence[Rendered], seed: int) -> dict[str, Estimate]:
    texts = [f"{record.instruction}\n{record.context}" for record in records]
    labels, lengths = [record.label for record in records], [len(row) for row in rows]
    return text_baselines(texts, labels, lengths=lengths, groups=group_ids(records), seed=seed)


def _examples(tasks: Sequence[Record], n: int) -> list[str]:
    """The first prompts of every label in turn."""
    by_label = [[task.id for task in tasks if task.label == label] for label in LABELS]
    return [ids[i] for i in range(n) for ids in by_label if i < len(ids)][:n]


def _untrained(job: Tracking, reference: Reference) -> dict[int, dict[str, Estimate]]:
    """What a model of random weights shows at the final token, with probes of its own."""
    model = random_weights(job.origin, job.seed)
    chat = pooled_in_memory(model, _chat_rows(job, model), job.layers, {"mean": "mean_prompt"})["mean"]
    probes = LayerProbes.fit(chat.features, [record.label for record in job.chat], C=job.C)
    pooled = pooled_in_memory(model, job.rows(job.arms[0]), job.layers, {"final": "final"})["final"]
    result = {}
    for layer in job.layers:
        rows, own, _ = placed_scores(reference, pooled, "final", layer)
        harmful, groups = reference.harmful[rows], reference.within(rows)
        z = probes.logits(pooled.features[layer][rows], layer)
        result[layer] = {
            "auroc": auroc(z, harmful, groups, seed=job.seed),
            "placed_auroc": auroc(own, harmful, groups, seed=job.seed),
        }
    return result
