"""The memory that LoRA on LLaMA-7B takes on a GPU: counted on the simulated one (tests/device) with the widths of
LLaMA-7B and one, two and three layers, and extended to 32 layers.

    python benchmarks/recovery_memory.py --micro-batch-size 1 --layers 1 --layers 2

Everything but the number of layers is that of the model, so the peak grows by the same bytes with every layer. Weights
are random: bytes do not depend on their values.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "device"))

import building
import simulated_cuda

# Before transformers is imported, which looks for devices once.
building.build()
native = simulated_cuda.install()

import torch  # noqa: E402
from cyclopts import run  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel  # noqa: E402

from adapruner.config import RecoveryOptions  # noqa: E402
from adapruner.recovery import window_examples  # noqa: E402
from adapruner.recovery._training import train  # noqa: E402

GIB = 2**30
LAYERS_OF_7B = 32


def main(
    *,
    layers: tuple[int, ...] = (1, 2, 3),
    micro_batch_size: int = 4,
    gradient_checkpointing: bool = True,
    seq_len: int = 256,
    steps: int = 2,
) -> None:
    """Prints the peak of every size, and of 32 layers with the slope of the last two."""
    options = RecoveryOptions(
        steps=steps,
        batch_size=2 * micro_batch_size,
        micro_batch_size=micro_batch_size,
        seq_len=seq_len,
        gradient_checkpointing=gradient_checkpointing,
        validation=1,
    )
    peaks = {}
    for count in layers:
        peaks[count] = peak(count, options)
        print(f"{count} layers: {peaks[count]:,} bytes", flush=True)
    (*_, before, last) = sorted(peaks)
    slope = (peaks[last] - peaks[before]) / (last - before)
    whole = peaks[last] + (LAYERS_OF_7B - last) * slope
    print(f"{slope:,.0f} bytes for each layer; {LAYERS_OF_7B} layers: {whole / GIB:.2f} GiB")


def peak(layers: int, options: RecoveryOptions) -> int:
    """The most bytes on the device, the model included, while it is trained."""
    gc.collect()
    before = native.used(0)
    model = seven_billion_wide(layers)
    windows = torch.randint(model.config.vocab_size, (3 * options.batch_size, options.seq_len))
    native.reset_peak(0)
    with tempfile.TemporaryDirectory() as folder:
        train(lambda: model, [window_examples(windows, "random tokens", options)], options, Path(folder))
    return int(native.peak(0) - before)


def seven_billion_wide(layers: int) -> PreTrainedModel:
    """On the device, in bfloat16."""
    with torch.device("meta"):
        config = LlamaConfig(num_hidden_layers=layers)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cuda")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01)
    return model


if __name__ == "__main__":
    run(main)
