"""Text from outside on a terminal or a page: shown as it is, and without effect."""

from __future__ import annotations

import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

# Line ends and tabs; and the joiners of Indic scripts, Persian and emoji.
_HARMLESS = "\n\t\u200c\u200d"


def printable(text: str) -> str:
    """A text with its control characters escaped: they could move the cursor of a terminal, or colour or turn round
    what follows."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(sign: str) -> str:
    is_shown = sign.isprintable() or sign in _HARMLESS or unicodedata.category(sign) == "Zs"
    return sign if is_shown else ascii(sign)[1:-1]


class PlainConsole(Console):
    """Names of models, files and datasets may look like markup or emoji, or have control characters, or characters that
    the encoding of the terminal lacks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    @property
    def encoding(self) -> str:
        """That of stdout or stderr too; rich reads that of a given file alone, and draws tables accordingly."""
        return (getattr(self.file, "encoding", None) or "utf-8").lower()

    def render_str(self, text: str, **options: Any) -> Text:
        encoded = printable(text).encode(self.encoding, "backslashreplace")
        return super().render_str(encoded.decode(self.encoding), **options)
