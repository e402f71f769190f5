"""Writes a page for each of four models that many people have, from its config: `python docs/models.py` writes
docs/models. No weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import adapruner
from adapruner import AdaPrunerError
from adapruner.run.memory import GIB
from adapruner.run.prune import estimate
from adapruner.run.steps import multimodal

FOLDER = Path(__file__).parent / "models"
CONFIGS = Path(__file__).parents[1] / "tests" / "configs"
# Widths are multiples of the groups in which each engine stores four bits.
FOUR_BITS = {"vllm": 128, "llama.cpp": 256}


class Model(NamedTuple):
    """A model.

    Attributes:
        name: on the Hub.
        ran: runs of smaller models of the family.
        tuning: GB that `adapruner recover` needs, by benchmarks/training_memory.py with 10 % removed.
        remark: on its commands.
        ratio: that whole steps of channels come near to.
        gpus: as `--gpu-memory` reads them.
        is_quantized: True for four bits in vLLM, which were tried with a dense text model.
    """

    title: str
    name: str
    ran: str
    tuning: int
    remark: str
    ratio: float = 0.1
    gpus: tuple[str, ...] = ("24GB", "80GB")
    is_quantized: bool = False

    @property
    def pruning(self) -> dict[str, object]:
        """The options of every run."""
        return {"ratio": self.ratio, "calibration": "c4"}


TUNING = "Fine-tuning needs about {} GB ([calculated](../guides/large-models.md#fine-tune-on-several-gpus))."
QUANTIZING = "`quantizing` is an [environment of its own](../steps/serve.md#four-bits-for-vllm)."
MODELS = {
    "qwen3-8b": Model(
        "Qwen3-8B",
        "Qwen/Qwen3-8B",
        "Tiny random models of its family were run, in [vLLM and llama.cpp](../reference/engines.md#engines) too."
        " Qwen2.5-Coder-0.5B, a Qwen 2, was [measured](../choose.md#what-was-measured), and run [in four"
        " bits](../steps/serve.md#four-bits-for-vllm).",
        17,
        QUANTIZING,
        is_quantized=True,
    ),
    "llama3.1-8b": Model(
        "Llama 3.1 8B",
        "meta-llama/Llama-3.1-8B-Instruct",
        "SmolLM2-135M, a Llama, was [measured](../choose.md#what-was-measured), fine-tuned, and run in llama.cpp [in"
        " four bits](../choose.md#speed-and-size); tiny random Llamas were run in"
        " [vLLM](../reference/engines.md#engines), not in four bits.",
        16,
        QUANTIZING,
        is_quantized=True,
    ),
    "gemma3-4b": Model(
        "Gemma 3 4B",
        "google/gemma-3-4b-it",
        "Gemma 3 270M was [measured](../choose.md#what-was-measured); tiny random models were run in vLLM [with an"
        " image](../reference/engines.md#vllm).",
        9,
        "Its layers are of equal width for vLLM, with all heads; [the parts that read images](../guides/multimodal.md)"
        " stay in any case. Four bits were not tried for multimodal models.",
        ratio=0.093,
    ),
    "qwen3-30b-a3b": Model(
        "Qwen3-30B-A3B",
        "Qwen/Qwen3-30B-A3B",
        "Tiny random models of its family were run, in [vLLM and mlx-lm](../reference/engines.md#engines) too; no"
        " released mixture was.",
        57,
        "LoRA trains its attention alone. Its experts are stored one by one, and put together when their layer is"
        " read. Four bits were not tried for mixtures.",
        gpus=("24GB", "80GB", "2x80GB"),
    ),
}


def pages() -> dict[str, str]:
    """The content of every page, by its name."""
    return {f"{key}.md": page(key, model) for key, model in MODELS.items()}


def page(key: str, model: Model) -> str:
    """The prunable parts of a model, the memory of a run, and the commands for each engine."""
    return f"""# {model.title}

<!-- Written by docs/models.py. -->

**Calculated from the config; this model was not run.** {model.ran}

## Prunable parts and memory

```bash
adapruner inspect {model.name}
adapruner inspect {model.name} --cost --gpu-memory {model.gpus[0]} {arguments(model.pruning)}
```

