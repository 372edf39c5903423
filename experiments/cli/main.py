"""The command line. Each command says what it needs; everything heavy is imported inside, so that --help is instant."""

from __future__ import annotations

import errno
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from pingscope.experiments.run.progress import say
from pingscope.interp.errors import UserError

# typer carries its own click or imports it, depending on the release; its public errors share this ancestor.
_ClickException: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="pingscope",
    help="See where an LLM agent's refusal goes under fine-tuning, and what brings it back.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Option("--model", "-m", help="Hub id or local folder of a causal LM.")]
Template = Annotated[
    Path | None, typer.Option("--chat-template", help="File with a chat template, for tokenizers without one.")
]
TasksFile = Annotated[
    str, typer.Option("--tasks", help="JSONL of records, or a preset: webdojo:PATH, organism:test, …")
]
Prompts = Annotated[
    str, typer.Option("--prompts", help="JSONL of records, or a preset: webdojo:PATH, advbench:PATH, …")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
Limit = Annotated[int, typer.Option("--limit", min=0, help="At most this many records per label (0: all).")]
Layers = Annotated[str, typer.Option("--layers", help="all, or for example 0-3,7,-1.")]


@app.command()
def study(
    config: Annotated[Path | None, typer.Option("--config", help="YAML; default: the model organism.")] = None,
    out: Out = Path("runs/study"),
    seed: Annotated[int | None, typer.Option("--seed", help="Overrides the config's seed.")] = None,
) -> None:
    """The main job: models, probes, search, behaviour, steering, tracks and the report, in order; resumable."""
    from pingscope.experiments.studies.config import load_config
    from pingscope.experiments.studies.study import run_study

    loaded = load_config(config)
    if seed is not None:
        loaded = loaded.model_copy(update={"seed": seed})
    report = run_study(loaded, out)
    typer.echo(f"report: {report}")


@app.command()
def organism(
    out: Out = Path("runs/organism"),
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Train the model organism: an aligned base and a fine-tuned agent, as two Hugging Face folders."""
    from pingscope.experiments.cli.activations import organism_command

    organism_command(out, seed)


@app.command()
def finetune(
    base: Annotated[str, typer.Option("--base", help="Hub id or local folder.")],
    data: Annotated[Path, typer.Option("--data", help="JSONL of conversations.")],
    out: Out,
    lora_rank: Annotated[int, typer.Option("--lora-rank", min=0, help="0: full fine-tuning.")] = 16,
    learning_rate: Annotated[float, typer.Option("--learning-rate")] = 1e-5,
    epochs: Annotated[float, typer.Option("--epochs")] = 1.0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 128,
    micro_batch_size: Annotated[int, typer.Option("--micro-batch-size", min=1)] = 4,
    max_length: Annotated[int, typer.Option("--max-length", min=1)] = 16384,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    chat_template: Template = None,
) -> None:
    """Agentic supervised fine-tuning (LoRA or full) on demonstrations; saves a Hugging Face folder."""
    from pingscope.experiments.models.finetune import FinetuneConfig
    from pingscope.experiments.models.finetune import finetune as run
    from pingscope.experiments.tasks.sources import read_template

    settings = FinetuneConfig(
        lora_rank=lora_rank,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        max_length=max_length,
        seed=seed,
    )
    record = run(base, str(data), out, settings, options={"chat_template": read_template(chat_template)})
    losses = record["loss"]
    trend = f", loss {losses[0]:.3f} → {losses[-1]:.3f}" if losses else ""
    typer.echo(f"model: {out} ({record['examples']} examples{trend})")


@app.command()
def evaluate(
    model: Model,
    tasks: TasksFile,
    arm: Annotated[list[str] | None, typer.Option("--arm", help="plain, naive, system, prefix, suffix.")] = None,
    text: Annotated[str, typer.Option("--text", help="Text of the arms prefix and suffix.")] = "",
    out: Out = Path("runs/evaluate"),
    limit: Limit = 0,
    max_turns: Annotated[int, typer.Option("--max-turns", min=1)] = 5,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    base_url: Annotated[str, typer.Option("--base-url", help="Server of --model openai:NAME.")] = "",
    per_minute: Annotated[float, typer.Option("--per-minute", min=0, help="Most requests a minute (0: any).")] = 0,
    chat_template: Template = None,
) -> None:
    """Generate, judge, and print refusal, attack success and success rates with confidence intervals."""
    if model.startswith("openai:"):
        from pingscope.experiments.cli.robustness import evaluate_endpoint_job

        evaluate_endpoint_job(
            model.removeprefix("openai:"), base_url, tasks, arm or ["plain"], text, out, limit, max_turns,
            max_new_tokens, per_minute,
        )  # fmt: skip
        return
    from pingscope.experiments.cli.activations import evaluate_command

    evaluate_command(model, tasks, arm or ["plain"], text, out, limit, max_turns, max_new_tokens, chat_template)


@app.command()
def cache(
    model: Model,
    prompts: Prompts,
    out: Out,
    layers: Layers = "all",
    positions: Annotated[str, typer.Option("--positions", help="Selection, e.g. prompt, final, role:page.")] = "prompt",
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")] = "float32",
    prefix: Annotated[str, typer.Option("--prefix", help="Injected start of the response.")] = "",
    suffix: Annotated[str, typer.Option("--suffix", help="Text at the end of the user prompt.")] = "",
    without: Annotated[
        str, typer.Option("--without", help="Records whose texts are left out: tasks the probes will be read on.")
    ] = "",
    limit: Limit = 0,
    chat_template: Template = None,
) -> None:
    """Write residual activations of prompts to a store on disk; resumable."""
    from pingscope.experiments.cli.activations import cache_command

    cache_command(model, prompts, out, layers, positions, dtype, prefix, suffix, without, limit, chat_template)


@app.command()
def probe(
    store: Annotated[Path, typer.Option("--store", help="Activation store of labelled prompts.")],
    out: Out,
    pooling: Annotated[
        str,
        typer.Option("--pooling", help="mean_prompt, mean_instruction, final; or mean:SELECTION, max:SELECTION."),
    ] = "mean_prompt",
    strength: Annotated[
        str, typer.Option("--C", help="Inverse regularisation: a number, or cv, by grouped cross-validation.")
    ] = "cv",
    other: Annotated[
        Path | None, typer.Option("--other", help="Store of the same prompts through another model: transfer.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Fit per-layer logistic probes on a store, with every control beside them."""
    from pingscope.experiments.cli.activations import probe_command

    probe_command(store, out, pooling, strength, other, seed)


@app.command()
def track(
    model: Model,
    probes: Annotated[Path, typer.Option("--probes", help="Folder written by `pingscope probe`.")],
    prompts: Prompts,
    base: Annotated[
        str, typer.Option("--base", help="The model before fine-tuning: adds the readings against it.")
    ] = "",
    out: Out = Path("runs/track"),
    prefix: Annotated[str, typer.Option("--prefix", help="Adds an arm with this start of the response.")] = "",
    limit: Limit = 0,
    chat_template: Template = None,
) -> None:
    """Safety logits over token positions, and the readings that one model allows, as a report."""
    from pingscope.experiments.cli.activations import track_command

    track_command(model, base, probes, prompts, out, prefix, limit, chat_template)


@app.command()
def mechanism(
    base: Annotated[str, typer.Option("--base", help="The model before fine-tuning: hub id or local folder.")],
    model: Model,
    probes: Annotated[Path, typer.Option("--probes", help="The base's probes, written by `pingscope probe`.")],
    tasks: TasksFile,
    validation: Annotated[
        str, typer.Option("--validation", help="Tasks on which components are searched; other ones than --tasks.")
    ] = "",
    agent_probes: Annotated[Path | None, typer.Option("--agent-probes", help="The agent's probes.")] = None,
    refusal: Annotated[
        list[str] | None, typer.Option("--refusal", help="Beginning of a refusal in the model's words; repeatable.")
    ] = None,
    out: Out = Path("runs/mechanism"),
    limit: Limit = 0,
    n: Annotated[int, typer.Option("--n", min=4, help="Tasks per label behind the maps and the search.")] = 60,
    judged: Annotated[int, typer.Option("--judged", min=0, help="Tasks per label generated under each patch.")] = 24,
    budget: Annotated[int, typer.Option("--budget", min=10, help="Forward passes of the component search.")] = 200,
    max_turns: Annotated[int, typer.Option("--max-turns", min=1)] = 5,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    chat_template: Template = None,
) -> None:
    """Which components lost the signal, and where the base's state restores refusal (attribution, patching)."""
    from pingscope.experiments.cli.activations import mechanism_command

    mechanism_command(
        base, model, probes, agent_probes, tasks, validation, refusal or [], out, limit, n, judged, budget, max_turns,
        max_new_tokens, seed, chat_template,
    )  # fmt: skip


@app.command()
def steer(
    model: Model,
    probes: Annotated[Path, typer.Option("--probes", help="Folder written by `pingscope probe`.")],
    tasks: TasksFile,
    validation: Annotated[
        str, typer.Option("--validation", help="Tasks on which the point is chosen; other ones than --tasks.")
    ] = "",
    out: Out = Path("runs/steer"),
    layers: Annotated[str, typer.Option("--layers", help="all: chosen among layer sets; or one set: 2-3.")] = "all",
    dose: Annotated[
        list[float] | None, typer.Option("--dose", help="Units of the mean residual norm; repeatable.")
    ] = None,
    place: Annotated[
        list[str] | None, typer.Option("--place", help="Selection to steer, e.g. final; repeatable.")
    ] = None,
    random_draws: Annotated[int, typer.Option("--random-draws", min=1)] = 5,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="The full sweep instead of successive halving.")
    ] = False,
    n_choice: Annotated[int, typer.Option("--n-choice", min=4, help="Tasks per label behind the choice.")] = 40,
    limit: Limit = 0,
    max_turns: Annotated[int, typer.Option("--max-turns", min=1)] = 5,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    chat_template: Template = None,
) -> None:
    """Dose × layers × place of steering, with norm-matched random directions and a shuffled-label probe's."""
    from pingscope.experiments.cli.steering import steer_command

    steer_command(
        model, probes, tasks, validation, out, layers, dose or [0.05, 0.1, 0.15, 0.2, 0.25],
        place or ["final", "final | generated[0:]"], random_draws, exhaustive, n_choice, limit, max_turns,
        max_new_tokens, seed, chat_template,
    )  # fmt: skip


