"""The time that a run will take: the work of its missing stages, counted, times the seconds of each kind of work.

Not counted are tasks of lm-eval, a Python function that judges trials, the timing for a target speed, and what takes a
few seconds. Parts of a stage that an earlier call finished are counted again, but for trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import torch

from adapruner.calibration import PROBED_TOKENS, probe_texts, questions, tokenize
from adapruner.config import RecoveryOptions
from adapruner.costs import time_work
from adapruner.errors import NonFiniteError
from adapruner.evaluation import texts_and_tokens
from adapruner.graph import Making
from adapruner.memory import TOKENS_FOR_COSTS, TOKENS_FOR_WHOLE, windows_of
from adapruner.option_rules import level_rounds_of, scoring_count, trials_of, written_count
from adapruner.planning import kept_counts
from adapruner.recovery import (
    Examples,
    Unwritten,
    scale_options,
    steps_between_validations,
    total_steps,
    window_examples,
)
from adapruner.result import Role
from adapruner.run.nodes import amount, chosen, evaluated, inputs, measured, models, placed, text
from adapruner.search import StudyFile, measurements, reused_layers

# The share of the windows of the objective that a trial sees: a starting point, and one that was proposed; the number
# of candidates that are judged on further windows; and how often (research/experiments/duration.md).
_STARTING_POINTS, _SEEN_BY_START, _SEEN_BY_OTHERS, _FINALISTS, _FURTHER = 11, 0.75, 0.2, 4, 1.25
# Systems of equations of a block, relative to one in all of its inputs: to choose its damping, to compare its groups.
_FOR_DAMPING, _FOR_REMOVALS = 1.0, 5.0
# Candidates that levelling judges on the objective, before its rounds and in each of them.
_JUDGED_BEFORE, _JUDGED_PER_ROUND = 2, 1
# Losses that compare distributions, relative to the loss of a text.
_DIVERGENCE = 1.3
# Passes through a dense and a pruned layer in the sequential fit, and further ones if heads are cut.
_PASSES, _FOR_HEADS = 2, 4

# Of the printed line: the name of a unit, its seconds, and decimals.
_UNITS = (("hours", 3600, 1), ("minutes", 60, 0), ("seconds", 1, 0))


class Work(NamedTuple):
    """A part of the work of a stage.

    Attributes:
        kind: see `time_work`; or `seconds`, which are known.
    """

    stage: str
    kind: str
    amount: float


def expected_seconds(makings: Sequence[Making]) -> dict[str, float]:
    """The seconds of each stage that is missing; loads the dense model. Empty if nothing is, for runs layer by layer,
    and if the model gives numbers that are not finite."""
    work, making = missing_work(makings), makings[0]
    if not work or making.value(placed.placement).layer_wise:
        return {}
    values = ("dense", "dense_fast", "structure", "seq_len", "terms")
    kinds = dict.fromkeys(kind for _, kind, _ in work if kind != "seconds")
    try:
        of_kind = time_work(kinds, *map(making.value, values)) | {"seconds": 1.0}
    except NonFiniteError:  # on random tokens; on its text, it may be well
        return {}
    seconds = dict.fromkeys((stage for stage, *_ in work), 0.0)
    for stage, kind, count in work:
        seconds[stage] += count * of_kind[kind]
    return seconds


def described(seconds: Mapping[str, float]) -> str:
    """One line; empty if nothing is expected."""
    total = sum(seconds.values())
    unit, size, digits = next(row for row in _UNITS if total >= 2 * row[1] or row[1] == 1)
    amounts = {stage: f"{amount / size:.{digits}f}" for stage, amount in seconds.items()}
    shown = ", ".join(f"{stage} {amount}" for stage, amount in amounts.items() if float(amount))
    return f"about {total / size:.{digits}f} {unit} on this machine: {shown}" if shown else ""


def missing_work(makings: Sequence[Making]) -> list[Work]:
    """The work of all stages that are missing; what several runs share is counted once."""
    work, places = list[Work](), set()
    for making in makings:
        counted = _Counted(making)
        for node in making.missing():
            place = making.folder_of(node).path / node.path
            if node.name in _WORK and place not in places:
                work += _WORK[node.name](counted)
            places.add(place)
    return work


class _Counted:
    """The work of each stage of a run.

    Attributes:
        cut: the blocks that lose groups by the budget that the search starts from, and the fraction that they keep.
        kept: the fraction of the parameters in the layers that is kept.
        cubes: of the inputs of all blocks that a projection reads.
    """

    def __init__(self, making: Making) -> None:
        self.making, self.config = making, making.given["config"]
        self.structure, self.seq_len = making.value(inputs.structure), self.config.seq_len
        counts = kept_counts(self.structure, making.value(amount.starting_budget))
        blocks = list(zip(self.structure.blocks, counts, strict=True))
        self.cut = [(block, count / block.groups) for block, count in blocks if count < block.groups]
        self.kept = 1 - self.structure.removed_parameters(counts) / sum(self.structure.layer_parameters)
        self.cubes = sum(block.inputs * block.inputs_of_one**2 for block in self.structure.blocks)
        # A candidate is compensated.
        self.solved = sum(block.inputs * block.inputs_of_one**2 * kept**3 for block, kept in self.cut)
        if self.config.compensation in ("none", "bias"):
            self.solved = 0.0

    @cached_property
    def windows(self) -> dict[str, int]:
        """The number of windows by use, those that the model writes for compensation included."""
        making, node = self.making, text.windows if self.making.is_made(text.windows) else text.drawn
        counts: dict[str, int] = making.value(text.window_counts) | {
            use: len(it) for use, it in making.value(node).items()
        }
        can_write = making.value(inputs.pool_text) is not None
        if text.self_written in making.wanted and "compensation" in counts:
            counts["self"] = written_count(self.config.self_windows, counts["compensation"], can_write)
        return counts

    @property
    def fitted(self) -> int:
        """The tokens that compensation is fitted on."""
        return (self.windows.get("compensation", 0) + self.windows.get("self", 0)) * int(self.seq_len)

    def written_windows(self) -> Iterator[Work]:
        drawn = self.making.value(text.drawn)
        for use, count in self.making.value(text.window_counts).items():
            if use not in drawn:
                yield Work(f"writing {use}", "written", count * (self.seq_len - 1))

    def self_written(self) -> Iterator[Work]:
        yield Work("writing text", "written", self.windows["self"] * (self.seq_len - 1))
        yield from _reading("writing text", self.windows["self"] * self.seq_len)

    def moments(self) -> Iterator[Work]:
        products = sum(block.inputs * block.inputs_of_one for block in self.structure.blocks)
        yield Work("reading activations", "layers", self.fitted)
        yield Work("reading activations", "sums", self.fitted * products)
        yield Work("reading activations", "solved", _FOR_DAMPING * self.cubes)

    def statistics(self) -> Iterator[Work]:
        yield Work("measuring", "measured", self.windows["pool"] * self.seq_len)
        if self.making.value("compares_removals"):
            yield Work("comparing removals", "solved", _FOR_REMOVALS * self.cubes)

    def removal_order(self) -> Iterator[Work]:
        tokens = windows_of(TOKENS_FOR_WHOLE, self.windows["pool"], self.seq_len) * self.seq_len
        for layers in self.making.value(chosen.removable).values():
            counts = measurements(len(layers))
            # The layers before a candidate are not run again.
            behind = 1 - sum(layers) / max(1, len(layers)) / self.structure.layers
            yield from _reading("removing parts whole", tokens * sum(counts), behind)
            yield Work("removing parts whole", "layers", tokens * len(counts))

    def found(self) -> Iterator[Work]:
        if self.config.objective_function:
            return
        config, making = self.config, self.making
        file = StudyFile(making.given["run_folder"].study, making.record(chosen.found).key)
        count = trials_of(config.trials, config.space, config.search, _STARTING_POINTS)
        trials = range(len(file.finished()), count)
        scoring = scoring_count(config.objective_windows, config.final_windows, self.windows["objective"])
        seen = sum(_SEEN_BY_START if trial < _STARTING_POINTS else _SEEN_BY_OTHERS for trial in trials)
        further = _FINALISTS * _FURTHER * (self.windows["objective"] - scoring)
        reused = reused_layers(config.layout, config.protect_first, self.structure.layers) / self.structure.layers
        yield Work("searching", "layers", reused * self.windows["objective"] * self.seq_len)
        yield from _reading("searching", (seen * scoring + further) * self.seq_len, (1 - reused / 2) * self.kept)
        yield Work("searching", "solved", (len(trials) + (_FINALISTS if further else 0)) * self.solved)

    def levelled(self) -> Iterator[Work]:
        if self.config.objective_function:
            return
        config = self.config
        rounds = level_rounds_of(config.level_rounds, self.making.value("ratio"), config.target)
        judged = _JUDGED_BEFORE + _JUDGED_PER_ROUND * rounds
        yield from _reading("levelling widths", judged * self.windows["objective"] * self.seq_len, self.kept)
        tokens = windows_of(TOKENS_FOR_COSTS, self.windows["pool"], self.seq_len) * self.seq_len
        blocks = [block.kind for block in self.making.value(chosen.levelled_blocks)]
        # Heads are measured where some are removed.
        loses_heads = any(block.kind == "heads" for block, _ in self.cut)
        changes = rounds * (blocks.count("channels") + loses_heads * blocks.count("heads"))
        # The layers before a change are not run again; the dense model is run once, the pruned one in every round.
        yield Work("levelling widths", "layers", tokens * (1 + self.kept * (rounds + changes / 2)))
        yield Work("levelling widths", "predictions", _DIVERGENCE * tokens * (1 + rounds + changes))
        yield Work("levelling widths", "solved", (judged + 2 * rounds) * self.solved)

    def compensated(self) -> Iterator[Work]:
        yield Work("cutting", "solved", self.solved)
        if not self.making.value(models.fits_sequentially):
            return
        hidden = self.making.value(inputs.empty).get_input_embeddings().weight.shape[1]
        last = max((block.layer for block, _ in self.cut), default=-1)
        passes = _PASSES * (last + 1) + _FOR_HEADS * sum(block.kind == "heads" for block, _ in self.cut)
        kept = [block.inputs * share for block, share in self.cut if not block.experts]
        yield Work("compensating", "layers", self.fitted * passes / self.structure.layers)
        # The sums of one triangle of the moments are half as much work as those of all products.
        yield Work("compensating", "sums", self.fitted * sum(count * (count + 2 * hidden) for count in kept))
        yield Work("compensating", "solved", self.solved)

    def pruned(self) -> Iterator[Work]:
        if self.making.value(models.tuning):
            options = scale_options(self.config.seed, self.making.value(inputs.main_device))
            windows = torch.zeros(self.fitted // self.seq_len, self.seq_len, dtype=torch.int64)
            yield from self._training("tuning scales", [window_examples(windows, "the text", options)], options, True)

    def training_texts(self) -> Iterator[Work]:
        for part in self.making.value(models.examples):
            if isinstance(part, Unwritten):
                yield Work(f"writing {part.name}", "written", part.count * self.config.recovery.seq_len)

    def recovered(self) -> Iterator[Work]:
        options, parts = self.config.recovery, self.making.value(models.examples)
        blend = [
            part.examples(torch.zeros(part.count, options.seq_len, dtype=torch.int64), options)
            if isinstance(part, Unwritten)
            else part
            for part in parts
        ]
        yield from self._training("recovering", blend, options, self.making.value(models.distils))

    def _training(
        self, stage: str, blend: Sequence[Examples], options: RecoveryOptions, distils: bool
    ) -> Iterator[Work]:
        steps = total_steps(blend, options)
        learnt = steps * options.batch_size * sum(part.share * part.mean_tokens for part in blend)
        held_out = sum(len(example["input_ids"]) for part in blend for example in part.validation)
        validated = held_out * (1 + math.ceil(steps / steps_between_validations(steps)))
        yield Work(stage, "learnt", learnt * self.kept)
        yield from _reading(stage, validated, self.kept)
        if distils:
            yield from _reading(stage, learnt + validated)

    def perplexity(self, role: Role) -> Iterator[Work]:
        node = text.report_texts if self.making.is_made(text.report_texts) else text.drawn_to_report
        tokens = sum(it.windows.numel() for it in self.making.value(node).values())
        yield Work("evaluating", "evaluated", tokens * self._share(role))

    def breakage(self, role: Role) -> Iterator[Work]:
        """A model writes, and reads built-in texts and questions and the greedy texts of the dense model, which reads
        the sampled ones."""
        tokenizer = self.making.value(inputs.tokenizer)
        texts, tokens = texts_and_tokens(tokenizer)
        windows = sum(it.windows.numel() for it in probe_texts(tokenizer, min(self.seq_len, PROBED_TOKENS)).values())
        answers = (f"Question: {it.question} Answer: {choice}" for it in questions() for choice in it.choices)
        # Answers that differ in their last token alone are read once.
        asked = {tuple(tokenize(tokenizer, answer).input_ids[:-1]) for answer in answers}
        yield Work("looking for breakage", "written", texts * tokens)
        read = windows + sum(map(len, asked)) + texts * tokens // (2 if role == "dense" else 1)
        yield from _reading("looking for breakage", read, self._share(role))

    def _share(self, role: Role) -> float:
        """The fraction of the parameters in layers that the model of a role has."""
        return 1.0 if role == "dense" else self.kept


def _reading(stage: str, tokens: float, layers: float = 1.0) -> Iterator[Work]:
    """A forward pass.

    Args:
        layers: the fraction of the layers, relative to the dense model.
    """
    yield Work(stage, "layers", tokens * layers)
    yield Work(stage, "predictions", tokens)


_WORK: dict[str, Callable[[_Counted], Iterator[Work]]] = {
    text.windows.name: _Counted.written_windows,
    text.self_written.name: _Counted.self_written,
    measured.moments.name: _Counted.moments,
    measured.statistics.name: _Counted.statistics,
    chosen.removal_order.name: _Counted.removal_order,
    chosen.found.name: _Counted.found,
    chosen.levelled.name: _Counted.levelled,
    models.compensated.name: _Counted.compensated,
    models.pruned.name: _Counted.pruned,
    models.training_texts.name: _Counted.training_texts,
    models.recovered.name: _Counted.recovered,
    **{node.name: partial(_Counted.perplexity, role=role) for role, node in evaluated.perplexity.items()},
    **{node.name: partial(_Counted.breakage, role=role) for role, node in evaluated.breakage.items()},
}
