"""What is written and read again: results, journals and decisions, as one schema.

``results.json`` is a :class:`Results`: every writer goes through :func:`dump_results`, every reader through
:func:`load_results`, so that a damaged file is named by its field and never drawn. Lines of ``generations.jsonl`` are
:class:`EpisodeRow`. ``python -m pingscope.schema`` prints the JSON schema, which is shipped as ``results.schema.json``.

A section that was not measured is absent; one that is there holds numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from typing_extensions import TypeAliasType

from pingscope.interp.errors import UserError
from pingscope.interp.files import read_json, write_json

T = TypeVar("T", bound=BaseModel)

SCHEMA_VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("results.schema.json")


def _finite(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def _number_or_null(value: Any) -> Any:
    return value if value is None else _finite(value)


Number = Annotated[float, BeforeValidator(_finite)]
Missing = Annotated[float | None, BeforeValidator(_number_or_null)]


class Part(BaseModel):
    """An object of the file. Facts beside those named here are kept as they are."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class Estimate(Part):
    """A number with its 95% interval; ``value`` is null where nothing could be measured."""

    value: Missing
    ci: Annotated[tuple[Missing, Missing], Field(strict=False)] | None
    n: int | None = Field(None, ge=0)
    n_missing: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Estimate:
        low, high = self.ci or (None, None)
        if low is not None and high is not None and low > high:
            raise ValueError("ci must be in order")
        return self


class Rate(Estimate):
    """A share of tasks, between 0 and 1."""

    @model_validator(mode="after")
    def _a_share(self) -> Rate:
        if self.value is not None and not -1e-9 <= self.value <= 1 + 1e-9:
            raise ValueError("value must be a share between 0 and 1")
        return self


def _kind(value: Any) -> str:
    if isinstance(value, Estimate) or (isinstance(value, Mapping) and {"value", "ci"} <= set(value)):
        return "estimate"
    if isinstance(value, Mapping):
        return "object"
    return "list" if isinstance(value, list | tuple) else "scalar"


def _score(value: Any) -> str:
    return "estimate" if isinstance(value, Estimate | Mapping) else "scalar"


# Nested objects whose leaves are estimates; and such with other facts between them.
if TYPE_CHECKING:  # a type checker does not follow types that contain themselves
    Estimates = Any
    Facts = Any
else:
    Estimates = TypeAliasType(
        "Estimates",
        Annotated[
            Annotated[Estimate, Tag("estimate")] | Annotated[dict[str, "Estimates"], Tag("object")],
            Discriminator(_kind),
        ],
    )
    Facts = TypeAliasType(
        "Facts",
        Annotated[
            Annotated[Estimate, Tag("estimate")]
            | Annotated[dict[str, "Facts"], Tag("object")]
            | Annotated[list["Facts"], Tag("list")]
            | Annotated[str | bool | int | float | None, Tag("scalar")],
            Discriminator(_kind),
        ],
    )

Label = Literal["harmful", "benign", "lookalike"]
Rates = dict[Label, dict[str, dict[str, Rate]]]  # label → judge → rate
Differences = dict[Label, dict[str, dict[str, Estimate]]]
Object = Annotated[dict[str, Facts], Field(min_length=1)]
Numbers = Annotated[dict[str, Estimates], Field(min_length=1)]


class Claim(Part):
    """A sentence generated from the numbers; ``holds`` is null where it could not be measured."""

    id: str = ""
    text: str
    holds: bool | None
    evidence: Facts = None


Score = Annotated[Annotated[Estimate, Tag("estimate")] | Annotated[Missing, Tag("scalar")], Discriminator(_score)]


class Candidate(Part):
    """A prefix of the search, and what it scored on the tasks searched."""

    text: str
    round: int | None = None
    perf: Score = None
    refusal: Score = None
    success: Score = None
    overall: Missing = None
    complete: bool | None = None  # false: it left the race early
    held_out: dict[str, Missing] | None = None