@app.command()
def gates(
    model: Model,
    prefix: Annotated[str, typer.Option("--prefix", help="The response prefix to be gated (\\n: a line end).")],
    train: Annotated[str, typer.Option("--train", help="Tasks that train the gate's probe.")] = "organism:train",
    validation: Annotated[
        str, typer.Option("--validation", help="Tasks that give threshold, layers and doses.")
    ] = "organism:validation",
    tasks: TasksFile = "organism:test",
    probes: Annotated[
        Path | None, typer.Option("--probes", help="A probe's directions to steer along, beside the gate's own.")
    ] = None,
    out: Out = Path("runs/gates"),
    fpr: Annotated[float, typer.Option("--fpr", help="False-positive rate stated, per episode.")] = 0.01,
    hysteresis: Annotated[
        float, typer.Option("--hysteresis", min=0, help="Logits below the threshold at which an open gate closes.")
    ] = 0.0,
    random_draws: Annotated[int, typer.Option("--random-draws", min=1)] = 5,
    n_train: Annotated[int, typer.Option("--n-train", min=4, help="Training tasks per label.")] = 100,
    n_validation: Annotated[int, typer.Option("--n-validation", min=4, help="Validation tasks per label.")] = 200,
    n_choice: Annotated[int, typer.Option("--n-choice", min=4, help="Tasks per label behind each choice.")] = 40,
    n: Annotated[int, typer.Option("--n", "--limit", min=0, help="Tasks per label that are reported.")] = 200,
    jailbreak: Annotated[
        bool, typer.Option("--jailbreak/--no-jailbreak", help="Also run every arm under a few-shot jailbreak.")
    ] = True,
    max_turns: Annotated[int, typer.Option("--max-turns", min=1)] = 5,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 40,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    chat_template: Template = None,
) -> None:
    """Gated steering and gated prefix against ungated steering, CAST, Any-Depth Alignment and random directions."""
    from pingscope.experiments.cli.gates import gates_command

    gates_command(
        model, prefix, train, validation, tasks, probes, out, fpr, hysteresis, random_draws, n_train, n_validation,
        n_choice, n, jailbreak, max_turns, max_new_tokens, seed, chat_template,
    )  # fmt: skip


