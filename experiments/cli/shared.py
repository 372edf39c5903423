"""What every command does: open its folder, read its tasks, load its model, run arms, leave results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pingscope.experiments.agents.endpoint import Endpoint
from pingscope.experiments.agents.rollout import Episode
from pingscope.experiments.cli.checks import disjoint, safe_out
from pingscope.experiments.cli.endings import unread_hint
from pingscope.experiments.cli.options import ModelOptions, ModelSettings
from pingscope.experiments.cli.parameters import Options
from pingscope.experiments.run.folder import Run
from pingscope.experiments.run.progress import bar, hide_weight_bars, say
from pingscope.experiments.studies.behaviour import run_arm
from pingscope.experiments.tasks.records import Record
from pingscope.experiments.tasks.rows import Skipped
from pingscope.experiments.tasks.sources import environment_for, read_tasks, read_template
from pingscope.interp.errors import UserError
from pingscope.interp.files import read_json, sha256_of, write_json
from pingscope.interp.generate.prompt_cache import PromptCache
from pingscope.interp.loading import load_model
from pingscope.interp.model.belonging import transfer_note
from pingscope.interp.model.hooked import HookedModel
from pingscope.schema import SCHEMA_VERSION, dump_results
from pingscope.steering.injection import SAFETY_SYSTEM, Arm

if TYPE_CHECKING:
    from pingscope.probes.logistic import LayerProbes

COMMAND = "command.json"  # beside results.json: whose results these are


class Episodes:
    """Runs arms on models, journalled in one folder; a model's prompts are read once."""

    def __init__(self, folder: Path, max_turns: int, max_new_tokens: int) -> None:
        self.folder, self.limits = folder, {"max_turns": max_turns, "max_new_tokens": max_new_tokens}
        self._prompts: dict[str, PromptCache] = {}
        self.missing: dict[str, dict[str, str]] = {}  # arm → task → why it has no outcome
        self._began = False  # whether any task of any arm could be run

    def __call__(self, model: HookedModel, arm: Arm, records: Sequence[Record]) -> list[Episode]:
        prompts = self._prompts.setdefault(model.fingerprint, PromptCache(model))
        with bar(arm.name, len(records)) as advance:
            ran = run_arm(
                model, records, arm, environment_for, journal=self.folder / "generations.jsonl", prompts=prompts,
                progress=advance, **self.limits,
            )  # fmt: skip
        if lost := {episode.id: episode.missing for episode in ran if episode.missing is not None}:
            self.missing.setdefault(arm.name, {}).update(lost)
        self._began = self._began or any(episode.missing is None for episode in ran)
        if not self._began:  # not one bad task, but a model, template or limit under which none can be run
            raise UserError(f"{model.name}: none of the {len(ran)} tasks could be run; the first: {ran[0].missing}")
        return ran


def open_run(options: Any) -> Run:
    """The command's folder, closed to others; results of another command or other options are not replaced unasked."""
    safe_out(options)
    run = Run(options.out, say)
    path, mine = run.folder / COMMAND, identity(options)
    if (run.folder / "results.json").exists() and path.exists() and not options.overwrite:
        kept = read_json(path)
        changed = sorted(name for name in mine.keys() | kept.keys() if mine.get(name) != kept.get(name))
        if changed:
            raise UserError(
                f"{run.folder}: holds results of other options (differs in {', '.join(changed)}); pass another --out, "
                "or --overwrite to replace them"
            )
    run.options = mine
    return run


def identity(options: Options) -> dict[str, Any]:
    """The command and its options as JSON; where it writes is no part of what it computes."""
    given = options.model_dump(exclude={"out", "overwrite"})
    command = type(options).__name__.removesuffix("Options").lower()
    return {"command": command} | {name: _content(value) for name, value in given.items()}


def _content(value: Any) -> Any:
    """A file is its content, a folder its place: the same file counts as the same under any path."""
    if isinstance(value, tuple):
        return [_content(one) for one in value]
    if isinstance(value, str | Path):
        kind, colon, rest = str(value).partition(":")
        for place, prefix in ((str(value), ""), (rest, kind + colon)):
            path = Path(place).expanduser()
            if place and len(place) < 4096 and "\n" not in place and path.exists():
                return prefix + (sha256_of(path.read_bytes()) if path.is_file() else str(path.resolve()))
        return str(value)
    return value


def loading(options: ModelSettings) -> dict[str, Any]:
    """The options as keyword arguments of :func:`pingscope.interp.loading.load_model`."""
    return {
        "chat_template": read_template(options.chat_template),
        "template_name": options.template_name or None,
        "template_variables": options.template_variables() or None,
        "device": options.device,
        "dtype": options.dtype,
        "blocks": options.blocks or None,
        "trust_remote_code": options.trust_remote_code,
    }


def open_model(options: ModelSettings, name: str = "", dtype: str = "", attention: str = "") -> HookedModel:
    """Load a checkpoint as the options say; ``name`` where a command has several models."""
    hide_weight_bars()
    how = loading(options) | {"attn_implementation": attention or None}
    if dtype:
        how["dtype"] = dtype
    if isinstance(options, ModelOptions) and not name:
        how["base"] = options.adapters_base() or None
    model = load_model(name or options.model, **how)  # type: ignore[attr-defined]
    say(f"model: {model.name} ({model.n_layers} layers x {model.d_model}, {model.device})")
    if model.precision:
        say(f"dtype: {model.precision}")
    return model


