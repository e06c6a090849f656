"""Budgets in, plans out: margins, ranks that are not here, and what is passed on."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from tests.plan import synthetic
from tests.plan.blocks import Mlp, Net, is_mlp
from tests.plan.synthetic import KIB
from wrappers import (
    InfeasibleBudgetError,
    _device,
    _knobs,
    apply_activation_checkpointing,
    make_plan,
    plan_for,
)
from wrappers.plan import api
from wrappers.plan.chain import chain_of, evaluate

X = torch.ones(64, 32)


@pytest.fixture(autouse=True)
def few_runs(monkeypatch):
    monkeypatch.setattr(_knobs, "PLAN_MENU_RUNS", 4)


def _plan(profile, budget, **settings):
    return make_plan(profile, budget, frontier_points=0, **settings)


def test_times_of_a_model_on_the_host_are_the_hosts(monkeypatch):
    """Also where there is an accelerator."""
    accelerator = torch.device("cuda", 0)
    monkeypatch.setattr(_device, "default_device", lambda: accelerator)
    monkeypatch.setattr(_device, "own_name", lambda d: "NVIDIA H100" if d == accelerator else None)
    monkeypatch.setattr(_device, "own_memory_bytes", lambda d: 80 * 2**30)
    monkeypatch.setattr(api, "_measure", lambda *args: None)
    found = api.profile(Net(1), X, check_fn=is_mlp)
    assert found.hardware.d2h_bytes_per_s == 0
    assert _plan(found, "1GiB").margin_bytes == 0


# --- Margins


@pytest.mark.parametrize("count", ["all", "activations"])
@pytest.mark.parametrize("margin", [None, 0, 7 * KIB, "1KiB", 0.1, "10%"])
def test_the_smallest_budget_is_accepted_and_one_byte_less_is_not(margin, count):
    profile = synthetic.profile(3)
    with pytest.raises(InfeasibleBudgetError) as refused:
        _plan(profile, 10 * KIB, margin=margin, count=count)
    smallest = refused.value.smallest_bytes
    assert f"{smallest} bytes" in str(refused.value)
    plan = _plan(profile, smallest, margin=margin, count=count)
    assert plan.smallest_bytes == smallest
    assert plan.peak_bytes - plan.uncounted_bytes <= smallest - plan.margin_bytes
    with pytest.raises(InfeasibleBudgetError) as refused:
        _plan(profile, smallest - 1, margin=margin, count=count)
    assert refused.value.smallest_bytes == smallest


@pytest.mark.parametrize("margin", [None, 0.1])
def test_the_smallest_budget_is_the_same_whatever_was_asked_for(margin):
    profile = synthetic.profile(3)
    plans = [_plan(profile, budget, margin=margin) for budget in ("1MiB", "1GiB")]
    assert plans[0].smallest_bytes == plans[1].smallest_bytes


def test_a_host_needs_no_margin():
    profile = synthetic.profile(2)
    hardware = dataclasses.replace(profile.hardware, d2h_bytes_per_s=0.0, h2d_bytes_per_s=0.0)
    assert _plan(dataclasses.replace(profile, hardware=hardware), KIB**2).margin_bytes == 0
    assert _plan(profile, KIB**2).margin_bytes == KIB**2 // 50


def test_policies_by_hand_are_in_the_plan():
    structure = synthetic.structure()
    structure = dataclasses.replace(structure, by_hand={"save matmuls": structure.options[1]})
    profile = synthetic.profile(3, structures={"s0": structure})
    (point,) = _plan(profile, KIB**2).hand_made
    choice = [1] * 3
    assert point.peak_bytes == evaluate(chain_of(profile), choice).peak_bytes
    assert point.name == "save matmuls"


# --- For ranks that are not here


def _for_ranks(world_size, **settings):
    return plan_for(
        lambda: Net(2),
        lambda: torch.ones(64, 32),
        device="H100",
        budget="1GiB",
        world_size=world_size,
        check_fn=is_mlp,
        **settings,
    )


def test_several_ranks_without_fsdp_have_buckets():
    one, two = _for_ranks(1), _for_ranks(2)
    gradient_bytes = one.persistent.gradient_bytes
    assert (one.world_size, one.persistent.bucket_bytes) == (1, 0)
    assert (two.world_size, two.persistent.bucket_bytes) == (2, gradient_bytes)
    # They are there in every moment of the step.
    assert two.peak_bytes - one.peak_bytes == gradient_bytes
    for span, other in zip(two.spans, one.spans, strict=True):
        assert span.planned_bytes - other.planned_bytes == gradient_bytes
    sharded = _for_ranks(2, fsdp=True)
    assert (sharded.world_size, sharded.persistent.bucket_bytes) == (2, 0)


def test_buckets_are_what_ddp_has(monkeypatch):
    """A model in DDP and a plan for several ranks count the same."""
    model = Net(2)
    plain = api.profile(model, X, check_fn=is_mlp, hardware="CPU")

    class Parallel(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    monkeypatch.setattr(api, "DistributedDataParallel", Parallel)
    wrapped = api.profile(Parallel(model), X, check_fn=is_mlp, hardware="CPU")
    expected = dataclasses.replace(api.with_buckets(plain, 2), world_size=1)
    assert wrapped.persistent == expected.persistent
    assert wrapped.regions == expected.regions
    assert wrapped.moments == expected.moments
    assert wrapped.start_bytes == expected.start_bytes
    assert wrapped.holdings == expected.holdings
    (buckets,) = [h for h in wrapped.holdings if h.operator == "DDP's buckets"]
    assert buckets.num_bytes == plain.persistent.gradient_bytes


def test_fsdps_precision_needs_fsdp():
    def build():
        raise AssertionError("nothing is built")

    with pytest.raises(ValueError, match=r"mp_policy is FSDP2's: pass fsdp=True"):
        plan_for(
            build, build, device="H100", budget=1, world_size=2, mp_policy=MixedPrecisionPolicy()
        )


# --- What apply_activation_checkpointing passes on


def _apply(model, budget="1GiB", **settings):
    return apply_activation_checkpointing(
        model, check_fn=is_mlp, memory_budget=budget, sample=X, hardware="CPU", **settings
    )


def test_apply_passes_on_what_planning_takes():
    momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    ample = _apply(Net(2), margin="1MiB", optimizer=momentum).plan
    assert (ample.margin_bytes, ample.counts) == (2**20, "all")
    assert _apply(Net(2)).plan.margin_bytes == 0
    model = Net(2)
    report = _apply(
        model,
        ample.smallest_bytes - 2**20 + 100,
        margin=100,
        strict=True,
        verify="first",
        optimizer=momentum,
    )
    assert report.plan.margin_bytes == 100
    assert report.plan.persistent.optimizer_bytes == report.plan.persistent.gradient_bytes
    assert not report.plan.is_measured
    assert report.wrapped
    for fqn in report.wrapped:
        region = model.get_submodule(fqn)._checkpoint_region
        assert (region.verify, region.policy.is_strict) == ("first", True)
    activations = _apply(Net(2), count="activations").plan
    assert activations.counts == "activations"
    assert activations.uncounted_bytes == activations.persistent.start_bytes(has_gradients=False)


@pytest.fixture
def no_profile(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a profile was made")

    monkeypatch.setattr(api, "profile", refuse)


def test_an_unknown_argument_is_named_beside_those_there_are(no_profile):
    with pytest.raises(TypeError, match=r"unknown arguments: budget_margin, color\.") as refused:
        _apply(Net(1), color=1, budget_margin=2)
    for name in ("count", "margin", "strict", "verify", "loss_fn", "optimizer", "max_options"):
        assert name in str(refused.value)


@pytest.mark.parametrize("budget", ["12G", "a lot", -1, 0, True, "120%"])
def test_a_budget_that_cannot_be_read_is_refused_before_anything_is_profiled(no_profile, budget):
    model = Net(1)
    with pytest.raises((ValueError, TypeError), match="memory budget"):
        _apply(model, budget)
    assert type(model.blocks[0]) is Mlp


def test_what_a_budget_counts_is_checked_at_once_too(no_profile):
    with pytest.raises(ValueError, match="count is one of all, activations, got 'some'"):
        _apply(Net(1), count="some")