@app.command()
def replay(
    log: Annotated[Path, typer.Argument(help="decisions.jsonl of a run.")],
    model: Model,
    tasks: Annotated[list[str], typer.Option("--tasks", help="Tasks of the run; repeatable.")],
    limit: Limit = 0,
    chat_template: Template = None,
) -> None:
    """Recompute every score of a gate's decision log and compare it to the bit; exits 2 on a mismatch."""
    from pingscope.experiments.cli.gates import replay_command

    replay_command(log, model, tasks, limit, chat_template)


@app.command()
def inject(
    model: Model,
    text: Annotated[str, typer.Option("--text", help="The text to inject.")],
    tasks: TasksFile,
    demonstrations: Annotated[
        Path | None, typer.Option("--demonstrations", help="JSONL of user and assistant: the few-shot safety arm.")
    ] = None,
    jailbreak: Annotated[
        Path | None, typer.Option("--jailbreak", help="JSONL of user and assistant: demonstrations of compliance.")
    ] = None,
    out: Out = Path("runs/inject"),
    limit: Limit = 0,
    max_turns: Annotated[int, typer.Option("--max-turns", min=1)] = 5,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    chat_template: Template = None,
) -> None:
    """Prefix against suffix against the other arms, with the same text; and each under a few-shot jailbreak."""
    from pingscope.experiments.cli.steering import inject_command

    inject_command(
        model, text, tasks, demonstrations, jailbreak, out, limit, max_turns, max_new_tokens, seed, chat_template
    )


