"""The random state of the process, which belongs to the program that calls this library."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Puts the random states of Python, NumPy and PyTorch back afterwards, on the CPU and on all accelerators."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with _of_pytorch_kept():
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def _of_pytorch_kept() -> contextlib.AbstractContextManager[None]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module = torch.get_device_module(accelerator) if accelerator else None
    # One that nothing has used yet has no state, and asking for it would set it up.
    if accelerator is None or not getattr(module, "is_initialized", lambda: False)():
        return torch.random.fork_rng(())
    return torch.random.fork_rng(range(torch.accelerator.device_count()), device_type=accelerator.type)
