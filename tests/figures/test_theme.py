"""Colours: one partner each in the dark, told apart, readable."""

from __future__ import annotations

import pytest

from pingscope.figures import theme


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_light_colour_has_one_dark_partner() -> None:
    assert len(theme.dark_partners()) == len(theme.PALETTE)


@pytest.mark.parametrize("mode", [0, 1])
def test_text_and_marks_stand_out_from_the_page(mode: int) -> None:
    surface = theme.PALETTE["surface"][mode]
    for name, least in {"ink": 12, "muted": 4.5, "harmful": 4.5, "benign": 4.5, "lookalike": 3, "agent": 3}.items():
        assert contrast(theme.PALETTE[name][mode], surface) >= least, name
    for name in ("hot", "cold", "high", "low"):  # printed numbers on the ends of the heat maps
        assert contrast(theme.PALETTE[name][mode], theme.PALETTE["ink"][mode]) >= 4.5, name


def test_arms_keep_their_colour_and_order() -> None:
    arms = ["strange", "agent+prefix", "agent", "base"]
    assert theme.sort_arms(arms) == ["base", "agent", "agent+prefix", "strange"]
    assert len({theme.arm_colour(arm) for arm in arms}) == 4
    assert theme.arm_key("strange") == "other"
    assert theme.colour("agent", 0.5) == "rgba(207,95,11,0.5)"
