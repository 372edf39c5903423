"""What a user's own checkpoint looks like to this toolkit, and whether its numbers can be trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from pingscope.experiments.cli.tables import print_table
from pingscope.experiments.run.progress import bar, say
from pingscope.interp.backends import BACKENDS, adopt
from pingscope.interp.backends.parity import Check, run_parity, sample_prompts, sliding_window
from pingscope.interp.chat.rendering import Prompt, Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.model.hooked import HookedModel

EXAMPLE = Prompt("example", "Send the invoice to the office.", system="You are a web agent.", page="inbox, notes")
GIGABYTE = 1e9


@dataclass(frozen=True)
class Finding:
    """One line of the first table; ``warning`` is empty where all is well."""

    name: str
    value: str
    warning: str = ""


def doctor_command(
    open_model: Callable[[], HookedModel], backends: Sequence[str], max_tokens: int, out: Path | None
) -> None:
    for backend in backends:
        if backend not in BACKENDS:
            raise UserError(f"--backend {backend!r}: unknown; use one of {', '.join(BACKENDS)}")
    model = open_model()
    findings = examine(model)
    print_table(["checkpoint", "", ""], [[f.name, f.value, f.warning] for f in findings])
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
    failed = [f"{backend}: {c.name}" for backend, found in checks.items() for c in found if not c.ok]
    if failed:
        say(f"failed: {', '.join(failed)}; do not trust numbers of this model until that is understood")
        raise typer.Exit(1)


def check_backend(
    model: HookedModel, backend: str, rows: Sequence[Rendered], progress: Callable[[str], None]
) -> list[Check]:
    """The parity suite of one backend against plain runs of ``model``; transformer_lens gets a copy."""
    return run_parity(adopt(model, backend), model, rows, progress=progress)


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
        Finding("size", f"{model.n_layers} layers x {model.d_model}, {model.n_heads} heads x {model.head_dim}"),
        Finding("parts of a block", "attention and MLP add up" if not parts else "stream only", parts),
        Finding("context", f"{model.context_length} tokens" + (f", sliding window {window}" if window else "")),
        Finding("dtype", dtype, "half precision: parity is looser" if "16" in dtype else ""),
        Finding("device", str(model.device)),
        Finding("attention", kernel),
        *_template(model),
        *_memory(model),
    ]


def _template(model: HookedModel) -> list[Finding]:
    try:
        row = model.render(EXAMPLE)
    except UserError as error:
        try:
            row = model.render(EXAMPLE, system=None)
        except UserError:
            return [Finding("chat template", "cannot render", str(error))]
        without = "refuses a system prompt; put it in the instruction"
    else:
        without = ""
    bos = getattr(model.tokenizer, "bos_token_id", None)
    count = row.ids.count(bos) if bos is not None else 0
    doubled = f"{count} BOS tokens; a template should write one or none" if count > 1 else ""
    roles = Counter(row.roles)
    return [
        Finding("chat template", f"hash {model.template_hash[:12]}", without),
        Finding("BOS tokens", "no BOS in the vocabulary" if bos is None else str(count), doubled),
        Finding("roles", ", ".join(f"{name} {n}" for name, n in roles.items())),
        Finding("final token", repr(model.tokenizer.decode([row.ids[row.final]]))),
    ]


def _memory(model: HookedModel) -> list[Finding]:
    """Decimal gigabytes: of the weights, and per 1000 tokens of keys and values, and of a float32 store."""
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    config = model.hf.config.get_text_config(decoder=True)
    kv_heads = getattr(config, "num_key_value_heads", None) or model.n_heads
    cache = 2 * model.n_layers * kv_heads * model.head_dim * model.hf.dtype.itemsize * 1000
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
        "findings": {f.name: {"value": f.value, "warning": f.warning} for f in findings},
        "parity": {
            backend: {c.name: {"error": c.error, "tolerance": c.tolerance, "n": c.cases, "ok": c.ok} for c in found}
            for backend, found in checks.items()
        },
    }
