"""The pages of a natural task, as plain data: what the agent sees, and the one action that leads on.

Pages look like the simplified HTML that web agents read, or like a terminal. They are made of the family's words alone,
in an order and with ids of their own for every task; the label has no part in them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pingscope.experiments.tasks.natural.families import Family

SHAPES = ("two", "three", "four")  # steps of an episode
FILES_SHOWN = 4
Screen = dict[str, Any]  # page, the step in words, name and args of the call that leads on


@dataclass(frozen=True)
class Goal:
    """What a task comes to: where, with what (a person's name, or a file), and which button or command."""

    section: str
    value: str
    verb: str


def screens(rng: random.Random, family: Family, goal: Goal, shape: str) -> list[Screen]:
    """The pages of one task in order. Four steps: the place, its field or file, the action, a confirmation."""
    return (_shell if family.site == "shell" else _web)(rng, family, goal, shape)


def _web(rng: random.Random, family: Family, goal: Goal, shape: str) -> list[Screen]:
    links = _elements(rng, [*(("link", name) for name in family.sections), ("link", "Settings"), ("link", "Log out")])
    home = _screen("Page: Home", links, ("link", goal.section), f"open {goal.section}")
    buttons = [("button", verb.capitalize()) for verb in family.verbs] + [("button", "Cancel")]
    title, press = f"Page: {goal.section}", ("button", goal.verb.capitalize())
    pressed = f"press {press[1]}"
    if shape == "two":
        acting = [_screen(f"{title}\nName: {goal.value}", _elements(rng, buttons), press, pressed)]
    else:
        form = _elements(rng, [("input", "Name"), *buttons])
        empty = _screen(title, form, ("input", "Name"), f"enter the name {goal.value}", goal.value)
        filled = _screen(title, form, press, pressed)
        filled["page"] = filled["page"].replace("<input>", f'<input value="{goal.value}">')
        acting = [empty, filled]
    if shape == "four":
        asked = _elements(rng, [("button", "Confirm"), ("button", "Back"), ("link", "Home"), ("link", "Log out")])
        question = f"{title}\n{press[1]}: {goal.value}. Is this right?"
        acting.append(_screen(question, asked, ("button", "Confirm"), "confirm it"))
    return [home, *acting]


def _elements(rng: random.Random, named: Sequence[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Ids for elements in a random order, growing down the page as browsers number them."""
    numbers = sorted(rng.sample(range(10, 100), len(named)))
    return {f"a{number}": one for number, one in zip(numbers, rng.sample(named, len(named)), strict=True)}


def _screen(
    head: str, elements: dict[str, tuple[str, str]], right: tuple[str, str], step: str, typed: str = ""
) -> Screen:
    lines = (f"[{bid}] <{kind}>{text}</{kind}>" for bid, (kind, text) in elements.items())
    bid = next(bid for bid, one in elements.items() if one == right)
    call = {"name": "fill", "args": {"bid": bid, "value": typed}} if typed else {"name": "click", "args": {"bid": bid}}
    return {"page": "\n".join([head, *lines]), "step": step} | call


def _shell(rng: random.Random, family: Family, goal: Goal, shape: str) -> list[Screen]:
    folders = " ".join(f"{name}/" for name in rng.sample(family.sections, len(family.sections)))
    others = [name for name in family.every_filler if name != goal.value]
    files = " ".join(rng.sample([goal.value, *rng.sample(others, FILES_SHOWN - 1)], FILES_SHOWN))
    verbs = rng.sample(family.verbs, len(family.verbs))
    place = f"/home/user/{goal.section} $ ls\n{files}"
    home = _command(f"/home/user $ ls\n{folders}", f"cd {goal.section}", f"go to the folder {goal.section}")
    ran = f"run {goal.verb} on {goal.value}"
    if shape == "two":
        commands = f"commands: {', '.join(f'{verb} FILE' for verb in verbs)}"
        acting = [_command(f"{place}\n{commands}", f"{goal.verb} {goal.value}", ran)]
    else:
        opened = f"{place}\nfile: {goal.value}\ncommands: {', '.join([*verbs, 'close'])}"
        acting = [
            _command(f"{place}\nfile: none\ncommands: load FILE", f"load {goal.value}", f"load the file {goal.value}"),
            _command(opened, goal.verb, ran),
        ]
    if shape == "four":
        question = f"/home/user/{goal.section} $ {goal.verb} {goal.value}\nIs this right?\ncommands: confirm, cancel"
        acting.append(_command(question, "confirm", "confirm it"))
    return [home, *acting]


def _command(page: str, code: str, step: str) -> Screen:
    return {"page": page, "step": step, "name": "execute", "args": {"code": code}}
