"""Where the signal is lost and which components lose it: attribution, readout, patching and restoration in one go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pingscope.experiments.agents.rollout import MakeEnvironment
from pingscope.experiments.studies.claims import cost_in_words, number, percent
from pingscope.experiments.studies.mechanism.attribution import attribution_study
from pingscope.experiments.studies.mechanism.components import BUDGET, restoration_study
from pingscope.experiments.studies.mechanism.patching import patching_study
from pingscope.experiments.studies.mechanism.readout import readout_study
from pingscope.experiments.tasks.records import Record
from pingscope.experiments.tasks.sources import take
from pingscope.interp.causal.patching import check_pair
from pingscope.interp.errors import UserError
from pingscope.interp.model.hooked import HookedModel
from pingscope.probes.logistic import LayerProbes
from pingscope.probes.multiplicity import Q


def mechanism_study(
    models: Mapping[str, HookedModel],
    probes: Mapping[str, LayerProbes],
    validation: Sequence[Record],
    test: Sequence[Record],
    make_env: MakeEnvironment,
    *,
    n: int = 60,
    judged: int = 24,
    budget: int = BUDGET,
    max_turns: int = 5,
    max_new_tokens: int = 40,
    refusals: Sequence[str] = (),
    seed: int = 0,
    transfer: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int], object] = lambda n: None,
    keep: Callable[[str, Callable[[], Any]], Any] = lambda name, compute: compute(),
) -> dict[str, Any]:
    """The sections ``attribution, readout, patching, restoration`` and ``mechanism_claims`` of ``results.json``.

    Args:
        models: ``base`` and ``agent``; probes: the base's at least, fitted on chat prompts.
        n: tasks per label behind the maps and the search; what the search found is reported on all of ``test``.
        judged: tasks per label whose first turn is generated under each patch of the map.
        budget: forward passes of the search for components.
        transfer: take probes that were fitted on other models than these.
        keep: gives a section that was computed before, or computes it and keeps it.

    A section that these tasks do not allow (one family, nothing lost) is left out, and said.
    """
    check_pair(models["base"], models["agent"])
    for name, found in probes.items():
        found.check_model(models[name], transfer=transfer, path=f"probes of {name}")
    shown = take(list(test), n)
    say("mechanism: attribution")
    sections: dict[str, Any] = {
        "attribution": keep("attribution", lambda: attribution_study(models, probes["base"], shown, seed=seed))
    }
    say("mechanism: readout against knowledge")
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "refusals": refusals, "seed": seed}
    sections["readout"] = keep(
        "readout", lambda: readout_study(models, probes, shown, max_new_tokens=max_new_tokens, seed=seed)
    )
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "patching": lambda: patching_study(models, shown, judged=judged, progress=progress, **limits),
        "restoration": lambda: restoration_study(
            models, take(list(validation), n), list(test), make_env,
            budget=budget, max_turns=max_turns, progress=progress, **limits,
        ),
    }  # fmt: skip
    for name, step in steps.items():
        say(f"mechanism: {name}")
        try:
            sections[name] = keep(name, step)
        except UserError as reason:
            say(f"mechanism: {name} left out: {reason}")
    return sections | {"mechanism_claims": mechanism_claims(sections)}


def mechanism_claims(sections: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the numbers say in plain words; each with its rule."""
    claims = [_carriers(sections["attribution"])]
    if "patching" in sections:
        claims.append(_restoring(sections["patching"]))
    if "restoration" in sections:
        claims.append(_set(sections["restoration"]))
    return claims


