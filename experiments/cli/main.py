"""The command line: its commands, and what each kind of error ends in. Heavy imports wait until a command runs."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from importlib.metadata import version
from typing import Annotated, Any

import typer

from pingscope.experiments.cli import options as declared
from pingscope.experiments.cli.parameters import Command, register
from pingscope.experiments.run.progress import say
from pingscope.experiments.run.waiting import wait_shortly
from pingscope.interp.errors import UserError

# typer carries its own click or imports it, depending on the release; its public errors share this ancestor.
_ClickException: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

COMMANDS = (
    Command("study", declared.StudyOptions, "study:study"),
    Command("organism", declared.OrganismOptions, "models:organism"),
    Command("fetch", declared.FetchOptions, "models:fetch"),
    Command("finetune", declared.FinetuneOptions, "models:finetune"),
    Command("evaluate", declared.EvaluateOptions, "behaviour:evaluate"),
    Command("cache", declared.CacheOptions, "activations:cache"),
    Command("probe", declared.ProbeOptions, "activations:probe"),
    Command("track", declared.TrackOptions, "activations:track"),
    Command("mechanism", declared.MechanismOptions, "mechanism:mechanism"),
    Command("steer", declared.SteerOptions, "behaviour:steer"),
    Command("gates", declared.GatesOptions, "gates:gates"),
    Command("replay", declared.ReplayOptions, "gates:replay"),
    Command("inject", declared.InjectOptions, "behaviour:inject"),
    Command("search", declared.SearchOptions, "search:search"),
    Command("guard", declared.GuardOptions, "robustness:guard"),
    Command("attack", declared.AttackOptions, "robustness:attack"),
    Command("transfer", declared.TransferOptions, "robustness:transfer"),
    Command("doctor", declared.DoctorOptions, "models:doctor"),
    Command("tasks", declared.TasksOptions, "worlds:tasks"),
    Command("report", declared.ReportOptions, "study:report"),
)

app = typer.Typer(
    name="pingscope",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pingscope {version('pingscope')}")
        raise typer.Exit


@app.callback()
def pingscope(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """See where an LLM agent's refusal goes under fine-tuning, and what brings it back."""


for _command in COMMANDS:
    register(app, _command)


def main() -> None:
    """Run the command line with one-line errors: 2 for bad input, 130 for Ctrl-C."""
    wait_shortly(os.environ)  # nothing above has imported torch
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        line = one_line(error)
        if line is None:
            say("error: this is a fault of pingscope, not of your input; please report it with the lines below")
            raise
        traceback.clear_frames(error.__traceback__)  # a command that failed lets go of its folder
        _fail(line, 2)
    if code == 130:  # Ctrl-C, in either of the two ways it arrives here
        _fail("interrupted; what was written is kept, and the same command goes on from it", code)
    sys.exit(code or 0)


def one_line(error: Exception) -> str | None:
    """What a user reads for an error that he can mend; None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, _ClickException):
        return str(error.format_message())
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{error.filename or 'output'}: no space left on the disk; free some and run again to resume"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{error.filename}: {error.strerror}; give a path that can be read and written"
    if isinstance(error, UnicodeError):
        return f"text that is not UTF-8 ({error}); give UTF-8 files"
    if isinstance(error, RecursionError):
        return "a file or template is nested too deeply to be read; flatten it"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; use fewer or shorter records (--limit), --dtype bfloat16, or --device sharded"
    return None


def _fail(message: str, code: int) -> None:
    say("error: " + " ".join(message.split()) if code == 2 else message)
    sys.exit(code)


if __name__ == "__main__":
    main()
