"""Tables of profiles and plans: what they say, with rich and without it."""

from __future__ import annotations

import builtins
import io
import sys

import pytest

from tests.plan import synthetic
from tests.plan.synthetic import KIB, NOTHING, OFFLOAD, PLAIN, PRODUCT
from wrappers.plan.build import build_plan
from wrappers.plan.parts import Measured, Phase, Point
from wrappers.plan.records import Moment
from wrappers.plan.show import (
    Table,
    comparison_report,
    duration,
    names_of,
    planned_holdings,
    report,
    size,
    why,
)


def lines_with(text, *words):
    return [line for line in str(text).splitlines() if all(word in line for word in words)]


# --- Words and numbers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (5 * 1024**3, "5.0 GiB"),
        (3 * 1024**4, "3072.0 GiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_sizes(num_bytes, text):
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("time_us", "text"),
    [(0.0, "0.0 us"), (12.34, "12.3 us"), (4321.0, "4.3 ms"), (2.5e6, "2.50 s"), (-7.0, "-7.0 us")],
)
def test_durations(time_us, text):
    assert duration(time_us) == text


def test_names_of_neighbours():
    assert names_of(["blocks.3"]) == "blocks.3"
    assert names_of(["blocks.0", "blocks.1", "blocks.2"]) == "blocks.0..blocks.2 x3"


def test_a_table_is_text():
    table = Table("title", ("name", "n>"), [("a", "10"), ("long", "9")], ["a note"])
    assert str(table) == "title\n  name   n\n  a     10\n  long   9\n  a note"
    assert str(Table("title", ("", ">"), [("a", "1")])) == "title\n  a  1"
    assert str(Table("title", ("name",))) == "title"


# --- A profile ------------------------------------------------------------------------------


def test_a_profile_groups_regions_by_structure():
    profile = synthetic.profile(12)
    odd = synthetic.structure("s1", "Head")
    regions = (*profile.regions[:-1], profile.regions[-1].__class__("head", "s1", 0, 0))
    structures = {**profile.structures, "s1": odd}
    text = str(report(synthetic.profile(12, regions=regions, structures=structures)))
    (row,) = lines_with(text, "blocks.0..blocks.10 x11", "110.0 us")
    # Forward, backward, kept in the plain model, options, the least kept.
    assert row.split()[2:] == [
        "Block",
        "110.0",
        "us",
        "200.0",
        "us",
        "90.0",
        "KiB",
        "4",
        "10.0",
        "KiB",
    ]
    (row,) = lines_with(text, "head", "Head", "KiB")
    assert row.split()[:2] == ["head", "Head"]


def test_a_profile_lists_operators_with_flags():
    structure = synthetic.structure()
    operators = list(structure.operators)
    changed = operators[2].__class__(
        "aten.native_dropout.default",
        0,
        "drop",
        40 * KIB,
        0,
        8.0,
        is_random=True,
        is_asked_once=True,
    )
    operators[2] = changed
    replaced = structure.__class__("s0", "Block", tuple(operators), 6, 1.0, 2.0, structure.options)
    text = str(report(synthetic.profile(2, structures={"s0": replaced})))
    (row,) = lines_with(text, "aten.addmm.default", " up ")
    assert row.split() == [
        "aten.addmm.default",
        "0",
        "up",
        "50.0",
        "us",
        "40.0",
        "KiB",
        "40.0",
        "KiB",
    ]
    (row,) = lines_with(text, "aten.native_dropout.default")
    assert row.split()[-4:] == ["-", "random,", "never", "recomputed"]
    assert "and 2 operators that make none" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "times derived from a data sheet for toy"),
        ({"is_measured": True}, "times measured on toy"),
        ({"world_size": 8}, "one of 8 ranks"),
    ],
)
def test_a_profile_says_where_its_times_are_from(changes, words):
    text = str(report(synthetic.profile(1, **changes)))
    assert words in text
    assert lines_with(text, "parameters and buffers", "100.0 KiB")


def test_a_region_that_cannot_be_recomputed_says_why():
    structure = synthetic.structure()
    fixed = structure.__class__(
        "s0", "Block", (), 0, 1.0, 2.0, structure.options[:1], reason="it holds compiled code"
    )
    assert "it holds compiled code" in str(report(synthetic.profile(2, structures={"s0": fixed})))


