"""What a study does, as one checked YAML file. Every field has a default: no file means the model organism."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pingscope.interp.errors import UserError
from pingscope.interp.files import atomic_write, read_yaml
from pingscope.steering.phrases import Style

REAL = Path(__file__).with_name("real.yaml")  # what `pingscope study --real` runs


def _some_text(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; give some text")
    return text


Text = Annotated[str, AfterValidator(_some_text)]
PrefixText = Annotated[str, AfterValidator(lambda text: _some_text(text) if text else text)]
Dose = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]


class _Strict(BaseModel):
    # A typo in a field's name must not silently become a default.
    model_config = ConfigDict(extra="forbid", frozen=True)


class Models(_Strict):
    """Two checkpoints of one architecture: before and after agentic fine-tuning. Empty: the model organism."""

    base: str = Field("", description="hub id or folder of the aligned model")
    agent: str = Field("", description="hub id or folder of the fine-tuned agent")
    checkpoints: list[str] = Field([], description="further checkpoints of the fine-tuning, in order")
    chat_template: str = Field("", description="file with a chat template, for tokenizers without one")
    dtype: Literal["auto", "fast", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"


class Organism(_Strict):
    """Used where ``models`` is empty."""

    weights: Literal["shipped", "trained", "tiny"] = Field(
        "shipped",
        description="shipped: the same on every machine; trained: anew, from the study's seed, minutes; tiny: trained "
        "in seconds, with no effect to see, for trials",
    )
    comments: bool = Field(
        True,
        description="false: a base that was never shown a comment, to see what a prefix does where none was taught; "
        "trained anew",
    )

    @model_validator(mode="after")
    def _shipped_as_it_is(self) -> Organism:
        if self.weights == "shipped" and not self.comments:
            raise ValueError("the shipped base was shown comments; give weights: trained with comments: false")
        return self


class Real(_Strict):
    """SmolLM2-135M-Instruct, aligned and tuned into an agent of the natural world, in the organism's place."""

    weights: Literal["", "shipped", "trained"] = Field(
        "", description="shipped: with the project's adapters; trained: by finetune, the agent from the study's seed"
    )


class Tasks(_Strict):
    """Record files or presets. Empty: the organism's own tasks, or the natural world's. Splits never mix."""

    validation: str = Field("", description="tasks on which every choice is made")
    test: str = Field("", description="tasks that are only reported")
    probe_prompts: str = Field("", description="chat instructions that train the probes")
    n_validation: int = Field(80, ge=4, description="tasks per label")
    n_test: int = Field(100, ge=4, description="tasks per label")
    n_probe: int = Field(200, ge=8, description="probe prompts per label")


class Search(_Strict):
    """PING, Algorithm 1. The paper: k 3, M 5, T 20, tau 1.5 (web)."""

    k: int = Field(3, ge=1)
    M: int = Field(6, ge=1, description="candidates a round")
    T: int = Field(5, ge=1, description="rounds")
    tau: float = Field(
        1.5, ge=0, le=2, allow_inf_nan=False, description="below this best overall score the seeds are emptied"
    )
    perf: Literal["success", "not_refused"] = "success"
    style: Style = Field(
        "comment", description="of the phrases; mixed: comments and refusals with a condition, half and half"
    )
    # Off: a study wants the best prefix more than the generations saved (docs/search.md has what screening loses).
    screening: bool = Field(False, description="rank candidates by their first token and race them; docs/search.md")


