"""Recompute every score of a decision log, to the bit.

The log names rows, steps and batches; the tasks give back the instructions, the environments the pages, the logged
answers what the agent did in between. Each batch is put together again as it was, since the last bits of a score depend
on the shape of the batch, and its forward passes are run again over the logged answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pingscope.experiments.agents.rollout import MakeEnvironment, environment_name, prompts_of
from pingscope.experiments.run.identity import model_identity
from pingscope.experiments.tasks.records import Record
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.files import read_journal
from pingscope.interp.generate.generation import generate
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.hooks import Edit
from pingscope.steering.decisions import Decision, GateSession, prompt_hash
from pingscope.steering.gates import Gate
from pingscope.steering.injection import Arm

WHOLE = 1 << 40  # slots: a logged batch is one batch again
FIELDS: dict[str, dict[str, Any]] = {  # of a log's entries, by kind
    "header": {"gate": dict, "arm": dict, "model": dict, "environment": str, "threads": int},
    "batch": {"batch": int, "step": int, "rows": list, "prompts": list},
    "decision": {"batch": int, "step": int, "position": int}
    | dict.fromkeys(("row", "score", "threshold", "action", "gate"), str),
    "answer": {"row": str, "step": int, "ids": list, "text": str, "finished": bool},
}
ARM = {"name": str, "demonstrations": list} | dict.fromkeys(("prefix", "suffix", "system"), str | None)
TEXTS = ("prefix", "suffix", "system", "demonstrations")  # of an arm, that change the prompt


def header(model: HookedModel, arm: Arm, make_env: MakeEnvironment, max_new_tokens: int) -> dict[str, Any]:
    """What a replay needs to know about a run."""
    return {
        "format": 1,
        "arm": {"name": arm.name, **{name: getattr(arm, name) for name in TEXTS}},
        "edits": [[edit.layer, str(edit.where)] for edit in arm.edits],
        "model": {"name": model.name, "fingerprint": model.fingerprint, "template": model.template_hash}
        | {"identity": model_identity(model)},
        "environment": environment_name(make_env),
        "max_new_tokens": max_new_tokens,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


@dataclass
class Part:
    """The entries of a log between two headers: one gate, one arm, one run."""

    head: dict[str, Any]
    batches: dict[int, dict[str, Any]] = field(default_factory=dict)
    decisions: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    answers: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Replayed:
    """Of one gate and arm: how many decisions were recomputed, and the ones that came out otherwise."""

    arm: str
    gate: str
    decisions: int
    opened: int
    mismatches: tuple[str, ...]


def replay(log: str | Path, model: HookedModel, records: Sequence[Record], make_env: MakeEnvironment) -> list[Replayed]:
    """Recompute a log's scores and compare them, and the actions, with what is written there.

    Raises:
        UserError: no log, another model, template or environment, a row that is not among the tasks.
    """
    by_id = {record.id: record for record in records}
    out: dict[tuple[str, str], Replayed] = {}
    for part in read_log(log):
        one = _replay_part(part, model, by_id, make_env, str(log))
        before = out.get((one.arm, one.gate))
        if before is not None:
            one = Replayed(
                one.arm, one.gate, one.decisions + before.decisions, one.opened + before.opened,
                before.mismatches + one.mismatches,
            )  # fmt: skip
        out[one.arm, one.gate] = one
    return list(out.values())


def read_log(log: str | Path) -> list[Part]:
    """The parts of a decision log."""
    if not Path(log).exists():
        raise UserError(f"{log}: no such decision log; arms behind a gate write one beside generations.jsonl")
    parts: list[Part] = []
    for number, row in enumerate(read_journal(log), 1):
        try:
            _check_entry(row)
            if row["kind"] == "header":
                parts.append(Part(row))
            elif row["kind"] == "batch":
                parts[-1].batches[row["batch"]] = row
            elif row["kind"] == "decision":
                parts[-1].decisions.setdefault(row["batch"], []).append(row)
            else:
                parts[-1].answers[row["row"], row["step"]] = row
        except IndexError as error:
            raise UserError(f"{log}:{number}: stands before any header; the log was cut, restore the file") from error
        except (KeyError, TypeError, ValueError) as error:
            reason = f"field {error} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"{log}:{number}: not an entry of a decision log ({reason}); restore the file") from error
    if not any(part.batches for part in parts):
        raise UserError(f"{log}: holds no decisions; it was cut off or emptied, restore the file")
    for part in parts:
        _check_whole(part, log)
    return parts


def _check_entry(row: Mapping[str, Any]) -> None:
    """Every field that a replay reads is there and of its type; a log may have been edited by hand."""
    kind = row["kind"]
    if kind not in FIELDS:
        raise ValueError(f"kind {kind!r} is unknown")
    _check_fields(row, FIELDS[kind])
    if kind == "header":
        _check_fields(row["arm"], ARM)
        _check_fields(row["model"], dict.fromkeys(("name", "fingerprint", "template", "identity"), str))
    elif kind == "batch" and len(row["rows"]) != len(row["prompts"]):
        raise ValueError("fields 'rows' and 'prompts' are not of one length")
    elif kind == "decision":
        float.fromhex(row["score"])


def _check_fields(row: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    for name, wanted in types.items():
        if not isinstance(row[name], wanted):
            raise TypeError(f"field {name!r} is {str(row[name])[:40]!r}")


def _check_whole(part: Part, log: str | Path) -> None:
    """Every batch has its decisions and its answers, and nothing stands outside of a batch.

    Raises:
        UserError: names what is missing; a log with a gap proves nothing about what was decided.
    """
    for number in sorted(part.decisions.keys() - part.batches.keys()):
        raise UserError(f"{log}: decisions of batch {number} without the batch; lines were removed, restore the file")
    for number, batch in sorted(part.batches.items()):
        if not part.decisions.get(number):
            raise UserError(f"{log}: batch {number} without decisions; lines were removed or cut, restore the file")
        lost = [name for name in batch["rows"] if (name, batch["step"]) not in part.answers]
        if lost:
            raise UserError(
                f"{log}: batch {number}: the answer of {lost[0]!r} at step {batch['step']} is missing; the log was cut "
                "off, restore the file or run the command again to complete it"
            )


def _replay_part(
    part: Part, model: HookedModel, records: Mapping[str, Record], make_env: MakeEnvironment, log: str
) -> Replayed:
    head = part.head
    _check(head, model, make_env, log)
    gate = Gate.from_dict(head["gate"], log)
    texts = {name: head["arm"][name] for name in TEXTS if name != "demonstrations"}
    demonstrations = tuple((user, said) for user, said in head["arm"]["demonstrations"])
    shown = Arm(head["arm"]["name"], demonstrations=demonstrations, **(texts | {"prefix": None}))
    prompts = _prompts(part, model, shown, records, make_env, log)
    session = GateSession(gate)
    compared, opened, wrong = 0, 0, []
    for number, batch in sorted(part.batches.items()):
        rows = [prompts[name, batch["step"]] for name in batch["rows"]]
        changed = [row.id for row, known in zip(rows, batch["prompts"], strict=True) if prompt_hash(row) != known]
        if changed:
            raise UserError(f"{log}: the prompt of {changed[0]!r} is not the one decided on; give the same --tasks")
        logged = part.decisions.get(number, [])
        said = [_fed(part.answers[name, batch["step"]]) for name in batch["rows"]]
        session.step = batch["step"]
        found = {(one.row, one.position): one for one in recompute(model, rows, session, said)}
        for entry in logged:
            compared += 1
            opened += entry["action"] == "open"
            one = found.pop((entry["row"], entry["position"]), None)
            place = f"{entry['row']}, step {entry['step']}, position {entry['position']}"
            if one is None:
                wrong.append(f"{place}: no such decision")
            elif one.score.hex() != entry["score"]:
                wrong.append(f"{place}: {one.score!r}, logged {float.fromhex(entry['score'])!r}")
            elif entry["threshold"] != float(gate.threshold).hex() or entry["gate"] != gate.hash:
                wrong.append(f"{place}: another threshold or gate than the header's")
            elif (entry["action"] == "open") != one.open:
                wrong.append(f"{place}: action {entry['action']} does not follow from the scores")
        wrong += [f"{one.row}, step {one.step}, position {one.position}: not in the log" for one in found.values()]
    return Replayed(head["arm"]["name"], gate.hash, compared, opened, tuple(wrong))


def recompute(
    model: HookedModel, rows: Sequence[Rendered], session: GateSession, said: Sequence[tuple[int, ...]]
) -> list[Decision]:
    """The decisions on one batch, in the shapes of the run: the same prompts in one prefill, then the same answers.

    Edits are left out: what a gate reads never depends on what it let through (see
    :func:`pingscope.interp.model.hooks.check_conditions`).
    """
    before = len(session.decisions)
    read = [Edit(session.layer, session.where, lambda x: x, when=session)]
    streaming = bool(session.where.generated_mask(torch.arange(1 << 10)).any())
    generate(model, rows, edits=read, token_budget=WHOLE, max_new_tokens=1, said=said if streaming else None)
    return session.decisions[before:]


def _fed(answer: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens of an answer that went back into the model: all but one that was cut off at the limit."""
    ids = tuple(answer["ids"])
    return ids if answer["finished"] else ids[:-1]


