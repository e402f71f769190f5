"""No circle of imports and none against the floors of pyproject.toml, imports in functions and by name included; and
nothing unpickles."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[1]
NAME = re.compile(r"\w+(\.\w+)+")


def imports_of(source: Path) -> dict[str, set[str]]:
    """For each module below a folder, the modules below it that it imports: by a statement anywhere, by a string that
    names one, or lazily, from the table of a package."""
    files = {".".join(file.relative_to(source).with_suffix("").parts): file for file in source.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): file for name, file in files.items()}
    edges = {}
    for module, file in modules.items():
        tree, is_package = ast.parse(file.read_text(encoding="utf-8")), file.name == "__init__.py"
        named = {name for node in ast.walk(tree) for name in names_in(node, module, is_package)}
        named = {name if name in modules else name.rpartition(".")[0] for name in named} & modules.keys()
        # A module is loaded with the packages around it.
        edges[module] = {name for name in named if not f"{module}.".startswith(f"{name}.")}
    return edges


def names_in(node: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{module} has a relative import"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        if NAME.fullmatch(node.value):
            yield node.value
        if is_package:  # a name in the table of a package that loads its modules lazily
            yield f"{module}.{node.value}"
    elif isinstance(node, ast.Call) and is_import_by_name(node.func):
        # The values of a variable are strings elsewhere in the module.
        is_written = isinstance(node.args[0], ast.Constant | ast.Name)
        assert is_package or is_written, f"{module} imports by a name that is computed"


def is_import_by_name(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def against_floors(imports: Mapping[str, set[str]], floors: list[str]) -> list[tuple[str, str]]:
    """The imports of a higher floor, or of a room beside one from which nothing may be imported."""
    rooms = {
        room: (number, " | " in floor) for number, floor in enumerate(floors) for room in re.split(r" [|:] ", floor)
    }

    def room_of(module: str) -> str:
        while module and module not in rooms:
            module = module.rpartition(".")[0]
        return module

    def forbids(here: tuple[int, bool], there: tuple[int, bool]) -> bool:
        return there[0] < here[0] or (there[0] == here[0] and here[1])

    pairs = [(one, other, room_of(one), room_of(other)) for one, names in imports.items() for other in sorted(names)]
    return [
        (one, other)
        for one, other, here, there in pairs
        if here and there and here != there and forbids(rooms[here], rooms[there])
    ]


def test_no_circle_and_no_import_of_a_higher_floor() -> None:
    imports = imports_of(ROOT / "src")
    assert "adapruner.verbs._inspect" in imports["adapruner.verbs"]  # lazily
    # The root package loads everything lazily, and is loaded with every module.
    imports = {module: names - {"adapruner"} for module, names in imports.items() if module != "adapruner"}
    assert circle(imports) == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for contract in project["tool"]["importlinter"]["contracts"]:
        assert against_floors(imports, contract["layers"]) == []


@pytest.mark.parametrize(
    "hidden",
    [
        "from house.roof import tile",
        "def stairs():\n    import house.roof",
        "import importlib\nimportlib.import_module('house.roof')",
        "from importlib import import_module\nROOF = 'house.roof'\n\ndef stairs():\n    import_module('house.roof')",
    ],
)
def test_hidden_imports_are_found(hidden: str, tmp_path: Path) -> None:
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "__init__.py").write_text("")
    (tmp_path / "house" / "roof.py").write_text("import house.cellar")
    (tmp_path / "house" / "cellar.py").write_text(hidden)
    imports = imports_of(tmp_path)
    assert set(circle(imports)) == {"house.roof", "house.cellar"}
    assert against_floors(imports, ["house.roof", "house.cellar"]) == [("house.cellar", "house.roof")]
    assert len(against_floors(imports, ["house.roof | house.cellar"])) == 2
    assert against_floors(imports, ["house.roof : house.cellar"]) == []


def test_a_computed_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "house.py").write_text("import importlib\nimportlib.import_module(f'{__name__}.roof')")
    with pytest.raises(AssertionError, match="house imports by a name that is computed"):
        imports_of(tmp_path)


def test_data_flows_one_way() -> None:
    """In a process of its own: import-linter sets up the logging of the one it is in."""
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    linted = subprocess.run([*lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout


def test_no_pickle_and_no_remote_code() -> None:
    forbidden = re.compile(r"import pickle|torch\.load\(|trust_remote_code\s*=\s*True\s*[,)](?!`)")
    for path in (ROOT / "src").rglob("*.py"):
        code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
        assert not forbidden.search(code), path
