"""What all benchmarks need to know of the machine: a description, seconds, memory. Linux only."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 2**20


def describe() -> str:
    """One line."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    kinds = (("AMX", torch.cpu._is_amx_tile_supported()), ("AVX-512 bfloat16", torch.cpu._is_avx512_bf16_supported()))
    bfloat16 = ", ".join(name for name, there in kinds if there) or "no bfloat16"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu} ({bfloat16}), {os.cpu_count()} cores, {total:.0f} GiB, PyTorch {torch.__version__}"


def seconds(work: Callable[[], object]) -> float:
    """How long some work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def reset_peak() -> None:
    """Gives freed memory back and lets the peak of the process start from what it holds now."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def memory(field: str) -> int:
    """A field of /proc/self/status, in bytes: VmRSS is held now, VmHWM the peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(field)))
