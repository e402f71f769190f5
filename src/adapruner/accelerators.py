"""The accelerator that PyTorch uses, of any vendor."""

from __future__ import annotations

from typing import Any

import torch


def accelerator_in_use() -> tuple[str, Any] | None:
    """Device type of the accelerator and the module of PyTorch for it; None if there is none, or if nothing has used it
    yet, since any query would initialise it."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module: Any = torch.get_device_module(device) if device else None
    if device is None or not getattr(module, "is_initialized", lambda: False)():
        return None
    return device.type, module