# --- Why memory did not drop ----------------------------------------------------------------


def test_the_plain_peak_lists_storages_with_their_holders():
    text = str(why(synthetic.profile(3)))
    (row,) = lines_with(text, "aten.addmm.default")
    assert row.split() == [
        "blocks.0..blocks.2",
        "x3",
        "aten.addmm.default",
        "120.0",
        "KiB",
        "54.5%",
        "autograd",
    ]
    (row,) = lines_with(text, "(outside)")
    assert row.split() == ["(outside)", "parameter", "100.0", "KiB", "45.5%", "model"]
    assert "220.0 KiB altogether: autograd 120.0 KiB, model 100.0 KiB" in text


def test_the_plain_peak_says_where_it_lies():
    text = str(why(synthetic.profile(3)))
    assert "the peak lies in the backward of a region that keeps everything (backward of" in text
    assert lines_with(text, "kept by regions", "180.0 KiB")
    assert lines_with(text, "altogether", "404.0 KiB")
    profile, _ = at_optimizer()
    text = str(why(profile))
    assert "the peak lies in the optimizer's step (optimizer)" in text
    assert "where no plan can help" in text


def test_a_long_list_of_storages_is_cut():
    profile = synthetic.profile(1)
    many = tuple(
        profile.holdings[1].__class__("blocks.0", f"aten.op{i}.default", KIB + i, "autograd")
        for i in range(45)
    )
    assert "and 5 smaller ones" in str(why(synthetic.profile(1, holdings=many)))
    assert "nothing is known of it" in str(why(synthetic.profile(1, holdings=())))


@pytest.mark.parametrize(
    "choice",
    [(2, 1, 0), (0, 0, 0), (2, 2, 2), (1, 1, 1), (3, 3, 1), (3, 3, 3)],
)
def test_what_is_alive_at_a_planned_peak_adds_up_to_it(choice):
    profile = synthetic.profile(3)
    plan = build_plan(profile, choice, budget_bytes=500 * KIB)
    holdings = planned_holdings(profile, plan)
    assert sum(holding.num_bytes for holding in holdings) == plan.peak_bytes
    sizes = [holding.num_bytes for holding in holdings]
    assert sizes == sorted(sizes, reverse=True)


def test_a_planned_peak_names_what_is_kept_and_by_whom():
    profile = synthetic.profile(3)
    plan = build_plan(profile, (PRODUCT, PLAIN, NOTHING), budget_bytes=500 * KIB)
    assert plan.peak.label == "backward of blocks.2"
    found = {(h.fqn, h.operator): (h.num_bytes, h.holder) for h in planned_holdings(profile, plan)}
    assert found == {
        ("", "parameters, gradients, inputs, ..."): (104 * KIB, "model"),
        ("blocks.0", "aten.addmm.default #0"): (40 * KIB, "region"),
        ("blocks.0", "input and others"): (10 * KIB, "region"),
        ("blocks.1", "aten.native_layer_norm.default #0"): (10 * KIB, "autograd"),
        ("blocks.1", "aten.addmm.default #0"): (40 * KIB, "autograd"),
        ("blocks.1", "aten.relu.default #0"): (40 * KIB, "autograd"),
        ("blocks.2", "(backward of blocks.2)"): (140 * KIB, "region"),
    }


def at_optimizer():
    moments = (*synthetic.profile(2).moments[:-1], Moment("optimizer", 0, 999 * KIB))
    return synthetic.profile(2, moments=moments), (NOTHING, NOTHING)


def outside():
    moments = [Moment(m.label, m.num_alive, m.base_bytes) for m in synthetic.profile(2).moments]
    moments[2] = Moment("after blocks.1", 2, 800 * KIB)
    return synthetic.profile(2, moments=tuple(moments)), (NOTHING, NOTHING)


def recompute():
    return synthetic.profile(2), (NOTHING, NOTHING)


def plain_backward():
    return synthetic.profile(3), (NOTHING, PRODUCT, PLAIN)


def in_forward():
    regions = [r.__class__(r.fqn, r.structure, 600 * KIB, 0) for r in synthetic.profile(2).regions]
    return synthetic.profile(2, regions=tuple(regions)), (NOTHING, NOTHING)


