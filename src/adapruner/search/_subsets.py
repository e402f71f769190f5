"""A smooth, low-dimensional family of calibration subsets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapruner.measurement._statistics import Statistics
from adapruner.structure._blocks import Structure

FEATURES = ("loss", "gradient", "first_component", "second_component")


@dataclass(frozen=True)
class SubsetFamily:
    """Subsets of the pool that represent it, tilted towards some of its samples.

    Every sample weighs exp(Σ_f tilt_f feature_f). A subset is herded: the samples are taken one by one so that the mean
    importance over the subset comes as near as it can to the weighted mean over the pool (kernel herding, Chen, Welling
    and Smola, arXiv 1203.3472). Without a tilt, this is the subset that represents the whole pool best. A small tilt
    changes few samples, so that neighbouring points are similar, which they are not in a search over single samples.

    Attributes:
        gram: [samples, samples], float64, products between the importances that the samples give to all vectors.
        features: [samples, features], float64, standardised: the loss, the size of the gradient, and the position along
            the two directions in which the samples' importances differ most.
    """

    gram: Tensor
    features: Tensor

    def choose(self, count: int, tilt: Mapping[str, float]) -> tuple[int, ...]:
        """The numbers of `count` samples, ascending.

        Args:
            tilt: weight of each of `FEATURES`; 0 for a feature that is not named.
        """
        tilts = torch.tensor([tilt.get(feature, 0.0) for feature in FEATURES], dtype=self.gram.dtype)
        to_target = self.gram @ torch.softmax(self.features @ tilts, 0)
        squares, to_chosen = self.gram.diagonal(), torch.zeros_like(to_target)
        chosen: list[int] = []
        squared_sum = target_sum = torch.zeros((), dtype=self.gram.dtype)
        for size in range(1, count + 1):
            # |mean over the subset - target|², up to a constant, if each sample were added next.
            distance = (squared_sum + 2 * to_chosen + squares) / size**2 - 2 * (target_sum + to_target) / size
            distance[chosen] = torch.inf
            best = int(distance.argmin())
            squared_sum = squared_sum + 2 * to_chosen[best] + squares[best]
            target_sum = target_sum + to_target[best]
            to_chosen = to_chosen + self.gram[best]
            chosen.append(best)
        return tuple(sorted(chosen))


def build_subset_family(statistics: Statistics, structure: Structure, counts: Sequence[int]) -> SubsetFamily:
    """Compares the samples of a pool by the first-order importance that they give to the removable groups, element by
    element if that was measured.

    Args:
        counts: number of groups that each block keeps; blocks that are kept whole do not count.
    """
    pruned = torch.tensor(
        [count < block.groups for block, count in zip(structure.blocks, counts, strict=True)], dtype=torch.bool
    )
    vectors = pruned[structure.block_of_vector]
    fine = statistics.element_absolute
    importance = (statistics.taylor.abs() if fine is None else fine)[:, vectors]
    blocks = structure.block_of_vector[vectors].expand_as(importance)
    means = torch.zeros(len(importance), len(structure.blocks)).scatter_reduce_(
        1, blocks, importance, "mean", include_self=False
    )
    # Blocks differ in scale by orders of magnitude; each shall count the same.
    aligned = importance / means.mean(0).clamp_min(torch.finfo(torch.float32).tiny)[blocks[0]]
    logarithm = aligned.clamp_min(torch.finfo(torch.float32).tiny).log()
    centred = logarithm - logarithm.mean(0) - logarithm.mean(1, keepdim=True) + logarithm.mean()
    features = [statistics.loss, aligned.mean(1).log(), *_leading_components(centred)]
    return SubsetFamily(
        gram=(aligned @ aligned.T).double(), features=torch.stack([_standardise(values) for values in features], 1)
    )


def _leading_components(centred: Tensor) -> tuple[Tensor, Tensor]:
    """[samples] each: positions along the two leading principal directions, with a definite sign."""
    # The samples-by-samples product has the same leading directions as the wide matrix, and is small.
    vectors = torch.linalg.eigh((centred @ centred.T).double()).eigenvectors
    first, second = (
        vector * vector[vector.abs().argmax()].sign() for vector in (vectors[:, -1], vectors[:, -min(2, len(vectors))])
    )
    return first, second


def _standardise(values: Tensor) -> Tensor:
    centred = values.double() - values.double().mean()
    return centred / centred.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