def settled(options: ModelSettings, model: HookedModel) -> str:
    """The dtype of a command's further models: what ``fast`` chose for the first, so that all compute alike."""
    return str(model.hf.dtype).removeprefix("torch.") if options.dtype == "fast" else ""


class Reader:
    """Reads a command's task sets under one rule for bad rows, and says how many were left out."""

    def __init__(self, skip_bad: bool) -> None:
        self.bad = Skipped() if skip_bad else None

    def __call__(self, spec: str, limit: int = 0, seed: int = 0) -> list[Record]:
        before = self.skipped
        records = read_tasks(spec, limit, seed, skipped=self.bad)
        if self.skipped > before:
            say(f"{spec}: {self.skipped - before} bad records skipped")
        return records

    @property
    def skipped(self) -> int:
        return len(self.bad or ())


def write_results(
    run: Run,
    models: HookedModel | Endpoint | Mapping[str, HookedModel],
    sections: dict[str, Any],
    *,
    ending: str,
    skipped: int,
    missing: Mapping[str, Mapping[str, str]] | None = None,
    tokens: list[Any] | None = None,
    limits: Sequence[str] = (),
    hint: str = "",
) -> None:
    """``results.json`` of one command, the report of what is in it, and in one sentence what came out.

    Until here ``run`` keeps other writers out.

    Args:
        models: the agent, or every model by its name; the last one's template is that of the results.
        skipped: records that could not be read; missing: arm → task → why it has no outcome.
        hint: why the numbers may mislead; default: of ``behaviour``, where most answers could not be read.
    """
    from pingscope.figures.report import build_report

    named = dict(models) if isinstance(models, Mapping) else {"agent": models}
    model = list(named.values())[-1]
    meta = {
        "title": title(run, [one.name for one in named.values()]),
        "note": ending,
        "versions": {name: version(name) for name in ("pingscope", "torch", "transformers")},
        "models": {name: {"id": one.name, "fingerprint": one.fingerprint} for name, one in named.items()},
        "template_hash": model.template_hash,
        "limits": list(limits),
    }
    for line in limits:
        say(f"note: {line}")
    if tokens is not None:
        write_json(run.folder / "tokens.json", tokens)
    if run.options:  # beside the results they belong to, and not before
        write_json(run.folder / COMMAND, run.options)
    document = {"schema_version": SCHEMA_VERSION, "meta": meta, "claims": [], **sections}
    document |= {"skipped": skipped, "missing": dict(missing or {})}
    dump_results(run.folder / "results.json", document)
    report = build_report(run.folder)
    for line in (hint or unread_hint(sections.get("behaviour")), ending):
        if line:
            typer.echo(line)
    typer.echo(f"report: {report}")


TITLES = {  # of a report, by the command that wrote it
    "evaluate": "Behaviour of",
    "steer": "Steering of",
    "inject": "Prefix and suffix on",
    "search": "Prefix search on",
    "gates": "Gates on",
    "guard": "Guards and prefix on",
    "attack": "Attacks on",
    "transfer": "Prefix transfer between",
    "mechanism": "Mechanism of",
    "track": "Safety signal in",
}


def title(run: Run, names: Sequence[str]) -> str:
    """What the report is about: the command and the models' short names; their places stand under provenance."""
    short = list(dict.fromkeys(Path(name).name or name for name in names))
    listed = short[0] if len(short) == 1 else f"{', '.join(short[:-1])} and {short[-1]}"
    return f"{TITLES.get((run.options or {}).get('command', ''), 'Results of')} {listed}"


def choosing_and_shown(
    read: Reader, tasks: str, limit: int, validation: str, n: int
) -> tuple[list[Record], list[Record]]:
    """Tasks that something is chosen on, and other ones that it is reported on."""
    records = read(tasks, limit)
    if validation:
        choosing = read(validation, n)
        disjoint({"--tasks": (tasks, records), "--validation": (validation, choosing)})
        return choosing, records
    # Without tasks of its own the choice gets every other one: what it found is never reported on what it saw.
    choosing, shown = records[1::2], records[::2]
    say(f"no --validation: {len(choosing)} of {len(records)} tasks are chosen on, the other {len(shown)} reported")
    return choosing, shown


def load_probes(path: Path) -> LayerProbes:
    """Probes of a folder; where there are none, how to make them."""
    from pingscope.probes.logistic import LayerProbes

    if not (path / "probes.json").exists():
        raise UserError(
            f"--probes {path}: holds no probes; make them: pingscope cache, then pingscope probe --out PROBES"
        )
    return LayerProbes.load(path)


def admit_probes(probes: LayerProbes, model: HookedModel, path: Path, transfer: bool) -> list[str]:
    """Refuse probes of another model, unless the transfer is asked for; sentences on it for the results' limits."""
    note = transfer_note(probes.check_model(model, transfer=transfer, path=path))
    return [note] if note else []


def note_open_comment(prefix: str) -> None:
    """A comment that no line end closes is gone on with in the same line: rarely meant, so it is said."""
    if prefix.lstrip().startswith("#") and not prefix.endswith("\n"):
        say(r"note: the prefix is a comment without line end; the model goes on in its line (close it with \n)")


def named_arm(name: str, text: str) -> Arm:
    """One of the arms of ``evaluate``, on the model given."""
    return {
        "plain": Arm("agent"),
        "naive": Arm("agent+naive", prefix="I cannot"),
        "prefix": Arm("agent+prefix", prefix=text),
        "suffix": Arm("agent+suffix", suffix=text.strip()),
        "system": Arm("agent+system", system=text or SAFETY_SYSTEM),
    }[name]