@pytest.mark.parametrize(
    ("case", "phase", "words"),
    [
        (at_optimizer, Phase.OPTIMIZER, "the planned peak lies in the optimizer's step"),
        (outside, Phase.OUTSIDE, "the planned peak lies outside of any region (after blocks.1)"),
        (recompute, Phase.RECOMPUTE, "lies in the recompute and backward of a region (backward of"),
        (plain_backward, Phase.BACKWARD, "in the backward of a region that keeps everything"),
        (in_forward, Phase.FORWARD, "the planned peak lies in the forward of a region"),
    ],
)
def test_a_plan_says_where_its_peak_lies(case, phase, words):
    profile, choice = case()
    plan = build_plan(profile, choice, budget_bytes=2000 * KIB)
    assert plan.peak.phase is phase
    for text in (str(why(profile, plan)), str(plan)):
        assert words in text
    has_advice = "where no plan can help" in str(plan)
    assert has_advice == (2 * plan.peak.base_bytes > plan.peak_bytes)


# --- A plan ---------------------------------------------------------------------------------


def test_a_plan_is_a_table():
    plan = synthetic.plan(
        (OFFLOAD, PRODUCT, PRODUCT, PLAIN),
        budget_bytes=450 * KIB,
        margin_bytes=10 * KIB,
        gap_us=2.0,
        hand_made=[Point("full recompute", 700 * KIB, 1500.0)],
    )
    text = str(plan)
    assert text.startswith("plan for Model: 3 of 4 regions wrapped")
    assert lines_with(
        text, "budget", "450.0 KiB", "everything on the device, 10.0 KiB of it margin"
    )
    assert lines_with(text, "predicted peak", size(plan.peak_bytes), f"in: {plan.peak.label}")
    assert lines_with(text, "smallest budget", size(plan.smallest_bytes))
    assert lines_with(text, "predicted step", "at most 0.14% above the fastest")
    (row,) = lines_with(text, "blocks.1..blocks.2 x2")
    assert row.split()[3:] == [
        *("planned", "90.0", "KiB", "50.0", "KiB", "-", "15.0", "us", "addmm", "0")
    ]
    (row,) = lines_with(text, "offloaded: addmm 0")
    assert row.split()[7:9] == ["40.0", "KiB"]
    (row,) = lines_with(text, "blocks.3", "left alone")
    assert row.split()[-1] == "everything"
    (row,) = lines_with(text, "full recompute")
    assert row.split()[-1] == "no"


def test_a_plan_for_activations_counts_these():
    plan = synthetic.plan(budget_bytes=200 * KIB, counts="activations", uncounted_bytes=104 * KIB)
    (row,) = lines_with(plan, "predicted peak")
    assert "180.0 KiB" in row
    assert "90.0% of the budget" in row
    assert lines_with(plan, "budget", "counts activations")


def test_a_comparison_is_a_table():
    plan = synthetic.plan()
    table = comparison_report(plan, Measured(plan.peak_bytes * 2, 1105.0, 1030.0), ["do this"])
    assert lines_with(table, "peak", "284.0 KiB", "568.0 KiB", "+100.00%")
    assert lines_with(table, "of the plain step", "1.073", "+0.00%")
    assert lines_with(table, "do this")
    without = str(comparison_report(plan, Measured(1, 1.0), []))
    assert "plain step" not in without


# --- rich -----------------------------------------------------------------------------------


def shown_by_rich(renderable):
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()


def test_rich_shows_the_same_cells():
    plan = synthetic.plan(hand_made=[Point("[red]policy[/red]", KIB, 1.0)])
    profile = synthetic.profile(3)
    comparison = plan.compare(Measured(KIB, 1.0))
    for what, own in (
        (plan, plan.report()),
        (report(profile), report(profile)),
        (comparison, comparison.report()),
    ):
        shown = " ".join(shown_by_rich(what).split())
        for table in own.tables:
            assert table.title in shown
            for cell in (cell for row in table.rows for cell in row):
                assert " ".join(cell.split()) in shown
            assert all(" ".join(note.split()) in shown for note in table.notes)


def test_text_needs_no_rich(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        assert name.split(".")[0] != "rich", "rich was imported"
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert "plan for Model" in str(synthetic.plan())
    assert "3 regions" in str(report(synthetic.profile(3)))
