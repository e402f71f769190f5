"""What things are called in the report, in its charts and tables alike."""

from __future__ import annotations

KINDS = {"channels": "channels", "kv-group": "KV groups", "query-head": "query heads"}
LOSS_NAMES = {"loss": "loss, nats per token", "kl": "divergence from the dense model, nats per token"}

_LONGEST_LABEL = 26


def shortened(text: str) -> str:
    """The end of a text source whose name is too long for a chart."""
    return text if len(text) <= _LONGEST_LABEL else f"…{text[1 - _LONGEST_LABEL :]}"


def described(value: float | int | str) -> str:
    """A number or a name as it is shown, numbers to three digits."""
    if isinstance(value, str):
        return value
    return f"{value:.3g}".replace("-", "−") if isinstance(value, float) else str(value).replace("-", "−")
