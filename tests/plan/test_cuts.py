"""The cuts of a region: all that are best, none that are not, against every subset there is."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wrappers.plan import cuts as cuts_module
from wrappers.plan.cuts import (
    Cut,
    Group,
    RegionGraph,
    cut_of,
    neighbours,
    pareto_cuts,
    thin,
    with_offload,
)

Point = tuple[float, ...]


def all_points(graph: RegionGraph) -> list[tuple[int, float]]:
    """(Bytes, time) of every set of groups that could be kept, found without the module's help."""
    found = set()
    size = len(graph.groups)
    for choice in itertools.product((True, False), repeat=size):
        needed, recomputed = set(graph.needed), set()
        for i in reversed(range(size)):
            if i in needed and not choice[i]:
                recomputed.add(i)
                needed |= set(graph.groups[i].reads)
        kept = needed - recomputed
        is_allowed = (
            all(graph.groups[i].is_candidate or graph.groups[i].is_forced for i in kept)
            and not any(graph.groups[i].is_forced for i in recomputed)
            and not any(p & kept and p & recomputed for p in graph.partners)
        )
        if is_allowed:
            found.add(
                (
                    sum(graph.groups[i].num_bytes for i in kept),
                    sum(graph.groups[i].time_us for i in recomputed),
                )
            )
    return sorted(found)


def front_of(points: list[Point]) -> list[Point]:
    """The points that no other is as good as."""
    different = set(points)
    return sorted(
        p
        for p in different
        if not any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in different)
    )


def points_of(cuts: list[Cut] | tuple[Cut, ...]) -> list[Point]:
    return [(cut.num_bytes, cut.time_us) for cut in cuts]


@st.composite
def graphs(draw: st.DrawFn, max_groups: int = 7) -> RegionGraph:
    size = draw(st.integers(1, max_groups))
    groups = []
    for i in range(size):
        kind = draw(st.sampled_from(["candidate"] * 6 + ["forced", "transient"]))
        groups.append(
            Group(
                draw(st.integers(0, 12)),
                draw(st.integers(0, 9)),
                tuple(draw(st.sets(st.integers(0, i - 1), max_size=3))) if i else (),
                is_candidate=kind == "candidate",
                is_forced=kind == "forced",
            )
        )
    needed = draw(st.sets(st.integers(0, size - 1)))
    free = [i for i in range(size) if groups[i].is_candidate]
    first = draw(st.sets(st.sampled_from(free), max_size=3)) if free else set()
    rest = [i for i in free if i not in first]
    second = draw(st.sets(st.sampled_from(rest), max_size=2)) if rest else set()
    partners = tuple(frozenset(p) for p in (first, second) if len(p) > 1)
    return RegionGraph(tuple(groups), frozenset(needed), partners)


def random_graph(size: int, span: int, part_needed: float, seed: int) -> RegionGraph:
    """Groups that read up to four of those up to ``span`` before them."""
    rng = random.Random(seed)
    groups = []
    for i in range(size):
        near = range(max(0, i - span), i)
        reads = rng.sample(near, min(len(near), rng.randint(1, 4)))
        groups.append(Group(rng.randint(1 << 16, 1 << 24), rng.randint(1, 1000), tuple(reads)))
    needed = frozenset(i for i in range(size) if rng.random() < part_needed) | {size - 1}
    return RegionGraph(tuple(groups), needed)


# --- Against every subset


@settings(max_examples=150, deadline=None, derandomize=True)
@given(graphs())
def test_front_is_that_of_all_subsets(graph: RegionGraph) -> None:
    found = pareto_cuts(graph, resolution_bytes=1)
    assert found.is_exact
    assert points_of(found.cuts) == front_of(all_points(graph))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(graphs())
def test_front_is_the_same_where_labels_of_other_demands_are_compared(graph: RegionGraph) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts_module, "_MANY_LABELS", 0)
        found = pareto_cuts(graph, resolution_bytes=1)
    assert found.is_exact
    assert points_of(found.cuts) == front_of(all_points(graph))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(graphs(), st.integers(2, 60))
