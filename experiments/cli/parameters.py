"""From a frozen model of options to a command: flags, YAML and ranges are all read off the one declaration."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pingscope.interp.errors import UserError
from pingscope.interp.files import read_yaml

_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


@dataclass(frozen=True)
class Flag:
    """How an option is spelled where that is not ``--its-name``; ``argument`` takes it by position."""

    names: tuple[str, ...] = ()
    argument: bool = False
    escapes: bool = False


class Options(BaseModel):
    """Options of a command. Frozen and strict: a field that is not declared is refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def unescaped(text: str) -> str:
    r"""``\n``, ``\t`` and ``\\`` as a shell passes them: a line end, a tab, one backslash. All else stays."""
    return re.sub(r"\\([nt\\])", lambda found: _ESCAPES[found[1]], text)


def flag_of(field: FieldInfo) -> Flag:
    return next((one for one in field.metadata if isinstance(one, Flag)), Flag())


def flag_name(kind: type[Options], name: str) -> str:
    """What a user types for a field, for messages."""
    field = kind.model_fields.get(name)
    if field is None:
        return name
    flag = flag_of(field)
    return name.upper() if flag.argument else (flag.names or (f"--{name.replace('_', '-')}",))[0].split("/")[0]


def read_options(kind: type[Options], command: str, given: Mapping[str, Any], config: Path | None = None) -> Options:
    """Flags over the YAML file over defaults, checked as a whole before anything runs.

    Raises:
        UserError: an option unknown, missing or out of its range, by the name that the user typed.
    """
    # `max-turns` and `max_turns` are the same option.
    values = {name.replace("-", "_"): value for name, value in read_yaml(config).items()} if config else {}
    if unknown := sorted(set(values) - set(kind.model_fields)):
        raise UserError(f"{config}: unknown field {unknown[0]!r}; `pingscope {command} --help` lists the options")
    values |= given
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    where = f"{config}: " if config and name in kind.model_fields and name not in given else ""
    if first["type"] == "missing":
        raise UserError(f"{where}Missing option {flag_name(kind, name)}; see `pingscope {command} --help`")
    said = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if not name:
        raise UserError(f"{command}: {said}")
    shown = repr(values.get(name))[:80]
    raise UserError(f"{where}{flag_name(kind, name)} {shown}: {said}; see `pingscope {command} --help`")


@dataclass(frozen=True)
class Command:
    """``run`` is ``module:function`` in this package, imported only when the command runs: --help stays instant."""

    name: str
    options: type[Options]
    run: str

    def __call__(self, options: Options) -> None:
        module, _, function = self.run.partition(":")
        getattr(importlib.import_module(f"{__package__}.{module}"), function)(options)


def register(app: typer.Typer, command: Command) -> None:
    """Declare the command's flags from its options; it is called with one object."""
    kind = command.options
    escaped = [name for name, field in kind.model_fields.items() if flag_of(field).escapes]
    takes_file = "config" not in kind.model_fields

    def call(**given: Any) -> None:
        given = {name: value for name, value in given.items() if value is not None and value != []}
        config = given.pop("config", None) if takes_file else None
        for name in escaped:
            if name in given:
                value = given[name]
                given[name] = unescaped(value) if isinstance(value, str) else [unescaped(one) for one in value]
        command(read_options(kind, command.name, given, config))

    parameters = [_parameter(name, field) for name, field in kind.model_fields.items()]
    if takes_file:
        parameters.append(
            _keyword("config", Path | None, typer.Option("--config", help="YAML of these options; flags win."))
        )
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__doc__ = kind.__doc__
    app.command(command.name)(call)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    flag, kind = flag_of(field), _typer_type(field.annotation)
    if flag.argument:
        return _keyword(name, kind, typer.Argument(help=field.description, show_default=False))
    words = flag.names or (f"--{name.replace('_', '-')}",)
    return _keyword(name, kind, typer.Option(*words, help=f"{field.description or ''}{_shown_default(field)}"))


def _keyword(name: str, kind: Any, info: Any) -> inspect.Parameter:
    # Every parameter may be left out here: what is required is decided after the YAML file was read.
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, info])


def _shown_default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined and field.default_factory is None:
        return "  [required]"
    value = field.default
    if value in ("", None, (), False):
        return ""
    return f"  [default: {', '.join(map(str, value)) if isinstance(value, tuple) else value}]"


def _typer_type(kind: Any) -> Any:
    """What typer reads from the shell; the model's own, finer type checks it afterwards."""
    inner = [one for one in get_args(kind) if one is not type(None)]
    if get_origin(kind) in (Union, UnionType):
        return _typer_type(inner[0])
    if get_origin(kind) is tuple:
        element = _typer_type(inner[0])
        return list[get_args(element)[0]] | None  # type: ignore[misc]
    base = kind if kind in (int, float, bool, Path) else str
    return base | None
