"""Machine-readable results on stdout."""

from __future__ import annotations

import json
from typing import Any


def print_json(content: Any) -> None:
    """Prints indented JSON; everything for people goes to stderr or is a table."""
    print(json.dumps(content, indent=2))
