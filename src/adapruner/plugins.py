"""Importance terms, families and datasets in installed packages that the user names."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import entry_points

from adapruner.errors import AdaPrunerError

# Packages name the module that registers something in this group of entry points, in their pyproject.toml.
GROUP = "adapruner"


def load_plugins(names: Iterable[str]) -> None:
    """Imports the modules of named entry points of the group `adapruner`, and no others.

    Raises:
        AdaPrunerError: no installed package has such an entry point.
    """
    plugins = entry_points(group=GROUP)
    for name in names:
        if name not in plugins.names:
            installed = ", ".join(sorted(plugins.names)) or "none"
            raise AdaPrunerError(f"no installed package has the plugin {name!r} (`plugins`); installed: {installed}")
        plugins[name].load()
