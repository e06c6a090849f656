"""Regions that compute alike are looked at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.plan.blocks import Mlp, Net, is_mlp
from wrappers import make_plan, profile
from wrappers.errors import WrapperError
from wrappers.plan.harness import Harness
from wrappers.plan.structures import looks_of


@pytest.fixture
def num_runs(monkeypatch):
    """How often a region runs on the harness."""
    runs = []
    run = Harness.run
    monkeypatch.setattr(Harness, "run", lambda self, *a, **k: runs.append(1) or run(self, *a, **k))
    return lambda: len(runs)


def _profile(model, rows=64, **settings):
    return profile(model, torch.ones(rows, 32), check_fn=is_mlp, hardware="CPU", **settings)


class _Same(Mlp):
    def __init__(self, width, index):
        super().__init__(width)


def test_the_cost_of_a_profile_does_not_depend_on_depth(num_runs):
    counts = []
    for num in (4, 24):
        before = num_runs()
        found = _profile(Net(num, make=_Same))
        assert (len(found.regions), len(found.structures)) == (num, 1)
        counts.append(num_runs() - before)
    assert counts[0] == counts[1] > 0


def test_a_number_that_differs_costs_one_run_a_region(num_runs):
    """The operators of each are compared; the menu is made once."""
    counts = []
    for num in (4, 24):
        before = num_runs()
        found = _profile(Net(num))
        assert len(found.structures) == 1
        counts.append(num_runs() - before)
    assert counts[1] - counts[0] == 20


class _Widens(Mlp):
    def __init__(self, width, index):
        super().__init__(width)
        if index == 1:
            self.up = nn.Linear(width, 2 * width)
            self.down = nn.Linear(2 * width, width)


class _Frozen(Mlp):
    def __init__(self, width, index):
        super().__init__(width)
        self.norm.requires_grad_(index != 1)


class _Drops(Mlp):
    def __init__(self, width, index):
        super().__init__(width)
        self.down = nn.Sequential(self.down, nn.Dropout(0.5 if index == 1 else 0.0))


class _Evaluates(_Drops):
    def __init__(self, width, index):
        super().__init__(width, 1)
        self.train(index != 1)


@pytest.mark.parametrize("make", [_Widens, _Frozen, _Drops, _Evaluates])
def test_what_computes_differently_is_another_structure(make):
    model = Net(4, make=make)
    found = _profile(model)
    keys = [region.structure for region in found.regions]
    assert keys[0] == keys[2] == keys[3] != keys[1]
    assert {s.class_name for s in found.structures.values()} == {make.__name__}


def test_looks_are_equal_for_what_is_built_alike():
    assert looks_of(Mlp(8)) == looks_of(Mlp(8))
    others = [Mlp(16), Mlp(8).eval(), Mlp(8).double(), Mlp(8).requires_grad_(False), Mlp(8, 3)]
    assert len({looks_of(module) for module in (Mlp(8), *others)}) == 6


def test_a_region_that_looks_at_values_is_named():
    class Item(Mlp):
        def forward(self, x):
            return super().forward(x) * x.sum().item()

    with pytest.raises(
        WrapperError, match=r"region `blocks\.0` does not run.*\.item\(\)"
    ) as raised:
        _profile(Net(2, make=Item))
    assert raised.value.fqn == "blocks.0"


def test_regions_without_a_gradient_are_left_alone():
    model = Net(3)
    model.first.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    found = _profile(model)
    first, *others = (found.structures[region.structure] for region in found.regions)
    assert first.reason == "no gradient flows through it"
    assert [option.decisions for option in first.options] == [None]
    assert all(not s.reason and len(s.options) > 1 for s in others)


class _SameElsewhere(Mlp):
    """Of another class, with the same operators."""


def test_regions_of_two_classes_with_the_same_operators_are_two_structures():
    model = Net(4, make=lambda width, index: (Mlp, _SameElsewhere)[index % 2](width))
    found = _profile(model)
    names = [found.structures[region.structure].class_name for region in found.regions]
    assert names == ["Mlp", "_SameElsewhere"] * 2
    ample = make_plan(found, 1 << 40, frontier_points=0)
    report = make_plan(found, ample.smallest_bytes, frontier_points=0).apply(model)
    assert report.wrapped
