"""State dicts of wrapped and sharded models have the plain model's names and go both ways."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tests.distributed.models import (
    IMPLS,
    assert_equal,
    forward,
    make_model,
    single_process,
)
from tests.distributed.test_fsdp2 import ORDERS, shard

NO_REENTRANT = IMPLS[1]
ALL_ORDERS = ("plain", *ORDERS)
FULL = StateDictOptions(full_state_dict=True)


def make_trained(order, batch_norm=True):
    """A sharded model and its optimizer after one step."""
    model = shard(make_model(batch_norm), order, NO_REENTRANT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    forward(model, dist.get_rank()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def whole(state):
    """Every tensor of a state dict as a plain tensor; a collective where it is sharded."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    if hasattr(state, "full_tensor"):
        return state.full_tensor()
    return state.clone() if isinstance(state, torch.Tensor) else state


def full_states(order):
    model, optimizer = make_trained(order)
    own = whole(model.state_dict())
    full = get_model_state_dict(model, options=FULL)
    sharded = get_model_state_dict(model)
    kinds = {name: type(value).__name__ for name, value in sharded.items()}
    optimizer_state = get_optimizer_state_dict(model, optimizer)
    return own, full, whole(sharded), kinds, whole(optimizer_state)


@pytest.fixture(scope="module")
def plain_states(ranks):
    return ranks(full_states, "plain")


def plain_after_one_step(batch_norm=True):
    """What training must have led to: the single-process model after the same step."""
    model = make_model(batch_norm)
    gradients = single_process(model, lambda m, rank: forward(m, rank).backward()).gradients
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name]
    optimizer.step()
    return model


@pytest.mark.parametrize("order", ORDERS)
def test_names_and_values_equal_those_of_the_plain_model(ranks, plain_states, order):
    names = list(make_model().state_dict())
    for got, expected in zip(ranks(full_states, order), plain_states, strict=True):
        own, full, sharded, kinds, optimizer_state = got
        plain_own, plain_full, plain_sharded, plain_kinds, plain_optimizer_state = expected
        assert list(own) == list(full) == list(sharded) == names
        assert kinds == plain_kinds
        assert "DTensor" in kinds.values()
        for mine, theirs in ((own, plain_own), (full, plain_full), (sharded, plain_sharded)):
            assert_equal(mine, theirs)
        assert optimizer_state["param_groups"] == plain_optimizer_state["param_groups"]
        assert optimizer_state["state"].keys() == plain_optimizer_state["state"].keys()
        for name, state in optimizer_state["state"].items():
            assert_equal(state, plain_optimizer_state["state"][name])


@pytest.mark.parametrize("order", ORDERS)
def test_a_full_state_dict_loads_into_a_plain_model(ranks, order):
    full = ranks(full_states, order)[0][1]
    plain = make_model()
    plain.load_state_dict(full, strict=True)
    parameters = dict(plain.named_parameters())
    expected = dict(plain_after_one_step().named_parameters())
    assert_equal(parameters, expected)


def set_full_state(order, state, optimizer_state):
    model, optimizer = make_trained(order)
    missing = set_model_state_dict(model, state, options=FULL)
    assert (missing.missing_keys, missing.unexpected_keys) == ([], [])
    set_optimizer_state_dict(model, optimizer, optimizer_state, options=FULL)
    return whole(model.state_dict()), whole(get_optimizer_state_dict(model, optimizer)["state"])


@pytest.mark.parametrize("order", ORDERS)
def test_a_plain_models_state_dicts_load_into_a_sharded_one(ranks, order):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        forward(model, 5).backward()
        optimizer.step()
    state = get_model_state_dict(model)
    optimizer_state = get_optimizer_state_dict(model, optimizer)
    for got, got_optimizer in ranks(set_full_state, order, state, optimizer_state):
        assert_equal(got, state)
        assert got_optimizer.keys() == optimizer_state["state"].keys()
        for name, values in got_optimizer.items():
            assert_equal(values, optimizer_state["state"][name])


def save_and_load(writer, reader, path):
    """Save from one order, load into another; return both wholes.

    Without batch norm: its statistics differ between ranks, and a file keeps one rank's.
    """
    model, optimizer = make_trained(writer, batch_norm=False)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.save(state, checkpoint_id=path)
    other, other_optimizer = make_trained(reader, batch_norm=False)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    loaded = {
        "model": get_model_state_dict(other),
        "optimizer": get_optimizer_state_dict(other, other_optimizer),
    }
    dcp.load(loaded, checkpoint_id=path)
    set_model_state_dict(other, loaded["model"])
    set_optimizer_state_dict(other, other_optimizer, loaded["optimizer"])
    return whole(model.state_dict()), whole(other.state_dict())


@pytest.mark.parametrize(
    ("writer", "reader"),
    [*(("plain", order) for order in ORDERS), *((order, "plain") for order in ORDERS)],
)
def test_sharded_files_are_read_by_any_order(ranks, tmp_path, writer, reader):
    for saved, loaded in ranks(save_and_load, writer, reader, tmp_path / "files"):
        assert_equal(loaded, saved)
        assert_equal(loaded, plain_after_one_step(batch_norm=False).state_dict())


def save(order, path):
    model, _ = make_trained(order, batch_norm=False)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("order", ORDERS)
def test_sharded_files_are_read_without_a_process_group(ranks, tmp_path, order):
    ranks(save, order, tmp_path / "files")
    plain = make_model(batch_norm=False)
    state = {"model": copy.deepcopy(plain.state_dict())}
    dcp.load(state, checkpoint_id=tmp_path / "files", no_dist=True)
    plain.load_state_dict(state["model"], strict=True)
    assert_equal(plain.state_dict(), plain_after_one_step(batch_norm=False).state_dict())
