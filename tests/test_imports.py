"""No circle of imports, functions included. `lint-imports` holds the floors of pyproject.toml; what runs code that a
file brings is found in tests/test_security.py."""

from graphlib import TopologicalSorter
from pathlib import Path

import grimp

SOURCE = Path(__file__).parents[1] / "src" / "adapruner"
# These import by a name that is computed, which no reader of imports sees.
LAZY = {"__init__.py", "formats/__init__.py", "vllm.py"}


def test_no_circle_of_imports():
    graph = grimp.build_graph("adapruner", cache_dir=None)
    # A module is loaded with the packages around it, and the root package loads everything lazily.
    imports = {
        module: {
            name for name in graph.find_modules_directly_imported_by(module) if not f"{module}.".startswith(f"{name}.")
        }
        for module in graph.modules - {"adapruner"}
    }
    assert "adapruner.base.errors" in imports["adapruner.budget.plan"]
    TopologicalSorter(imports).prepare()


def test_imports_by_computed_names_are_known():
    named = {path for path in SOURCE.rglob("*.py") if "import_module" in path.read_text(encoding="utf-8")}
    assert {path.relative_to(SOURCE).as_posix() for path in named} <= LAZY
