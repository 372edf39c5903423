"""One schema: what is damaged is named by file and field, what is whole comes back as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from pingscope.figures.report import build_report
from pingscope.interp.errors import UserError
from pingscope.schema import SCHEMA_FILE, check_results, dump_results, json_schema, load_results
from tests.figures import sample

WHOLE = json.loads(json.dumps(sample.results()))
SECTIONS = [name for name in WHOLE if name not in ("schema_version", "meta", "claims", "tokens", "skipped")]
DAMAGE: dict[str, Any] = {
    "null": None,
    "emptied": {},
    "an empty list": [],
    "a text": "text",
    "a number": 3,
    "true": True,
}


def leaf(value: Any, way: tuple[Any, ...] = ()) -> tuple[Any, ...] | None:
    """The way to the first estimate's value."""
    if isinstance(value, dict):
        if {"value", "ci"} <= set(value):
            return (*way, "value")
        items: Any = value.items()
    else:
        items = enumerate(value) if isinstance(value, list) else ()
    return next((found for key, inner in items if (found := leaf(inner, (*way, key)))), None)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("section", SECTIONS)
def test_a_damaged_section_is_named_and_nothing_is_drawn(tmp_path: Path, section: str, damage: str) -> None:
    document = WHOLE | {section: DAMAGE[damage]}
    (tmp_path / "results.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=f"results.json: field '{section}'") as error:
        build_report(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("wrong", ["7", [1], {"much": {}}, True])
@pytest.mark.parametrize("section", SECTIONS)
def test_a_number_of_another_type_is_named_to_its_place(section: str, wrong: Any) -> None:
    document = copy.deepcopy(WHOLE)
    way = leaf(document[section])
    if way is None:
        pytest.skip(f"{section} holds no estimate")
    place: Any = document[section]
    for step in way[:-1]:
        place = place[step]
    place[way[-1]] = wrong
    with pytest.raises(UserError, match=f"field '{section}") as error:
        check_results(document, "results.json")
    assert f".{way[-1]}" in str(error.value)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"schema_version": 99}, "schema_version"),
        ({"schema_version": None}, "schema_version"),
        ({"behavior": {}}, "behavior"),
        ({"behavior": {"agent": {}}}, "behavior"),
        ({"claims": [{"text": 7, "holds": None}]}, r"claims\[0\].text"),
        ({"claims": [{"text": "a", "holds": "yes"}]}, r"claims\[0\].holds"),
        ({"meta": {"limits": "none"}}, "meta.limits"),
        ({"behaviour": {"agent": {"evil": {}}}}, "behaviour.agent.evil"),
    ],
)
def test_other_damage(change: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=f"field '{field}'"):
        check_results(WHOLE | change, "results.json")


def test_rates_are_shares_and_intervals_are_in_order() -> None:
    for cell in ({"value": 1.2, "ci": None, "n": 3}, {"value": 0.5, "ci": [0.9, 0.1], "n": 3}):
        document = {"schema_version": 1, "behaviour": {"agent": {"harmful": {"strict": {"refusal_rate": cell}}}}}
        with pytest.raises(UserError, match="refusal_rate"):
            check_results(document, "results.json")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    dump_results(path, WHOLE | {"floor": {}, "gates": None})
    kept = {name: value for name, value in WHOLE.items() if name != "floor"}
    assert json.loads(path.read_text()) == kept == json.loads(json.dumps(load_results(path).plain()))
    with pytest.raises(UserError, match="behaviour"):
        dump_results(path, WHOLE | {"behaviour": {"agent": 3}})
    assert json.loads(path.read_text()) == kept  # a document that is refused leaves the old one


def test_the_published_schema_is_that_of_the_code() -> None:
    assert SCHEMA_FILE.read_text() == json_schema()
