"""The terminal that tables and live views are drawn on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import rich.console
from rich import box
from rich.table import Table
from rich.text import Text

from ekd_ray.cli.output import wrap_words
from ekd_ray.errors import spell_controls


class Console(rich.console.Console):
    """Rich's console, on which a text says what it says: markup, names of emojis and signs that
    a terminal would obey are shown as they are written.

    That holds for `str`, in the cells of tables too; a `Text` is made of texts of our own.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's; on a terminal texts are broken between words."""
        if self.is_terminal:
            objects = tuple(
                wrap_words(each, self.width) if isinstance(each, str) else each for each in objects
            )
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Leave it to the command's end, which says nothing and is no failure."""
        self.quiet = True
        raise

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich's, of the text with its signs spelt out."""
        return super().render_str(spell_controls(text), **options)


def print_points(console: Console, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table of configurations: names and figures whole, because a line that the terminal
    breaks is better than one cut short. The console is as wide from then on."""
    texts = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in texts:
        table.add_row(*row)
    width = sum(3 + max(map(len, column)) for column in zip(columns, *texts, strict=True))
    console.width = max(console.width, width)
    console.print(table)
