"""State of PyTorch that belongs to the calling program: its accelerator and its random numbers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def accelerator_in_use() -> tuple[str, Any] | None:
    """Device type of the accelerator and the module of PyTorch for it; None if there is none, or if nothing has used it
    yet, since any query would initialise it."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module: Any = torch.get_device_module(device) if device else None
    if device is None or not getattr(module, "is_initialized", lambda: False)():
        return None
    return device.type, module


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restores the random states of Python, NumPy and PyTorch afterwards, on the CPU and on all accelerators."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    in_use = accelerator_in_use()
    devices: dict[str, Any] = {"devices": ()}
    if in_use:
        devices = {"devices": range(torch.accelerator.device_count()), "device_type": in_use[0]}
    with torch.random.fork_rng(**devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