def _carriers(section: Mapping[str, Any]) -> dict[str, Any]:
    layer, cell = list(section["layers"].items())[-1]
    total = cell["total"]["lost"]
    parts = [
        (name, lost, q)
        for name, lost, q in zip(cell["components"], cell["lost"], cell["q"], strict=True)
        if q is not None and q <= Q and lost["value"] * total["value"] > 0
    ]
    parts.sort(key=lambda part: -abs(part[1]["value"]))
    carried = sum(lost["value"] for _, lost, _ in parts[:3])
    real = total["ci"][0] is not None and total["ci"][0] > max(abs(draw["total"]["value"]) for draw in cell["random"])
    share = f" They carry {100 * carried / total['value']:.0f}% of it." if real and parts else ""
    names = ", ".join(f"{name} ({lost['value']:+.1f})" for name, lost, _ in parts[:3]) or "no component"
    return {
        "id": "components-lost",
        "text": f"At the final token after layer {layer} the probe's harmful-benign logit gap fell by "
        f"{number(total)}, mostly in what these write: {names}.{share}",
        "holds": bool(real and parts),
        "evidence": {
            "gap lost": total,
            **{f"lost by {name}": lost for name, lost, _ in parts[:3]},
            "random directions, gap lost": "; ".join(number(draw["total"]) for draw in cell["random"]),
            "rule": f"interval above every random direction; components at a false discovery rate of {100 * Q:.0f}%",
        },
    }


def _restoring(section: Mapping[str, Any]) -> dict[str, Any]:
    cells = {layer: by_role["final"] for layer, by_role in section["maps"]["denoise"]["harmful"].items()}
    known = {layer: cell for layer, cell in cells.items() if cell["share"]["value"] is not None}
    if not known:
        return {
            "id": "state-restores",
            "text": "Base and agent do not differ in their refusal log-odds on harmful tasks: nothing to restore.",
            "holds": None,
            "evidence": section["reference"],
        }
    layer = max(known, key=lambda name: known[name]["share"]["value"])
    cell = known[layer]
    # What a benign prompt's state does as well is the model's lean, not this prompt's harm.
    own = [name for name, one in known.items() if one["share"]["value"] >= max(0.5, 2 * one["control"]["value"])]
    since = (
        f"; half is back, and not by a benign prompt's state, from layer {own[0]} on"
        if own
        else "; no layer alone brings back half"
    )
    return {
        "id": "state-restores",
        "text": "The base's state at the final token, put into the agent on the same harmful prompt, moves its refusal "
        f"log-odds {percent(cell['share'])} of the way back at layer {layer}{since}. The base's state on a benign "
        f"prompt moves it {percent(cell['control'])}.",
        "holds": cell["share"]["value"] >= 0.5 and cell["q"] is not None and cell["q"] <= Q,
        "evidence": {
            **{f"layer {name}": one["share"] for name, one in known.items()},
            "rule": f"≥ 50% and above 0 at a false discovery rate of {100 * Q:.0f}% over the whole map",
        },
    }


def _set(section: Mapping[str, Any]) -> dict[str, Any]:
    held = section["held_out"]
    back, cost, share = held["refusal_restored"], held["cost"], section["share"]
    random = [draw["value"] for draw in held["random"]["refusal_restored"] if draw["value"] is not None]
    worst = max(random) if random else None
    points = None if cost["value"] is None else 100 * cost["value"]
    bars = {
        "≥ 80% of the lost refusal": back["value"] is not None and back["value"] >= 0.8,
        "≤ 5% of the components": share <= 0.05,
        "≤ 1 point of benign success": points is not None and points <= 1,
        "random sets ≤ 10%": worst is not None and worst <= 0.1,
    }
    missed = [name for name, met in bars.items() if not met]
    return {
        "id": "few-components",
        "text": f"Patching {', '.join(section['chosen']) or 'no component'} ({100 * share:.0f}% of "
        f"{section['components']} components) at the final token alone restores {percent(back)} of the lost refusals "
        f"on the held-out family {section['family']}"
        + (", at an unknown cost" if points is None else f" and {cost_in_words(points)} of benign success")
        + (
            ""
            if worst is None
            else f"; {len(random)} random sets of that size restore {100 * sum(random) / len(random):.0f}% on average, "
            f"{100 * worst:.0f}% at best"
        )
        + ".",
        "holds": not missed,
        "evidence": {
            "refusals restored": back,
            "log-odds restored": held["restored"],
            "benign success lost": cost,
            "rule": ", ".join(bars),
            "missed": ", ".join(missed) or "none",
        },
    }
