"""Whole numbers on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter, Token


def _whole_number(_: Any, tokens: Sequence[Token]) -> int:
    """cyclopts would truncate a fraction."""
    if not re.fullmatch("[0-9]{1,9}", tokens[0].value):
        raise ValueError("expected a whole number from 0 to 999,999,999")
    return int(tokens[0].value)


WholeNumber = Annotated[int, Parameter(converter=_whole_number)]
