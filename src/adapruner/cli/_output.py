"""Machine-readable results on stdout, and advice on stderr."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console


def print_json(content: Any) -> None:
    """Prints indented JSON; everything for people goes to stderr or is a table."""
    print(json.dumps(content, indent=2))


def print_advice(lines: list[str]) -> None:
    """Prints what should not go unseen, on stderr."""
    for line in lines:
        Console(stderr=True).print(f"adapruner: {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)
