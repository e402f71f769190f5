"""Installs the simulated CUDA device into this process, for good: `install()` before transformers is imported.

Python asks PyTorch's C++ code about devices through `torch.cuda`; here its functions answer for the simulated device.
The variables `SIMULATED_CUDA_DEVICES` (default 1) and `SIMULATED_CUDA_GIB` (of each, default 80) are read once.
"""

import collections
import contextlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import building
import torch
import torchgen
import yaml

# What was counted since it was last cleared: (stage, kind, operator, line of the package) → calls.
# Kinds: h2d, d2h (copies to and from the device), p2p (between devices), wait (the host waits for the device).
events: collections.Counter[tuple[str, str, str, str]] = collections.Counter()
stage = "-"
native: Any = None
# Whether the device multiplies bfloat16; a T4 or V100 does not.
native_bfloat16 = True

_PACKAGE = f"{os.sep}adapruner{os.sep}"


def install() -> Any:
    """Makes the device available and returns its library."""
    global native
    if native is not None:
        return native
    spec: Any = importlib.util.spec_from_file_location(building.NAME, building.library())
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    native.accept_scalars(_operators_that_accept_scalars())
    native.set_listener(note)
    limit_memory(int(float(os.environ.get("SIMULATED_CUDA_GIB", "80")) * 2**30))
    _answer_for_the_device()
    _replace_storage_methods()
    return native


def limit_memory(total: int) -> None:
    """Sets how many bytes each device has."""
    for index in range(native.device_count()):
        native.set_total(index, total)


def note(kind: str, operator: str, size: int) -> None:
    """Counts an event at the line of the package that caused it."""
    # A thread of the backward pass has no caller.
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and _PACKAGE not in frame.f_code.co_filename:
        frame = frame.f_back
    place = f"{frame.f_code.co_filename.split(_PACKAGE)[-1]}:{frame.f_lineno}" if frame else "?"
    events[stage, kind, operator, place] += 1


def _operators_that_accept_scalars() -> list[str]:
    """Operators whose devices the dispatcher does not compare: they accept scalars of the CPU."""
    file = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    by_name = {entry["func"].split("(")[0].strip(): entry for entry in entries}
    return [
        f"aten::{name}"
        for name, entry in by_name.items()
        for of in (entry, by_name.get(entry.get("structured_delegate"), entry))
        if "NoCheck" in str(of.get("device_check", ""))
    ]


def _number(device: Any = None) -> int:
    if isinstance(device, int):
        return device if device >= 0 else native.current_device()
    index = None if device is None else torch.device(device).index
    return native.current_device() if index is None else index


