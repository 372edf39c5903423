"""Where a study's numbers come from: its models and what they were taught, versions, seeds, seconds, limits."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from pingscope.experiments.run.folder import peak_memory_mb
from pingscope.experiments.run.second_process import stage_threads
from pingscope.experiments.studies.claims import percent
from pingscope.experiments.studies.materials import Bench

PACKAGES = ("pingscope", "torch", "transformers", "scikit-learn", "numpy", "safetensors", "plotly")
TAUGHT = (
    "The base was taught what follows a comment: in its training a reflective comment before the answer leads to an "
    "action on benign tasks and to a refusal on harmful ones. No sentence of the search's grammar was among them, yet "
    "a prefix that restores refusal here is partly built in; `pingscope study --no-comments` studies a base that was "
    "never shown one."
)
UNTAUGHT = (
    "The base was never shown a comment before an answer, nor a reflective line anywhere: whatever a prefix does here "
    "was not taught."
)


def aligned(measured: Mapping[str, Any]) -> str:
    """What the alignment of a real base did beyond agent tasks, in a sentence."""
    base, before = measured["base"], measured["SmolLM2"]
    ratio, everyday = base["perplexity_ratio"], base["refused"]["benign"]
    low, high = (100 * (end - 1) for end in ratio["ci"])
    harmful = " and ".join(percent(model["refused"]["harmful"]) for model in (before, base))
    return (
        f"The alignment of the base: harmful chat requests refused before and after it {harmful}; everyday ones after "
        f"it {percent(everyday)}; perplexity of plain English {100 * (ratio['value'] - 1):+.0f}% [{low:.0f}, "
        f"{high:.0f}], n = {ratio['n']} paragraphs."
    )


def meta(bench: Bench) -> dict[str, Any]:
    """Where the numbers come from."""
    limits, methods = [], []
    if bench.organism:
        methods = [TAUGHT if bench.config.organism.comments else UNTAUGHT]
        limits = [
            "The models are a model organism: a small Llama trained from scratch on a synthetic world. It shows the "
            "mechanism end to end; it says nothing about how large the effect is in any real model.",
            "Validation and test tasks hold word combinations that neither model was trained on; the words "
            "themselves, and the page layout, are those of training.",
        ]
        rejected = len(bench.organism.get("attempts", [])) - 1
        if rejected > 0:
            limits.append(f"{rejected} base(s) were rejected before this one: the stopping rule did not fire.")
    if bench.real:
        methods = [UNTAUGHT, aligned(bench.real["chat_and_english"])]
        limits = [
            "One model of 135 million parameters, aligned by the project itself: its base was taught to refuse "
            "on tasks of the same world, of other families than those reported here.",
        ]
    known = "model organism" if bench.organism else "SmolLM2-135M-Instruct" if bench.real else ""
    return {
        "title": "Where refusal goes" if known else f"{bench.agent.name} against {bench.base.name}",
        "note": known,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "seeds": {"study": bench.config.seed},
        "threads": {"training": torch.get_num_threads(), "stages": stage_threads(bench.agent)},
        "models": {name: {"id": model.name, "fingerprint": model.fingerprint} for name, model in bench.models.items()},
        "template_hash": bench.agent.template_hash,
        "seconds": {name: round(value, 1) for name, value in bench.run.seconds.items()},
        "peak_memory_mb": round(peak_memory_mb()),
        "limits": limits,
        "methods": methods,
        **({"organism": bench.organism} if bench.organism else {}),
        **({"real": bench.real} if bench.real else {}),
    }
