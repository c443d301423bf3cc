"""Help that fits on a screen: examples first, then the flags that one needs first."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NoReturn

from ekd_ray.cli.output import print_text
from ekd_ray.config.setting_list import list_settings
from ekd_ray.config.settings import Settings
from ekd_ray.errors import UserError, unknown_name, usual_name

LINES = 30  # of the help at first
_KINDS = {"int": "a whole number", "float": "a number"}


class HelpParser(argparse.ArgumentParser):
    """A parser with `--help`, which fits on a screen, and `--help-all`.

    A mistake in the flags is a `UserError`.

    Attributes:
        examples: command lines.
        first: the flags that `--help` shows where not all have room.
    """

    examples: Sequence[str] = ()
    first: Sequence[str] = ()

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "add_help": False, "allow_abbrev": False})
        group = self.add_argument_group("help")
        group.add_argument("-h", "--help", action="help", help="what one needs first")
        group.add_argument("--help-all", action=_HelpAll, help="all flags")

    def format_help(self) -> str:
        """The whole help if it has no more than `LINES` lines, else with the `first` flags."""
        whole = self.format_help_all()
        if whole.count("\n") <= LINES:
            return whole
        count = sum(bool(action.option_strings) for action in self._actions)
        return (
            f"{self._format(_Short, self.first)}In parentheses: what holds without the flag. "
            f"--help-all shows all {count} flags.\n"
        )

    def format_help_all(self) -> str:
        """The help with all flags."""
        return self._format(_Whole, None)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the flags as a `UserError`."""
        if found := re.fullmatch(r"argument (\S+?)(/\S+)?: invalid (\w+) value: (.*)", message):
            raise UserError(f"{found[1]} must be {_KINDS[found[3]]}, got {found[4]}.")
        if found := re.fullmatch(
            r"argument (\S+): invalid choice: '(.*)' \(choose from .*", message
        ):
            known = next(a.choices for a in self._actions if found[1] in (a.metavar, a.dest))
            raise unknown_name(f"{found[1].lower()} of {self.prog}:", found[2], known or ())
        if found := re.fullmatch(r"argument (\S+?)(/\S+)?: expected (.*)", message):
            raise UserError(f"{found[1]} needs {found[3]}; see {self.prog} --help.")
        raise UserError(f"{message}; see {self.prog} --help.")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """As `parse_args`; an unknown flag is a `UserError` that names the nearest ones."""
        args, extra = self.parse_known_args(argv)
        for word in extra:
            if word.startswith("-"):
                name = word.partition("=")[0]
                setting = usual_name(name).replace("-", "_")
                if setting in _settings(self) and f"--{setting}" not in _flags(self):
                    raise UserError(f"{name} is a setting: write --set {setting}=VALUE.")
                raise unknown_name("flag", name, [*_flags(self)])
            raise UserError(f"unexpected argument {word!r}; see {self.prog} --help.")
        return args

    def _format(self, style: type[_Whole], only: Sequence[str] | None) -> str:
        formatter = style(prog=self.prog)
        named = [a for a in self._actions if not a.option_strings]
        usage = " ".join([self.prog, *map(formatter.describe, named), "[flags]"])
        head = f"usage: {usage}\n{self.description or ''}".rstrip()
        if self.examples:
            head += "\n\nexamples:\n" + "\n".join(f"  {line}" for line in self.examples)
        for group in sorted(self._action_groups, key=lambda group: group.title == "help"):
            formatter.start_section(group.title)
            formatter.add_arguments(a for a in group._group_actions if _is_shown(a, only))
            formatter.end_section()
        if only is None:
            formatter.add_text(self.epilog)
            return f"{head}\n\n{formatter.format_help()}"
        return f"{head}\n\n" + formatter.format_help().replace("\n\n", "\n")


class _HelpAll(argparse.Action):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "nargs": 0, "default": argparse.SUPPRESS})

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, HelpParser)
        print_text(parser.format_help_all(), end="")
        parser.exit()


class ListSettings(argparse.Action):
    """`--list-settings`: prints the settings of some configurations, and leaves."""

    def __init__(
        self, *, classes: Sequence[type[Settings]], without: Collection[str], **options: Any
    ) -> None:
        super().__init__(**{**options, "nargs": 0, "default": argparse.SUPPRESS})
        self.classes, self.without = classes, without

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print_text("\n\n".join(_settings_text(cls, self.without) for cls in self.classes))
        parser.exit()


def _settings_text(cls: type[Settings], without: Collection[str]) -> str:
    title = {"DistillConfig": "a run", "StudyConfig": "a study"}[cls.__name__]
    width = max(60, shutil.get_terminal_size().columns - 2)
    lines = []
    for subject, rows in list_settings(cls).items():
        rows = [row for row in rows if row.name not in without]
        lines += ["", f"{title}: {subject}"] * bool(rows)
        for row in rows:
            text = f"{row.doc} (default: {row.default})" if row.default else row.doc
            lines += textwrap.wrap(
                text, width, initial_indent=f"  {row.name:24s} ", subsequent_indent=" " * 27,
                break_on_hyphens=False,
            )  # fmt: skip
    return "\n".join(lines[1:])


class _Whole(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def describe(self, action: argparse.Action) -> str:
        """A positional argument as the usage shows it."""
        return self._format_args(action, str(action.metavar or action.dest).upper())


class _Short(_Whole):
    """One line a flag: its first name, and the first clause of its help."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = f" {self._format_args(action, action.dest.upper())}" if action.nargs != 0 else ""
        return action.option_strings[0] + value

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        clause = re.split(r"; | \(|: |, e\.g\.|, such as", text)[0]
        default = re.search(r"[(;] ?default: ([^)]*)\)$", text)
        return f"{clause} ({default[1]})" if default else clause


def _is_shown(action: argparse.Action, only: Sequence[str] | None) -> bool:
    if only is None or not action.option_strings:
        return True
    return any(flag in only for flag in action.option_strings)


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in all_actions(parser):
        yield from (flag for flag in action.option_strings if flag.startswith("--"))


def _settings(parser: argparse.ArgumentParser) -> set[str]:
    """The names that `--set` of a command takes."""
    lists = (a for a in all_actions(parser) if isinstance(a, ListSettings))
    return {
        name for action in lists for cls in action.classes for name in cls.names()
        if name not in action.without
    }  # fmt: skip


def all_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """All arguments of a parser, those of its commands included."""
    found: list[argparse.Action] = []
    for action in parser._actions:
        found.append(action)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found += all_actions(command)
    return found