@app.command()
def search(
    model: Model,
    tasks: TasksFile,
    out: Out = Path("runs/search"),
    k: Annotated[int, typer.Option("--k", min=1, help="Seeds kept per criterion.")] = 3,
    candidates: Annotated[int, typer.Option("--candidates", "-M", min=1, help="Candidates a round.")] = 6,
    rounds: Annotated[int, typer.Option("--rounds", "-T", min=1)] = 5,
    tau: Annotated[float, typer.Option("--tau", help="Below this best overall score seeds are emptied.")] = 1.5,
    preset: Annotated[
        str, typer.Option("--preset", help="paper-web or paper-code: the paper's search, exactly as published.")
    ] = "",
    perf: Annotated[str, typer.Option("--perf", help="not_refused (the paper's) or success.")] = "not_refused",
    generator: Annotated[
        str, typer.Option("--generator", help="phrases (built in), hf:PATH, or openai:MODEL with --base-url.")
    ] = "phrases",
    base_url: Annotated[str, typer.Option("--base-url", help="OpenAI-compatible server; key: OPENAI_API_KEY.")] = "",
    per_minute: Annotated[float, typer.Option("--per-minute", min=0, help="Most requests a minute (0: any).")] = 0,
    screening: Annotated[
        bool,
        typer.Option("--screening/--exhaustive", help="Rank and race candidates, or measure all of them (default)."),
    ] = False,
    probes: Annotated[
        Path | None, typer.Option("--probes", help="Rank by these probes' final-token logit instead.")
    ] = None,
    max_generations: Annotated[int, typer.Option("--max-generations", min=0, help="Budget in answers (0: none).")] = 0,
    max_minutes: Annotated[float, typer.Option("--max-minutes", min=0, help="Budget in minutes (0: none).")] = 0,
    held_out: Annotated[str, typer.Option("--held-out", help="Tasks on which the winner is measured again.")] = "",
    limit: Limit = 0,
    max_turns: Annotated[int, typer.Option("--max-turns", min=1)] = 5,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    chat_template: Template = None,
) -> None:
    """PING: search for a response prefix that restores refusal at little cost (the paper's Algorithm 1)."""
    from pingscope.experiments.cli.search import search_job
    from pingscope.steering.ping import Settings

    search_job(
        model, tasks, out, Settings(k, candidates, rounds, tau), preset=preset, perf=perf,  # type: ignore[arg-type]
        generator=generator, base_url=base_url, per_minute=per_minute, screening=screening, probes=probes,
        max_generations=max_generations, max_minutes=max_minutes, held_out=held_out, limit=limit,
        max_turns=max_turns, max_new_tokens=max_new_tokens, seed=seed, chat_template=chat_template,
    )  # fmt: skip