def test_each_subset_is_matched_within_the_resolution(graph: RegionGraph, resolution: int) -> None:
    found = points_of(pareto_cuts(graph, resolution_bytes=resolution).cuts)
    points = all_points(graph)
    for num_bytes, time_us in points:
        assert any(b < num_bytes + resolution and t <= time_us for b, t in found)
    assert found[0] == min(points), "the fewest bytes are exact at any resolution"
    assert found[-1][1] == min(t for _, t in points)
    assert found == front_of(found)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(graphs(), st.integers(1, 4))
def test_few_labels_give_real_cuts_with_both_ends(graph: RegionGraph, max_labels: int) -> None:
    found = pareto_cuts(graph, resolution_bytes=1, max_labels=max_labels)
    points = points_of(found.cuts)
    assert set(points) <= set(all_points(graph))
    assert points == front_of(points)
    assert points[-1][1] == min(t for _, t in all_points(graph))
    if found.is_exact:
        assert points == front_of(all_points(graph))


def test_dropped_labels_are_admitted() -> None:
    graph = random_graph(60, 15, 0.3, 1)
    exact = pareto_cuts(graph)
    found = pareto_cuts(graph, max_labels=500)
    assert exact.is_exact
    assert not found.is_exact
    # Good all the same: each exact cut is matched by one that is worse by a fiftieth of the range.
    (most, longest) = exact.cuts[-1].num_bytes, exact.cuts[0].time_us
    for num_bytes, time_us in points_of(exact.cuts):
        assert any(
            b <= num_bytes + most / 50 and t <= time_us + longest / 50
            for b, t in points_of(found.cuts)
        )


# --- By hand


def test_a_recompute_needs_its_whole_cone() -> None:
    """x -> a -> b -> c, backward needs a and c: what c costs depends on whether a is kept."""
    graph = RegionGraph(
        (Group(10, 5.0), Group(10, 7.0, (0,)), Group(10, 1.0, (1,))), frozenset({0, 2})
    )
    assert pareto_cuts(graph, resolution_bytes=1).cuts == (
        Cut(frozenset(), 0, 13.0, frozenset({0, 1, 2})),
        Cut(frozenset({2}), 10, 5.0, frozenset({0})),
        Cut(frozenset({0, 2}), 20, 0.0),
    )


def test_what_nothing_needs_is_neither_kept_nor_run() -> None:
    graph = RegionGraph((Group(10, 5.0), Group(1, 7.0, (0,)), Group(3, 1.0)), frozenset({1}))
    assert cut_of(graph, {0, 1, 2}) == Cut(frozenset({1}), 1, 0.0)
    assert pareto_cuts(RegionGraph(graph.groups, frozenset())).cuts == (Cut(frozenset(), 0, 0.0),)


def test_an_input_is_let_go_where_nothing_that_runs_again_reads_it() -> None:
    graph = RegionGraph(
        (Group(100, 0.0, is_forced=True), Group(40, 9.0, (0,))), needed=frozenset({1})
    )
    # To keep the output costs less than to keep the input for its recompute.
    assert points_of(pareto_cuts(graph, resolution_bytes=1).cuts) == [(40, 0.0)]
    cheaper = replace(graph, groups=(replace(graph.groups[0], num_bytes=30), graph.groups[1]))
    assert points_of(pareto_cuts(cheaper, resolution_bytes=1).cuts) == [(30, 9.0), (40, 0.0)]


def test_forced_groups_are_kept_whatever_is_asked_for() -> None:
    graph = RegionGraph((Group(8, 2.0), Group(4, 3.0, (0,), is_forced=True)), frozenset({1}))
    assert cut_of(graph, ()) == Cut(frozenset({1}), 4, 0.0)
    assert points_of(pareto_cuts(graph).cuts) == [(4, 0.0)]


