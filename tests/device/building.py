"""Builds the library of the simulated device, once for every version of PyTorch and of the source.

It is kept in `$ADAPRUNER_TEST_CACHE`, by default `~/.cache/adapruner-tests`.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("simulated_cuda.cpp")
NAME = "adapruner_simulated_cuda"
# The library stands in for parts of PyTorch that change between versions.
SUPPORTED_VERSIONS = ("2.13",)
_COMPILER = os.environ.get("CXX", "c++")
_LIBRARIES = ("c10", "torch_cpu", "torch", "torch_python")


def reason_against() -> str | None:
    """Why the device cannot be simulated here; None if it can."""
    if torch.version.cuda or torch.version.hip:
        return "PyTorch is built for a GPU; the simulated device needs a build for the CPU"
    version = torch.__version__.split("+")[0]
    if not version.startswith(tuple(f"{supported}." for supported in SUPPORTED_VERSIONS)):
        return f"PyTorch {version} is not supported, only {', '.join(SUPPORTED_VERSIONS)}"
    if sys.platform != "linux":
        return f"the library is built on Linux only, not on {sys.platform}"
    if shutil.which(_COMPILER) is None:
        return f"there is no C++ compiler {_COMPILER}"
    headers = Path(sysconfig.get_path("include"))
    return None if (headers / "Python.h").is_file() else f"there are no headers of Python in {headers}"


def library() -> Path:
    """Where the library is, or will be."""
    cache = os.environ.get("ADAPRUNER_TEST_CACHE") or Path.home() / ".cache" / "adapruner-tests"
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    return Path(cache) / f"{torch.__version__}-{sys.implementation.cache_tag}-{digest}" / f"{NAME}.so"


def build() -> float:
    """Builds the library if it is missing; returns the seconds that this took. Other processes wait for it."""
    path = library()
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with FileLock(path.with_suffix(".lock")):
        if path.is_file():
            return 0.0
        partial = path.with_suffix(".partial")
        command = [_COMPILER, "-shared", "-fPIC", "-std=c++20", "-O1", f"-DTORCH_EXTENSION_NAME={NAME}", str(SOURCE)]
        command += [f"-isystem{folder}" for folder in (*include_paths(), sysconfig.get_path("include"))]
        command += [*(f"-L{folder}" for folder in library_paths()), *(f"-l{name}" for name in _LIBRARIES)]
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the simulated device was not built:\n{done.stdout}{done.stderr}")
        # Last: a build that was killed leaves no library.
        partial.rename(path)
    return time.monotonic() - started
