"""FullyShardedDataParallel over wrapped blocks: gradients and state-dict names.

FSDP1 is in maintenance and torch's own wrapper is what its policies were written for, so this
file shows only that what works there works here. The update by SGD with a learning rate of one
shows the gradients, also where ``use_orig_params=False`` leaves one flat parameter.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from tests.distributed.models import (
    IMPLS,
    NUM_BLOCKS,
    Block,
    assert_equal,
    forward,
    make_model,
    single_process,
)
from wrappers import apply_activation_checkpointing

NUM_UNITS = NUM_BLOCKS + 1


def is_block(module: nn.Module) -> bool:
    return isinstance(module, Block)


def is_block_unit(module: nn.Module) -> bool:
    return isinstance(module, FullyShardedDataParallel) and isinstance(module.module, Block)


def make_fsdp(order, impl, use_orig_params):
    model = make_model(batch_norm=False)
    if order in ("inside", "in_place"):
        apply_activation_checkpointing(
            model, check_fn=is_block, impl=impl, inplace=order == "in_place"
        )
    fsdp = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )
    if order == "after":  # the usual recipe: shard, then wrap the blocks inside their units
        apply_activation_checkpointing(fsdp, check_fn=is_block, impl=impl)
    if order == "outside":
        apply_activation_checkpointing(fsdp, check_fn=is_block_unit, impl=impl)
    return fsdp


def run_fsdp1(order, impl, use_orig_params, max_norm=None):
    with warnings.catch_warnings():
        # torch 2.13: about FSDP1 itself, and state-dict tensors that will be DTensors.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        fsdp = make_fsdp(order, impl, use_orig_params)
        num_units = len(FullyShardedDataParallel.fsdp_modules(fsdp))
        forward(fsdp, dist.get_rank()).backward()
        norm = None if max_norm is None else fsdp.clip_grad_norm_(max_norm)
        torch.optim.SGD(fsdp.parameters(), lr=1.0).step()
        return num_units, norm, {name: t.clone() for name, t in fsdp.state_dict().items()}


def step(model, rank):
    forward(model, rank).backward()


ORDERS = ("inside", "in_place", "after", "outside")
CASES = [(order, impl) for order in ORDERS for impl in IMPLS]


@pytest.mark.parametrize("use_orig_params", [True, False], ids=["orig", "flat"])
@pytest.mark.parametrize(("order", "impl"), CASES)
def test_updated_state_dict_equals_a_single_process(ranks, order, impl, use_orig_params):
    plain = make_model(batch_norm=False)
    gradients = single_process(plain, step).gradients
    expected = {name: value - gradients[name] for name, value in plain.state_dict().items()}
    for _, _, state in ranks(run_fsdp1, order, impl, use_orig_params):
        assert_equal(state, expected)


@pytest.mark.parametrize(("order", "impl"), CASES)
def test_fsdp_finds_all_its_units_below_the_root(ranks, order, impl):
    """What FSDP does to all units at once, clipping for one, must not miss a wrapped one."""
    gradients = single_process(make_model(batch_norm=False), step).gradients
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for num_units, got, _ in ranks(run_fsdp1, order, impl, True, 1e-3):
        assert num_units == NUM_UNITS
        torch.testing.assert_close(got, norm)
