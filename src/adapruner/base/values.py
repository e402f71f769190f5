"""Types of option values: fractions, sizes, numbers of tokens."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, TypeAdapter, ValidationError


def _check_fraction(value: float) -> float:
    if not 0 < value < 1:
        percent = value if 1 < value < 100 else 20
        raise ValueError(f"is not a fraction between 0 and 1: {percent / 100:g} removes {percent:g} %")
    return value


def size_in_bytes(value: Any) -> int:
    """Bytes of a size such as 400MB or 1.5GiB.

    Raises:
        ValueError: it is not a size.
    """
    try:
        return int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError:
        raise ValueError("is not a size: expected a number with a unit, as 400MB or 1.5GiB") from None


def _check_size(value: Any) -> str:
    if not size_in_bytes(value):
        raise ValueError("must be more than nothing")
    return str(value)


def _check_tokens(value: Any) -> str:
    """A number of tokens in digits, of one such as 300k or 2M."""
    text = str(value).strip()
    number = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)([kMB]?)", text)
    if number is None or (tokens := float(number[1]) * _THOUSANDS[number[2]]) < 1:
        raise ValueError("is not a number of tokens: expected one such as 300k, 2M or 1_000_000")
    return str(round(tokens))


_THOUSANDS = {"": 1, "k": 1_000, "M": 1_000_000, "B": 1_000_000_000}

Count = Annotated[int, Field(ge=1)]
Tokens = Annotated[str, BeforeValidator(_check_tokens)]
TokensOrNone = Annotated[str, BeforeValidator(lambda value: value if value == "none" else _check_tokens(value))]
Size = Annotated[str, BeforeValidator(_check_size)]
Fraction = Annotated[float, AfterValidator(_check_fraction)]
# One value stands for a tuple of one.
ONE_OR_MORE = BeforeValidator(lambda value: value if isinstance(value, list | tuple) else (value,))
Names = Annotated[tuple[str, ...], ONE_OR_MORE]
