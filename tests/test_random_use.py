"""Random sequences of commands; `benchmarks/random_use.py` runs hundreds."""

from __future__ import annotations

import pytest

import random_use


@pytest.mark.timeout(900)
def test_every_command_leaves_what_it_must() -> None:
    done = random_use.use(sequences=20, seed=1, steps=4, variants=("a tenth", "a fifth", "recovered"))
    assert done["sequences"] >= 20
    assert {"pruned", "refused", "damaged"} <= done.keys()
