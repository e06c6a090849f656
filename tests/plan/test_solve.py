"""The solver against all choices, against HiGHS, and against its own certificate."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.bench.solver import budget_between, random_chain, realistic_chain
from wrappers.plan import milp
from wrappers.plan.chain import Chain, Cost, Item, evaluate
from wrappers.plan.milp import Prices, solve_milp, stages_of
from wrappers.plan.solve import DoesNotFitError, Solution, frontier, solve

solver = importlib.import_module("wrappers.plan.solve")

# HiGHS 1.8 and later write a line to the standard output when they repair a solution.
pytestmark = pytest.mark.usefixtures("capfd")

OFFLOAD = pytest.mark.parametrize("has_offload", [False, True], ids=["kept", "offload"])


def costs_of(chain: Chain, budget: int) -> Iterator[Cost]:
    for choice in itertools.product(*(range(len(items)) for items in chain.items)):
        cost = evaluate(chain, choice, budget)
        if cost.peak_bytes <= budget:
            yield cost


def best_of(chain: Chain, budget: int) -> float:
    return min(cost.extra_us for cost in costs_of(chain, budget))


def check(chain: Chain, budget: int, solution: Solution) -> None:
    """What holds of every solution."""
    cost = evaluate(chain, solution.choice, budget)
    assert cost[:3] == (solution.peak_bytes, solution.extra_us, solution.stall_us)
    assert solution.peak_bytes <= budget
    assert solution.bound_us <= solution.extra_us
    assert solution.gap_us == solution.extra_us - solution.bound_us


# --- Against the optimum


@OFFLOAD
def test_finds_the_optimum_of_tiny_chains(has_offload: bool) -> None:
    for seed in range(100):
        chain = random_chain(seed, max_regions=5, max_options=4, has_offload=has_offload)
        budget = budget_between(chain, (0.0, 0.2, 0.5, 0.8, 1.0)[seed % 5])
        solution = solve(chain, budget)
        check(chain, budget, solution)
        assert solution.extra_us == pytest.approx(best_of(chain, budget), abs=1e-6)
        assert solution.is_optimal


@st.composite
def small_chains(draw: st.DrawFn) -> Chain:
    """Small numbers, so that many things are equal, zero or just fit."""
    sizes = st.integers(0, 6)
    items = st.builds(Item, sizes, sizes, sizes.map(float), st.sampled_from([0, 0, 0, 2, 5]))
    num = draw(st.integers(0, 4))
    plain = st.builds(Item, sizes, sizes, st.just(0.0))
    regions = [(draw(plain), *draw(st.lists(items, max_size=3))) for _ in range(num)]
    bandwidth = draw(st.sampled_from([0.0, 1.0]))
    times = tuple(float(draw(sizes)) for _ in range(num))
    bases = tuple(draw(sizes) for _ in range(num + 1))
    back = bandwidth * draw(st.sampled_from([0.25, 2.0]))
    return Chain(tuple(regions), bases, times, times, 10.0, bandwidth, back)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(small_chains(), st.integers(0, 8))
def test_finds_the_optimum_of_small_numbers(chain: Chain, spare: int) -> None:
    if not chain.can_offload:
        kept = (tuple(i for i in items if not i.offload_bytes) for items in chain.items)
        chain = dataclasses.replace(chain, items=tuple(kept))
    budget = chain.smallest()[0] + spare
    solution = solve(chain, budget)
    check(chain, budget, solution)
    assert solution.extra_us == pytest.approx(best_of(chain, budget), abs=1e-6)
    assert solution.is_optimal


@OFFLOAD
def test_is_as_good_as_a_proven_optimum(has_offload: bool) -> None:
    for seed in range(16):
        chain = random_chain(seed, max_regions=12, max_options=10, has_offload=has_offload)
        budget = budget_between(chain, (0.0, 0.2, 0.5, 0.8)[seed // 4 % 4])
        solution, reference = solve(chain, budget), solve_milp(chain, budget)
        check(chain, budget, solution)
        assert reference.is_proven
        assert solution.extra_us == pytest.approx(reference.extra_us, abs=1e-6 * chain.step_us)
        assert solution.is_optimal


@OFFLOAD
@pytest.mark.parametrize("is_identical", [True, False], ids=["identical", "different"])
def test_gap_of_many_regions_is_small(is_identical: bool, has_offload: bool) -> None:
    chain = realistic_chain(1, 192, 40, is_identical=is_identical, has_offload=has_offload)
    budget = budget_between(chain, 0.3)
    solution = solve(chain, budget)
    check(chain, budget, solution)
    assert solution.extra_us > 0
    assert solution.gap_us <= (5e-3 if has_offload else 1e-3) * chain.step_us


def test_symmetry_is_merged() -> None:
    """Identical regions take no more labels than there are sums, in orders of magnitude."""
    chain = realistic_chain(2, 64, 12, is_identical=True)
    solution = solve(chain, budget_between(chain, 0.4))
    assert solution.is_optimal
    assert solution.num_labels < 2_000_000


# --- The certificate


def states_of(chain: Chain, choice: tuple[int, ...], budget: int) -> Iterator[tuple[float, ...]]:
    """Before each region: bytes kept, on their way out, back early, and the time so far."""
    kept, out, back, spent = 0, 0.0, 0.0, 0.0
    for k, need in enumerate(chain.needs(choice)[:-1]):
        yield kept, out, back, spent
        item, room = chain.items[k][choice[k]], budget - need
        spent += item.extra_us
        if chain.can_offload:
            spent += max(out - room, 0) / chain.d2h_bytes_per_us
            spent += max(back - room, 0) / chain.h2d_bytes_per_us
        copied = chain.h2d_bytes_per_us * (chain.backward_us[k] + item.extra_us)
        out = max(min(out, room) - chain.d2h_bytes_per_us * chain.forward_us[k], 0)
        back = max(min(back, room) - copied, 0)
        kept, out, back = (
            kept + item.kept_bytes,
            out + item.offload_bytes,
            back + item.offload_bytes,
        )


@OFFLOAD
def test_any_prices_give_a_bound(has_offload: bool) -> None:
    """For what follows any state of any choice: the certificate does not trust HiGHS."""
    rng = np.random.default_rng(0)
    for seed in range(60):
        chain = random_chain(seed, max_regions=4, max_options=4, has_offload=has_offload)
        budget = budget_between(chain, 0.4)
        stages = stages_of(chain, budget)
        num = len(stages)
        largest = max(i.need_bytes for items in chain.items for i in items)
        scale = chain.step_us / max(largest, 1) * 10.0 ** rng.uniform(-2, 1)
        out, back, out_moved, back_moved = scale * rng.random((4, num)) * rng.integers(0, 2, num)
        if seed % 2:
            out_moved = back_moved = np.full(num, np.inf)
        if not has_offload:
            back = out_moved = back_moved = np.zeros(num)
        shares = rng.choice([rng.random((2, num - 1)), np.ones((2, num - 1))])
        prices = Prices(out, back, out_moved, back_moved, *shares, np.zeros((num, 3)))
        bound = solver._bound_of(stages, chain, budget, prices)
        for choice in itertools.product(*(stage.options.tolist() for stage in stages[:-1])):
            cost = evaluate(chain, choice, budget)
            if cost.peak_bytes <= budget:
                for k, (*state, spent) in enumerate(states_of(chain, choice, budget)):
                    assert spent + bound.of(k, *state) <= cost.extra_us + 1e-6 * chain.step_us


@pytest.mark.parametrize(("room", "price", "wait_us"), [(40, 1.0, 0.0), (10, 5.0, 30.0)])
@pytest.mark.parametrize("direction", ["out", "back"])
def test_bound_knows_waits_and_recomputes(
    direction: str, room: int, price: float, wait_us: float
) -> None:
    """100 bytes move, 60 are through in time; a wait takes the rest at 1 microsecond a byte."""
    is_out = direction == "out"
    slow = Item(0, 0, 0.0 if is_out else 50.0)
    chain = Chain(
        ((Item(0, 0, 0.0, 100),), (slow,), (Item(0, 100, 0.0),)),
        (0,) * 4,
        (0.0, 60.0 if is_out else 0.0, 1000.0),
        (0.0, 10.0, 1000.0),
        100.0,
        1.0 if is_out else 1e6,
        1e6 if is_out else 1.0,
    )
    budget = 100 + room
    row = np.array([0.0, 0.0, price, 0.0])
    none, large = np.zeros(4), np.full(4, np.inf)
    rows = (row, none) if is_out else (none, row)
    prices = Prices(*rows, large, large, np.ones(3), np.ones(3), np.zeros((4, 3)))
    bound = solver._bound_of(stages_of(chain, budget), chain, budget, prices)
    state = (0, 100.0, 0.0) if is_out else (0, 0.0, 100.0)
    exact_us = evaluate(chain, [0, 0, 0], budget).extra_us
    assert exact_us == pytest.approx(wait_us + slow.extra_us, abs=1e-3)
    assert bound.of(1, *state) <= exact_us + 1e-6


def test_only_dominated_labels_are_dropped() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 6, (300, 4))
    kept, spent, out, back = values.T
    rows = np.arange(len(values))
    labels = solver._Labels(kept, spent, out, back, spent + kept, rows, rows)
    left = solver._pareto(labels).parent
    assert len(left) < len(values)
    for row in set(rows.tolist()) - set(left.tolist()):
        assert (values[left] <= values[row]).all(1).any()


@OFFLOAD
@pytest.mark.parametrize("width", [1, 2, 5])
def test_narrow_passes_do_not_claim_too_much(
    width: int, has_offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver, "WIDTHS", (width,))
    monkeypatch.setattr(solver, "_MAX_NODES", 0)
    monkeypatch.setattr(solver, "MAX_EXACT_REGIONS", 0)
    num_open = 0
    for seed in range(60):
        chain = random_chain(seed, max_regions=5, max_options=4, has_offload=has_offload)
        budget = budget_between(chain, 0.4)
        solution = solve(chain, budget)
        check(chain, budget, solution)
        assert solution.bound_us <= best_of(chain, budget) + 1e-6
        num_open += not solution.is_optimal
    assert num_open or width > 2


def test_without_a_linear_program_it_is_still_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "relax", lambda *_: None)
    for seed in range(40):
        chain = random_chain(seed, max_regions=5, max_options=4)
        budget = budget_between(chain, 0.4)
        assert solve(chain, budget).extra_us == pytest.approx(best_of(chain, budget), abs=1e-6)


def test_out_of_time_has_a_gap_and_fits() -> None:
    chain = realistic_chain(3, 40, 20)
    budget = budget_between(chain, 0.3)
    hasty, solution = solve(chain, budget, time_limit_s=0.0), solve(chain, budget)
    check(chain, budget, hasty)
    assert hasty.bound_us <= solution.extra_us < hasty.extra_us


# --- Borders


@OFFLOAD
def test_smallest_budget_is_solved_and_one_byte_less_refused(has_offload: bool) -> None:
    for seed in range(40):
        chain = random_chain(seed, max_regions=8, has_offload=has_offload)
        smallest = chain.smallest()[0]
        assert solve(chain, smallest).peak_bytes <= smallest
        with pytest.raises(DoesNotFitError) as caught:
            solve(chain, smallest - 1)
        error = caught.value
        assert (error.budget_bytes, error.smallest_bytes) == (smallest - 1, smallest)
        assert chain.needs(error.choice)[error.index] == smallest
        assert str(smallest) in str(error)


def test_what_dominates_is_named() -> None:
    chain = Chain(
        ((Item(2, 3, 0.0),), (Item(2, 90, 0.0),), (Item(2, 3, 0.0),)),
        (1, 1, 1, 1),
        (1.0,) * 3,
        (1.0,) * 3,
        9.0,
    )
    with pytest.raises(DoesNotFitError) as caught:
        solve(chain, 5)
    assert (caught.value.index, caught.value.smallest_bytes) == (1, 92)


def test_budget_above_the_plain_peak_is_the_plain_choice() -> None:
    for seed in range(3, 40, 4):  # Realistic menus, whose plain option comes first.
        chain = random_chain(seed)
        plain = [0] * len(chain.items)
        solution = solve(chain, chain.peak_bytes(plain))
        assert solution.choice == tuple(plain)
        assert (solution.extra_us, solution.gap_us, solution.num_labels) == (0.0, 0.0, 0)
        if chain.smallest()[0] < solution.peak_bytes:
            assert solve(chain, solution.peak_bytes - 1).extra_us > 0


def test_offloading_for_nothing_is_not_chosen() -> None:
    """Of options that add nothing, the one that moves nothing."""
    chain = Chain(((Item(2, 9, 0.0, 5), Item(7, 9, 0.0)),), (0, 0), (9.0,), (9.0,), 9.0, 1.0, 1.0)
    assert solve(chain, 100).choice == (1,)


def test_chain_without_regions() -> None:
    chain = Chain((), (7,), (), (), 1.0)
    assert solve(chain, 7).choice == ()
    with pytest.raises(DoesNotFitError):
        solve(chain, 6)


def test_one_option_a_region() -> None:
    chain = Chain(((Item(5, 9, 3.0),),) * 4, (1,) * 5, (1.0,) * 4, (1.0,) * 4, 12.0)
    solution = solve(chain, 5 * 3 + 9)
    assert (solution.choice, solution.extra_us, solution.gap_us) == ((0,) * 4, 12.0, 0.0)


def test_equal_options_and_no_time() -> None:
    item = Item(5, 9, 0.0)
    chain = Chain(((item, item, Item(0, 4, 0.0)),) * 6, (0,) * 7, (0.0,) * 6, (0.0,) * 6, 0.0)
    solution = solve(chain, 9)
    assert (solution.extra_us, solution.gap_us) == (0.0, 0.0)
    assert solution.peak_bytes <= 9


def test_sizes_of_petabytes_are_exact() -> None:
    unit = 2**45
    region = (Item(unit + 1, unit + 1, 0.0), Item(unit, unit, 1.0))
    chain = Chain((region,) * 64, (0,) * 65, (1.0,) * 64, (1.0,) * 64, 192.0)
    for spare in (0, 1, 31, 63):
        solution = solve(chain, 64 * unit + spare)
        assert solution.extra_us == 64 - spare
        assert solution.peak_bytes == 64 * unit + spare
        assert solution.gap_us <= 1e-3 * chain.step_us


# --- The rest


@OFFLOAD
def test_same_chain_same_solution(has_offload: bool) -> None:
    chain = realistic_chain(4, 24, 12, is_identical=True, has_offload=has_offload)
    budget = budget_between(chain, 0.3)
    first = solve(chain, budget)
    assert all(solve(chain, budget) == first for _ in range(3))


def test_progress_rises_to_one() -> None:
    chain = realistic_chain(5, 20, 12)
    seen: list[float] = []
    solve(chain, budget_between(chain, 0.3), progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert all(0 <= fraction <= 1 for fraction in seen)


@OFFLOAD
def test_frontier_falls_from_the_smallest_peak_to_the_plain_one(has_offload: bool) -> None:
    chain = realistic_chain(6, 12, 10, has_offload=has_offload)
    seen: list[float] = []
    points = frontier(chain, 8, progress=seen.append)
    peaks = [point.peak_bytes for point in points]
    times = [point.extra_us for point in points]
    assert peaks == sorted(set(peaks))
    assert times == sorted(set(times), reverse=True)
    assert peaks[0] == chain.smallest()[0]
    assert times[-1] == 0
    assert len(points) > 4
    assert seen[-1] == 1.0
    for point in points:
        optimum = solve(chain, point.peak_bytes).extra_us
        assert optimum - 1e-6 <= point.extra_us <= optimum + 0.02 * chain.step_us
    with pytest.raises(ValueError, match="at least 2"):
        frontier(chain, 1)


def test_missing_scipy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = realistic_chain(7, 4, 5)
    budget = budget_between(chain, 0.5)
    for name in ("scipy", "scipy.optimize"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"activation-wrappers\[plan\]"):
        solve(chain, budget)


def test_infinite_gap_never_leaves_the_solver() -> None:
    """A first pass that loses every label still ends in a choice that fits."""
    chain = realistic_chain(8, 30, 15, has_offload=True)
    smallest = chain.smallest()[0]
    solution = solve(chain, smallest, max_work=0)
    check(chain, smallest, solution)
    assert math.isfinite(solution.gap_us)
    assert milp.stages_of(chain, smallest)
