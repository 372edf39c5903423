"""The selection language: what it selects, how it is written, what it refuses."""

from __future__ import annotations

import pytest
import torch

from pingscope.interp import Rendered, UserError
from pingscope.interp.model.selection import at, final, generated, parse, prompt, resolve_layers, role

ROLES = ("template", "system", "template", "instruction", "page", "header", "prefix", "response", "response")
ROW = Rendered("p", "", tuple(range(9)), ROLES)


@pytest.mark.parametrize(
    ("selection", "positions"),
    [
        (final(), [6]),
        (prompt(), [0, 1, 2, 3, 4, 5, 6]),
        (role("instruction", "page"), [3, 4]),
        (role("response"), [7, 8]),
        (at(0, -1, -2), [0, 5, 6]),
        (at(8, 100), []),
        (generated(), [7, 8]),
        (generated(1), [8]),
        (generated(0, 1), [7]),
        (prompt() - role("template", "system"), [3, 4, 5, 6]),
        (final() | generated(0, 1), [6, 7]),
        (prompt() - role("template") | at(0), [0, 1, 3, 4, 5, 6]),
        (prompt() - (role("template") | at(1)), [3, 4, 5, 6]),
    ],
)
def test_positions_and_round_trip(selection, positions):
    assert [i for i, flag in enumerate(selection.mask(ROW)) if flag] == positions
    assert parse(str(selection)) == selection
    assert str(parse(str(selection))) == str(selection)


def test_written_forms():
    text = "role:instruction,page | generated[0:5] - role:template"
    assert parse(text) == (role("instruction", "page") | generated(0, 5)) - role("template")
    assert str(parse(text)) == text
    assert parse(" generated ") == generated() == parse("generated[:]")
    assert parse("final|at:-1 , 3") == final() | at(-1, 3)


def test_generated_masks():
    index = torch.arange(-2, 6)
    assert generated(1, 3).generated_mask(index).tolist() == [False] * 3 + [True, True] + [False] * 3
    assert (final() | generated(4)).generated_mask(index).tolist() == [False] * 6 + [True, True]
    assert (generated() - generated(1)).generated_mask(index).tolist() == [i == 0 for i in range(-2, 6)]
    assert role("response").generated_mask(index).tolist() == [i >= 0 for i in range(-2, 6)]
    assert not (prompt() | role("page") | at(3)).generated_mask(index).any()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "finale",
        "role:instructions",
        "role:",
        "final final",
        "final |",
        "(final",
        "final)",
        "generated[3:2]",
        "generated[-1:]",
        "at:",
        "at:x",
        "final & prompt",
        "role:page,",
        "- final",
    ],
)
def test_typos_are_refused(text):
    with pytest.raises(UserError, match="selection"):
        parse(text)


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("1-4", [1, 2, 3, 4]),
        ("5,0, 2", [0, 2, 5]),
        ("0,2,-1", [-1, 0, 2]),
        ("embed,1-2", [-1, 1, 2]),
        (3, [3]),
        ([2, 2, 0], [0, 2]),
        (range(2), [0, 1]),
    ],
)
def test_layers(layers, found):
    assert resolve_layers(layers, 6) == found


@pytest.mark.parametrize("layers", ["6", "0-6", "-2", "first", "", "4-2", [9], []])
def test_layers_that_do_not_exist(layers):
    with pytest.raises(UserError, match="layers"):
        resolve_layers(layers, 6)


def test_exclusions_of_generated_windows():
    index = torch.arange(-1, 7)
    some = parse("final | generated[0:6] - generated[2:4]")
    assert some.generated_mask(index).tolist() == [False, True, True, False, False, True, True, False]
    assert [i for i, flag in enumerate((some - final()).mask(ROW)) if flag] == [7, 8]
    assert str(some) == "final | generated[0:6] - generated[2:4]"