def _prompts(
    part: Part,
    model: HookedModel,
    arm: Arm,
    records: Mapping[str, Record],
    make_env: MakeEnvironment,
    log: str,
) -> dict[tuple[str, int], Rendered]:
    """Every row's prompt at every step."""
    said: dict[str, list[str]] = {}
    for (row, _), answer in sorted(part.answers.items(), key=lambda item: item[0][1]):
        said.setdefault(row, []).append(answer["text"])
    unknown = sorted(set(said) - set(records))
    if unknown:
        raise UserError(f"{log}: row {unknown[0]!r} is not among the tasks; give the --tasks of the run")
    return {
        (name, step): row
        for name, texts in said.items()
        for step, row in enumerate(prompts_of(model, records[name], texts, make_env, arm))
    }


def _check(head: Mapping[str, Any], model: HookedModel, make_env: MakeEnvironment, log: str) -> None:
    known = head["model"]
    if known["fingerprint"] != model.fingerprint:
        raise UserError(f"{log}: was written with {known['name']}, whose weights are not those of {model.name}")
    if known["template"] != model.template_hash:
        raise UserError(f"{log}: was written with another chat template; pass it with --chat-template")
    if known["identity"] != model_identity(model):
        raise UserError(f"{log}: was written with other end tokens, another tokenizer or number format; load them so")
    if head["environment"] != environment_name(make_env):
        raise UserError(f"{log}: was written with the environment {head['environment']}; give its tasks")
    if head["threads"] != torch.get_num_threads():
        torch.set_num_threads(head["threads"])  # the order of sums follows the number of threads
