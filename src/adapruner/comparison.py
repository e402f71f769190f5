"""Models side by side: their numbers, and which of them there is no reason to choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from adapruner.config import Engine
from adapruner.evaluation import Perplexity, Rate, TaskScore, mean_accuracies
from adapruner.tables import Column, Table

Axis = Literal["size", "prefill", "decode"]
AXES: dict[Axis, str] = {"size": "size", "prefill": "prompt tokens/s", "decode": "generated tokens/s"}
# Speeds this close count as equal: no measurement of a minute is better.
_SPEED_TOLERANCE = 0.03


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Point(_Content):
    """The numbers of one model, in one quantization and engine.

    Attributes:
        model: as the user wrote it.
        type: that of the GGUF file, `gguf` for a file that was given, or the dtype in transformers.
        size: bytes of the GGUF file, or of the weights in transformers.
        perplexity: on the text of the comparison; `bits_per_byte` is known.
        prefill, decode: tokens per second of reading a prompt, and of generating after it, one sequence at a time.
        tasks: of lm-eval, in transformers.
    """

    model: str
    engine: Engine
    type: str
    size: int
    perplexity: Perplexity
    prefill: Rate
    decode: Rate
    tasks: list[TaskScore] = []

    @property
    def name(self) -> str:
        return f"{self.model} {self.type}"

    @property
    def bits_per_byte(self) -> float:
        bits = self.perplexity.bits_per_byte
        assert bits is not None
        return bits

    def cost(self, axis: Axis) -> float:
        """Bytes, or seconds per token."""
        return float(self.size) if axis == "size" else 1 / getattr(self, axis).median


class Comparison(_Content):
    """Models side by side.

    Attributes:
        points: in the order of the given models, engines and types.
        prompt, new_tokens, repetitions: how speed was measured.
        device: that transformers ran on; llama.cpp runs on the CPU.
    """

    points: list[Point]
    prompt: int
    new_tokens: int
    repetitions: int
    device: str

    @computed_field
    @property
    def dominated(self) -> dict[str, dict[Axis, str]]:
        """By the name of each dominated point, and by what it costs: the name of the point that dominates it, see
        `dominating`."""
        dominated: dict[str, dict[Axis, str]] = {}
        for point in self.points:
            for axis in AXES:
                if better := dominating(point, self.points, axis):
                    dominated.setdefault(point.name, {})[axis] = better.name
        return dominated


def dominating(point: Point, points: Sequence[Point], axis: Axis) -> Point | None:
    """Of the points that are at least as good as this one in bits per byte and cost no more, and are better in one of
    both: the one with the fewest bits per byte. Speeds within 3 % count as equal. None if there is none."""
    better = [other for other in points if _dominates(other, point, axis)]
    return min(better, key=lambda other: (other.bits_per_byte, other.cost(axis)), default=None)


def _dominates(one: Point, other: Point, axis: Axis) -> bool:
    margin = 1.0 if axis == "size" else 1 + _SPEED_TOLERANCE
    costs = one.cost(axis), other.cost(axis)
    if one.bits_per_byte == other.bits_per_byte:
        return costs[0] * margin < costs[1]
    return one.bits_per_byte < other.bits_per_byte and costs[0] <= costs[1] * margin


def table(comparison: Comparison) -> Table:
    """A row for every point."""
    points, dominated = comparison.points, comparison.dominated
    means = [mean_accuracies(score.metrics for score in point.tasks) for point in points]
    metrics = list(dict.fromkeys(metric for by_metric in means for metric in by_metric))
    columns = [
        Column("model", is_number=False),
        *map(Column, ("MB", "bits per byte", "perplexity", AXES["prefill"], AXES["decode"])),
        *(Column(f"mean {metric}") for metric in metrics),
        Column("dominated in, by", is_number=False),
    ]
    rows = [
        [
            point.name,
            f"{point.size / 1e6:,.1f}",
            f"{point.bits_per_byte:.4f}",
            f"{point.perplexity.perplexity:.2f}",
            shown_rate(point.prefill),
            shown_rate(point.decode),
            *(f"{mean[metric]:.4f}" if metric in mean else "" for metric in metrics),
            "; ".join(f"{AXES[axis]}: {better}" for axis, better in dominated.get(point.name, {}).items()),
        ]
        for point, mean in zip(points, means, strict=True)
    ]
    return Table("points", "Numbers of every point", columns, rows, _protocols(comparison))


def _protocols(comparison: Comparison) -> list[str]:
    """How the numbers came about, one line each."""
    points = comparison.points
    engines = {"llama.cpp": "llama.cpp on the CPU", "transformers": f"transformers on {comparison.device}"}
    used = " and ".join(name for engine, name in engines.items() if any(point.engine == engine for point in points))
    return [
        *dict.fromkeys(point.perplexity.protocol for point in points),
        f"tokens per second: {used}, one sequence, prompts of {comparison.prompt} tokens, then"
        f" {comparison.new_tokens} generated with a cache; medians (least–greatest) of {comparison.repetitions}"
        " repetitions, one model after the other",
        *dict.fromkeys(score.protocol for point in points for score in point.tasks),
    ]


def shown_rate(rate: Rate) -> str:
    """Tokens per second as they are shown."""
    return f"{rate.median:,.1f} ({rate.least:,.1f}–{rate.greatest:,.1f})"
