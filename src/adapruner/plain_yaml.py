"""YAML from outside this package, which may contain anything."""

from __future__ import annotations

from typing import Any

import yaml


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases, with which a few lines can expand to more than fits into memory."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has an alias (*name): write out what it stands for")
        return super().compose_node(parent, index)


# Errors of reading and parsing a file, also for invalid numbers and dates and endless nesting.
UNREADABLE = (OSError, yaml.YAMLError, ValueError, RecursionError)


def parse_options(text: str) -> dict[str, Any]:
    """Options and their values in YAML.

    Raises:
        YAMLError, ValueError, RecursionError: it is not a mapping of options to values.
    """
    options = yaml.load(text, PlainLoader)
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError("it is not a mapping of options to values")
    return options
