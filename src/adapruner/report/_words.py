"""What things are called in the report, in its charts and tables alike."""

from __future__ import annotations

KINDS = {"channels": "channels", "kv-group": "KV groups", "query-head": "query heads"}
LOSS_NAMES = {"loss": "loss, nats per token", "kl": "divergence from the dense model, nats per token"}

_LONGEST_LABEL = 26


def shortened(text: str) -> str:
    """The end of a text source whose name is too long for a chart."""
    return text if len(text) <= _LONGEST_LABEL else f"…{text[1 - _LONGEST_LABEL :]}"
