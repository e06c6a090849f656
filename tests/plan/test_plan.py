"""Plans: what they say about a choice, how they are saved, and what they do to a model."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import pickle
import re
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper as torch_checkpoint_wrapper,
)

from tests.distributed.models import Block, assert_equal, forward, gradients, make_model
from tests.plan import synthetic
from tests.plan.synthetic import KIB, NOTHING, OFFLOAD, PLAIN, PRODUCT
from wrappers import (
    CheckpointImpl,
    CheckpointPolicy,
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
    region_report,
    remove_activation_checkpointing,
)
from wrappers.errors import WrapperError
from wrappers.plan import schema
from wrappers.plan.build import build_plan, made_by_hand
from wrappers.plan.chain import chain_of, evaluate
from wrappers.plan.names import left_out, places, plain_name
from wrappers.plan.parts import VERSION, Measured, Phase, Point
from wrappers.plan.plan import Plan, PlanMismatchError
from wrappers.plan.records import RECOMPUTE_ALL, Moment, Persistent
from wrappers.plan.spans import spans_of

# --- What a plan says -----------------------------------------------------------------------


def test_a_plan_says_what_the_choice_comes_to():
    plan = synthetic.plan(margin_bytes=7, gap_us=3.0)
    # Kept by blocks.0 and blocks.1: 10 + 50 KiB; the backward of blocks.2, left alone: 120 KiB.
    assert plan.peak_bytes == (104 + 60 + 120) * KIB
    assert (plan.peak.base_bytes, plan.peak.kept_bytes) == (104 * KIB, 60 * KIB)
    assert plan.peak.running_bytes == 120 * KIB
    assert (plan.peak.label, plan.peak.phase) == ("backward of blocks.2", Phase.BACKWARD)
    assert plan.plain_peak.num_bytes == (104 + 180 + 120) * KIB
    assert (plan.plain_step_us, plan.recompute_us, plan.step_us) == (1030.0, 75.0, 1105.0)
    assert (plan.margin_bytes, plan.gap_us, plan.wait_us) == (7, 3.0, 0.0)
    assert plan.num_wrapped == 2
    assert [region.kept_bytes for region in plan.regions] == [10 * KIB, 50 * KIB, 90 * KIB]
    assert [region.plain_bytes for region in plan.regions] == [90 * KIB] * 3
    # The need of blocks.0: its backward, 140 KiB, after the gradients of two blocks, 8 KiB each.
    assert plan.regions[0].need_bytes == (104 + 16 + 140) * KIB
    assert plan.regions[1].counts == {"aten.addmm.default": 2}
    assert plan.regions[0].counts == {}


@pytest.mark.parametrize("choice", [(0, 0, 0), (2, 2, 2), (1, 2, 0), (3, 3, 2), (3, 0, 3)])
def test_the_largest_span_is_the_peak_of_the_chain(choice):
    profile = synthetic.profile(3)
    plan = build_plan(profile, choice, budget_bytes=320 * KIB)
    cost = evaluate(chain_of(profile), choice, 320 * KIB)
    assert plan.peak_bytes == cost.peak_bytes == max(s.planned_bytes for s in plan.spans)
    assert plan.step_us == profile.step_us + cost.extra_us
    plain = chain_of(profile).peak_bytes((0, 0, 0))
    assert plan.plain_peak.num_bytes == plain == max(s.plain_bytes for s in plan.spans)
    for peak in (plan.peak, plan.plain_peak):
        assert peak.base_bytes + peak.kept_bytes + peak.running_bytes == peak.num_bytes
    assert plan.smallest_bytes == chain_of(profile).smallest()[0]


@pytest.mark.parametrize("choice", [(0, 0, 0), (2, 1, 0), (3, 3, 2)])
def test_spans_are_the_step_in_order_and_without_holes(choice):
    plan = synthetic.plan(choice, budget_bytes=270 * KIB)
    assert [span.label for span in plan.spans] == [
        "before blocks.0",
        "forward of blocks.0",
        "between blocks.0 and blocks.1",
        "forward of blocks.1",
        "between blocks.1 and blocks.2",
        "forward of blocks.2",
        "after blocks.2",
        "backward of blocks.2",
        "backward of blocks.1",
        "backward of blocks.0",
        "backward after blocks.0",
        "optimizer",
    ]
    assert [span.num_alive for span in plan.spans] == [0, 0, 1, 1, 2, 2, 3, 2, 1, 0, 0, 0]
    at = plain_at = 0.0
    for span in plan.spans:
        assert math.isclose(span.start_us, at, abs_tol=1e-9)
        assert math.isclose(span.plain_start_us, plain_at, abs_tol=1e-9)
        at, plain_at = at + span.duration_us, plain_at + span.plain_us
    assert math.isclose(plain_at, plan.plain_step_us)
    assert math.isclose(at, plan.step_us)
    wrapped = [region.is_wrapped for region in plan.regions]
    backwards = [s.phase for s in plan.spans if s.label.startswith("backward of")]
    expected = [Phase.RECOMPUTE if each else Phase.BACKWARD for each in reversed(wrapped)]
    assert backwards == expected
    assert plan.spans[-1].phase is Phase.OPTIMIZER


@pytest.mark.parametrize("num_moments", range(8))
def test_regions_are_laid_out_also_where_moments_are_missing(num_moments):
    profile = synthetic.profile(3)
    some = synthetic.profile(3, moments=profile.moments[len(profile.moments) - num_moments :])
    spans = spans_of(some, (0, 0, 0))
    assert num_moments == 0 or spans[-1].label == "optimizer"
    labels = [span.label for span in spans if "ward of" in span.label]
    assert labels == [
        *("forward of blocks.0", "forward of blocks.1", "forward of blocks.2"),
        *("backward of blocks.2", "backward of blocks.1", "backward of blocks.0"),
    ]


def test_a_peak_may_lie_in_the_optimizer():
    moments = [*synthetic.profile(2).moments[:-1], Moment("optimizer", 0, 999 * KIB)]
    profile = synthetic.profile(2, moments=tuple(moments))
    plan = build_plan(profile, (NOTHING, NOTHING), budget_bytes=1000 * KIB)
    assert plan.peak.phase is plan.plain_peak.phase is Phase.OPTIMIZER
    assert plan.peak_bytes == plan.peak.base_bytes == 999 * KIB


def test_nothing_is_recomputed_at_a_plain_peak():
    plan = synthetic.plan((NOTHING, NOTHING))
    assert plan.peak.phase is Phase.RECOMPUTE
    assert plan.plain_peak.phase is Phase.BACKWARD


def test_a_step_without_regions():
    profile = synthetic.profile(0, regions=(), moments=(Moment("optimizer", 0, 5 * KIB),))
    plan = build_plan(profile, (), budget_bytes=KIB)
    assert (plan.peak_bytes, plan.num_wrapped, plan.ratio) == (5 * KIB, 0, 1.0)
    assert [span.phase for span in plan.spans] == [Phase.OPTIMIZER]


def test_copies_take_memory_and_waits_take_time():
    # 1 GB/s: a block's 40 KiB take 41 us, its forward 110 us: they are out before the next but one.
    profile = synthetic.profile(3)
    roomy = build_plan(profile, (OFFLOAD, OFFLOAD, OFFLOAD), budget_bytes=1000 * KIB)
    assert roomy.wait_us == 0
    at_end = next(span for span in roomy.spans if span.label == "after blocks.2")
    assert at_end.planned_bytes == at_end.base_bytes + 30 * KIB + 40 * KIB
    tight = build_plan(profile, (OFFLOAD, OFFLOAD, OFFLOAD), budget_bytes=roomy.peak_bytes - 5000)
    assert tight.wait_us > 0
    assert tight.peak_bytes <= tight.budget_bytes
    assert math.isclose(tight.spans[-1].start_us + tight.spans[-1].duration_us, tight.step_us)


def by_hand(**changes):
    """Points by name, for blocks that know what two policies come to."""
    nothing, product = (synthetic.structure().options[i] for i in (NOTHING, PRODUCT))
    found = {RECOMPUTE_ALL: nothing, "save matmuls": product}
    structure = dataclasses.replace(synthetic.structure(), by_hand=found)
    profile = synthetic.profile(4, **{"structures": {"s0": structure}, **changes})
    return {point.name: point for point in made_by_hand(profile)}


def test_policies_by_hand_come_to_their_sums():
    points = by_hand()
    assert list(points) == [
        "recompute all",
        *(f"recompute all in every {k}." for k in (2, 3, 4)),
        "save matmuls",
    ]
    base, plain_us = 104 * KIB, 4 * 310.0 + 100.0
    found = {name: (p.peak_bytes, p.step_us - plain_us) for name, p in points.items()}
    # The backward of the last region, after what those before it keep, 10 KiB or, left alone, 90;
    # where every other one is recomputed, that of the last but one, after a gradient of 8 KiB.
    assert found == {
        "recompute all": (base + (3 * 10 + 140) * KIB, 4 * 60.0),
        "recompute all in every 2.": (base + (10 + 90 + 8 + 140) * KIB, 2 * 60.0),
        "recompute all in every 3.": (base + (10 + 2 * 90 + 140) * KIB, 2 * 60.0),
        "recompute all in every 4.": (base + (10 + 2 * 90 + 120) * KIB, 60.0),
        "save matmuls": (base + (3 * 50 + 130) * KIB, 4 * 15.0),
    }


def test_a_policy_by_hand_finds_nothing_in_some_regions():
    """They are left alone then."""
    known = {RECOMPUTE_ALL: synthetic.structure().options[NOTHING]}
    structures = {
        "s0": dataclasses.replace(synthetic.structure(), by_hand=known),
        "s1": dataclasses.replace(synthetic.structure("s1"), reason="no gradient"),
    }
    regions = synthetic.profile(2).regions
    regions = (dataclasses.replace(regions[0], structure="s1"), regions[1])
    everything = made_by_hand(synthetic.profile(2, regions=regions, structures=structures))[0]
    assert everything.peak_bytes == (104 + 90 + 140) * KIB
    assert made_by_hand(synthetic.profile(2)) == []


def test_a_plan_says_why():
    profile = synthetic.profile(3)
    plan = build_plan(profile, (NOTHING, PRODUCT, PLAIN), budget_bytes=400 * KIB)
    text = str(plan.why(profile))
    assert "backward of blocks.2" in text
    assert "aten.addmm.default #0" in text
    assert f"{plan.peak_bytes / KIB:.1f} KiB altogether" in text


@pytest.mark.parametrize(("has_gradients", "expected"), [(False, 1111), (True, 11111)])
def test_what_is_on_the_device_when_a_step_begins(has_gradients, expected):
    persistent = Persistent(1, 10_000, 10, 100_000, 100, 1_000)
    assert persistent.start_bytes(has_gradients=has_gradients) == expected
    profile = synthetic.profile(1, persistent=persistent, has_gradients=has_gradients)
    assert profile.start_bytes == expected


# --- Names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fqn", "expected"),
    [
        ("blocks.0", "blocks.0"),
        ("module.blocks.0", "blocks.0"),
        ("_orig_mod.module.blocks.0", "blocks.0"),
        ("_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module", "blocks.0"),
        ("blocks.0._orig_mod._checkpoint_wrapped_module.mlp", "blocks.0.mlp"),
        ("encoder.module.0", "encoder.module.0"),
        ("module", ""),
    ],
)
def test_plain_names(fqn, expected):
    assert plain_name(fqn) == expected


def test_a_wrapper_and_the_module_inside_are_the_module_inside():
    inner = make_model(False)
    found = places(nn.Sequential().append(inner))
    assert found["0.blocks.1"].module is inner.blocks[1]
    assert found["0.blocks.1"].parents[-1] is inner.blocks
    parallel = nn.DataParallel(inner)
    assert places(parallel)[""].module is inner
    assert places(parallel)["blocks.1"].module is inner.blocks[1]


def test_left_out_modules_are_those_of_the_same_class_outside_of_regions():
    model = make_model(False)
    model.blocks[0].inner = Block(False)
    assert left_out(model, ["blocks.0", "blocks.1"]) == ("blocks.2",)
    assert left_out(model, ["blocks.1", "blocks.2"]) == ("blocks.0", "blocks.0.inner")
    assert left_out(model, []) == ()


# --- Apply ----------------------------------------------------------------------------------


@pytest.fixture
def model():
    return make_model(batch_norm=False)


def is_as_it_was(model):
    outer = [type(block) for block in model.blocks]
    return outer == [Block] * 3 and all("forward" not in vars(b) for b in model.blocks)


@pytest.mark.parametrize("inplace", [False, True])
def test_apply_wraps_as_planned(model, inplace):
    plain = copy.deepcopy(model)
    report = synthetic.plan().apply(model, inplace=inplace)
    assert report.wrapped == ("blocks.0", "blocks.1")
    assert report.skipped == {"blocks.2": "the plan leaves it alone"}
    for each in (plain, model):
        for step in range(2):
            forward(each, step).backward()
    assert_equal(gradients(model), gradients(plain))
    rows = {row.fqn: row for row in region_report(model).rows}
    assert set(rows) == {"blocks.0", "blocks.1"}
    assert all(row.impl is CheckpointImpl.REPLAY for row in rows.values())
    assert (rows["blocks.0"].num_kept, rows["blocks.1"].num_kept) == (0, 1)
    assert (type(model.blocks[0]) is Block) == inplace
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    remove_activation_checkpointing(model)
    assert is_as_it_was(model)


def test_what_is_to_be_offloaded_is(model):
    synthetic.plan((OFFLOAD, PRODUCT, PLAIN)).apply(model)
    policies = [block._checkpoint_region.policy for block in model.blocks[:2]]
    name = ("aten.addmm.default", 0)
    assert [policy.decisions for policy in policies] == [
        {name: CheckpointPolicy.MUST_CPU_OFFLOAD},
        {name: CheckpointPolicy.MUST_SAVE},
    ]


def test_a_plan_that_leaves_everything_alone_wraps_nothing(model):
    report = synthetic.plan((PLAIN, PLAIN, PLAIN)).apply(model)
    assert report.wrapped == ()
    assert list(report.skipped) == ["blocks.0", "blocks.1", "blocks.2"]
    assert is_as_it_was(model)


def test_a_shared_module_gets_one_wrapper(model):
    model.again = model.blocks[0]
    plan = synthetic.plan()
    plan.apply(model)
    assert model.again is model.blocks[0]
    assert type(model.blocks[0]) is not Block


def test_a_plan_fits_a_model_in_data_parallel_and_a_compiled_one(model):
    parallel = nn.DataParallel(model)
    assert synthetic.plan().apply(parallel).wrapped == ("module.blocks.0", "module.blocks.1")
    compiled = torch.compile(make_model(False), backend="eager")
    assert synthetic.plan().apply(compiled).wrapped == ("blocks.0", "blocks.1")


def test_a_compiled_region_is_wrapped_in_place(model):
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    outer = model.blocks[0]
    synthetic.plan().apply(model)
    assert model.blocks[0] is outer
    assert "forward" in vars(outer._orig_mod)


def test_a_plan_for_another_model_wraps_nothing_and_says_what_differs(model):
    model.blocks.append(Block(False))
    model.blocks[1] = nn.Linear(8, 8)
    plan = synthetic.plan((NOTHING,) * 5)
    with pytest.raises(PlanMismatchError) as caught:
        plan.apply(model)
    error = caught.value
    assert error.missing == ("blocks.4",)
    assert error.other_class == {"blocks.1": ("Block", "Linear")}
    assert error.unplanned == ()
    assert error.fqn == "blocks.4"
    text = str(error)
    assert "planned, but not in the model: blocks.4" in text
    assert "of another class: blocks.1 (Block planned, Linear there)" in text
    assert "make a plan for this model" in text
    assert type(model.blocks[0]) is Block
    assert pickle.loads(pickle.dumps(error)).missing == error.missing


def test_modules_that_the_plan_does_not_know_are_an_error(model):
    with pytest.raises(PlanMismatchError, match=r"in the model, but not planned: blocks\.2") as e:
        synthetic.plan((NOTHING, PRODUCT)).apply(model)
    assert e.value.unplanned == ("blocks.2",)
    assert is_as_it_was(model)


@pytest.mark.parametrize("known", [("blocks.2",), None])
def test_modules_that_were_left_out_are_no_error(model, known):
    profile = synthetic.profile(2, left_out=known)
    plan = build_plan(profile, (NOTHING, PRODUCT), budget_bytes=400 * KIB)
    assert plan.apply(model).wrapped == ("blocks.0", "blocks.1")


def test_long_lists_of_names_are_cut(model):
    with pytest.raises(PlanMismatchError, match=r"blocks\.10, and 4 more"):
        synthetic.plan((NOTHING,) * 15).apply(model)


def wrap_by_apply(model):
    apply_activation_checkpointing(model, check_fn=lambda m: m is model.blocks[1])
    return "blocks.1"


def wrap_in_place(model):
    checkpoint_wrapper(model.blocks[2], inplace=True)
    return "blocks.2"


def wrap_offloading(model):
    model.blocks[0] = offload_wrapper(model.blocks[0])
    return "blocks.0"


def wrap_by_torch(model):
    model.blocks[0] = torch_checkpoint_wrapper(model.blocks[0])
    return "blocks.0"


def wrap_outside_of_regions(model):
    model.embed = checkpoint_wrapper(model.embed)
    return "embed"


@pytest.mark.parametrize(
    "wrap",
    [wrap_by_apply, wrap_in_place, wrap_offloading, wrap_by_torch, wrap_outside_of_regions],
)
def test_what_is_wrapped_already_is_an_error(model, wrap):
    fqn = wrap(model)
    blocks = list(model.blocks)
    with pytest.raises(PlanMismatchError, match=r"remove_activation_checkpointing\(model\)") as e:
        synthetic.plan().apply(model)
    assert e.value.wrapped == (fqn,)
    assert list(model.blocks) == blocks


def test_a_plan_is_applied_once(model):
    plan = synthetic.plan()
    plan.apply(model)
    with pytest.raises(PlanMismatchError, match=r"wrapped already: blocks\.0, blocks\.1"):
        plan.apply(model)


def test_a_wrapped_root_is_an_error(model):
    with pytest.raises(PlanMismatchError, match=r"\(the root\)"):
        synthetic.plan().apply(checkpoint_wrapper(model))


def test_transformers_own_checkpointing_is_an_error(model):
    model.gradient_checkpointing = True
    with pytest.raises(PlanMismatchError, match=r"gradient_checkpointing_disable\(\)"):
        synthetic.plan().apply(model)
    assert is_as_it_was(model)


def test_a_region_that_is_the_root_is_missing(model):
    profile = synthetic.profile(1)
    root = profile.regions[0].__class__("", "s0", 0, 0)
    plan = build_plan(synthetic.profile(1, regions=(root,)), (NOTHING,), budget_bytes=KIB)
    with pytest.raises(PlanMismatchError) as caught:
        plan.apply(model)
    assert caught.value.missing == ("",)


def test_only_modules_can_be_planned():
    with pytest.raises(TypeError, match="expected an nn"):
        synthetic.plan().apply("model")


class Longer(Block):
    """A Block with one product more, under the name that the plan knows."""

    def forward(self, x):
        return super().forward(self.up(x)[:, :8])


Longer.__name__ = "Block"


def test_strict_raises_where_a_region_calls_other_operators(model):
    model.blocks[1] = Longer(False)
    synthetic.plan().apply(model, strict=True)
    with pytest.raises(WrapperError, match=r"aten\.addmm\.default is called 3 times, expected 2"):
        forward(model, 0).backward()


def test_without_strict_such_a_region_warns(model):
    model.blocks[1] = Longer(False)
    plain = copy.deepcopy(model)
    synthetic.plan().apply(model)
    with pytest.warns(UserWarning, match="called 3 times, expected 2"):
        forward(model, 0).backward()
    forward(plain, 0).backward()
    assert_equal(gradients(model), gradients(plain))


def test_verify_is_passed_on(model):
    synthetic.plan().apply(model, verify="first")
    assert model.blocks[0]._checkpoint_region.verify == "first"
    other = make_model(False)
    synthetic.plan().apply(other)
    assert other.blocks[0]._checkpoint_region.verify == "never"


# --- Save and load --------------------------------------------------------------------------


def full_plan():
    point = Point("full recompute", 300 * KIB, 1210.5)
    return synthetic.plan(
        (OFFLOAD, PRODUCT, PLAIN), frontier=[(300_000, 1200.0)], hand_made=[point], gap_us=1
    )


def test_a_plan_comes_back_equal(tmp_path):
    plan = full_plan()
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.hash == plan.hash
    assert again.regions[0].decisions[0].action is plan.regions[0].decisions[0].action
    assert type(again.gap_us) is float
    assert os.listdir(tmp_path) == ["plan.json"]
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == VERSION


def test_the_hash_tells_plans_apart():
    hashes = {synthetic.plan(choice).hash for choice in [(2, 1, 0), (2, 2, 0), (2, 3, 0)]}
    assert len(hashes) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", each) for each in hashes)
    assert synthetic.plan().hash == synthetic.plan().hash


def test_equal_plans_have_one_hash_in_whatever_order_their_keys_are():
    plan = synthetic.plan((PRODUCT, PLAIN))
    first = [
        dataclasses.replace(plan.regions[0], counts=c) for c in ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    ]
    one, other = (dataclasses.replace(plan, regions=(r, plan.regions[1])) for r in first)
    assert one == other
    assert one.hash == other.hash


def test_numbers_of_numpy_become_plain_ones(tmp_path):
    np = pytest.importorskip("numpy")
    given = {"smallest_bytes": np.int64(7), "gap_us": np.float64(2.5), "budget_bytes": 400 * KIB}
    plan = synthetic.plan(**given)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_a_failed_save_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    path.write_text("old")

    def fail(handle):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        synthetic.plan().save(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def set_in(data, path, value):
    *parents, last = path
    for key in parents:
        data = data[key]
    data[last] = value


@pytest.mark.parametrize(
    ("path", "value", "where", "what"),
    [
        (["version"], 99, "$.version", "has format 99, this package reads format 1"),
        (["version"], "1", "$.version", "expected an integer"),
        (["model_class"], 3, "$.model_class", "expected a text, got 3"),
        (["is_measured"], 1, "$.is_measured", "expected true or false, got 1"),
        (["budget_bytes"], -1, "$.budget_bytes", "expected an integer of at least 0, got -1"),
        (["budget_bytes"], True, "$.budget_bytes", "expected an integer of at least 0, got true"),
        (["budget_bytes"], 1.5, "$.budget_bytes", "expected an integer of at least 0, got 1.5"),
        (["step_us"], math.nan, "$.step_us", "expected a finite number of at least 0, got NaN"),
        (["gap_us"], math.inf, "$.gap_us", "expected a finite number"),
        (["step_us"], -0.5, "$.step_us", "at least 0, got -0.5"),
        (["step_us"], None, "$.step_us", "got null"),
        (["regions"], {}, "$.regions", "expected a list, got an object"),
        (["regions", 2], [1], "$.regions[2]", "expected an object, got a list of 1"),
        (["regions", 0, "kept_bytes"], "1", "$.regions[0].kept_bytes", 'got "1"'),
        (["regions", 1, "extra_us"], math.nan, "$.regions[1].extra_us", "expected a finite number"),
        (["regions", 1, "fqn"], "blocks.0", "$.regions[1].fqn", "blocks.0 is there twice"),
        (["regions", 0, "decisions"], 7, "$.regions[0].decisions", "expected a list"),
        (
            ["regions", 0, "decisions", 0, "action"],
            "drop",
            "$.regions[0].decisions[0].action",
            "expected one of 'save', 'offload', got \"drop\"",
        ),
        (
            ["regions", 1, "counts", "aten.addmm.default"],
            -2,
            '$.regions[1].counts["aten.addmm.default"]',
            "at least 0, got -2",
        ),
        (["counts"], "some", "$.counts", "expected 'all' or 'activations'"),
        (["peak", "phase"], ["a"], "$.peak.phase", "got a list of 1"),
        (["peak", "color"], 1, "$.peak", "unknown keys: color"),
        (["left_out"], "x", "$.left_out", "expected a list"),
    ],
)
def test_a_damaged_plan_says_where_and_what(tmp_path, path, value, where, what):
    data = json.loads(full_plan().to_json())
    set_in(data, path, value)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data))
    with pytest.raises(schema.FormatError) as caught:
        Plan.load(file)
    assert caught.value.path == where
    assert what in str(caught.value)
    assert str(caught.value).startswith(where)
    assert str(file) in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("path", [["budget_bytes"], ["regions", 1, "fqn"], ["persistent"]])
def test_a_missing_key_is_named(path):
    data = json.loads(full_plan().to_json())
    *parents, last = path
    holder = data
    for key in parents:
        holder = holder[key]
    del holder[last]
    with pytest.raises(schema.FormatError, match=f"missing keys: {last}"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "not JSON"),
        ("[1, 2", "not JSON"),
        ("[]", "expected an object, got a list of 0"),
        ("null", "expected an object, got null"),
        ('{"version": 2}', "has format 2"),
        ('{"version": 1, "version": 1}', "keys given twice in one object: version"),
        ("[" * 100_000, "too deeply nested"),
        ("9" * 5000, "not JSON"),
    ],
)
def test_what_is_no_plan_is_refused(text, what):
    with pytest.raises(schema.FormatError, match=re.escape(what)):
        Plan.from_json(text)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00garbage\x80")
    with pytest.raises(schema.FormatError, match="not JSON"):
        Plan.load(tmp_path / "plan.json")


def test_profiles_travel_as_json_too():
    profile = synthetic.profile(3)
    text = schema.dump(profile)
    assert schema.read(type(profile), schema.load(text)) == profile


# --- Compare --------------------------------------------------------------------------------


def test_a_comparison_has_relative_errors():
    plan = synthetic.plan()
    comparison = plan.compare(Measured(plan.peak_bytes, 2 * 1105.0, 2 * 1030.0))
    assert comparison.peak_error == 0
    assert comparison.step_error == 1.0
    assert comparison.ratio_error == 0
    assert comparison.is_within_budget
    assert comparison.advice == ()
    assert "the plan holds" in str(comparison)
    assert "+100.00%" in str(comparison)


def test_a_comparison_says_what_is_worth_doing():
    plan = synthetic.plan(margin_bytes=KIB)
    excess = plan.compare(Measured(plan.budget_bytes + 3 * KIB, plan.step_us))
    assert not excess.is_within_budget
    assert any("margin of 4.0 KiB" in each for each in excess.advice)
    assert any("profile again" in each for each in excess.advice)
    assert excess.ratio_error is None
    slow = plan.compare(Measured(plan.peak_bytes, 2 * plan.step_us))
    (advice,) = slow.advice
    assert "calibrate()" in advice
    measured = build_plan(synthetic.profile(3, is_measured=True), (2, 1, 0), budget_bytes=400 * KIB)
    (advice,) = measured.compare(Measured(plan.peak_bytes, 2 * plan.step_us)).advice
    assert "profile again on this machine" in advice


def test_what_the_budget_does_not_count_does_not_exceed_it():
    plan = synthetic.plan(budget_bytes=200 * KIB, counts="activations", uncounted_bytes=104 * KIB)
    assert plan.compare(Measured(plan.peak_bytes, plan.step_us)).is_within_budget


def test_nothing_of_it_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "wrapped" in repr(synthetic.plan())
