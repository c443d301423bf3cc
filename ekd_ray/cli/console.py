"""The terminal that tables and live views are drawn on."""

from __future__ import annotations

from typing import Any

import rich.console
from rich.text import Text

from ekd_ray.errors import spell_controls


class Console(rich.console.Console):
    """Rich's console, on which a text says what it says: markup, names of emojis and signs that
    a terminal would obey are shown as they are written.

    That holds for `str`, in the cells of tables too; a `Text` is made of texts of our own.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def on_broken_pipe(self) -> None:
        """Leave it to the command's end, which says nothing and is no failure."""
        self.quiet = True
        raise

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich's, of the text with its signs spelt out."""
        return super().render_str(spell_controls(text), **options)
