"""What a user's own checkpoint looks like to this toolkit, and whether its numbers can be trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from pingscope.experiments.cli.tables import print_table
from pingscope.experiments.models.one_answer import Finding, try_prompt
from pingscope.experiments.run.progress import bar, say
from pingscope.interp.backends import BACKENDS, adopt
from pingscope.interp.backends.parity import Check, run_parity, sample_prompts, sliding_window
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.model.hooked import HookedModel

GIGABYTE = 1e9


def doctor_command(
    open_model: Callable[[], HookedModel], backends: Sequence[str], max_tokens: int, out: Path | None
) -> None:
    """Look, try one prompt and one answer, compare with plain runs; exit code 1 if anything is not to be trusted."""
    for backend in backends:
        if backend not in BACKENDS:
            raise UserError(f"--backend {backend!r}: unknown; use one of {', '.join(BACKENDS)}")
    model = open_model()
    findings = examine(model)
    print_findings(findings)
    rows = sample_prompts(model, max_tokens)
    window = sliding_window(model)
    if window and max(map(len, rows)) <= window:
        say(f"no prompt is longer than the sliding window ({window}); raise --max-tokens to test beyond it")
    checks: dict[str, list[Check]] = {}
    for backend in backends:
        with bar(backend, None) as advance:
            checks[backend] = check_backend(model, backend, rows, lambda name: advance(info=name))
    print_parity(checks, model)
    if out is not None:
        from pingscope.interp.files import write_json

        write_json(out, to_json(model, findings, checks))
    failed = [f.name for f in findings if f.fails]
    failed += [f"{backend}: {c.name}" for backend, found in checks.items() for c in found if not c.ok]
    if failed:
        say(f"failed: {', '.join(failed)}; do not trust numbers of this model until that is understood")
        typer.echo(f"verdict: {model.name} is not to be trusted here ({len(failed)} of the checks above failed)")
        raise typer.Exit(1)
    warned = [f.name for f in findings if f.warning]
    care = f"; mind the notes on {', '.join(warned)}" if warned else ""
    typer.echo(f"verdict: {model.name} can be trusted here: {sum(map(len, checks.values()))} comparisons agree{care}")


def print_findings(findings: Sequence[Finding]) -> None:
    """The first table, and under it what is to be minded: sentences would make the table wider than a terminal."""
    print_table(["checkpoint", "found"], [[f.name, f.value] for f in findings])
    for finding in findings:
        if finding.warning:
            typer.echo(f"{'FAILED' if finding.fails else 'note'}: {finding.name}: {finding.warning}")


def check_backend(
    model: HookedModel, backend: str, rows: Sequence[Rendered], progress: Callable[[str], None]
) -> list[Check]:
    """The parity suite of one backend against plain runs of ``model``; transformer_lens gets a copy."""
    try:
        return run_parity(adopt(model, backend), model, rows, progress=progress)
    except UserError:
        raise
    except Exception as broken:  # a foreign architecture fails in any way
        reason = " ".join(str(broken).split())[:160]
        raise UserError(
            f"{model.name}: the comparison by backend {backend} broke off ({type(broken).__name__}: {reason}); do not "
            "trust numbers of this model"
        ) from broken


def examine(model: HookedModel) -> list[Finding]:
    """Architecture, numbers, template and memory of a loaded model, in the order they are printed."""
    hf, window = model.hf, sliding_window(model)
    dtypes = Counter(str(p.dtype).removeprefix("torch.") for p in hf.parameters())
    dtype = ", ".join(name for name, _ in dtypes.most_common())
    kernel = getattr(hf.config, "_attn_implementation", None) or "its own"
    parts = model.parts_problem
    return [
        Finding("model", model.name),
        Finding("architecture", f"{type(hf).__name__}, family {model.family.name}, blocks at {model.family.blocks}"),
        Finding("size", f"{model.n_layers} layers x {model.d_model}" + _heads(model)),
        Finding("parts of a block", "attention and MLP add up" if not parts else "stream only", parts),
        Finding("context", f"{model.context_length} tokens" + (f", sliding window {window}" if window else "")),
        Finding("dtype", dtype, "half precision: parity is looser" if "16" in dtype else ""),
        Finding("device", str(model.device)),
        Finding("attention", kernel),
        *try_prompt(model),
        *_memory(model),
    ]


def _heads(model: HookedModel) -> str:
    """Heads by size: some families' layers differ."""
    if not model.n_heads:
        return ", no attention heads"
    sizes = " or ".join(map(str, sorted({one.size for one in model.heads})))
    return f", {model.n_heads} heads x {sizes}"


def _memory(model: HookedModel) -> list[Finding]:
    """Decimal gigabytes: of the weights, and per 1000 tokens of keys and values, and of a float32 store."""
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    cache = 2 * sum(one.kv_width for one in model.heads) * model.hf.dtype.itemsize * 1000
    store = model.n_layers * model.d_model * 4 * 1000
    return [
        Finding("memory, weights", f"{weights / GIGABYTE:.3f} GB"),
        Finding("memory, KV cache", f"{cache / GIGABYTE:.4f} GB per 1000 tokens"),
        Finding("disk, all layers", f"{store / GIGABYTE:.4f} GB per 1000 tokens in float32"),
    ]


def print_parity(checks: dict[str, list[Check]], model: HookedModel) -> None:
    """Worst errors by check and backend; a failed one is marked."""
    names = list(dict.fromkeys(c.name for found in checks.values() for c in found))
    by_name = {backend: {c.name: c for c in found} for backend, found in checks.items()}

    def cell(check: Check | None) -> str:
        if check is None:
            return "–"
        return f"{check.error:.1e}" + ("" if check.ok else f" FAILED (> {check.tolerance:.0e}, {check.worst})")

    rows = [[name, *(cell(by_name[backend].get(name)) for backend in checks)] for name in names]
    print_table(
        ["parity", *checks], rows,
        "worst relative error against unpadded single-prompt Hugging Face runs; generation: share of answers that "
        f"differ; {model.hf.dtype}".replace("torch.", ""),
    )  # fmt: skip


def to_json(model: HookedModel, findings: Sequence[Finding], checks: dict[str, list[Check]]) -> dict[str, Any]:
    """What was printed, for a file."""
    return {
        "model": model.name,
        "findings": {f.name: {"value": f.value, "warning": f.warning, "fails": f.fails} for f in findings},
        "parity": {
            backend: {c.name: {"error": c.error, "tolerance": c.tolerance, "n": c.cases, "ok": c.ok} for c in found}
            for backend, found in checks.items()
        },
    }
