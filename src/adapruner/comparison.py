"""Models side by side: their numbers, and the models that are dominated by others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, computed_field

from adapruner.config import Engine
from adapruner.evaluation import Perplexity, Rate, TaskScore, mean_accuracies
from adapruner.tables import Column, Table

Axis = Literal["size", "prefill", "decode"]
AXES: dict[Axis, str] = {"size": "size", "prefill": "prompt tokens/s", "decode": "generated tokens/s"}
# Speeds this close count as equal: short measurements are not more precise.
_SPEED_TOLERANCE = 0.03


class Point(BaseModel, extra="forbid", frozen=True, ser_json_inf_nan="constants"):
    """The numbers of one model, in one quantization and engine.

    Attributes:
        model: as the user wrote it.
        type: the type of the GGUF file, `gguf` for a given file, or the dtype in transformers.
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


class Comparison(BaseModel, extra="forbid", frozen=True, ser_json_inf_nan="constants"):
    """Models side by side.

    Attributes:
        points: in the order of the given models, engines and types.
        prompt, new_tokens, repetitions: of the measurement of speed.
        device: of transformers; llama.cpp runs on the CPU.
    """

    points: list[Point]
    prompt: int
    new_tokens: int
    repetitions: int
    device: str

    @computed_field
    @property
    def dominated(self) -> dict[str, dict[Axis, str]]:
        """The name of the point that dominates, see `dominating`, by the name of the dominated point and by the kind of
        cost."""
        dominated: dict[str, dict[Axis, str]] = {}
        for point in self.points:
            for axis in AXES:
                if better := dominating(point, self.points, axis):
                    dominated.setdefault(point.name, {})[axis] = better.name
        return dominated


def dominating(point: Point, points: Sequence[Point], axis: Axis) -> Point | None:
    """The point with the fewest bits per byte among those that dominate a point; None if there is none.

    A point dominates another if it has no more bits per byte and costs no more, and is better in one of both. Speeds
    within 3 % count as equal.
    """
    better = [candidate for candidate in points if _dominates(candidate, point, axis)]
    return min(better, key=lambda candidate: (candidate.bits_per_byte, candidate.cost(axis)), default=None)


def _dominates(candidate: Point, point: Point, axis: Axis) -> bool:
    margin = 1.0 if axis == "size" else 1 + _SPEED_TOLERANCE
    if candidate.bits_per_byte == point.bits_per_byte:
        return candidate.cost(axis) * margin < point.cost(axis)
    return candidate.bits_per_byte < point.bits_per_byte and candidate.cost(axis) <= point.cost(axis) * margin


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
    """How the numbers were measured, one line each."""
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
    """Tokens per second with their range, for a table."""
    return f"{rate.median:,.1f} ({rate.least:,.1f}–{rate.greatest:,.1f})"
