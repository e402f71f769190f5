"""The versions that the package is for, by make test-matrix: every Python, the oldest and the newest transformers."""

from __future__ import annotations

import re

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]

nox.options.sessions = ["tests"]
nox.options.error_on_missing_interpreters = False


def oldest(package: str) -> str:
    """The requirement of exactly the lower bound that pyproject.toml states."""
    bounds = {
        re.split(r"[^\w-]", line)[0]: line
        for line in nox.project.load_toml("pyproject.toml")["project"]["dependencies"]
    }
    return bounds[package].replace(">=", "==") + ".*"


@nox.session(python=PYTHONS)
@nox.parametrize("transformers", ["oldest", "newest"])
def tests(session: nox.Session, transformers: str) -> None:
    """The test suite; arguments behind -- go to pytest."""
    wanted = oldest("transformers") if transformers == "oldest" else "transformers"
    # --upgrade: the environment may be one of last month.
    session.install("--upgrade", "--editable", ".[dev]", wanted)
    session.run("python", "-c", "import torch, transformers; print(torch.__version__, transformers.__version__)")
    session.run("pytest", "--numprocesses", "2", "--dist", "loadfile", *session.posargs, env={"OMP_NUM_THREADS": "1"})
