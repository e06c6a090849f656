"""Menus against all that could be on them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.plan.blocks import COSTS, HARDWARE, Mlp, harness
from wrappers import _device
from wrappers.plan import cuts
from wrappers.plan.cuts import Group
from wrappers.plan.menu import MenuMaker, _is_d2h, _text, record
from wrappers.plan.records import RECOMPUTE_ALL, Decision
from wrappers.policies import save_matmuls

ROWS = 4096
#: Cuts that differ by less are one.
RESOLUTION = 64 * 1024


def _maker(block, x, **settings):
    alone, module = harness(block, x)
    recording = record(alone, module, COSTS, "block")
    return MenuMaker(alone, recording, HARDWARE, **settings), recording


class Tiny(nn.Module):
    """Two products, a gelu, a sine: few enough for all subsets."""

    def __init__(self, width=32):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)).sin()).sin()


def test_no_subset_is_better_than_the_menu():
    maker, recording = _maker(Tiny(), torch.ones(ROWS, 32))
    options, is_exact = maker.options()
    assert is_exact
    named = [
        Decision(str(call.func), call.ordinal)
        for call in recording.calls
        if sum(call.sizes) and str(call.func) != "aten.t.default"
    ]
    assert len(named) == 5
    subsets = itertools.chain.from_iterable(
        itertools.combinations(named, n) for n in range(len(named) + 1)
    )
    for subset in subsets:
        found = maker.measure(subset)
        need = max(found.forward_bytes, found.backward_bytes)
        assert any(
            option.kept_bytes <= found.kept_bytes + RESOLUTION
            and option.extra_us <= found.extra_us + 1e-6
            and max(option.forward_bytes, option.backward_bytes) <= need + RESOLUTION
            for option in options
        ), subset


def test_options_are_sorted_and_none_is_worse_than_another():
    maker, _ = _maker(Mlp(), torch.ones(ROWS, 32))
    options, _ = maker.options()
    assert list(options) == sorted(options, key=lambda o: (-o.kept_bytes, o.extra_us))
    assert options[-1].decisions == ()
    looks = [(o.kept_bytes, o.extra_us, max(o.forward_bytes, o.backward_bytes)) for o in options]
    for one, other in itertools.permutations(looks, 2):
        assert one == other or not all(a <= b for a, b in zip(one, other, strict=True))


def test_keeping_all_replays_nothing_that_takes_time():
    maker, _ = _maker(Mlp(), torch.ones(ROWS, 32))
    everything, nothing = maker.measure(maker.keep_all()), maker.measure(())
    assert everything.kept_bytes > nothing.kept_bytes
    assert everything.extra_us < nothing.extra_us
    half = maker.measure(maker.keep_longest())
    assert everything.extra_us <= half.extra_us <= nothing.extra_us


def test_the_table_names_operators_and_what_is_saved():
    maker, _ = _maker(Mlp(), torch.ones(ROWS, 32))
    rows = [(r.operator, r.ordinal, r.module, r.output_bytes, r.saved_bytes) for r in maker.rows()]
    x = ROWS * 32 * 4
    assert rows == [
        ("aten.native_layer_norm.default", 0, "norm", x + 2 * ROWS * 4, x + 2 * ROWS * 4),
        ("aten.addmm.default", 0, "up", 4 * x, 4 * x),
        ("aten.gelu.default", 0, "", 4 * x, 4 * x),
        ("aten.addmm.default", 1, "down", x, 0),
        ("aten.add.Tensor", 0, "", x, 0),
    ]


def test_offloading_is_offered_where_there_is_a_link():
    maker, _ = _maker(Mlp(), torch.ones(ROWS, 32), offloads=True)
    options, _ = maker.options()
    assert any(option.offload_bytes for option in options)
    maker, _ = _maker(Mlp(), torch.ones(ROWS, 32))
    assert not any(option.offload_bytes for option in maker.options()[0])


def test_measured_times_correct_the_derived_ones():
    maker, _ = _maker(Mlp(), torch.ones(ROWS, 32))
    points = {d: 100.0 + 1.5 * maker.measure(d).extra_us for d in ((), maker.keep_all())}
    maker.fit(points)
    for decisions, extra_us in points.items():
        assert abs(maker.measure(decisions).extra_us - extra_us) < 0.02 * extra_us


def test_choices_are_kept_and_random_numbers_are_named():
    class Choice(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(32, 8)

        def forward(self, x):
            weights, index = self.gate(x).topk(2)
            return F.dropout(x, 0.5)[:, :2] * weights * index.sin()

    maker, _ = _maker(Choice(), torch.ones(ROWS, 32))
    rows = {row.operator: row for row in maker.rows()}
    assert rows["aten.topk.default"].is_asked_once
    assert any(row.is_random for row in rows.values())
    assert not rows["aten.addmm.default"].is_asked_once


def test_regions_with_the_same_operators_have_one_key():
    keys = [
        _maker(Mlp(32, index=0), torch.ones(64, 32))[1].key,
        _maker(Mlp(32, index=1), torch.ones(64, 32))[1].key,
        _maker(Mlp(32), torch.ones(32, 32))[1].key,
        _maker(Mlp(32).requires_grad_(False), torch.ones(64, 32))[1].key,
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_groups_read_what_was_made_before():
    graph = _maker(Mlp(), torch.ones(64, 32))[0].graph()
    assert all(isinstance(group, Group) for group in graph.groups)
    assert [group.reads for group in graph.groups] == [(), (0,), (1,), (2,), (3,)]
    assert cuts.cut_of(graph, range(5)).kept <= graph.needed


class Attention(nn.Module):
    """Fused attention, which draws random numbers only where it drops something."""

    def __init__(self, p):
        super().__init__()
        self.p = p
        self.qkv = nn.Linear(32, 3 * 32)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        fused = torch.ops.aten._scaled_dot_product_flash_attention.default
        return x + fused(q, k, v, self.p)[0].transpose(1, 2).flatten(2)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_attention_draws_random_numbers_only_where_it_drops(p):
    maker, _ = _maker(Attention(p), torch.ones(2, 16, 32))
    (row,) = [row for row in maker.rows() if "attention" in row.operator]
    assert row.is_random == (p > 0)


def test_a_policy_by_hand_takes_what_it_takes_on_the_engine():
    block, x = Mlp(), torch.ones(ROWS, 32)
    maker, _ = _maker(block, x)
    by_hand = maker.by_hand()
    assert list(by_hand) == [RECOMPUTE_ALL, "save matmuls", "save matmuls and attention"]
    run = harness(block, x)[0].run(save_matmuls())
    option = by_hand["save matmuls"]
    assert option.kept_bytes == run.kept_bytes > by_hand[RECOMPUTE_ALL].kept_bytes
    assert (option.forward_bytes, option.backward_bytes) == (run.forward_bytes, run.backward_bytes)
    assert [(d.operator, d.ordinal) for d in option.decisions] == [
        ("aten.addmm.default", 0),
        ("aten.addmm.default", 1),
    ]
    assert by_hand[RECOMPUTE_ALL].decisions == ()


def test_ranks_on_devices_of_one_kind_have_one_key():
    first, second = (_text([torch.device(name)]) for name in ("cuda:0", "cuda:1"))
    assert first == second
    assert first != _text([torch.device("cpu")])


def test_copies_to_the_host_are_known_by_where_tensors_lie(monkeypatch):
    here, there = torch.ones(2), torch.ones(2)
    monkeypatch.setattr(_device, "is_host", lambda tensor: tensor is here)
    assert _is_d2h((there,), [here])
    assert not _is_d2h((there,), [there])
    assert not _is_d2h((here,), [here])
    assert not _is_d2h((here, 2), [there])
    assert not _is_d2h((there,), [here, there])
    assert not _is_d2h((there,), [])


def test_a_copy_to_the_host_is_never_made_again(monkeypatch):
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(32, 8)

        def forward(self, x):
            asked = self.gate(x).sigmoid()
            return x * asked.exp().sum()

    x = torch.ones(64, 32)
    assert _maker(Asks(), x)[0].options()[0][-1].decisions == ()
    # From here on the gate's product is a copy to the host, where the rest is computed.
    monkeypatch.setattr(_device, "is_host", lambda tensor: tensor.shape == (64, 8))
    maker, _ = _maker(Asks(), x)
    once = {row.operator for row in maker.rows() if row.is_asked_once}
    assert once == {"aten.addmm.default"}
    # Its backward needs the sigmoid, which reads the copy: one of both is always kept.
    for option in maker.options()[0]:
        assert {d.operator for d in option.decisions} & {*once, "aten.sigmoid.default"}
