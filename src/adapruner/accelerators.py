"""The accelerator that PyTorch uses, whoever made it."""

from __future__ import annotations

from typing import Any

import torch


def accelerator_in_use() -> tuple[str, Any] | None:
    """Its device type and the module of PyTorch for it; None where there is none, or nothing has used it yet: it would
    be set up by asking it anything."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module: Any = torch.get_device_module(found) if found else None
    if found is None or not getattr(module, "is_initialized", lambda: False)():
        return None
    return found.type, module