@app.command()
def guard(
    model: Model,
    prefix_file: Annotated[Path, typer.Option("--prefix-file", help="The prefix, as `pingscope search` writes it.")],
    tasks: TasksFile,
    guards: Annotated[
        list[str] | None,
        typer.Option("--guard", help="llama-guard:MODEL, wildguard:MODEL or classifier:MODEL; repeatable."),
    ] = None,
    probes: Annotated[Path | None, typer.Option("--probes", help="The agent's probes: adds them as a guard.")] = None,
    validation: Annotated[str, typer.Option("--validation", help="Tasks that set the probe's threshold.")] = "",
    fpr: Annotated[float, typer.Option("--fpr", help="Share of benign validation tasks the probe may block.")] = 0.05,
    out: Out = Path("runs/guard"),
    limit: Limit = 0,
    max_turns: Annotated[int, typer.Option("--max-turns", min=1)] = 5,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    chat_template: Template = None,
) -> None:
    """Refusal and success of the agent, + guard, + prefix, + both."""
    from pingscope.experiments.cli.robustness import guard_job

    guard_job(
        model, prefix_file, tasks, guards or [], probes, validation, fpr, out, limit, max_turns, max_new_tokens,
        chat_template,
    )  # fmt: skip


@app.command()
def attack(
    model: Model,
    prefix_file: Annotated[Path, typer.Option("--prefix-file", help="The prefix, as `pingscope search` writes it.")],
    tasks: TasksFile,
    demonstrations: Annotated[
        str, typer.Option("--demonstrations", help="Other tasks, whose answers become the few-shot jailbreak.")
    ] = "",
    shots: Annotated[int, typer.Option("--shots", min=1)] = 4,
    out: Out = Path("runs/attack"),
    limit: Limit = 0,
    max_turns: Annotated[int, typer.Option("--max-turns", min=1)] = 5,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    chat_template: Template = None,
) -> None:
    """A found prefix under attacks that strip it, and under a few-shot jailbreak."""
    from pingscope.experiments.cli.robustness import attack_job

    attack_job(model, prefix_file, tasks, demonstrations, shots, out, limit, max_turns, max_new_tokens, chat_template)


@app.command()
def transfer(
    models: Annotated[list[str], typer.Option("--model", "-m", help="Hub id or folder; repeatable.")],
    prefix_files: Annotated[
        list[Path], typer.Option("--prefix-file", help="A prefix per model, in the order of --model; further ones too.")
    ],
    tasks: TasksFile,
    out: Out = Path("runs/transfer"),
    limit: Limit = 0,
    max_turns: Annotated[int, typer.Option("--max-turns", min=1)] = 5,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    chat_template: Template = None,
) -> None:
    """Every model's prefix in every model."""
    from pingscope.experiments.cli.robustness import transfer_job

    transfer_job(models, prefix_files, tasks, out, limit, max_turns, max_new_tokens, chat_template)


@app.command()
def doctor(
    model: Model,
    backend: Annotated[
        list[str] | None, typer.Option("--backend", help="hf, transformer_lens or nnsight; repeatable.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=16, help="Longest prompt of the suite.")] = 1024,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda:1, …, sharded.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    attention: Annotated[str, typer.Option("--attention", help="eager, sdpa, … (default: the model's).")] = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the tables to this JSON file.")] = None,
    chat_template: Template = None,
) -> None:
    """Check a checkpoint: layout, template, roles, memory, and parity with plain single-prompt runs."""
    from pingscope.experiments.models.doctor import doctor_command

    doctor_command(model, backend or ["hf"], max_tokens, device, dtype, attention, chat_template, out)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run's folder, with results.json.")]) -> None:
    """Rebuild report.html from results.json."""
    from pingscope.figures.report import build_report

    typer.echo(f"report: {build_report(folder)}")


def main() -> None:
    """Run the command line with one-line errors: 2 for bad input, 130 for Ctrl-C."""
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        traceback.clear_frames(error.__traceback__)  # a command that failed lets go of its folder
        _fail(str(error), 2)
    except KeyboardInterrupt:
        code = 130
    except _ClickException as error:
        _fail(error.format_message(), 2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _fail(f"{error.filename or 'output'}: no space left on the disk; free some and run again to resume", 2)
    if code == 130:  # Ctrl-C, in either of the two ways it arrives here
        _fail("interrupted; the same command resumes where it stopped", code)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> None:
    say("error: " + " ".join(message.split()) if code == 2 else message)
    sys.exit(code)


if __name__ == "__main__":
    main()
