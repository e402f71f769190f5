"""The pruning plan: the kept groups of every block. Nothing else passes from choosing to cutting."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field, ValidationError, model_validator
from torch import Tensor
from typing_extensions import Self

from adapruner.base.errors import AdaPrunerError, first_problem, reason
from adapruner.base.tables import Column, Table
from adapruner.budget.counts import default_budget, kept_counts
from adapruner.options import HeadGranularity
from adapruner.structure.blocks import Kind, Structure, layers_without_heads, note_on_mixers

_KINDS: tuple[Kind, ...] = ("heads", "experts", "channels")
# More than any model has; tables show a row for every layer.
_MOST_LAYERS = 1 << 16


class BlockPlan(BaseModel, extra="forbid", frozen=True, strict=True):
    """The numbers of the kept groups of one block, in ascending order; empty if the attention is removed whole."""

    layer: Annotated[int, Field(ge=0, lt=_MOST_LAYERS)]
    kind: Kind
    groups: Annotated[int, Field(ge=1)]
    kept: tuple[int, ...]

    @property
    def kept_of_all(self) -> str:
        """The number of kept groups as it is shown."""
        return f"{len(self.kept):,} of {self.groups:,}" if self.kept else "none"

    @model_validator(mode="after")
    def _kept_are_groups(self) -> Self:
        ascending = all(before < after for before, after in pairwise(self.kept))
        if self.kept and (not ascending or self.kept[0] < 0 or self.kept[-1] >= self.groups):
            raise ValueError(f"layer {self.layer} keeps other {self.kind} than some of its {self.groups}, in order")
        return self


class PruningPlan(BaseModel, extra="forbid", frozen=True, strict=True):
    """The kept groups of a model; stored as JSON, explainable, with a hash that is equal for equal cuts."""

    model_type: str
    head_granularity: HeadGranularity
    total_parameters: Annotated[int, Field(ge=1)]
    removed_parameters: Annotated[int, Field(ge=0)]
    blocks: Annotated[tuple[BlockPlan, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _something_stays(self) -> Self:
        if self.removed_parameters >= self.total_parameters:
            raise ValueError(f"{self.removed_parameters:,} of {self.total_parameters:,} parameters cannot be removed")
        return self

    @property
    def ratio(self) -> float:
        """The share of all parameters that is removed."""
        return self.removed_parameters / self.total_parameters

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of groups in this plan, in the order in which they are shown."""
        return [kind for kind in _KINDS if any(block.kind == kind for block in self.blocks)]

    def name_of(self, kind: Kind) -> str:
        """The name of the groups of a kind."""
        if kind == "heads":
            return "KV groups" if self.head_granularity == "kv-group" else "query heads"
        return kind

    @property
    def note(self) -> str:
        """A note on the layers that a table of the blocks does not show."""
        return note_on_mixers(layers_without_heads(max(self.by_layer) + 1, self.blocks))

    @property
    def by_layer(self) -> dict[int, dict[Kind, BlockPlan]]:
        """The blocks of every layer, by kind."""
        layers: dict[int, dict[Kind, BlockPlan]] = {}
        for block in self.blocks:
            layers.setdefault(block.layer, {})[block.kind] = block
        return layers

    @property
    def hash(self) -> str:
        """SHA-256 over the plan as JSON."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @staticmethod
    def of(structure: Structure, kept: Sequence[Sequence[int]]) -> PruningPlan:
        """The plan that keeps these groups.

        Args:
            kept: for each of `structure.blocks`, the numbers of the kept groups in ascending order; the same number of
                every stratum of the block.

        Raises:
            AdaPrunerError: these are not groups of the blocks, or something cannot be removed whole.
        """
        try:
            blocks = tuple(
                BlockPlan(layer=block.layer, kind=block.kind, groups=block.groups, kept=tuple(groups))
                for block, groups in zip(structure.blocks, kept, strict=True)
            )
        except ValueError as error:
            raise AdaPrunerError(f"these groups make no plan: {reason(error)}") from None
        for block, block_plan in zip(structure.blocks, blocks, strict=True):
            strata = [group * block.strata // block.groups for group in block_plan.kept]
            if len({strata.count(stratum) for stratum in range(block.strata)}) > 1:
                raise AdaPrunerError(
                    f"layer {block.layer} keeps other numbers of {block.kind} in some of its {block.strata} strata"
                )
        counts = [len(block.kept) for block in blocks]
        structure.check_removable(counts)
        return PruningPlan(
            model_type=structure.model_type,
            head_granularity=structure.head_granularity,
            total_parameters=structure.total_parameters,
            removed_parameters=structure.removed_parameters(counts),
            blocks=blocks,
        )

    @staticmethod
    def from_scores(
        structure: Structure,
        scores: Tensor,
        ratio: float = 0.2,
        *,
        round_to: int = 32,
        protect_first: float | None = None,
        protect_last: float | None = None,
        head_share: float | None = None,
    ) -> PruningPlan:
        """The plan that keeps in every block the groups with the highest scores.

        For what else a `Budget` describes, as a uniform layout, call `budget.counts.kept_counts` and `make_plan`.

        Args:
            scores: [groups], in the order of `structure.blocks`.
            ratio: fraction of all parameters to remove; of a multimodal model, of those of its decoder.
            round_to, protect_first, protect_last, head_share: as in `PruneOptions`.

        Raises:
            AdaPrunerError: the ratio cannot be reached, with the arithmetic; or not every group has a score.
        """
        shares = round_to, protect_first, protect_last, head_share
        budget = default_budget(structure, ratio, "per-layer", "parameters", *shares)
        return make_plan(structure, scores, kept_counts(structure, budget))

    def save(self, path: Path) -> None:
        """Writes the plan as JSON."""
        path.write_text(self.model_dump_json() + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> PruningPlan:
        """Reads a plan written by `save`.

        Raises:
            AdaPrunerError: the file cannot be read, or holds something else.
        """
        try:
            return PruningPlan.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise AdaPrunerError(f"{path} is not a pruning plan: {first_problem(error)}") from None
        except OSError as error:
            raise AdaPrunerError(f"cannot read {path}: {reason(error)}") from None

    def explain(self) -> Table:
        """A table with one row per layer: the numbers of kept heads, experts and channels."""
        title = f"{self.removed_parameters:,} of {self.total_parameters:,} parameters are removed ({self.ratio:.1%})"
        columns = [Column("layer"), *(Column(f"{self.name_of(kind)} kept") for kind in self.kinds)]
        rows = [
            [str(layer), *(blocks[kind].kept_of_all if kind in blocks else "–" for kind in self.kinds)]
            for layer, blocks in self.by_layer.items()
        ]
        return Table("layer-table", title, columns, rows, [self.note] if self.note else [])

    def check_fits(self, structure: Structure) -> None:
        """Raises AdaPrunerError if the plan was made for another model, or removes what cannot be removed whole."""
        mine = [(block.layer, block.kind, block.groups) for block in self.blocks]
        theirs = [(block.layer, block.kind, block.groups) for block in structure.blocks]
        if mine != theirs or self.total_parameters != structure.total_parameters:
            raise AdaPrunerError(
                f"this plan is for a {self.model_type} of {self.total_parameters:,} parameters in {len(mine)} blocks,"
                f" the model is a {structure.model_type} of {structure.total_parameters:,} in {len(theirs)}"
            )
        structure.check_removable([len(block.kept) for block in self.blocks])


def make_plan(structure: Structure, scores: Tensor, counts: Sequence[int]) -> PruningPlan:
    """Keeps the most important groups of every block (local ranking); of equal scores, the earlier group.

    Args:
        scores: [groups], of all blocks in the order of `structure.blocks`.
        counts: number of groups that each block keeps, a multiple of its strata.
    """
    if scores.shape != (groups := structure.group_offsets[-1],) or scores.isnan().any():
        raise AdaPrunerError(f"the scores, {list(scores.shape)}, are not {groups} numbers, one for every group")
    kept = []
    for block, block_scores, count in zip(
        structure.blocks, scores.split([block.groups for block in structure.blocks]), counts, strict=True
    ):
        # The same number of every stratum.
        ranked = block_scores.view(block.strata, -1).argsort(dim=1, descending=True, stable=True)
        first_of_stratum = torch.arange(block.strata)[:, None] * (block.groups // block.strata)
        best = ranked[:, : count // block.strata] + first_of_stratum
        kept.append(tuple(best.flatten().sort().values.tolist()))
    return PruningPlan.of(structure, kept)
