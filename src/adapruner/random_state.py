"""The random state of the process, which belongs to the program that calls this library."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Puts the random states of Python, NumPy and PyTorch back afterwards, on the CPU and on all GPUs."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
