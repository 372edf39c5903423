"""A gate at work over the steps of episodes: what it remembers of a row, and the log of every decision.

The log is JSON lines, only ever appended to. It holds ids, numbers, hashes and the model's own answers, never the text
of a prompt. From it, the model and the tasks, :mod:`experiments.studies.gates.replay` recomputes every score to the
bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.files import append_jsonl, read_journal, sha256_of
from pingscope.interp.generate.generation import Generation
from pingscope.interp.model.selection import Selection
from pingscope.steering.gates import Gate, GateWatch


@dataclass(frozen=True)
class Decision:
    """One decision: of which row, at which step (turn) of its episode and position in its text, and the outcome.

    ``batch`` numbers the forward passes: a score's last bits depend on the shape of the batch it was computed in.
    """

    row: str
    step: int
    position: int
    score: float
    open: bool
    batch: int


class GateSession:
    """A :class:`Gate` over one run of episodes; use it where an edit's ``when`` is asked for.

    Hysteresis goes by the row's id: what was open at the end of a step needs only stay above the release. With
    ``log`` every decision, the make-up of every batch and every answer are appended.

    Args:
        header: facts about the run that a replay needs (see :func:`pingscope.experiments.studies.gates.replay.header`).
    """

    def __init__(self, gate: Gate, log: str | Path | None = None, header: Mapping[str, Any] | None = None) -> None:
        self.gate, self.log = gate, log
        self.step = 0
        self.decisions: list[Decision] = []
        self._open: dict[str, bool] = {}
        self._pending: list[dict[str, Any]] = []
        self._batches = 0
        if log is not None:
            self._batches = 1 + max((row["batch"] for row in read_journal(log) if "batch" in row), default=-1)
            self._pending.append({"kind": "header", "gate": gate.to_dict(), **(header or {})})

    @property
    def layer(self) -> int:
        return self.gate.layer

    @property
    def where(self) -> Selection:
        return self.gate.where

    def identity(self) -> list[Any]:
        return self.gate.identity()

    def watch(self, rows: Sequence[Rendered]) -> GateWatch:
        """A watch over one batch that knows what was open before, and reports here."""
        batch, self._batches = self._batches, self._batches + 1
        if self.log is not None:
            entry = {"kind": "batch", "batch": batch, "step": self.step, "rows": [row.id for row in rows]}
            self._pending.append(entry | {"prompts": [prompt_hash(row) for row in rows]})

        def note(row: str, position: int, score: float, flag: bool) -> None:
            self.decisions.append(Decision(row, self.step, position, score, flag, batch))
            self._open[row] = flag
            if self.log is not None:
                self._pending.append(self._entry(self.decisions[-1]))

        return GateWatch(self.gate, rows, [self._open.get(row.id, False) for row in rows], note)

    def is_open(self, row: str) -> bool:
        """Whether the latest decision on a row was to open."""
        return self._open.get(row, False)

    def end_step(self, said: Mapping[str, Generation]) -> None:
        """Close a step: log its answers by row, write everything out, count on."""
        if self.log is not None:
            for row, answer in said.items():
                entry = {"kind": "answer", "row": row, "step": self.step, "ids": list(answer.ids)}
                self._pending.append(entry | {"text": answer.text, "finished": answer.finished})
            append_jsonl(self.log, *self._pending)
            self._pending = []
        self.step += 1

    def _entry(self, decision: Decision) -> dict[str, Any]:
        gate = self.gate
        return {
            "kind": "decision",
            "batch": decision.batch,
            "row": decision.row,
            "step": decision.step,
            "position": decision.position,
            "score": decision.score.hex(),
            "threshold": float(gate.threshold).hex(),
            "action": "open" if decision.open else "closed",
            "probe": gate.probe,
            "model": gate.model,
            "gate": gate.hash,
        }


def prompt_hash(row: Rendered) -> str:
    """Short hash of a prompt's token ids."""
    return sha256_of(list(row.ids))[:16]
