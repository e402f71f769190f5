"""adapruner recover"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from adapruner.cli._output import plain_console, print_advice, print_json
from adapruner.config import Dtype, RecoveryOptions
from adapruner.processes import this_process


def recover(
    model: str,
    /,
    *,
    data: str,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    teacher: str | None = None,
    options: Annotated[RecoveryOptions | None, Parameter(name="*")] = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Fine-tune a pruned model, or distil the dense model into it. Rerun the same command to resume.

    Parameters
    ----------
    model:
        Hub id, model folder, .gguf file, or smollm2.
    data:
        Instructions with answers (columns instruction, output, input), any text, or self: the teacher writes it.
    output:
        Folder of the recovered model.
    teacher:
        The dense model, for distillation.
    dtype:
        Dtype of the weights; auto keeps the checkpoint's. Nothing is trained in float16.
    device:
        auto, cpu, cuda, …
    overwrite:
        Start again, whatever recovery the folder holds.
    json:
        Print recovery.json on stdout.
    """
    from adapruner import verbs

    given = options.model_dump(exclude_unset=True) if options else {}
    record = verbs.recover(model, data, output, teacher, overwrite, dtype, device, **given)
    if not this_process().leads:
        return
    if json:
        print_json(record.model_dump(mode="json"))
        return
    plain_console().print(
        f"{output}: validation loss {record.loss_before:.4f} → {record.loss_after:.4f} nats per token, best after"
        f" {record.best_step} of {record.steps} steps, {record.tokens:,} tokens",
        soft_wrap=True,
    )
    if record.loss_after >= record.loss_before:
        print_advice(["training has not lowered the validation loss: train longer, or lower --learning-rate"])
