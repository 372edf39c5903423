"""Options end to end: structured rubbish ends in one line before anything runs, and one declaration serves all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pingscope.experiments.cli import main as cli
from pingscope.experiments.cli import options as declared
from pingscope.experiments.cli.parameters import Command, flag_of, read_options, unescaped
from pingscope.interp.errors import UserError

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every command's work replaced by a note of its options."""
    calls: list[Any] = []
    monkeypatch.setattr(Command, "__call__", lambda self, options: calls.append(options))
    return calls


@pytest.fixture
def pingscope(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pingscope", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


FINETUNE = ("finetune", "--base", "b", "--data", "d.jsonl", "--out", "o")
STEER = ("steer", "--model", "m", "--probes", "p", "--tasks", "t")
EVALUATE = ("evaluate", "--model", "m", "--tasks", "t")
GATES = ("gates", "--model", "m", "--prefix", "# x")
SEARCH = ("search", "--model", "m", "--tasks", "t")
MECHANISM = ("mechanism", "--base", "b", "--model", "m", "--probes", "p", "--tasks", "t")
GUARD = ("guard", "--model", "m", "--prefix", "x", "--tasks", "t", "--guard", "wildguard:G")
TRANSFER = ("transfer", "--model", "a", "--model", "b", "--tasks", "t")

REFUSED = [
    *((*STEER, "--dose", dose) for dose in (0, -5, 1e9, "nan", "inf")),
    *((*FINETUNE, "--learning-rate", rate) for rate in (1e9, 0, -1, "nan", "inf")),
    *((*FINETUNE, "--epochs", epochs) for epochs in (0, -1, "nan")),
    *((*GATES, "--fpr", fpr) for fpr in (0, 7, -1, "nan")),
    *((*GUARD, "--fpr", fpr) for fpr in (0, 0.6)),
    *((*SEARCH, "--tau", tau) for tau in ("nan", -1, 2.5, "inf")),
    *(("probe", "--store", "s", "--out", "o", "--C", C) for C in ("1e300", "0", "-1", "nan", "much")),
    (*GATES, "--hysteresis", "inf"),
    (*GATES[:3], "--prefix", "  \n "),
    (*EVALUATE, "--arm", "prefix", "--text", "\\n"),
    (*EVALUATE, "--arm", "plain", "--arm", "plain"),
    (*EVALUATE, "--arm", "plain", "--text", "# unused"),
    (*EVALUATE, "--arm", "prefix", "--text", "a", "--prefix-file", "b"),
    (*EVALUATE, "--base-url", "http://x"),
    (*EVALUATE, "--template-var", "nothing"),
    (*MECHANISM, "--refusal", ""),
    (*MECHANISM, "--refusal", " "),
    (*TRANSFER, "--prefix", "only one"),
    (*TRANSFER, "--prefix", "a", "--prefix", ""),
    (*GUARD[:-2],),
    (*SEARCH, "--preset", "paper"),
    (*SEARCH, "--max-minutes", "nan"),
    (*SEARCH, "--seed", -1),
]


@pytest.mark.parametrize("words", REFUSED, ids=lambda words: " ".join(map(str, (words[0], *words[-2:]))))
def test_values_out_of_range_are_one_line_and_start_nothing(
    words: tuple[object, ...], pingscope: Cli, started: list[Any]
) -> None:
    code, out, err = pingscope(*words)
    assert (code, out, started) == (2, "", [])
    assert err.startswith("error: ") and err.count("\n") == 1 and "--" in err


@pytest.mark.parametrize("words", [FINETUNE, STEER, EVALUATE, GATES, SEARCH, MECHANISM, GUARD], ids=lambda w: w[0])
def test_the_same_words_without_the_fault_start_the_command(
    words: tuple[object, ...], pingscope: Cli, started: list[Any]
) -> None:
    assert pingscope(*words)[0] == 0
    assert len(started) == 1


RUBBISH = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.just("9" * 5000), st.just("\x00"),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=5)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_rubbish_in_any_field_is_refused_or_in_range(command: Command, data: st.DataObject) -> None:
    names = [*command.options.model_fields, "nonsense"]
    values = {name: data.draw(RUBBISH) for name in data.draw(st.lists(st.sampled_from(names), min_size=1))}
    try:
        options = read_options(command.options, command.name, values)
    except UserError as error:
        assert str(error).strip()
        return
    assert "nonsense" not in values
    assert type(options).model_validate(options.model_dump()) == options


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_rubbish_from_the_shell_never_ends_in_a_traceback(
    command: Command, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["pingscope", command.name]
    shell = st.one_of(st.integers().map(str), st.floats().map(str), st.text(max_size=12), st.just("9" * 400))
    for name in data.draw(st.lists(st.sampled_from([*command.options.model_fields]), min_size=1, max_size=4)):
        flag = flag_of(command.options.model_fields[name])
        names = [] if flag.argument else [(flag.names or (f"--{name.replace('_', '-')}",))[0].split("/")[0]]
        words += [*names, data.draw(shell)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.setattr(Command, "__call__", lambda self, options: None)
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code in (0, 2)


def test_yaml_gives_options_and_flags_win(pingscope: Cli, started: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "o.yaml"
    path.write_text("model: m\ntasks: t\nmax-turns: 3\nprefix: 'a\\n'\narm: [plain, prefix]\n")
    assert pingscope("evaluate", "--config", path, "--max-turns", 2)[0] == 0
    (options,) = started
    assert (options.max_turns, options.arm, options.prefix) == (2, ("plain", "prefix"), "a\\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle: x", "'modle'"), ("- a", "found a list"), ("a: [", "not valid YAML"), ("true", "found a bool"),
        ("model: m\ntasks: t\nlimit: -1", "--limit"), ("model: 7\ntasks: t", "--model"), ("[" * 5000, "not valid YAML"),
        ("limit: " + "9" * 10_000, "o.yaml"),
    ],
)  # fmt: skip
def test_faults_in_yaml_name_the_file_and_the_field(
    text: str, said: str, pingscope: Cli, started: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "o.yaml"
    path.write_text(text)
    code, _, err = pingscope("evaluate", "--config", path)
    assert code == 2 and said in err and "o.yaml" in err and err.count("\n") == 1 and not started


def test_a_prefix_is_the_same_text_from_flag_and_file(pingscope: Cli, started: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "prefix.txt"
    path.write_bytes(b"# Is this safe?\n")
    for command, more in (
        ("evaluate", ["--tasks", "t", "--arm", "prefix"]), ("inject", ["--tasks", "t"]), ("gates", []),
        ("track", ["--prompts", "t", "--probes", "p"]), ("cache", ["--prompts", "t", "--out", "o"]),
        ("guard", ["--tasks", "t", "--guard", "wildguard:G"]), ("attack", ["--tasks", "t"]),
    ):  # fmt: skip
        assert pingscope(command, "--model", "m", *more, "--prefix", r"# Is this safe?\n")[0] == 0, command
        assert pingscope(command, "--model", "m", *more, "--prefix-file", path)[0] == 0, command
        first, second = started[-2:]
        assert first.prefix_text() == second.prefix_text() == "# Is this safe?\n"
    path.write_bytes(rb"a literal \n  ")
    assert declared.PrefixOptions(prefix_file=path).prefix_text() == "a literal \\n  "
    assert unescaped(r"C:\\new\d\t") == "C:\\new\\d\t"


@pytest.mark.parametrize("content", [b"", b" \n\t", b"\xff\xfe\x00"], ids=["empty", "spaces", "binary"])
def test_a_prefix_file_without_a_prefix_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"--prefix-file .*p\.txt"):
        declared.PrefixOptions(prefix_file=path).prefix_text()


def test_help_of_every_command_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pingscope.experiments.cli import main\n"
        "for command in main.COMMANDS:\n"
        "    try: main.app([command.name, '--help'], standalone_mode=False)\n"
        "    except SystemExit: pass\n"
        "main.app(['--version'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'sklearn', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]") and "pingscope 0." in done.stdout
    assert "--template-var" in done.stdout and "[default: runs/evaluate]" in done.stdout
