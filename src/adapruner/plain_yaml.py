"""YAML of others, which may be anything."""

from __future__ import annotations

from typing import Any

import yaml


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases, by which a few lines can stand for more than memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has an alias (*name): write out what it stands for")
        return super().compose_node(parent, index)


# What reading and parsing a file raise, also for invalid numbers and dates and endless nesting.
UNREADABLE = (OSError, yaml.YAMLError, ValueError, RecursionError)


def parse_options(text: str) -> dict[str, Any]:
    """Options and their values out of YAML.

    Raises:
        YAMLError, ValueError, RecursionError: it is something else.
    """
    options = yaml.load(text, PlainLoader)
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError("it is not a mapping of options to values")
    return options