def test_partners_are_kept_or_recomputed_together() -> None:
    groups = (Group(10, 1.0), Group(10, 20.0), Group(1, 3.0, (0,)))
    alone = RegionGraph(groups, frozenset({0, 1}))
    together = RegionGraph(groups, frozenset({0, 1}), (frozenset({0, 1}),))
    assert (10, 1.0) in points_of(pareto_cuts(alone, resolution_bytes=1).cuts)
    assert points_of(pareto_cuts(together, resolution_bytes=1).cuts) == [(0, 21.0), (20, 0.0)]
    assert cut_of(together, {1}).kept == {0, 1}
    # A partner that nothing needs has no say.
    unneeded = RegionGraph(groups, frozenset({0}), (frozenset({0, 1}),))
    assert points_of(pareto_cuts(unneeded, resolution_bytes=1).cuts) == [(0, 1.0), (10, 0.0)]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ({"is_forced": True}, [(20, 0.0)]),
        ({"is_candidate": False}, [(0, 21.0)]),
    ],
)
def test_one_partner_without_a_choice_decides_for_all(
    kinds: dict[str, bool], expected: list[Point]
) -> None:
    groups = (Group(10, 1.0, **kinds), Group(10, 20.0))
    graph = RegionGraph(groups, frozenset({0, 1}), (frozenset({0, 1}),))
    assert points_of(pareto_cuts(graph, resolution_bytes=1).cuts) == expected
    assert points_of([cut_of(graph, {}), cut_of(graph, {0, 1})]) == expected * 2


@pytest.mark.parametrize("is_candidate", [False, True])
def test_a_demand_that_cannot_be_kept_is_not_paid_in_bytes(
    monkeypatch: pytest.MonkeyPatch, is_candidate: bool
) -> None:
    """Nor one that could be if its partner were: then labels of more demands are not better."""
    monkeypatch.setattr(cuts_module, "_MANY_LABELS", 0)
    groups = (
        Group(0, 100.0, is_candidate=is_candidate),
        Group(10, 1.0, (0,)),
        Group(5, 50.0),
        Group(1000, 0.0),
    )
    partners = (frozenset({0, 3}),) if is_candidate else ()
    graph = RegionGraph(groups, frozenset({1, 2, 3}), partners)
    found = pareto_cuts(graph, resolution_bytes=1)
    assert points_of(found.cuts)[:4] == [(0, 151.0), (5, 101.0), (10, 50.0), (15, 0.0)]


def test_times_that_are_equal_but_for_rounding_are_equal() -> None:
    """1100 + 2200 is less than 1000 * 3 * 1.1 in its last bit: that is worth no byte."""
    groups = (Group(1, 1.1), Group(1, 2.2), Group(3, 3 * 1.1))
    cuts = pareto_cuts(RegionGraph(groups, frozenset(range(3))), resolution_bytes=1).cuts
    assert frozenset({0, 1}) in {cut.kept for cut in cuts}
    assert frozenset({2}) not in {cut.kept for cut in cuts}