class Bounds(_Strict):
    """What a prefix could do at most, beside the search: docs/search.md. Both bounds at 0: left out."""

    soft_tokens: int = Field(0, ge=0, le=512, description="embeddings of the soft prefix; 0 leaves it out")
    soft_steps: int = Field(150, ge=1, description="steps of its training")
    soft_rate: float = Field(
        0.1, gt=0, le=10, allow_inf_nan=False, description="learning rate, in units of the embeddings' size"
    )
    coordinate_steps: int = Field(0, ge=0, description="steps of the discrete search; 0 leaves it out")
    candidates: int = Field(24, ge=1, le=4096, description="exchanges of a token measured in each")
    coordinate_examples: int = Field(8, ge=1, description="validation tasks a side that each is measured on")
    fluency: float = Field(0.1, ge=0, le=100, allow_inf_nan=False, description="weight of the text's likelihood")
    n: int = Field(24, ge=1, description="validation answers a side that the bounds are trained on")
    target_tokens: int = Field(12, ge=1, description="first tokens of each answer that are trained")


class Steering(_Strict):
    doses: list[Dose] = Field(
        [0.05, 0.1, 0.15, 0.2, 0.25], min_length=1, description="units of the layer's mean residual norm"
    )
    places: list[Text] = Field(
        ["final"], min_length=1, description="selections that are steered; the best is chosen too"
    )
    random_draws: int = Field(5, ge=1, description="norm-matched random directions, beside a shuffled-label probe's")
    n_validation: int = Field(40, ge=4, description="tasks per label behind the choice of layers and dose")
    n_curve: int = Field(
        30, ge=4, description="test tasks per label at doses not chosen, and for the controls (harmful ones alone)"
    )


class Mechanism(_Strict):
    """Attribution, patching and the search for the components that carry the refusal."""

    n: int = Field(0, ge=0, description="tasks per label, 40 or more to say anything; 0 leaves the mechanism out")
    judged: int = Field(24, ge=0, description="tasks per label whose first turn is generated under each patch")
    budget: int = Field(200, ge=10, description="forward passes of the search for components")
    refusals: list[Text] = Field([], description="beginnings of refusals in the model's own words; empty: common ones")


class StudyConfig(_Strict):
    seed: int = Field(0, ge=0, lt=2**32)
    models: Models = Models()
    organism: Organism = Organism()
    real: Real = Real()
    tasks: Tasks = Tasks()
    search: Search = Search()
    bounds: Bounds = Bounds()
    steering: Steering = Steering()
    mechanism: Mechanism = Mechanism()
    n_prefixed: int = Field(
        30, ge=0, description="test tasks per label on which every checkpoint is given the agent's prefixes; 0: none"
    )
    max_turns: int = Field(5, ge=1)
    max_new_tokens: int = Field(40, ge=1)
    floor_updates: int = Field(20, ge=2, description="updates without behaviour change behind the noise floor")
    prefix: PrefixText = Field("", description="analyse this prefix instead of searching for one")
    system_prompt: str = Field("", description="safety system prompt of the arm agent+system; empty: the built-in one")


def load_config(path: str | Path | None) -> StudyConfig:
    """Read a YAML config; every error names the file and the field."""
    if path is None:
        return StudyConfig()
    raw = read_yaml(path)
    try:
        config = StudyConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "(top level)"
        raise UserError(f"{path}: field '{field}': {first['msg']}; see docs/configuration.md") from error
    if config.real.weights and config.models.base:
        raise UserError(f"{path}: field 'real': 'models' names others; give one of the two")
    if bool(config.models.base) != bool(config.models.agent):
        raise UserError(f"{path}: field 'models': give both 'base' and 'agent', or neither for the organism")
    if config.models.base and not (config.tasks.validation and config.tasks.test and config.tasks.probe_prompts):
        raise UserError(
            f"{path}: field 'tasks': your own models need 'validation', 'test' and 'probe_prompts' (JSONL or preset)"
        )
    named = [one for one in (config.tasks.validation, config.tasks.test, config.tasks.probe_prompts) if one]
    if repeated := [one for one in named if named.count(one) > 1]:
        raise UserError(f"{path}: field 'tasks': {repeated[0]} is given for two splits; splits never mix")
    return config


def save_config(config: StudyConfig, path: Path) -> None:
    atomic_write(path, yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))
