"""The memory of every moment by sums, the smallest budget, and the copies of [Note: Copies]."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from scripts.bench.solver import random_chain
from wrappers.plan import chain as chains
from wrappers.plan.chain import Chain, Item, evaluate

TINY = range(30)


def choices(chain: Chain) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*(range(len(items)) for items in chain.items))


def tiny(seed: int, *, has_offload: bool = False) -> Chain:
    return random_chain(seed, max_regions=5, max_options=4, has_offload=has_offload)


def chain_of(*items: Item, base: int = 0, us: float = 10.0, bandwidth: float = 1.0) -> Chain:
    """One option a region."""
    num = len(items)
    regions = tuple((item,) for item in items)
    times = (us,) * num
    return Chain(regions, (base,) * (num + 1), times, times, 30.0, bandwidth, bandwidth)


def test_peak_is_the_largest_of_all_moments() -> None:
    chain = Chain(((Item(3, 10, 0.0),), (Item(4, 8, 0.0),)), (2, 6, 5), (1.0, 1.0), (1.0, 1.0), 6.0)
    assert chain.needs([0, 0]) == [10, 3 + 8, 3 + 4 + 5]
    assert chain.peak_bytes([0, 0]) == 12
    assert evaluate(chain, [0, 0]) == (12, 0.0, 0.0, ())


def test_moment_between_regions_counts() -> None:
    chain = Chain(((Item(3, 1, 0.0),), (Item(0, 1, 0.0),)), (0, 50, 0), (1.0,) * 2, (1.0,) * 2, 6.0)
    assert chain.peak_bytes([0, 0]) == 53


@pytest.mark.parametrize("has_offload", [False, True])
def test_smallest_budget_is_that_of_the_best_choice(has_offload: bool) -> None:
    for seed in TINY:
        chain = tiny(seed, has_offload=has_offload)
        smallest, choice = chain.smallest()
        assert smallest == min(chain.peak_bytes(c) for c in choices(chain))
        assert chain.peak_bytes(choice) == smallest
        assert evaluate(chain, choice, smallest).peak_bytes == smallest


def test_smallest_budget_leaves_out_what_cannot_be_offloaded() -> None:
    chain = Chain(((Item(9, 9, 0.0), Item(0, 9, 1.0, 9)),), (0, 3), (1.0,), (1.0,), 3.0)
    assert chain.smallest() == (12, [0])
    able = dataclasses.replace(chain, d2h_bytes_per_us=1.0, h2d_bytes_per_us=1.0)
    assert able.smallest() == (9, [1])


def test_chain_without_regions() -> None:
    chain = Chain((), (7,), (), (), 1.0)
    assert chain.smallest() == (7, [])
    assert evaluate(chain, []) == (7, 0.0, 0.0, ())


def test_large_sizes_are_exact() -> None:
    huge = 2**45
    chain = chain_of(*[Item(huge + 1, huge + 3, 0.0)] * 100, base=5)
    assert chain.smallest()[0] == 100 * (huge + 1) + 5


# --- Copies


def test_copy_stays_until_it_is_through() -> None:
    # 25 bytes leave behind the forwards of regions 1 and 2, 10 each; 5 are left at the end.
    moving = Item(0, 40, 0.0, 25)
    rest = Item(0, 40, 0.0)
    cost = evaluate(chain_of(moving, rest, rest, base=40), [0, 0, 0])
    assert cost.copy_bytes == (0, 25, 15, 5)
    assert cost.peak_bytes == 40 + 25
    assert cost.extra_us == cost.stall_us == 0


def test_wait_makes_room_in_both_directions() -> None:
    moving, rest = Item(0, 40, 2.0, 25), Item(0, 40, 0.0)
    cost = evaluate(chain_of(moving, rest, rest, base=40), [0, 0, 0], 40 + 12)
    # Before region 1, 25 - 12 bytes too many, once on their way out and once back; then 2 are left.
    assert cost.copy_bytes == (0, 12, 2, 0)
    assert cost.peak_bytes == 40 + 12
    assert cost.stall_us == 13 + 13
    assert cost.extra_us == 2 + 26


def test_recompute_gives_copies_back_more_time() -> None:
    moving, slow = Item(0, 40, 0.0, 25), Item(0, 40, 15.0)
    chain = dataclasses.replace(
        chain_of(moving, slow, Item(0, 40, 0.0), base=0), d2h_bytes_per_us=100.0
    )
    # Out: 25 at once. Back: 10 + 15 bytes in the backward of the slow region.
    assert evaluate(chain, [0, 0, 0]).copy_bytes == (0, 25, 0, 0)
    fast = dataclasses.replace(chain, items=(chain.items[0], chain.items[2], chain.items[2]))
    assert evaluate(fast, [0, 0, 0]).copy_bytes == (0, 25, 15, 5)


def test_peak_shows_a_choice_that_no_wait_makes_fit() -> None:
    cost = evaluate(chain_of(Item(0, 40, 0.0, 25), base=40), [0], 39)
    assert cost.peak_bytes == 40 > 39


def test_waits_are_the_shortest_possible() -> None:
    """Against any other division of waits over the moments, which never is shorter."""
    rng = random.Random(0)
    num_waiting = 0
    for seed in range(200):
        chain = tiny(seed, has_offload=True)
        choice = [rng.randrange(len(items)) for items in chain.items]
        budget = chain.peak_bytes(choice) + rng.randrange(200)
        cost = evaluate(chain, choice, budget)
        assert cost.peak_bytes <= budget
        num_waiting += cost.stall_us > 0
        for _ in range(20):
            waits = [rng.choice([0.0, rng.uniform(0, 40)]) for _ in range(len(chain.items) + 1)]
            assert _stall_with(chain, choice, budget, waits) >= cost.stall_us - 1e-6
    assert num_waiting > 20


def _stall_with(chain: Chain, choice: list[int], budget: int, waits: list[float]) -> float:
    """The waits for copies to the host and back if each moment waits at least so long."""
    total = 0.0
    needs = chain.needs(choice)
    for bandwidth, times in (
        (chain.d2h_bytes_per_us, chain.forward_us),
        (
            chain.h2d_bytes_per_us,
            [
                us + i[o].extra_us
                for us, i, o in zip(chain.backward_us, chain.items, choice, strict=True)
            ],
        ),
    ):
        moving = 0.0
        for k, need in enumerate(needs):
            wait = max(waits[k], (moving - (budget - need)) / bandwidth)
            total += wait
            moving = max(moving - wait * bandwidth, 0.0)
            if k < len(choice):
                moved = chain.items[k][choice[k]].offload_bytes
                moving = max(moving - times[k] * bandwidth, 0.0) + moved
    return total


def test_offloading_without_a_bandwidth_is_refused() -> None:
    with pytest.raises(ValueError, match="option 0 of region 1 offloads 4 bytes"):
        evaluate(chain_of(Item(1, 1, 0.0), Item(1, 1, 0.0, 4), bandwidth=0.0), [0, 0])


def test_more_budget_never_waits_longer() -> None:
    for seed in TINY:
        chain = tiny(seed, has_offload=True)
        choice = chain.smallest()[1]
        peak = chains.evaluate(chain, choice).peak_bytes
        stalls = [
            evaluate(chain, choice, budget).stall_us
            for budget in range(chain.peak_bytes(choice), peak + 2, max(peak // 50, 1))
        ]
        assert stalls == sorted(stalls, reverse=True)
        assert evaluate(chain, choice, peak).stall_us == 0
