"""The simulated device is one: separate from the CPU, limited, counted."""

import json
from pathlib import Path

import pytest

from device.client import Device

START = """
import gc, io, json, torch, simulated_cuda
from torch.nn import functional
a, b = torch.arange(35.0, device="cuda").view(5, 7), torch.ones(7, 5).to("cuda")
def refused(call):
    try:
        call()
    except (RuntimeError, IndexError) as error:
        return type(error).__name__ + ": " + str(error)
    return None
"""


def run(device: Device, tmp_path: Path, body: str) -> list[object]:
    file = tmp_path / "program.py"
    file.write_text(f"{START}\n{body}\nprint(json.dumps(result))")
    outcome = device.run(file=file)
    assert outcome.code == 0, outcome.stderr
    assert outcome.left == 0
    result: list[object] = json.loads(outcome.stdout)
    return result


def test_tensors_of_two_devices_do_not_mix(device, tmp_path):
    body = """
cpu = torch.ones(5, 7)
result = [refused(call) for call in (
    lambda: a @ cpu.T, lambda: a + cpu, lambda: cpu.add_(a), lambda: torch.cat([a, cpu]),
    lambda: a.index_select(0, torch.tensor([1])), lambda: cpu[torch.tensor([1], device="cuda")],
    lambda: functional.embedding(torch.tensor([1]), a), lambda: functional.cross_entropy(a, torch.zeros(5).long()),
    lambda: a.index_copy_(0, torch.tensor([1], device="cuda"), cpu[:1]), lambda: torch.where(a > 1, a, cpu),
)]
"""
    assert [message for message in run(device, tmp_path, body) if "device" not in str(message)] == []


def test_what_a_gpu_accepts_is_accepted(device, tmp_path):
    body = """
view = a[1:, ::2]
view.fill_(3)
out = torch.empty(0, device="cuda")
torch.mm(a, b, out=out)
file = io.BytesIO()
torch.save(a, file)
file.seek(0)
loaded = torch.load(file)
linear = torch.nn.Linear(7, 3).cuda()
functional.cross_entropy(linear(a), torch.tensor([0, 1, 2, 0, 1], device="cuda")).backward()
with torch.autocast("cuda", torch.bfloat16):
    product = linear(a)
result = [
    (a + torch.tensor(2.0)).device.type, a[torch.tensor([0, 1])].shape[0], bool((a.cpu()[1:, ::2] == 3).all()),
    out.tolist() == (a.cpu() @ b.cpu()).tolist(), loaded.device.type, linear.weight.grad.device.type,
    str(product.dtype), torch.ones(3).pin_memory().is_pinned(), torch.accelerator.current_accelerator().type,
    a.clone().untyped_storage().cpu().device.type,
]
"""
    expected = ["cuda", 2, True, True, "cuda", "cuda", "torch.bfloat16", True, "cuda", "cpu"]
    assert run(device, tmp_path, body) == expected


def test_memory_is_limited_and_counted(device, tmp_path):
    body = """
simulated_cuda.limit_memory(10**6)
held = torch.cuda.memory_allocated()
message = refused(lambda: torch.empty(10**6, device="cuda"))
big = torch.empty(10**5, device="cuda")
more = torch.cuda.memory_allocated() - held
unread = bool(big.isnan().all())
view = big[5:]
del big
kept = torch.cuda.memory_allocated() - held
del view
result = [message, more, unread, kept, torch.cuda.memory_allocated() - held, *torch.cuda.mem_get_info()]
"""
    message, *numbers = run(device, tmp_path, body)
    assert str(message).startswith("OutOfMemoryError: CUDA out of memory. Tried to allocate 4000000 bytes")
    assert numbers == [400_000, True, 400_000, 0, 10**6 - 280, 10**6]


def test_copies_and_waits_are_counted(device, tmp_path):
    body = """
simulated_cuda.events.clear()
a.sum().item(); a.cpu(); b.to("cpu", non_blocking=True); torch.ones(2).cuda(); a[torch.tensor([0])]; (a > 3).nonzero()
result = sorted([kind, operator, calls] for (_, kind, operator, _), calls in simulated_cuda.events.items())
"""
    assert run(device, tmp_path, body) == [
        ["d2h", "copy_", 1],
        ["d2h", "copy_ (non-blocking)", 1],
        ["h2d", "copy_", 2],
        ["wait", "aten::_local_scalar_dense", 1],
        ["wait", "aten::nonzero", 1],
    ]


@pytest.mark.device_matrix
def test_two_devices_do_not_mix(two_devices, tmp_path):
    body = """
other = torch.ones(5, 7, device="cuda:1")
moved = a.to("cuda:1")
with torch.cuda.device(1):
    made = torch.empty(2, device="cuda")
result = [refused(lambda: a + other), str((moved + other).device), str(made.device), torch.cuda.device_count()]
"""
    message, *others = run(two_devices, tmp_path, body)
    assert "cuda:0 and cuda:1" in str(message)
    assert others == ["cuda:1", "cuda:1", 2]
