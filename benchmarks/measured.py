"""What benchmarks take from the folder of a run that was measured before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from adapruner import PruneConfig
from adapruner.graph import RunFolder
from adapruner.measurement import Statistics, StoredMoments


@dataclass(frozen=True)
class Measured:
    """The options and the measurements of a run.

    Attributes:
        windows: by use, [windows, tokens] each, int64.
        moments: empty if the run has none.
    """

    config: PruneConfig
    windows: dict[str, Tensor]
    statistics: Statistics
    moments: StoredMoments

    @classmethod
    def read(cls, run: Path) -> Measured:
        """Of a run for one ratio."""
        return cls(
            RunFolder(run).read_config(),
            load_file(run / "windows.safetensors"),
            Statistics.load(run / "statistics.safetensors"),
            StoredMoments(run / "moments"),
        )


def share(run: Path, source: Path) -> None:
    """Gives a run what another one with the same inputs has measured, unless it has begun."""
    folder, other = RunFolder(run), RunFolder(source)
    if not folder.config.is_file():
        # A folder with artifacts is taken for a run if it has a config.
        folder.save_config(other.read_config())
        for name in ("windows.safetensors", "self.safetensors", "moments", "statistics.safetensors"):
            if other.record(name) is not None:
                folder.take_over(name, other)
