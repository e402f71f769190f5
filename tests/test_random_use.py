"""Random sequences of commands, and runs with odd numbers; `benchmarks/random_use.py` and `odd_numbers.py` try more."""

from __future__ import annotations

import pytest

import odd_numbers
import random_use


@pytest.mark.timeout(900)
def test_every_command_leaves_what_it_must() -> None:
    done = random_use.use(sequences=20, seed=1, steps=4, variants=("a tenth", "both", "recovered"))
    assert done["sequences"] == 20
    assert {"pruned", "refused", "damaged"} <= done.keys()


def test_odd_numbers_give_a_right_result_or_one_line() -> None:
    tried = list(odd_numbers.try_numbers(runs=10, seed=1))
    assert [outcome for outcome, is_right in tried if not is_right] == []
    assert len({outcome for outcome, _ in tried}) > 3
