"""FSDP2 around, inside and beside activation checkpointing: gradients, collectives, no alarms.

Three ways to combine the two on a block:

* *inside*: ``fully_shard(checkpoint_wrapper(block))``. FSDP's hooks stand outside the region.
* *outside*: ``checkpoint_wrapper(fully_shard(block))``. FSDP's hooks stand in the region and run
  again in the recompute.
* *in place*, before or after ``fully_shard``: the hooks stand outside the region.
"""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)

from tests.distributed.models import (
    IMPLS,
    NUM_BLOCKS,
    Model,
    assert_equal,
    buffers,
    data,
    forward,
    gradients,
    make_model,
    single_process,
)
from tests.distributed.ranks import RankFailedError
from wrappers import CheckpointImpl, checkpoint_wrapper

ORDERS = ("inside", "outside", "in_place_before", "in_place_after")
REENTRANT, NO_REENTRANT = IMPLS
NAMES = [impl.name for impl in IMPLS]


class CountingAllGather(DefaultAllGather):
    def __init__(self, counts, key):
        self.counts, self.key = counts, key

    def __call__(self, *args, **kwargs):
        self.counts[self.key] += 1
        return super().__call__(*args, **kwargs)


class CountingReduceScatter(DefaultReduceScatter):
    def __init__(self, counts, key):
        self.counts, self.key = counts, key

    def __call__(self, *args, **kwargs):
        self.counts[self.key] += 1
        return super().__call__(*args, **kwargs)


def shard(model: Model, order: str, impl: CheckpointImpl, *, counts=None, **options) -> Model:
    """Apply ``fully_shard`` and checkpointing to each block, then ``fully_shard`` to the root."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    units = {}
    for index, block in enumerate(model.blocks):
        outer = block
        if order in ("inside", "in_place_before"):
            outer = checkpoint_wrapper(block, impl=impl, inplace=order != "inside")
        units[f"block {index}"] = fully_shard(outer, mesh=mesh, **options)
        if order in ("outside", "in_place_after"):
            outer = checkpoint_wrapper(block, impl=impl, inplace=order != "outside")
        model.blocks[index] = outer
    units["root"] = fully_shard(model, mesh=mesh, **options)
    if counts is not None:
        for name, unit in units.items():
            unit.set_custom_all_gather(CountingAllGather(counts, (name, "all-gather")))
            unit.set_custom_reduce_scatter(CountingReduceScatter(counts, (name, "reduce-scatter")))
    return model


# --- Steps: each runs on plain models in this process and on a sharded one in every rank --------


def one_step(model, rank, micro_batch=0):
    forward(model, rank, micro_batch).backward()


def accumulate(model, rank):
    """Two micro-batches; FSDP reduces once, in the second backward."""
    for micro_batch in range(2):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(micro_batch == 1)
        one_step(model, rank, micro_batch)


def two_forwards(model, rank):
    """Two frames of each region are alive, over one set of parameters."""
    (forward(model, rank, 0) + forward(model, rank, 1)).backward()


def two_backwards(model, rank):
    """The first backward frees the parameters under the second's frames and reduces."""
    first, second = forward(model, rank, 0), forward(model, rank, 1)
    first.backward()
    second.backward()


def evaluate_between(model, rank):
    """An evaluation between forward and backward gathers and frees the parameters once more."""
    loss = forward(model, rank)
    model.eval()
    with torch.no_grad():
        model(data(rank))
    model.train()
    loss.backward()


STEPS = {
    step.__name__: step
    for step in (one_step, accumulate, two_forwards, two_backwards, evaluate_between)
}


def freeze_first_block(model):
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)


def freeze_half_of_each_block(model):
    for block in model.blocks:
        block.up.requires_grad_(False)


def no_change(model):
    pass


def run_sharded(order, impl, step, prepare=no_change, batch_norm=True, options=None):
    model = make_model(batch_norm)
    prepare(model)
    shard(model, order, impl, **(options or {}))
    step(model, dist.get_rank())
    return gradients(model), buffers(model)


def reference(impl, step):
    """A single process's result, its gradients added up in the order in which FSDP does it.

    Where FSDP reduces more than once in a step, the sum over micro-batches is taken after the
    mean over ranks: in two backwards, and in the backward through two REENTRANT nodes of a block.
    """
    expected = single_process(make_model(), step)
    if step in (two_forwards, two_backwards):
        first, second = (
            single_process(make_model(), partial(one_step, micro_batch=index)).gradients
            for index in range(2)
        )
        for name in first:
            is_in_node = impl is REENTRANT and name.startswith("blocks.")
            if step is two_backwards or is_in_node:
                expected.gradients[name] = first[name] + second[name]
    return expected


def assert_as_expected(results, expected):
    for rank, (got_gradients, got_buffers) in enumerate(results):
        assert_equal(got_gradients, expected.gradients)
        assert_equal(got_buffers, expected.buffers[rank])


def is_unsound(order, impl, step):
    """FSDP2 loses gradients here, whose checkpointing whosoever: see the test that says so."""
    return order == "outside" and impl is REENTRANT and step is two_forwards


COMBINATIONS = [
    pytest.param(order, impl, step, id=f"{impl.name}-{order}-{name}")
    for impl in IMPLS
    for order in ORDERS
    for name, step in STEPS.items()
    if not is_unsound(order, impl, step)
]


