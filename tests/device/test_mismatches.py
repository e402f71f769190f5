"""A tensor that stays on the CPU by mistake is found."""

from device.client import pruning

# Calls of `to` out of one file of the package do not move; the conversion of dtypes is left as it is.
PROGRAM = """
import sys, torch
from adapruner.cli import main

move = torch.Tensor.to

def stay(tensor, *arguments, **named):
    moved = move(tensor, *arguments, **named)
    if sys._getframe(1).f_code.co_filename.endswith("measurement/taylor.py") and moved.device != tensor.device:
        return move(tensor, moved.dtype)
    return moved

torch.Tensor.to = stay
try:
    main({arguments!r})
finally:
    torch.Tensor.to = move
"""


def test_a_tensor_left_on_the_cpu_is_found(device, family, text_file, tmp_path):
    arguments = pruning(family("llama"), text_file, tmp_path / "a")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(arguments=[str(argument) for argument in arguments]))
    outcome = device.run(file=program)
    assert outcome.code == 1
    assert "Expected all tensors to be on the same device" in outcome.stderr
