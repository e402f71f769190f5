"""YAML from outside this package, which may contain anything."""

from __future__ import annotations

from typing import Any

import yaml

from adapruner.errors import reason


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, with which a few lines can expand to more than fits into memory."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has an alias (*name): write out what it stands for")
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> Any:
    """The content of YAML.

    Raises:
        ValueError: it is not YAML of plain values, or has an alias.
    """
    try:
        return yaml.load(text, _PlainLoader)
    # Values of explicit types (`!!timestamp x`) and endless nesting raise nearly every class.
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError(reason(error)) from error


def parse_options(text: str) -> dict[str, Any]:
    """Options and their values in YAML.

    Raises:
        ValueError: it is not a mapping of options to values.
    """
    options = parse_yaml(text)
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError("it is not a mapping of options to values")
    return options
