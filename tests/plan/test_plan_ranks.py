"""One plan for all ranks, or an error on all of them; and plans applied to sharded models.

The functions run in real gloo processes. What a rank raises comes back as text and fields.
"""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.models import Block, forward, gradients, make_model
from tests.plan import synthetic
from tests.plan.synthetic import KIB, NOTHING, PLAIN, PRODUCT
from wrappers import CheckpointImpl, region_report
from wrappers.plan.build import build_plan
from wrappers.plan.plan import Plan, PlanMismatchError
from wrappers.plan.ranks import RanksError, merge, plan_together, share
from wrappers.plan.records import Decision, Hardware, Option

# --- Merging profiles -----------------------------------------------------------------------


def changed(profile, **changes):
    """A profile in which every structure has some fields changed."""
    structures = {
        key: dataclasses.replace(each, **changes) for key, each in profile.structures.items()
    }
    return dataclasses.replace(profile, structures=structures)


def test_the_merge_of_equal_profiles_is_that_profile():
    profile = synthetic.profile(3)
    assert merge([profile]) is profile
    assert merge([profile, synthetic.profile(3), synthetic.profile(3)]) == profile


def test_a_merge_has_the_larger_bytes_and_times():
    first = synthetic.profile(2, base_bytes=100 * KIB, step_us=900.0, optimizer_us=50.0)
    second = synthetic.profile(2, base_bytes=120 * KIB, step_us=800.0, optimizer_us=60.0)
    second = changed(second, forward_us=300.0, backward_us=1.0)
    second = dataclasses.replace(second, has_gradients=True)
    merged = merge([first, second])
    assert [r.forward_base_bytes for r in merged.regions] == [120 * KIB] * 2
    assert [m.base_bytes for m in merged.moments] == [m.base_bytes for m in second.moments]
    assert (merged.step_us, merged.optimizer_us) == (900.0, 60.0)
    (structure,) = merged.structures.values()
    assert (structure.forward_us, structure.backward_us) == (300.0, 200.0)
    assert merged.has_gradients
    assert merge([second, first]) == merged


def test_an_option_is_as_slow_as_on_the_slowest_rank_that_has_it():
    first, second = synthetic.profile(1), synthetic.profile(1)
    (structure,) = first.structures.values()
    slower = dataclasses.replace(structure.options[PRODUCT], extra_us=99.0)
    other = Option((Decision("aten.relu.default", 0),), 50 * KIB, 1.0, 100 * KIB, 130 * KIB)
    second = changed(second, options=(structure.options[PLAIN], slower, other))
    (merged,) = merge([first, second]).structures.values()
    assert merged.options == (structure.options[0], slower, *structure.options[2:])


def test_a_merged_device_is_as_slow_as_the_slowest():
    fast = Hardware("fast", {"float32": 9.0, "int8": 1.0}, 8.0, 7.0, 6.0, 1.0, memory_bytes=100)
    large = Hardware("large", {"float32": 5.0}, 9.0, 8.0, 2.0, 3.0, memory_bytes=200)
    merged = merge([synthetic.profile(1, hardware=fast), synthetic.profile(1, hardware=large)])
    assert merged.hardware == Hardware(
        "fast, large", {"float32": 5.0}, 8.0, 7.0, 2.0, 3.0, memory_bytes=100
    )


def other_models():
    plain = synthetic.profile(3)
    key = synthetic.structure("s1")
    mixed = dataclasses.replace(
        plain,
        regions=(
            *plain.regions[:2],
            dataclasses.replace(plain.regions[2], structure="s1"),
        ),
        structures={**plain.structures, "s1": key},
    )
    moved = dataclasses.replace(plain, regions=plain.regions[::-1])
    return {
        "shorter": (synthetic.profile(2), "blocks.2: missing"),
        "longer": (synthetic.profile(4), "blocks.3: unknown to rank 0"),
        "shapes": (mixed, "blocks.2: other operators, shapes or data types"),
        "class": (changed(plain, class_name="Layer"), "blocks.0: a Layer instead of a Block"),
        "operators": (changed(plain, operators=()), "blocks.0: other operators"),
        "order": (moved, "blocks.2: called in another order"),
        "moments": (synthetic.profile(3, moments=()), "outside of regions: other moments"),
    }