class HeldOut(Part):
    """Winner, rivals and controls on tasks that the search never saw."""

    n: int
    behaviour: dict[str, Rates]
    overall: dict[str, Estimate]
    texts: dict[str, str | None]
    selection_bias: Object


class Search(Part):
    winner: str | None = None
    candidates: list[Candidate] = []
    generations: int | None = None
    tau: Missing = None
    perf_means: str | None = None
    screening: Object | None = None
    held_out: HeldOut | None = None
    missing: dict[str, str] | None = None  # tasks that could not be asked, and why


class Bound(Part):
    """One bound of the search and its way: of the soft prefix a loss a step, of the discrete one the best so far."""

    tokens: int
    steps: int
    losses: list[Number]


class Bounds(Part):
    """What a prefix could do at most, on tasks that neither the search nor the bounds saw."""

    verdict: str
    sentence: str
    bar: Object
    behaviour: Annotated[dict[str, Rates], Field(min_length=1)]
    texts: dict[str, str]
    n: int
    examples: Object
    soft: Bound | None = None
    discrete: Bound | None = None


class Step(Part):
    """One checkpoint of a fine-tuning."""

    step: Number
    chosen: bool = False  # the agent of the study
    behaviour: Rates | None = None
    prefixed: dict[str, Rates] | None = None  # by arm: this checkpoint behind the agent's prefixes
    gap: Numbers | None = None  # by layer
    readings: Object | None = None  # by layer, reading, position


class Curve(Part):
    """A track along a prompt as columns of equal length."""

    role: list[str]
    slot: list[int]
    slots: list[int]
    value: list[Missing]
    low: list[Missing]
    high: list[Missing]
    by: list[Literal["fraction", "index"]] | None = None
    n: list[int] | None = None

    @model_validator(mode="after")
    def _equal(self) -> Curve:
        columns = (self.role, self.slot, self.slots, self.value, self.low, self.high, self.by, self.n)
        if len({len(column) for column in columns if column is not None}) > 1:
            raise ValueError("has columns of unequal length")
        return self


class InjectedArm(Part):
    """One arm of the injection study: what is said where, and its rates by label."""

    kind: str
    name: str | None = None
    text: str | None = None
    model: str | None = None
    harmful: dict[str, dict[str, Rate]] | None = None
    benign: dict[str, dict[str, Rate]] | None = None
    lookalike: dict[str, dict[str, Rate]] | None = None

    @property
    def rates(self) -> Rates:
        found: dict[Label, Any] = {"harmful": self.harmful, "benign": self.benign, "lookalike": self.lookalike}
        return {label: cells for label, cells in found.items() if cells is not None}


class TokenRow(Part):
    """One prompt's tokens under one arm, with the safety logit of every layer at each of them."""

    arm: str
    tokens: list[str]
    roles: list[str]
    logits: dict[str, list[Missing]]
    id: str | int | None = None
    label: str = ""
    title: str = ""

    @model_validator(mode="after")
    def _parallel(self) -> TokenRow:
        if len(self.roles) != len(self.tokens):
            raise ValueError("has as many roles as tokens: no")
        for layer, column in self.logits.items():
            if len(column) != len(self.tokens):
                raise ValueError(f"logits.{layer} has {len(column)} entries for {len(self.tokens)} tokens")
        return self


class Meta(Part):
    """Where the numbers come from."""

    title: str = ""
    note: str = ""
    limits: list[str] = []
    methods: list[str] = []


