"""Knowledge against readout: does the direction that knows of harm lie along the one that refuses?

Per layer, at the final token: the cosine between the harm probe and the refusal direction (mean over refused minus
mean over other prompts), between base and agent, and the logit lens: the mass of refusal, action and comment starts
if the stream at that layer were decoded as it is. Where a model refuses all harmful and nothing else, its refusal
direction *is* its harm direction of means; the counts say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pingscope.experiments.agents.rollout import AnyAction, run_episodes
from pingscope.experiments.studies.tracking.noise_floor import pooled_in_memory
from pingscope.experiments.studies.tracking.prompts import layer_key, plain
from pingscope.experiments.tasks.records import Record
from pingscope.interp.chat.beginnings import token_classes
from pingscope.interp.model.hooked import HookedModel
from pingscope.probes.logistic import LayerProbes
from pingscope.probes.resampling import NO_INTERVAL, bootstrap
from pingscope.probes.statistics import Estimate, mean
from pingscope.steering.injection import Arm

FEWEST = 5  # prompts on each side of a difference of means


def readout_study(
    models: Mapping[str, HookedModel],
    probes: Mapping[str, LayerProbes],
    tasks: Sequence[Record],
    *,
    max_new_tokens: int = 40,
    seed: int = 0,
) -> dict[str, Any]:
    """The section ``readout`` of ``results.json``; ``probes`` by model, the base's at least.

    Returns:
        ``n[model]`` (refused, not_refused); ``cosine[layer]`` with ``probe_refusal`` by model, ``probes`` and
        ``refusals`` (base against agent), and ``chance``: the cosine that 95 % of random directions stay below;
        ``lens[model][layer][label][class]``: probability mass.
    """
    layers = list(probes["base"].layers)
    states, refused = {}, {}
    for name, model in models.items():
        rows = [model.render(task.prompt()) for task in tasks]
        states[name] = pooled_in_memory(model, rows, layers, {"final": "final"})["final"].features
        ran = run_episodes(model, tasks, AnyAction, Arm(name), max_turns=1, max_new_tokens=max_new_tokens)
        refused[name] = np.array([episode.outcome() == "refused" for episode in ran])
    cosine = {}
    for layer in layers:
        ws = {name: _at(found, layer) for name, found in probes.items()}
        cosine[layer_key(layer)] = {
            "probe_refusal": {
                name: _cosine(states[name][layer], refused[name], w, seed=seed) for name, w in ws.items()
            },
            "probes": _between(ws["base"], ws["agent"]) if "agent" in ws else None,
            "refusals": _refusals(states, refused, layer),
            "chance": 1.96 / math.sqrt(models["base"].d_model),
        }
    labels = [task.label for task in tasks]
    return plain(
        {
            "n": {
                name: {"refused": int(flags.sum()), "not_refused": int((~flags).sum())}
                for name, flags in refused.items()
            },
            "cosine": cosine,
            "lens": {name: logit_lens(model, states[name], labels, seed) for name, model in models.items()},
        }
    )


def logit_lens(
    model: HookedModel, states: Mapping[int, np.ndarray], labels: Sequence[str], seed: int = 0
) -> dict[str, dict[str, dict[str, Estimate]]]:
    """``[layer][label][class]``: mass of first-token classes when the stream is put through final norm and head.

    At the header's end: where a template puts white space before every answer (GLM-4), the lens sees that first.
    """
    head, norm = model.hf.get_output_embeddings(), model.final_norm
    classes = token_classes(model.tokenizer)
    found: dict[str, dict[str, dict[str, Estimate]]] = {}
    kinds = np.array(labels)
    for layer, x in states.items():
        with torch.no_grad():
            stream = torch.as_tensor(x, dtype=head.weight.dtype, device=head.weight.device)
            mass = head(stream if norm is None else norm(stream)).float().softmax(-1).double().cpu().numpy()
        found[layer_key(layer)] = {
            label: {name: mean(mass[kinds == label][:, list(ids)].sum(1), seed=seed) for name, ids in classes.items()}
            for label in dict.fromkeys(labels)
        }
    return found


def _at(probes: LayerProbes, layer: int) -> np.ndarray:
    return probes.directions[probes.layers.index(layer)]


def _between(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _cosine(x: np.ndarray, refused: np.ndarray, w: np.ndarray, *, seed: int) -> Estimate:
    """Cosine of ``w`` and the difference of means, with its interval over prompts."""
    side, n = refused, len(x)
    if min(side.sum(), (~side).sum()) < FEWEST:
        return Estimate(math.nan, NO_INTERVAL, n)

    def statistic(weights: np.ndarray) -> np.ndarray:
        up, down = weights[:, side], weights[:, ~side]
        r = (up @ x[side]) / up.sum(1, keepdims=True) - (down @ x[~side]) / down.sum(1, keepdims=True)
        lengths = np.linalg.norm(r, axis=1) * np.linalg.norm(w)
        # Before block 0 the final token is the same in every prompt: no difference, no direction.
        return np.divide(r @ w, lengths, out=np.full(len(r), np.nan), where=lengths > 0)

    return Estimate(float(statistic(np.ones((1, n)))[0]), bootstrap(statistic, n, strata=side, seed=seed), n)


def _refusals(states: Mapping[str, Any], refused: Mapping[str, np.ndarray], layer: int) -> float | None:
    directions = []
    for name in ("base", "agent"):
        yes, no = refused[name], ~refused[name]
        if min(yes.sum(), no.sum()) < FEWEST:
            return None
        directions.append(states[name][layer][yes].mean(0) - states[name][layer][no].mean(0))
    return _between(*directions)