@pytest.mark.parametrize("reshard", [True, False], ids=["reshard", "keep"])
@pytest.mark.parametrize(("order", "impl", "step"), COMBINATIONS)
def test_gradients_and_buffers_equal_a_single_process_bit_by_bit(ranks, order, impl, step, reshard):
    options = {"reshard_after_forward": reshard}
    results = ranks(run_sharded, order, impl, step, no_change, True, options)
    assert_as_expected(results, reference(impl, step))


def test_the_two_halves_are_the_whole_batch():
    """What the other tests compare with is a plain step over the global batch, up to rounding."""
    model = make_model().eval()
    expected = single_process(model, one_step).gradients
    model(torch.cat([data(0), data(1)])).square().mean().backward()
    torch.testing.assert_close(gradients(model), expected)


def test_losing_gradients_is_refused(ranks):
    """REENTRANT around an FSDP module, met twice in one backward.

    The rerun of the first frame to come makes FSDP's pre-backward hook; until the root's backward
    is over FSDP then takes every further rerun for one inside its own backward, and reduces
    nothing: the other micro-batch's gradients are gone. With torch's wrapper they are, silently.
    """
    with pytest.raises(RankFailedError, match=r"CheckpointError: region.*FSDP") as caught:
        ranks(run_sharded, "outside", REENTRANT, two_forwards)
    assert "failed in 2 of 2 ranks" in str(caught.value)


@pytest.mark.parametrize("prepare", [freeze_first_block, freeze_half_of_each_block])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("impl", IMPLS, ids=NAMES)
def test_frozen_parameters(ranks, impl, order, prepare):
    plain = make_model()
    prepare(plain)
    results = ranks(run_sharded, order, impl, one_step, prepare)
    assert_as_expected(results, single_process(plain, one_step))


# --- Mixed precision --------------------------------------------------------------------------


def bf16_step(model, rank):
    """What FSDP does with ``param_dtype`` bf16 and ``reduce_dtype`` fp32, written out."""
    model.bfloat16().register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
    one_step(model, rank)
    gradients = [parameter.grad.float() for parameter in model.parameters()]
    for parameter, gradient in zip(model.float().parameters(), gradients, strict=True):
        parameter.grad = gradient


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("impl", IMPLS, ids=NAMES)
def test_mixed_precision(ranks, impl, order):
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results = ranks(run_sharded, order, impl, one_step, no_change, False, {"mp_policy": bf16})
    assert_as_expected(results, single_process(make_model(batch_norm=False), bf16_step))


# --- Training ---------------------------------------------------------------------------------


def train(order, impl, reshard):
    model = shard(make_model(), order, impl, reshard_after_forward=reshard)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    losses = []
    for step in range(3):
        loss = forward(model, dist.get_rank(), step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def plain_losses(ranks):
    losses = ranks(train, "plain", None, True)
    assert len({loss for per_rank in losses for loss in per_rank}) == 6
    return losses


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("impl", IMPLS, ids=NAMES)
def test_losses_equal_plain_fsdp_to_the_last_digit(ranks, plain_losses, impl, order, reshard):
    assert ranks(train, order, impl, reshard) == plain_losses


# --- Collectives ------------------------------------------------------------------------------


def count(order, impl, reshard):
    """Collectives of the second of two steps; the first may do work that is done once."""
    counts = Counter()
    model = shard(make_model(), order, impl, counts=counts, reshard_after_forward=reshard)
    one_step(model, dist.get_rank())
    counts.clear()
    one_step(model, dist.get_rank())
    return dict(counts)


@pytest.mark.parametrize(("reshard", "num_all_gathers"), [(True, 2), (False, 1)])
@pytest.mark.parametrize(
    ("order", "impl"),
    [("plain", None), *((order, impl) for order in ORDERS for impl in IMPLS)],
)
def test_collectives_of_a_layer_are_those_of_plain_fsdp(
    ranks, order, impl, reshard, num_all_gathers
):
    """One all-gather in forward, one in backward if FSDP freed the parameters; one reduction."""
    units = [f"block {index}" for index in range(NUM_BLOCKS)] + ["root"]
    expected = {(unit, "all-gather"): num_all_gathers for unit in units}
    expected |= {(unit, "reduce-scatter"): 1 for unit in units}
    assert ranks(count, order, impl, reshard) == [expected, expected]


# --- Attributes of a module that FSDP manages


class Counting(Model):
    """Its blocks scale by the number of their call."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        for block in self.blocks:
            block.num_calls = 0
            block.register_forward_pre_hook(count_call)


def count_call(block, args):
    block.num_calls += 1
    return (args[0] * block.num_calls,)


def make_counting():
    torch.manual_seed(0)
    return Counting()


def run_counting(order, impl):
    model = shard(make_counting(), order, impl)
    one_step(model, dist.get_rank())
    return gradients(model), [block.num_calls for block in model.blocks]


@pytest.mark.parametrize("order", ["outside"])
@pytest.mark.parametrize("impl", IMPLS, ids=NAMES)
def test_counters_of_sharded_modules(ranks, impl, order):
    expected = single_process(make_counting(), one_step).gradients
    for got, num_calls in ranks(run_counting, order, impl):
        assert num_calls == [1] * NUM_BLOCKS
        assert_equal(got, expected)