class Results(BaseModel):
    """``results.json``. Sections stand by name; a name that is not known is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: int = Field(ge=1)
    meta: Meta = Meta()
    claims: list[Claim] = []
    behaviour: Annotated[dict[str, Rates], Field(min_length=1)] | None = None
    paired: dict[str, Differences] | None = None
    impossible: dict[str, str] | None = None  # arms that a model cannot be given, and why
    skipped: int | None = Field(None, ge=0)  # records that could not be read
    missing: dict[str, dict[str, str]] | None = None  # arm → task id → why it has no outcome
    injection: Annotated[dict[str, InjectedArm], Field(min_length=1)] | None = None
    search: Search | None = None
    bounds: Bounds | None = None
    probes: Numbers | None = None
    baselines: Numbers | None = None
    tracks: Numbers | None = None
    curves: Annotated[dict[str, dict[str, dict[str, Curve]]], Field(min_length=1)] | None = None
    collapse: Object | None = None
    collapse_claims: list[Claim] | None = None
    floor: Object | None = None
    first_token: Numbers | None = None
    detectors: Object | None = None
    dose_response: Annotated[list[Step], Field(min_length=1)] | None = None
    mechanism_claims: list[Claim] | None = None
    attribution: Object | None = None
    readout: Object | None = None
    patching: Object | None = None
    restoration: Object | None = None
    steering: Numbers | None = None
    steering_coherence: Numbers | None = None
    steering_validation: Object | None = None
    steering_chosen: Object | None = None
    gates: Object | None = None
    guards: Object | None = None
    attacks: Object | None = None
    transfer: Object | None = None
    tokens: list[TokenRow] | None = None

    def plain(self) -> dict[str, Any]:
        """The document as it is written: sections that were not measured are absent."""
        return self.model_dump(mode="json", exclude_unset=True)


class EpisodeTurn(Part):
    """One answer in an episode."""

    page: str
    text: str
    status: str
    finished: bool


class EpisodeRow(Part):
    """A line of ``generations.jsonl``: one task under one arm. Holds no instruction."""

    key: str
    arm: str
    id: str
    label: str
    turns: list[EpisodeTurn]
    success: bool | None
    chat: bool
    prefix: str | None = None
    missing: str | None = None


def check_results(document: Any, where: str | Path) -> Results:
    """A document as :class:`Results`.

    Raises:
        UserError: names the file, the first field that is wrong, and what to do.
    """
    if not isinstance(document, Mapping):
        raise UserError(f"{where}: field '(top level)' must be an object; run the command that wrote it again")
    for name, value in document.items():
        if value is None or (value in ({}, []) and name not in ("claims", "tokens", "meta")):
            raise UserError(
                f"{where}: field '{name}' is empty; a section without numbers is left out: run its stage again"
            )
    found = validated(Results, document, where)
    if found.schema_version > SCHEMA_VERSION:
        raise UserError(
            f"{where}: field 'schema_version' is {found.schema_version}, this version reads up to {SCHEMA_VERSION}; "
            "update pingscope"
        )
    return found


def load_results(path: str | Path) -> Results:
    """Read ``results.json``."""
    return check_results(read_json(path), path)


def dump_results(path: str | Path, document: Mapping[str, Any]) -> Results:
    """Check a document and write it; sections that hold nothing are left out."""
    kept = {name: value for name, value in document.items() if value not in (None, {}, []) or name == "claims"}
    found = check_results(kept, path)
    write_json(path, kept)
    return found


def check_tokens(rows: Any, where: str | Path) -> list[TokenRow]:
    """Rows of ``tokens.json``."""
    if not isinstance(rows, list):
        raise UserError(f"{where}: field 'tokens' must be a list; run the stage that wrote it again")
    return [validated(TokenRow, row, where, ("tokens", number)) for number, row in enumerate(rows)]


def validated(kind: type[T], value: Any, where: str | Path, at: tuple[str | int, ...] = ()) -> T:
    """``value`` as a ``kind``, or one line that names file, field and remedy."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    steps = [step for step in (*at, *first["loc"]) if step not in ("estimate", "object", "list", "scalar", "[key]")]
    field = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")
    said = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
    raise UserError(f"{where}: field '{field or '(top level)'}' {said}; run the stage that wrote it again")


def json_schema() -> str:
    """The JSON schema of ``results.json``."""
    return json.dumps(Results.model_json_schema(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
