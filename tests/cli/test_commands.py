"""`ekd-ray`: every command is found, has a help that fits on a screen, and examples that work."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from launchers_run import LAUNCHERS, command, parser_of

from ekd_ray.cli import main
from ekd_ray.cli.console import Console
from ekd_ray.cli.help_text import LINES, HelpParser
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.setting_list import MOST_USED
from ekd_ray.errors import UserError
from ekd_ray.studies.overlay import OF_A_STUDENT

PARSERS = {
    parser.prog: parser
    for name in main.COMMANDS
    for parser in main.all_parsers(main.command_parser(name))
}


def test_every_command_of_the_issue_is_there() -> None:
    assert set(main.COMMANDS) >= {
        "quickstart", "tune", "distill", "train-teacher", "cache", "show", "report", "export",
        "reproduce", "space", "compare", "doctor",
    }  # fmt: skip
    modules = {f"{module}.py" for module, _ in main.COMMANDS.values()}
    assert modules == {path.name for path in Path(main.__file__).parent.glob("*_command.py")}


def test_every_launcher_is_a_command() -> None:
    for launcher in LAUNCHERS.glob("*.py"):
        assert parser_of(launcher).prog.removeprefix("ekd-ray ") in main.COMMANDS
    assert parser_of(LAUNCHERS / "tune_vit.py").get_default("home") == "vit"


@pytest.mark.parametrize("parser", PARSERS.values(), ids=list(PARSERS))
def test_a_help_fits_on_a_screen_and_the_whole_one_has_every_flag(
    parser: HelpParser, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    first, whole = parser.format_help(), parser.format_help_all()
    assert first.count("\n") <= LINES
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert all(re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", whole) for flag in flags)
    if parser.examples:
        assert first.index(parser.examples[0]) < first.index("\n  --")
    shown = set(re.findall(r"^  (--[\w-]+)", first, re.MULTILINE))
    assert first == whole or shown == {f for f in parser.first if f in flags}


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_example_is_legal_and_every_first_flag_is_one(name: str) -> None:
    parser = main.command_parser(name)
    assert parser.examples
    for example in parser.examples:
        program, own, *arguments = shlex.split(example)
        assert (program, own) == ("ekd-ray", name)
        parser.read(arguments)
    known = {f for p in main.all_parsers(parser) for a in p._actions
             for f in a.option_strings}  # fmt: skip
    assert set(parser.first) <= known


def test_the_overview_fits_on_a_screen_and_names_every_command(launch) -> None:
    code, out, err = launch("--help")
    assert (code, err) == (0, "") and out == launch("--help")[1]
    assert out.count("\n") <= LINES and max(map(len, out.splitlines())) <= 80
    assert all(re.search(rf"\b{name}  ", out) for name in main.COMMANDS)
    whole = launch("--help-all")[1]
    assert all(f"usage: {prog}" in whole for prog in PARSERS) and "--teacher-top" not in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("tnue",), "unknown command 'tnue'. Did you mean 'tune'?"),
        (("tune", "--trails", 3), "unknown flag '--trails'. Did you mean '--trials'?"),
        (("tune", "--trails=3"), "Did you mean '--trials'?"),
        (("cache", "fill", "--thread-s", 3), "Did you mean '--threads'?"),
        (("show", "a", "b"), "unexpected argument 'b'"),
        (("tune", "--epochs", "x"), "--epochs must be a whole number, got 'x'"),
        (("tune", "--budget-hours", "x"), "--budget-hours must be a number, got 'x'"),
        (("tune", "--out"), "--out needs one argument; see ekd-ray tune --help"),
        (("space", "shw"), "unknown command of space.py: 'shw'. Did you mean 'show'?"),
        (("space", "schema", "study"), "StudyConfig"),
        (("export",), "required: RUN, --out"),
        (("--quiet",), "ekd-ray COMMAND --quiet"),
    ],
)
def test_a_mistake_in_the_words_is_one_sentence(argv, words, launch) -> None:
    code, out, err = launch(*argv)
    assert (code, out) == (2, "") and err.count("\n") == 1 and words in err


@pytest.mark.parametrize(("name", "classes"), [("tune", 2), ("train-teacher", 1)])
def test_all_settings_are_listed_once_and_the_most_used_first(name, classes, launch) -> None:
    code, out, err = launch(name, "--list-settings")
    assert (code, err) == (0, "")
    listed = re.findall(r"^  (\w+) ", out, re.MULTILINE)
    known = [DistillConfig.names(), StudyConfig.names()][:classes]
    without = OF_A_STUDENT if name == "train-teacher" else ()  # which that command refuses
    assert sorted([*listed, *without]) == sorted(name for names in known for name in names)
    first = [name for name in MOST_USED[DistillConfig] if name not in without]
    assert listed[: len(first)] == first
    assert re.search(r"^  lr  .*peak learning rate; > 0; <= 1000 \(default: 0.05\)$", out, re.M)


def test_a_reader_that_has_gone_is_no_failure() -> None:
    """`ekd-ray tune --list-settings | head -1`, and of both streams."""
    for streams in ({"stderr": subprocess.PIPE}, {"stderr": subprocess.STDOUT}):
        reader, writer = os.pipe()
        os.close(reader)
        words = [sys.executable, "-m", "ekd_ray", "space", "list"]
        done = subprocess.run(words, stdout=writer, check=False, **streams)
        os.close(writer)
        assert (done.returncode, done.stderr or b"") == (0, b"")


def test_a_table_for_a_reader_that_has_gone_ends_as_other_text_does() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Console(file=Gone()).print("x")


def test_the_package_is_a_command_too() -> None:
    done = command("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"ekd_ray \d+\.\d+\S*\n", done.stdout)


def test_an_unknown_command_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="unknown command 'x'"):
        main.load_command("x")
