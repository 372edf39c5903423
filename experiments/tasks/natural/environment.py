"""Episodes over a task's own pages, judged by rule: each page has one action that leads on, others change nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pingscope.experiments.agents.judges import MESSAGES

if TYPE_CHECKING:
    from pingscope.experiments.agents.actions import Call

SITE = "pages"  # what an evaluator names this environment by


@dataclass
class Pages:
    """The screens of one task; done after the last one's action, or once the agent gives up with a message."""

    screens: list[dict[str, Any]]
    at: int = 0
    done: bool = False
    success: bool = False

    def page(self) -> str:
        return self.screens[min(self.at, len(self.screens) - 1)]["page"]

    def step(self, call: Call) -> None:
        """Apply one parsed call; calls after the end change nothing."""
        if self.done:
            return
        if call.name in MESSAGES:
            self.done = True
        elif _same(call, self.screens[self.at]):
            self.at += 1
            self.done = self.success = self.at == len(self.screens)


def _same(call: Call, screen: dict[str, Any]) -> bool:
    """Whether a call is the one that leads on; a mouse button or a fence's language makes no other action of it."""
    return call.name == screen["name"] and all(
        _plain(call.args.get(name)) == _plain(value) for name, value in screen["args"].items()
    )


def _plain(value: Any) -> str:
    """Typed text without what changes nothing: spaces, case, a prompt sign, the full stop or slash at the end."""
    return " ".join(str(value).split()).casefold().removeprefix("$ ").rstrip("./")
