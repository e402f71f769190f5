"""Importance terms, families and datasets in packages that the user has installed and asks for by name."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import entry_points

from adapruner.errors import AdaPrunerError

# Packages name the module that registers something under it, in their pyproject.toml.
GROUP = "adapruner"


def load_plugins(names: Iterable[str]) -> None:
    """Imports the modules of some entry points of the group `adapruner`; nothing is imported that is not named.

    Raises:
        AdaPrunerError: no installed package has such an entry point.
    """
    found = entry_points(group=GROUP)
    for name in names:
        if name not in found.names:
            installed = ", ".join(sorted(found.names)) or "none"
            raise AdaPrunerError(f"no installed package has the plugin {name!r} (`plugins`); installed: {installed}")
        found[name].load()
