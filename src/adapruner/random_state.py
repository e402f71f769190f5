"""The random state of the process, which belongs to the calling program."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from adapruner.accelerators import accelerator_in_use


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