@pytest.mark.parametrize("name", list(other_models()))
def test_profiles_of_other_models_do_not_merge(name):
    other, what = other_models()[name]
    with pytest.raises(RanksError) as caught:
        merge([synthetic.profile(3), synthetic.profile(3), other])
    assert f"rank 2: {what}" in str(caught.value)
    assert "ranks 2 have another model than rank 0" in str(caught.value)
    assert list(caught.value.differences) == [2]
    assert caught.value.fqn == what.partition(":")[0]


def test_many_differences_are_cut():
    with pytest.raises(RanksError, match="and 12 more"):
        merge([synthetic.profile(30), synthetic.profile(10)])


# --- Without a process group ----------------------------------------------------------------


def solve(profile):
    return build_plan(profile, [NOTHING] * len(profile.regions), budget_bytes=400 * KIB)


def test_a_process_alone_plans_alone():
    plan = plan_together(lambda: synthetic.profile(3), solve)
    assert plan == solve(synthetic.profile(3))
    assert share(plan) is plan
    with pytest.raises(TypeError, match="no plan to share"):
        share(None)


# --- In processes ---------------------------------------------------------------------------


def outcome(function, *args):
    """What a function returns, or what it raises, as data."""
    try:
        return function(*args)
    except Exception as error:
        kind = type(error).__name__
        failures = {r: type(e).__name__ for r, e in getattr(error, "failures", {}).items()}
        return {"error": kind, "text": str(error), "failures": failures}


def profile_of_rank(rank):
    return synthetic.profile(2, base_bytes=(100 + rank) * KIB, step_us=1000.0 - rank)


def plan_in_ranks():
    rank = dist.get_rank()
    return plan_together(lambda: profile_of_rank(rank), solve)


def fail_on_one_rank():
    def profile():
        if dist.get_rank() == 1:
            raise ValueError("out of memory while profiling")
        return synthetic.profile(2)

    return outcome(plan_together, profile, solve)


def plan_with_another_model():
    return outcome(plan_together, lambda: synthetic.profile(2 + dist.get_rank()), solve)


def not_feasible(profile):
    raise PlanMismatchError("does not fit", fqn="blocks.0", missing=("blocks.1",))


def solve_what_is_not_feasible():
    try:
        plan_together(lambda: synthetic.profile(2), not_feasible)
    except PlanMismatchError as error:
        return str(error), error.fqn, error.missing
    return None


def share_from_rank_0():
    own = synthetic.plan() if dist.get_rank() == 0 else None
    return share(own).hash, outcome(share, synthetic.plan() if dist.get_rank() else None)


def read_another_plan():
    """On rank 1 what was sent is read as something else."""
    if dist.get_rank() == 0:
        return outcome(share, synthetic.plan())
    read = Plan.from_json
    try:
        Plan.from_json = lambda text: dataclasses.replace(read(text), budget_bytes=1)
        return outcome(share, None)
    finally:
        Plan.from_json = read


def plan_in_a_group_each():
    """As pipeline stages do: different models, and nobody waits for the other."""
    rank = dist.get_rank()
    group = dist.new_group([rank], use_local_synchronization=True)
    try:
        plan = plan_together(lambda: synthetic.profile(2 + rank), solve, group)
    finally:
        dist.destroy_process_group(group)
    return [region.fqn for region in plan.regions]


