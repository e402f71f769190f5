"""AdaPruner prunes causal language models into smaller dense checkpoints.

`prune` runs the whole procedure, `load` reads its result; the command line offers the same.
"""

import ast
import importlib
import logging
from pathlib import Path

# Progress is shown on stderr, unless this level is raised.
logging.getLogger(__name__).setLevel(logging.INFO)

__version__ = "0.2.0"

# The module of every name, as type checkers read it too; importing it, and PyTorch, waits until the name is used.
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_MODULES = {name.name: line.module for line in _STUB.body if isinstance(line, ast.ImportFrom) for name in line.names}
__all__ = [*_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(str(_MODULES[name])), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
