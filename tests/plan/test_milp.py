"""The reference itself, against all choices; and what it says when it has no time."""

from __future__ import annotations

import ctypes
import itertools
import math
import os

import numpy as np
import pytest

from scripts.bench.solver import budget_between, random_chain, realistic_chain
from wrappers.plan import milp
from wrappers.plan.chain import Chain, Item, evaluate
from wrappers.plan.milp import no_prices, relax, solve_milp, stages_of

# HiGHS 1.8 and later write a line to the standard output when they repair a solution.
pytestmark = pytest.mark.usefixtures("capfd")


def best_of(chain: Chain, budget: int) -> float:
    costs = (
        evaluate(chain, choice, budget)
        for choice in itertools.product(*(range(len(items)) for items in chain.items))
    )
    return min((c.extra_us for c in costs if c.peak_bytes <= budget), default=math.inf)


@pytest.mark.parametrize("has_offload", [False, True])
def test_finds_the_optimum(has_offload: bool) -> None:
    for seed in range(24):
        chain = random_chain(seed, max_regions=5, max_options=4, has_offload=has_offload)
        budget = budget_between(chain, (0.0, 0.3, 0.7)[seed % 3])
        found = solve_milp(chain, budget)
        assert found.is_proven
        assert found.extra_us == pytest.approx(best_of(chain, budget), rel=1e-6, abs=1e-6)
        assert found.choice is not None
        assert evaluate(chain, found.choice, budget).peak_bytes <= budget


def test_what_does_not_fit_is_proven() -> None:
    chain = random_chain(3, max_regions=5)
    found = solve_milp(chain, chain.smallest()[0] - 1)
    assert (found.choice, found.is_proven) == (None, True)


def test_out_of_time_is_not_called_an_optimum() -> None:
    chain = realistic_chain(0, 48, 30, is_identical=True)
    found = solve_milp(chain, budget_between(chain, 0.3), time_limit_s=0.3)
    assert not found.is_proven
    assert found.bound_us < found.extra_us


def test_out_of_nodes_is_not_called_an_optimum() -> None:
    chain = realistic_chain(0, 12, 12, has_offload=True)
    budget = budget_between(chain, 0.2)
    few, many = solve_milp(chain, budget, max_nodes=1), solve_milp(chain, budget)
    assert many.is_proven
    assert few.bound_us <= many.extra_us <= few.extra_us


def test_budget_is_kept_to_the_byte() -> None:
    """HiGHS's tolerance of 1e-6 is a thousand bytes here, and one byte decides."""
    unit = 10**9
    chain = Chain(
        ((Item(unit + 1, unit + 1, 0.0), Item(unit, unit, 1.0)),) * 3,
        (0,) * 4,
        (1.0,) * 3,
        (1.0,) * 3,
        9.0,
    )
    for spare in range(4):
        found = solve_milp(chain, 3 * unit + spare)
        if found.choice is not None:
            assert evaluate(chain, found.choice).peak_bytes <= 3 * unit + spare
        assert found.is_proven <= (found.extra_us == 3 - spare)
        assert found.bound_us <= 3 - spare + 1e-6


def test_stages_leave_out_what_cannot_be_in_an_optimum() -> None:
    items = (
        Item(5, 9, 1.0),
        Item(5, 9, 1.0),  # Equal to the first.
        Item(5, 9, 2.0),  # Slower.
        Item(6, 9, 1.0),  # Larger.
        Item(9, 9, 0.0),
        Item(0, 99, 0.0),  # Never fits.
        Item(0, 9, 0.0, 4),  # Cannot be offloaded.
        Item(0, 4, 3.0),
    )
    chain = Chain((items,), (2, 3), (1.0,), (1.0,), 3.0)
    region, end = stages_of(chain, 20)
    assert region.options.tolist() == [0, 4, 7]
    assert region.need.tolist() == [9, 9, 4]
    assert end.need.tolist() == [3]
    region, _ = stages_of(chain, 9)
    assert region.options.tolist() == [0, 7]  # 9 bytes kept do not leave the 3 of the end.


def test_prices_are_of_bytes_that_bind() -> None:
    chain = Chain(
        ((Item(10, 10, 0.0), Item(0, 0, 40.0)),) * 2, (0, 0, 0), (1.0,) * 2, (1.0,) * 2, 100.0
    )
    prices = relax(stages_of(chain, 15), chain, 15)
    assert prices is not None
    # Of 20 bytes 5 must go, at 4 microseconds each; which moments bind is left to HiGHS.
    assert prices.out.sum() == pytest.approx(4.0)
    assert not prices.back.any()
    assert not no_prices(3).out.any()
    assert np.all(prices.out >= 0)


def test_nothing_reaches_the_standard_output_while_highs_runs(capfd):
    library = ctypes.CDLL(None)
    with milp._standard_output_shut():
        library.puts(b"a line of HiGHS")
        os.write(1, b"another one\n")
    print("ours")
    library.fflush(None)
    assert capfd.readouterr().out == "ours\n"