class _Stream:
    """There is one stream, and everything on it is done at once."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = torch.device("cuda", _number(device))
        self.device_index, self.device_type, self.stream_id, self.cuda_stream = self.device.index, 1, 0, 0

    def synchronize(self) -> None:
        note("wait", "stream", 0)

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None: ...


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


@contextlib.contextmanager
def _in_stream(stream: Any) -> Iterator[None]:
    yield


def _exchange_device(index: int) -> int:
    before: int = native.current_device()
    if index >= 0:
        native.set_device(index)
    return before


def _memory_info(device: Any = None) -> tuple[int, int]:
    total = native.total(_number(device))
    return total - native.used(_number(device)), total


def _properties(device: Any = None) -> Any:
    return types.SimpleNamespace(
        name="Simulated CUDA",
        total_memory=native.total(_number(device)),
        major=9,
        minor=0,
        multi_processor_count=132,
        warp_size=32,
        gcnArchName="",
        is_integrated=False,
        shared_memory_per_block_optin=232448,
    )


def _synchronize(device: Any = None) -> None:
    note("wait", "synchronize", 0)


def _used(device: Any = None) -> int:
    return int(native.used(_number(device)))


def _peak(device: Any = None) -> int:
    return int(native.peak(_number(device)))


def _reset_peak(device: Any = None) -> None:
    native.reset_peak(_number(device))


def _answer_for_the_device() -> None:
    """The functions of `torch.cuda`. The device has no random state of its own: numbers come from the CPU's."""
    state = torch.default_generator.get_state
    answers = {
        "_is_compiled": lambda: True,
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "is_initialized": lambda: True,
        "_lazy_call": lambda call, **_: call(),
        "_is_in_bad_fork": lambda: False,
        "device_count": native.device_count,
        "_device_count_nvml": native.device_count,
        "current_device": native.current_device,
        "set_device": lambda device: native.set_device(_number(device)),
        "_exchange_device": _exchange_device,
        "_maybe_exchange_device": _exchange_device,
        "get_device_properties": _properties,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "Simulated CUDA",
        "get_arch_list": lambda: ["sm_90"],
        "can_device_access_peer": lambda device, peer: True,
        # As PyTorch answers: products that are slow are supported too.
        "is_bf16_supported": lambda including_emulation=True: including_emulation or native_bfloat16,
        "is_tf32_supported": lambda: True,
        "synchronize": _synchronize,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "set_stream": lambda stream: None,
        "stream": _in_stream,
        "Stream": _Stream,
        "Event": _Event,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": _memory_info,
        "memory_allocated": _used,
        "memory_reserved": _used,
        "max_memory_allocated": _peak,
        "max_memory_reserved": _peak,
        "reset_peak_memory_stats": _reset_peak,
        "memory_stats": lambda device=None: {
            "allocated_bytes.all.current": _used(device),
            "allocated_bytes.all.peak": _peak(device),
        },
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device="cuda": state(),
        "set_rng_state": lambda state, device="cuda": None,
        "get_rng_state_all": lambda: [state() for _ in range(native.device_count())],
        "set_rng_state_all": lambda states: None,
    }
    for module in (torch.cuda, torch.cuda.memory, torch.cuda.random, torch.cuda.graphs):
        for name, answer in answers.items():
            if module is torch.cuda or hasattr(module, name):
                setattr(module, name, answer)
    torch.cuda.default_generators = (torch.default_generator,) * native.device_count()
    torch.backends.cuda.is_built = lambda: True
    torch.accelerator.current_stream = _Stream
    torch.accelerator.synchronize = _synchronize
    for name, function in {
        "_cuda_getCurrentRawStream": lambda index: 0,
        "_cuda_isCurrentStreamCapturing": lambda: False,
        "_cuda_getDevice": native.current_device,
        "_cuda_getDeviceCount": native.device_count,
        "_cuda_isInBadFork": lambda: False,
    }.items():
        if not hasattr(torch._C, name):
            setattr(torch._C, name, function)


def _replace_storage_methods() -> None:
    """Copies of storages do not go through operators: here they are copies of tensors of bytes."""
    storage_class: Any = torch.UntypedStorage
    clone, cpu, copy, to, resize = (getattr(storage_class, name) for name in ("clone", "cpu", "copy_", "to", "resize_"))

    def as_bytes(storage: Any) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    def on_device(*devices: torch.device) -> bool:
        return "cuda" in [device.type for device in devices]

    def clone_any(self: Any) -> Any:
        return as_bytes(self).clone().untyped_storage() if on_device(self.device) else clone(self)

    def to_cpu(self: Any) -> Any:
        return as_bytes(self).cpu().untyped_storage() if on_device(self.device) else cpu(self)

    def copy_any(self: Any, source: Any, non_blocking: Any = None) -> Any:
        if not on_device(self.device, source.device):
            return copy(self, source, non_blocking)
        as_bytes(self).copy_(as_bytes(source))
        return self

    def to_any(self: Any, *, device: Any, non_blocking: bool = False) -> Any:
        if on_device(self.device, torch.device(device)):
            return as_bytes(self).to(device).untyped_storage()
        return to(self, device=device, non_blocking=non_blocking)

    def resize_any(self: Any, size: int) -> Any:
        if not on_device(self.device):
            return resize(self, size)
        native.resize_storage(as_bytes(self), int(size))
        return self

    for name, method in {
        "clone": clone_any,
        "cpu": to_cpu,
        "copy_": copy_any,
        "to": to_any,
        "resize_": resize_any,
    }.items():
        setattr(storage_class, name, method)

    def restore(storage: Any, location: str) -> Any:
        """For `torch.load`: a storage that was saved on the device."""
        return to_any(storage, device=location) if location.startswith("cuda") else None

    torch.serialization.register_package(5, lambda storage: None, restore)
