"""adapruner benchmark"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from adapruner.cli._numbers import WholeNumber
from adapruner.cli._output import plain_console, print_advice, print_json
from adapruner.config import Dtype

if TYPE_CHECKING:
    from adapruner.evaluation import Speed


def benchmark(
    model: str,
    /,
    *,
    against: str | None = None,
    batch_size: Annotated[tuple[WholeNumber, ...], Parameter(negative="")] = (1, 16),
    prompt: WholeNumber = 128,
    new_tokens: WholeNumber = 32,
    repetitions: WholeNumber = 5,
    dtype: Dtype = "auto",
    device: str = "auto",
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Measure size, memory and tokens per second of a model, beside another one.

    Parameters
    ----------
    model:
        Hub id, model folder, .gguf file, or smollm2.
    against:
        The model to compare with: the dense one.
    batch_size:
        Sequences at once; may be repeated.
    prompt:
        Tokens that are read at once.
    new_tokens:
        Tokens that are then generated.
    repetitions:
        Of which the median is taken; models take turns.
    dtype:
        auto, float32, bfloat16 or float16.
    device:
        auto, cpu, cuda, …
    json:
        Print JSON on stdout instead of the table.
    """
    from adapruner import verbs

    speeds = verbs.benchmark(model, against, batch_size, prompt, new_tokens, repetitions, dtype, device)
    if json:
        print_json({name: speed.model_dump(mode="json") for name, speed in speeds.items()})
    else:
        plain_console().print(_table(speeds, prompt, new_tokens))
    print_advice([*_advice(speeds[model], speeds[against] if against else None)])


def _table(speeds: dict[str, Speed], prompt: int, new_tokens: int) -> Table:
    """A row for each quantity; of two models, a last column says by how much the second one is smaller or faster."""
    own = list(speeds.values())
    table = Table("", *speeds, *(["gain"] if len(own) == 2 else []), caption_justify="left")
    sizes: dict[str, list[int | None]] = {
        "parameters": [speed.parameters for speed in own],
        "bytes of weights": [speed.weight_bytes for speed in own],
        "peak bytes of memory": [speed.peak_memory_bytes for speed in own],
        "MACs per token of the prompt": [speed.prompt_macs for speed in own],
        "MACs per generated token": [speed.new_token_macs for speed in own],
    }
    for name, values in sizes.items():
        known = [value for value in values if value is not None]
        gain = [f"{known[0] / known[1]:.2f} ×"] if len(known) == 2 else [""]
        table.add_row(name, *("unknown" if value is None else f"{value:,}" for value in values), *gain[: len(own) - 1])
    for name, kind in (("prompt tokens/s", "prefill"), ("generated tokens/s", "decode")):
        for batch in own[0].prefill:
            rates = [getattr(speed, kind)[batch] for speed in own]
            cells = [f"{rate.median:,.1f} ({rate.least:,.1f}–{rate.greatest:,.1f})" for rate in rates]
            gain = [f"{rates[-1].median / rates[0].median:.2f} ×"]
            table.add_row(f"{name}, batch {batch}", *cells, *gain[: len(own) - 1])
    table.caption = (
        f"prompts of {prompt} tokens, then {new_tokens} generated with a cache; medians (least–greatest) of repetitions"
        " in turn"
    )
    return table


def _advice(speed: Speed, dense: Speed | None) -> Iterator[str]:
    """What stands in the way of speed."""
    if speed.unfriendly_widths:
        numbers = [str(layer) for layer in speed.unfriendly_widths]
        layers = ", ".join(numbers[:8]) + (" …" if len(numbers) > 8 else "")
        yield (
            f"the feed-forward widths of layers {layers} are no multiples of {speed.friendly_multiple}, with which this"
            f" device is faster: prune with --round-to {speed.friendly_multiple}"
        )
    for kind, what in (("prefill", "reads prompts"), ("decode", "generates")):
        for batch, rate in getattr(speed, kind).items():
            if dense and rate.median <= getattr(dense, kind)[batch].median:
                yield f"the model {what} no faster than the one beside it at batch size {batch}"
