"""What tests read out of the outcome of a command."""

from __future__ import annotations

import json
from typing import Any

from device.client import Outcome


def only_json(outcome: Outcome) -> Any:
    """The result of a command that succeeded, of which there is nothing else on stdout."""
    assert outcome.code == 0, outcome.stderr
    return json.loads(outcome.stdout)


def only_line(outcome: Outcome) -> str:
    """The message of a command that was refused: one line, without a traceback, beside finished stages and advice."""
    assert outcome.code == 2, outcome.stderr
    assert "Traceback" not in outcome.stderr
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("adapruner: ")]
    assert len(lines) == 1, outcome.stderr
    return lines[0].removeprefix("adapruner: ")