@pytest.mark.parametrize(
    ("groups", "needed", "partners", "message"),
    [
        ((Group(1, 1.0, (0,)),), {0}, (), "group 0 reads"),
        ((Group(1, 1.0, (1,)), Group(1, 1.0)), {0}, (), "group 0 reads"),
        ((Group(1, 1.0),), {1}, (), "no group 1"),
        ((Group(1, 1.0),), {-1}, (), "no group -1"),
        ((Group(1, 1.0),) * 3, {0}, ({0, 1}, {1, 2}), "overlap"),
        (
            (Group(1, 1.0, is_forced=True), Group(1, 1.0, is_candidate=False)),
            {0},
            ({0, 1},),
            "never",
        ),
    ],
)
def test_impossible_graphs_are_refused(
    groups: tuple[Group, ...], needed: set[int], partners: tuple[set[int], ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RegionGraph(groups, frozenset(needed), tuple(map(frozenset, partners)))


# --- A transformer block, and large regions

UNIT = 1 << 20

#: Name, units of d, microseconds, what it reads; the block's input is the first.
BLOCK = [
    ("x", 1, 0, ()),
    ("norm_1", 1, 20, ("x",)),
    ("qkv", 3, 300, ("norm_1",)),
    ("attention", 1, 250, ("qkv",)),
    ("projection", 1, 100, ("attention",)),
    ("add_1", 1, 15, ("x", "projection")),
    ("norm_2", 1, 20, ("add_1",)),
    ("up", 4, 400, ("norm_2",)),
    ("gelu", 4, 80, ("up",)),
    ("down", 1, 400, ("gelu",)),
    ("dropout", 1, 30, ("down",)),
]
NAMES = [name for name, *_ in BLOCK]


def block() -> RegionGraph:
    groups = tuple(
        Group(
            units * UNIT,
            float(us),
            tuple(map(NAMES.index, reads)),
            is_forced=name == "x",
            offload_us=None if name == "x" else 5.0,
        )
        for name, units, us, reads in BLOCK
    )
    unneeded = {"projection", "down"}
    return RegionGraph(groups, frozenset(i for i, name in enumerate(NAMES) if name not in unneeded))


def names_of(positions: frozenset[int]) -> set[str]:
    return {NAMES[i] for i in positions}


def test_the_cuts_of_a_transformer_block() -> None:
    found = pareto_cuts(block())
    assert found.is_exact
    assert points_of(found.cuts) == front_of(all_points(block()))
    by_units = {cut.num_bytes // UNIT: cut for cut in found.cuts}
    assert names_of(by_units[1].kept) == {"x"}
    assert by_units[1].time_us == sum(us for *_, us, _ in BLOCK)
    # First of all norms and sums go, as they cost next to nothing; then gelu, for 80 us.
    assert names_of(by_units[13].recomputed) == {"norm_1", "norm_2", "gelu", "dropout", "down"} or (
        by_units[13].time_us <= 135
    )
    assert by_units[17].time_us == 0


def test_neighbours_of_a_block_differ_by_one_toggle() -> None:
    graph = block()
    cut = cut_of(graph, {NAMES.index("qkv"), NAMES.index("up")})
    found = neighbours(graph, cut)
    assert cut not in found
    kept = {frozenset(names_of(other.kept)) for other in found}
    more = set(NAMES) - {"x", "qkv", "up", "down"}  # down is read by dropout alone: see below
    assert {frozenset({"x", "qkv", "up", name}) for name in more} <= kept
    assert frozenset({"x", "up"}) in kept
    assert frozenset({"x", "qkv"}) in kept
    assert frozenset({"x", "qkv", "up", "down"}) in kept
    assert len(found) == len(more) + 3
    assert all(cut_of(graph, other.kept) == other for other in found)


def test_neighbours_toggle_partners_together() -> None:
    groups = tuple(Group(1, 1.0) for _ in range(4))
    graph = RegionGraph(groups, frozenset(range(4)), (frozenset({0, 1}),))
    found = neighbours(graph, cut_of(graph, {2}))
    assert {other.kept for other in found} == {frozenset({0, 1, 2}), frozenset(), frozenset({2, 3})}
    assert [o.kept for o in neighbours(graph, cut_of(graph, {0, 1, 2, 3}))] == [
        {2, 3},
        {0, 1, 3},
        {0, 1, 2},
    ]


@pytest.mark.parametrize("span", [5, 60])
def test_sixty_candidates_are_exact(span: int) -> None:
    for part_needed in (0.3, 0.9):
        graph = random_graph(60, span, part_needed, seed=1)
        found = pareto_cuts(graph)
        assert found.is_exact
        assert found.cuts[-1] == cut_of(graph, range(60))
        assert found == pareto_cuts(graph), "the same each time"


def test_more_than_sixty_candidates_are_cut_as_well() -> None:
    found = pareto_cuts(random_graph(150, 6, 0.6, seed=2), max_options=40)
    assert len(found.cuts) == 40
    assert found.is_exact


# --- Offloading


def test_offloading_moves_the_largest_first() -> None:
    graph = block()
    cut = cut_of(graph, {NAMES.index("qkv"), NAMES.index("up"), NAMES.index("attention")})
    found = with_offload(graph, [cut])
    assert [names_of(variant.offloaded) for variant in found] == [
        set(),
        {"up"},
        {"up", "qkv"},
        {"up", "qkv", "attention"},
    ]
    for variant in found:
        assert variant.kept | variant.offloaded == cut.kept
        assert not variant.kept & variant.offloaded
        assert variant.num_bytes + variant.offload_bytes == cut.num_bytes
        assert variant.time_us == cut.time_us + 5.0 * len(variant.offloaded)
        assert variant.recomputed == cut.recomputed


def test_offloaded_cuts_that_are_no_better_are_left_out() -> None:
    graph = block()
    cuts = pareto_cuts(graph).cuts
    found = with_offload(graph, cuts, max_options=1000)
    points = [(v.num_bytes, v.time_us, v.offload_bytes) for v in found]
    assert sorted(points) == front_of(points)
    assert points_of([v for v in found if not v.offloaded]) == points_of(cuts)
    assert len(with_offload(graph, cuts, max_options=20)) == 20


def test_small_and_immovable_outputs_stay() -> None:
    groups = (Group(100, 1.0), Group(1000, 1.0, offload_us=2.0), Group(10, 1.0, offload_us=2.0))
    graph = RegionGraph(groups, frozenset(range(3)))
    found = with_offload(graph, [cut_of(graph, range(3))], min_bytes=11)
    assert [variant.offloaded for variant in found] == [frozenset(), frozenset({1})]


# --- Thinning


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(*[st.integers(0, 30)] * 3), min_size=1, max_size=40), st.integers(3, 12))
def test_thinned_points_are_undominated_and_keep_the_extremes(
    points: list[Point], max_options: int
) -> None:
    chosen = thin(points, max_options)
    front = front_of(points)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(len(front), max_options)
    assert {points[i] for i in chosen} <= set(front)
    for criterion in range(3):
        assert min(points[i][criterion] for i in chosen) == min(p[criterion] for p in points)


def test_thinning_keeps_corners_and_fills_gaps() -> None:
    line = [(float(x), 100.0 - x) for x in range(101)]
    assert thin(line, 5) == [0, 25, 50, 75, 100]
    # A corner close to another point counts more than a point that is far from all.
    bent = [(0.0, 100.0), (10.0, 20.0), (11.0, 19.9), (50.0, 15.0), (100.0, 0.0)]
    assert thin(bent, 3) == [0, 1, 4]
    assert thin(bent, 4) == [0, 1, 3, 4]
    # The third criterion has its own extreme.
    assert thin([(0, 2, 9), (2, 0, 9), (1, 1, 8), (3, 3, 0)], 3) == [0, 1, 3]


def test_thinning_refuses_to_lose_an_extreme() -> None:
    assert thin([], 1) == []
    assert thin([(1, 2), (1, 2)], 2) == [0]
    with pytest.raises(ValueError, match="cannot choose 2 points"):
        thin([(1, 2, 3)], 2)


def test_a_thinned_front_keeps_its_ends() -> None:
    graph = random_graph(60, 6, 0.9, seed=0)
    full, few = pareto_cuts(graph), pareto_cuts(graph, max_options=12)
    assert len(few.cuts) == 12
    assert (few.cuts[0], few.cuts[-1]) == (full.cuts[0], full.cuts[-1])
    assert set(few.cuts) <= set(full.cuts)


def test_numbers_alone_are_needed() -> None:
    """The file says nothing about tensors, and needs no package of an extra."""
    code = (
        "import sys, importlib.util as u\n"
        "s = u.spec_from_file_location('cuts', sys.argv[1]); m = u.module_from_spec(s)\n"
        "sys.modules['cuts'] = m; s.loader.exec_module(m)\n"
        "m.pareto_cuts(m.RegionGraph((m.Group(1, 1.0),), frozenset({0})))\n"
        "assert not {'torch', 'numpy', 'scipy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, cuts_module.__file__], check=True, timeout=60)
