"""How far the estimates of code are from what HumanEval measured, and how often their intervals hold it.

`python research/residuals.py` fits the constants of `evaluation/abilities.py` to the rows of `results/truth.json` with
HumanEval, then leaves out each row and each model. The model of a row: the true share of the problems that are left is
`(1 - spelt) exp(-c rise + e)`, at most 1, where `e` has the standard deviation
`hypot(c error, spread rise, floor)`; a rise below zero counts as none. The measured count scatters around the share.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binom

# The problems that are asked, and the fraction of those that the original does not solve and an unharmed model does.
ASKED, GAINED = 41, 0.05
# Uniform priors of c, its spread, and the floor.
PER_NAT, SPREAD, FLOOR = np.meshgrid(
    np.linspace(1, 10, 46), np.linspace(0, 3, 16), np.linspace(0.0, 0.3, 16), indexing="ij"
)
# Standard normal numbers of equal weight, and the shares at which likelihoods are tabulated.
_NORMAL = np.polynomial.hermite_e.hermegauss(31)
_SHARES = np.linspace(0, 1, 201)


class Row(NamedTuple):
    """A measured model.

    Attributes:
        rise: of the loss on code, in nats per token; error: its standard error.
        spelt: the share of tokens that were removed.
        solved: problems that the model solves; of: that its original solves.
    """

    model: str
    rise: float
    error: float
    spelt: float
    solved: int
    of: int

    @property
    def measured(self) -> float:
        return min(1.0, self.solved / self.of)


class Fit(NamedTuple):
    per_nat: float
    spread: float
    floor: float

    def interval(self, row: Row) -> tuple[float, float]:
        """Two standard errors below and above the estimate."""
        lost = max(row.rise, 0.0)
        error = 2 * np.sqrt((self.per_nat * row.error) ** 2 + (self.spread * lost) ** 2 + self.floor**2)
        left = (1 - row.spelt) * np.exp(-self.per_nat * lost)
        return float(left * np.exp(-error)), float(min(1.0, left * np.exp(error)))

    def holds(self, row: Row) -> bool:
        least, most = self.interval(row)
        return least <= row.measured <= most


def rows_of(file: Path) -> list[Row]:
    """The rows of `truth.json` with HumanEval."""
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["tables"]["models"]["rows"]
    names = Row._fields
    return [Row(*(row[name] for name in names)) for row in rows if "solved" in row]


def chances(share: Any, of: int) -> tuple[Any, Any]:
    """The probabilities to solve a problem that the original solves, and one that it does not, of a model with a share
    of its problems left."""
    gained = GAINED * share
    return np.clip((share * of - gained * (ASKED - of)) / of, 0, 1), gained


def likelihood(row: Row) -> Any:
    """The logarithm of the likelihood of a measured count, over the grid of the priors."""
    kept, gained = chances(_SHARES, row.of)
    counts = range(min(row.solved, row.of) + 1)
    by_share = sum(
        binom.pmf(count, row.of, kept) * binom.pmf(row.solved - count, ASKED - row.of, gained) for count in counts
    )
    lost, total = max(row.rise, 0.0), np.zeros_like(PER_NAT)
    deviation = np.sqrt((PER_NAT * row.error) ** 2 + (SPREAD * lost) ** 2 + FLOOR**2)
    for place, weight in zip(*_NORMAL, strict=True):
        shares = np.minimum(1, (1 - row.spelt) * np.exp(-PER_NAT * lost + place * deviation))
        total += weight * np.interp(shares, _SHARES, by_share)
    return np.log(np.maximum(total, 1e-300))


def fitted(likelihoods: list[Any]) -> Fit:
    """The means of the posterior."""
    total = sum(likelihoods)
    posterior = np.exp(total - total.max())
    return Fit(*(float((posterior * values).sum() / posterior.sum()) for values in (PER_NAT, SPREAD, FLOOR)))


def drawn(fit: Fit, row: Row, order: np.random.Generator) -> tuple[float, Row]:
    """A true share, and a row with a count measured of it."""
    lost = max(row.rise, 0.0)
    deviation = np.sqrt((fit.per_nat * row.error) ** 2 + (fit.spread * lost) ** 2 + fit.floor**2)
    share = min(1.0, (1 - row.spelt) * np.exp(-fit.per_nat * lost + deviation * order.normal()))
    kept, gained = chances(share, row.of)
    return share, row._replace(solved=int(order.binomial(row.of, kept) + order.binomial(ASKED - row.of, gained)))


def main() -> None:
    rows = rows_of(Path(__file__).parent / "results" / "truth.json")
    likelihoods = [likelihood(row) for row in rows]
    fit = fitted(likelihoods)
    print(f"all {len(rows)} rows: {fit}, {sum(map(fit.holds, rows))} held")
    held = [fitted([*likelihoods[:number], *likelihoods[number + 1 :]]).holds(row) for number, row in enumerate(rows)]
    print(f"each row left out: {sum(held)} of {len(rows)} held")
    for model in dict.fromkeys(row.model for row in rows):
        without = fitted([of for of, row in zip(likelihoods, rows, strict=True) if row.model != model])
        own = [row for row in rows if row.model == model]
        print(f"{model} left out: {without}, {sum(map(without.holds, own))} of {len(own)} held")
    order = np.random.default_rng(0)
    for name, truth, printed in (("fit", fit, fit), ("without residual", Fit(5.5, 0, 0), fit)):
        shares, counts = [], []
        for row in rows * 1000:
            share, measured = drawn(truth, row, order)
            least, most = printed.interval(row)
            shares.append(least <= share <= most)
            counts.append(printed.holds(measured))
        print(f"drawn, {name}: true shares {np.mean(shares):.3f}, measured ones {np.mean(counts):.3f} held")


if __name__ == "__main__":
    main()