{prunable(CONFIGS / key)}
| `--gpu-memory` | fits | GiB on each GPU | GiB of main memory |
|---|---|---|---|
{"".join(memory(key, model, gpu) for gpu in model.gpus)}
## For vLLM

{for_vllm(key, model)}

{TUNING.format(model.tuning)} {model.remark}

## For llama.cpp

{for_llama_cpp(key, model)}
"""


def prunable(folder: Path) -> str:
    """A table of the groups of a layer; in each of these models, all layers are equal."""
    structure, around = adapruner.inspect(folder), multimodal(folder)
    total = structure.total_parameters
    inside = f" in the decoder, {around[1]:,} in all" if around else ""
    rows = ""
    for block in (block for block in structure.blocks if block.layer == 0):
        kind = "KV groups" if block.kind == "heads" else block.kind
        groups, size = block.groups, block.parameters_per_group
        rows += f"| {kind} | {groups:,} | {size:,} | {share(structure.layers * groups * size / total)} |\n"
    return f"""{total:,} parameters{inside}; at most {share(structure.removable_parameters / total)} can be removed:

| in each of {structure.layers} layers | groups | parameters per group | share |
|---|---|---|---|
{rows}"""


def memory(key: str, model: Model, gpu: str) -> str:
    """A row on the memory of a run."""
    estimated = estimate(CONFIGS / key, gpu, **model.pruning)
    fits = "no" if not estimated.fits else "layer by layer" if estimated.placement.layer_wise else "in memory"
    return f"| {gpu} | {fits} | {estimated.memory.device / GIB:.1f} | {estimated.memory.host / GIB:.1f} |\n"


def for_vllm(key: str, model: Model) -> str:
    """The commands from the released model to the served one."""
    run, served = f"runs/{key}", f"runs/{key}/{'w4a16' if model.is_quantized else 'tuned'}"
    lines = [
        prune(key, model, "vllm", run, model.is_quantized),
        f"adapruner recover {run}/model --data answers:alpaca --teacher {model.name} --teacher-top 64 \\",
        f"    --seq-len 2048 --micro-batch-size 1 --gradient-checkpointing -o {run}/tuned",
    ]
    if model.is_quantized:
        step = f"""'["quantized", "{run}/tuned", "{served}", "notes.txt"]'"""
        lines.append(f"quantizing/bin/python benchmarks/four_bits.py step {step}")
    return console(*lines, f"vllm serve {served}")


def for_llama_cpp(key: str, model: Model) -> str:
    """The commands, or why there are none."""
    run = f"runs/{key}-gguf"
    try:
        command = prune(key, model, "llama.cpp", run, in_four_bits=True)
    except AdaPrunerError as refusal:
        return (
            f"`--for llama.cpp` is refused: {refusal}. llama.cpp's own converter was not tried on the folder for vLLM,"
            " a stock checkpoint."
        )
    export = f"adapruner export {run}/model --to gguf --gguf-type q4_k_m -o {key}.gguf"
    return console(command, export, f"llama-server -m {key}.gguf") + "\n\nFine-tune as above before `export`."


def prune(key: str, model: Model, engine: str, output: str, in_four_bits: bool) -> str:
    """The command that prunes a model for an engine.

    Raises:
        AdaPrunerError: the command would be refused.
    """
    options = model.pruning | {"for_": engine} | ({"round_to": FOUR_BITS[engine]} if in_four_bits else {})
    estimate(CONFIGS / key, model.gpus[-1], **options)
    return f"adapruner prune {model.name} {arguments(options)} -o {output}"


def arguments(options: Mapping[str, object]) -> str:
    """Options as the command line has them."""
    return " ".join(f"--{name.strip('_').replace('_', '-')} {value}" for name, value in options.items())


def console(*lines: str) -> str:
    """A block of commands."""
    return "\n".join(["```console", *lines, "```"])


def share(fraction: float) -> str:
    """A fraction in percent."""
    return f"{100 * fraction:.1f} %"


if __name__ == "__main__":
    for file, content in pages().items():
        (FOLDER / file).write_text(content, encoding="utf-8")
