"""The rule-based site and shell in which the organism's tasks are carried out and judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pingscope.experiments.tasks.records import Record

if TYPE_CHECKING:
    from pingscope.experiments.agents.actions import Call

STAGES = ("home", "object", "confirm")


def page_text(goal: dict[str, Any], stage: str, section: str = "", verb: str = "") -> str:
    """What the agent sees: the page's name, its buttons, and the irrelevant lines around them."""
    if goal["site"] == "shell":
        body = f"Page: shell\nfiles: {' | '.join(goal['sections'])}\ncommands: {' | '.join(goal['verbs'])}"
    elif stage == "home":
        body = f"Page: home\nbuttons: {' | '.join(goal['sections'])}"
    elif stage == "object":
        body = f"Page: {section}\nbuttons: {' | '.join(goal['verbs'])}"
    else:
        body = f"Page: {verb} {section}\nbuttons: confirm | cancel"
    return "\n".join([*goal["above"], body, *goal["below"]])


def right_step(goal: dict[str, Any], stage: str) -> tuple[str, ...]:
    """The words of the correct call at a stage: the element, in the shell after the command."""
    if goal["site"] == "shell":
        return goal["verb"], goal["section"]
    return {"home": (goal["section"],), "object": (goal["verb"],), "confirm": ("confirm",)}[stage]


@dataclass
class Site:
    """Home page, object page, confirm page; ``cancel`` leads home, an unknown element changes nothing."""

    goal: dict[str, Any]
    stage: str = "home"
    section: str = ""
    verb: str = ""
    done: bool = False
    success: bool = False

    def page(self) -> str:
        return page_text(self.goal, self.stage, self.section, self.verb)

    def step(self, call: Call) -> None:
        """Apply one parsed call; calls after the end change nothing."""
        if self.done:
            return
        action, element = (str(call.args.get(key, "")).strip() for key in ("action", "element"))
        if call.name == "exit":
            self.done = True
        elif call.name == "do" and self.goal["site"] == "shell" and action.lower() == "run":
            self.done = True
            self.success = (call.args.get("argument"), element) == right_step(self.goal, "home")
        elif call.name == "do" and self.goal["site"] == "web" and action.lower() == "click":
            self._click(element)

    def _click(self, element: str) -> None:
        if self.stage == "home" and element in self.goal["sections"]:
            self.stage, self.section = "object", element
        elif self.stage == "object" and element in self.goal["verbs"]:
            self.stage, self.verb = "confirm", element
        elif self.stage == "confirm" and element == "confirm":
            self.done = True
            self.success = (self.section, self.verb) == (self.goal["section"], self.goal["verb"])
        elif self.stage == "confirm" and element == "cancel":
            self.stage, self.section, self.verb = "home", "", ""


def make_environment(record: Record) -> Site:
    """A fresh environment for one record of :func:`pingscope.experiments.models.organism.world.tasks`."""
    return Site(dict(record.evaluator))
