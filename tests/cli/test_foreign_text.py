"""Texts of others are shown as they are written: no terminal, browser or rich obeys them."""

from __future__ import annotations

import ast
import io
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_studies import Maker, searched

import ekd_ray
from ekd_ray.cli import study_text
from ekd_ray.cli.console import Console
from ekd_ray.cli.terminal import Terminal, folded, plain_table, progress_line
from ekd_ray.errors import UserError, spell_controls
from ekd_ray.results.html import facts_html
from ekd_ray.results.report import write_report

LIBRARY = Path(ekd_ray.__file__).parent
EVIL = "\x1b]0;owned\x07[/x][bold]b[/bold]:smile:\u202e\x9b2J"
SHOWN = "\\x1b]0;owned\\x07[/x][bold]b[/bold]:smile:\\u202e\\x9b2J"
ACTING = ("\x1b]", "\x07", "\u202e", "\x9b")


@given(st.text())
@settings(deadline=None)
def test_no_sign_acts_and_what_can_be_read_stays(text):
    found = spell_controls(text)
    kinds = {unicodedata.category(sign) for sign in found if sign not in "\n\t"}
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    found.encode("utf-8")
    assert found == text or not text.isprintable()
    shown = str(UserError(text))
    assert all(sign.isprintable() or unicodedata.category(sign) == "Zs" for sign in shown)


def drawn(*views, width=100, tty=True):
    console = Console(file=io.StringIO(), force_terminal=tty, width=width)
    for view in views:
        console.print(view)
    return console.file.getvalue()


def test_rich_shows_markup_emojis_and_escapes_as_text():
    table = plain_table(EVIL, title=EVIL)
    table.add_row(EVIL)
    views = (EVIL, table, folded(EVIL), progress_line(EVIL, 0.5, EVIL, width=300))
    for view in views:
        found = drawn(view, width=300)
        assert SHOWN in found and not any(sign in found for sign in ACTING)


def test_the_live_view_shows_it_too():
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    terminal = Terminal(console=console, shown=("optimizer",))
    terminal.stage(EVIL, 2, 3)
    terminal.started(EVIL, 0, {"optimizer": EVIL})
    terminal.epoch(0, {"epoch": 1, "train_loss": 1.0, "val_top1": 0.5})
    terminal.ended(0, failure=EVIL)
    terminal.note(EVIL)
    terminal.stage(EVIL, 1, 0)  # a spinner
    terminal.close()
    found = console.file.getvalue()
    assert found.count(SHOWN) >= 4 and not any(sign in found for sign in ACTING)


def test_a_study_whose_reasons_are_hostile(tmp_path, monkeypatch):
    maker = Maker(tmp_path / "run")
    study = searched(maker)
    maker.trial(30, [0.1], status="failed", reason=EVIL, lr=0.01, momentum=0.5, optimizer=EVIL)
    study = type(study).load(maker.path)
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr(study_text, "Console", lambda **given: console)
    study_text.print_progress(study, None, "")
    for found in (console.file.getvalue(), write_report(study).read_text(encoding="utf-8")):
        assert SHOWN in found and not any(sign in found for sign in ACTING)


def test_a_notebook_and_an_error_show_it(launch):
    assert SHOWN in facts_html(EVIL, {EVIL: EVIL})
    code, _, err = launch("show", EVIL)
    assert code == 2 and SHOWN in err and not any(sign in err for sign in ACTING)


# They write for another program, or what is ours alone.
_OTHERS = {"output.py", "console.py", "cluster.py", "background.py"}
_SINKS = {"print", "rich.console.Console", "Text.from_markup", "sys.stdout.write",
          "sys.stderr.write"}  # fmt: skip


def sinks(tree):
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Call) and ast.unparse(node.func) in _SINKS
            and not (node.args and ast.unparse(node.args[0]).startswith("spell_controls(")))
        or (isinstance(node, ast.keyword) and node.arg == "markup")
        or (isinstance(node, ast.ImportFrom) and node.module == "rich.console"
            and "Console" in {name.name for name in node.names})
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line", ["print(x)", "c.print(x, markup=True)", "from rich.console import Console"]
)
def test_the_scan_sees_it(line):
    assert sinks(ast.parse(line))


def test_all_text_goes_through_what_spells_it():
    paths = [path for path in LIBRARY.rglob("*.py") if path.name not in _OTHERS]
    found = {str(path): sinks(ast.parse(path.read_text(encoding="utf-8"))) for path in paths}
    assert not {path: lines for path, lines in found.items() if lines}
