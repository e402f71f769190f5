"""The random state of the process, which belongs to the program that calls this library."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from adapruner.accelerators import accelerator_in_use


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
    found = accelerator_in_use()
    if found is None:
        return torch.random.fork_rng(())
    return torch.random.fork_rng(range(torch.accelerator.device_count()), device_type=found[0])