def test_all_ranks_have_the_plan_of_the_merged_profile(ranks):
    plans = ranks(plan_in_ranks)
    assert plans[0] == plans[1] == solve(merge([profile_of_rank(0), profile_of_rank(1)]))
    assert plans[0].persistent == synthetic.PERSISTENT
    assert plans[0].plain_step_us == 1000.0


def test_a_rank_that_cannot_profile_makes_all_raise(ranks):
    outcomes = ranks(fail_on_one_rank)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0]["error"] == "RanksError"
    assert outcomes[0]["failures"] == {1: "ValueError"}
    assert "1 of 2 ranks failed at the step `profile`" in outcomes[0]["text"]
    assert "rank 1: ValueError: out of memory while profiling" in outcomes[0]["text"]


def test_a_rank_with_another_model_makes_all_raise(ranks):
    outcomes = ranks(plan_with_another_model)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0]["error"] == "RanksError"
    assert "rank 1: blocks.2: unknown to rank 0" in outcomes[0]["text"]


def test_what_solving_raises_every_rank_raises(ranks):
    expected = ("does not fit", "blocks.0", ("blocks.1",))
    assert ranks(solve_what_is_not_feasible) == [expected, expected]


def test_rank_0_shares_its_plan(ranks):
    results = ranks(share_from_rank_0)
    assert {plan_hash for plan_hash, _ in results} == {synthetic.plan().hash}
    for _, without in results:
        assert (without["error"], "no plan to share" in without["text"]) == ("TypeError", True)


def test_a_rank_that_reads_another_plan_makes_all_raise(ranks):
    outcomes = ranks(read_another_plan)
    assert outcomes[0] == outcomes[1]
    assert "plan of ranks 1 is not that of rank 0" in outcomes[0]["text"]


def test_groups_plan_for_themselves(ranks):
    assert ranks(plan_in_a_group_each) == [
        ["blocks.0", "blocks.1"],
        ["blocks.0", "blocks.1", "blocks.2"],
    ]


# --- Sharded models -------------------------------------------------------------------------


def shard_fsdp2(model):
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def shard_fsdp1(model):
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


SHARDINGS = {"FSDP2": shard_fsdp2, "FSDP1": shard_fsdp1, "DDP": DistributedDataParallel}


def updates(sharding, is_planned):
    """The gradients of two steps, and what became of the regions."""
    model = SHARDINGS[sharding](make_model(batch_norm=False))
    report = None
    if is_planned:
        plan = share(synthetic.plan() if dist.get_rank() == 0 else None)
        report = plan.apply(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        for step in range(2):
            forward(model, dist.get_rank(), step).backward()
    return gradients(model), report, region_report(model)


def planned_and_plain(sharding):
    plain, _, _ = updates(sharding, is_planned=False)
    planned, report, regions = updates(sharding, is_planned=True)
    assert plain
    assert plain.keys() == planned.keys()
    assert all(torch.equal(plain[name], planned[name]) for name in plain)
    rows = [(row.impl, row.num_kept, row.reason) for row in regions.rows]
    return len(report.wrapped), list(report.skipped), rows


@pytest.mark.parametrize("sharding", list(SHARDINGS))
def test_a_plan_of_the_plain_model_fits_a_sharded_one(ranks, sharding):
    """The gradients are those of the sharded model without a plan, and regions are replayed."""
    replay = CheckpointImpl.REPLAY
    for num_wrapped, skipped, rows in ranks(planned_and_plain, sharding):
        assert num_wrapped == 2
        assert skipped == ["blocks.2"]
        assert rows == [(replay, 0, ""), (replay, 1, "")]


def refuse(sharding):
    model = SHARDINGS[sharding](nn.Sequential(Block(False)))
    try:
        synthetic.plan().apply(model)
    except PlanMismatchError as error:
        return error.missing
    return None


def test_a_plan_for_another_model_does_not_fit_a_sharded_one(ranks):
    expected = ("blocks.0", "blocks.1", "blocks.2")
    assert ranks(refuse, "DDP") == [expected, expected]
