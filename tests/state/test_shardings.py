"""State checkpoints of models that FSDP1, HSDP, DDP and torch.compile have changed.

Each is saved under the plain model's names, loaded by a plain model in one process, and by the
same kind of job; the optimizer's state too, bit by bit.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from tests.state.jobs import LAYOUTS
from wrappers import apply_activation_checkpointing, checkpoint_wrapper, state
from wrappers.state import CheckpointException

pytestmark = pytest.mark.usefixtures("seeded")


class Tied(nn.Module):
    """Token models' usual parts: a tied head, blocks, something frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(8, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(2))
        self.norm = nn.LayerNorm(6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 8, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.frozen(self.norm(x)))


def fsdp1(model, **kwargs):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **kwargs)


def hybrid(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


KINDS = {
    "DDP": nn.parallel.DistributedDataParallel,
    "FSDP1": lambda model: fsdp1(
        model, use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy({nn.Sequential})
    ),
    "FSDP1, flat": lambda model: fsdp1(
        model, use_orig_params=False, ignored_states=list(model.frozen.parameters())
    ),
    "HSDP": hybrid,
}


def make_job(kind):
    warnings.filterwarnings("ignore", ".*_get_pg_default_device.*", UserWarning)
    warnings.filterwarnings("ignore", "Multiple backends are registered", UserWarning)
    warnings.filterwarnings("ignore", ".*FSDP.state_dict_type.*", FutureWarning)
    warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
    model = Tied()
    is_block = lambda module: isinstance(module, nn.Sequential)  # noqa: E731
    apply_activation_checkpointing(model, check_fn=is_block)
    model = KINDS[kind](model)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=0.1)


def train(model, optimizer, seed):
    tokens = torch.randint(8, (3,), generator=torch.Generator().manual_seed(seed))
    model(tokens).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def contents(model, optimizer):
    """Whole tensors by name, from torch's own functions."""
    options = StateDictOptions(full_state_dict=True)
    weights, of_optimizer = get_state_dict(model, optimizer, options=options)
    states = {
        f"{name}: {key}": value
        for name, values in of_optimizer["state"].items()
        for key, value in values.items()
    }
    return copy.deepcopy({**weights, **states})


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def save_and_load(path, kind, layout, num_steps):
    model, optimizer = make_job(kind)
    for step in range(num_steps):
        train(model, optimizer, step)
    state.save(path, model, optimizer, layout=layout)
    if not num_steps:
        return None
    expected = contents(model, optimizer)
    other, loaded = make_job(kind)
    train(other, loaded, 7)
    state.load(path, other, loaded)
    assert_same(contents(other, loaded), expected)
    return expected


def check(run, path, kind, layout, num_steps):
    expected = run(save_and_load, path, kind, layout, num_steps)[0]
    model = Tied()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, 9)
    state.load(path, model, optimizer)
    if num_steps:
        assert_same(contents(model, optimizer), expected)
    else:
        assert_same(dict(model.state_dict()), dict(Tied().state_dict()))
        assert not optimizer.state


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["DDP", "FSDP1", "FSDP1, flat"])
def test_other_shardings(ranks, tmp_path, kind, layout):
    check(ranks, tmp_path / "x", kind, layout, 2)


@pytest.mark.parametrize("kind", ["DDP", "FSDP1"])
def test_optimizers_before_their_first_step(ranks, tmp_path, kind):
    """FSDP1 wants a state for every parameter, or for none."""
    check(ranks, tmp_path / "x", kind, "dcp", 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_replicated_and_sharded(ranks4, tmp_path, layout):
    check(ranks4, tmp_path / "x", "HSDP", layout, 2)


# --- A fault beside a collective ----------------------------------------------------------------


class FailingReader(FileSystemReader):
    def read_metadata(self, *args, **kwargs):
        if dist.get_rank() == 1:
            raise OSError("unreadable")
        return super().read_metadata(*args, **kwargs)


def load_with_a_fault(path):
    model, optimizer = make_job("FSDP1")
    train(model, optimizer, 0)
    state.save(path, model, optimizer)
    with pytest.raises(CheckpointException) as caught:
        state.load(path, model, optimizer, storage_reader=FailingReader(path))
    return {rank: repr(error) for rank, (error, _) in caught.value.failures.items()}


def test_a_fault_before_the_collectives_of_a_model(ranks, tmp_path):
    """FSDP1 makes its states in collectives, which a rank that has failed does not join."""
    expected = {1: "OSError('unreadable')"}
    assert ranks(load_with_a_fault, tmp_path / "x") == [expected, expected]


# --- torch.compile ------------------------------------------------------------------------------


def compiled(module):
    return torch.compile(module, backend="eager")


def compile_child(model):
    model[1] = compiled(model[1])
    return model


def wrap_child(model):
    model[1] = checkpoint_wrapper(model[1])
    return model


#: What is compiled and what is wrapped, in every order.
ORDERS = {
    "whole": compiled,
    "in place": lambda model: model.compile(backend="eager") or model,
    "child": compile_child,
    "wrapped, then compiled": lambda model: compile_child(wrap_child(model)),
    "compiled, then wrapped": lambda model: wrap_child(compile_child(model)),
    "child and whole": lambda model: compiled(wrap_child(compile_child(model))),
}


def make_compiled(order=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = ORDERS[order](model) if order else model
    return model, torch.optim.AdamW(model.parameters())


@pytest.mark.parametrize("order", ORDERS)
def test_compiled_models_have_the_plain_names(tmp_path, order):
    model, optimizer = make_compiled(order)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    path = state.save(tmp_path / "x", model, optimizer)
    names = FileSystemReader(path).read_metadata().state_dict_metadata
    of_model = {f"model.{name}" for name in make_compiled()[0].state_dict()}
    assert {name for name in names if name.startswith("model.")} == of_model
    assert not any("_orig_mod" in name or "_checkpoint" in name for name in names)
    for order_of_other in (None, order):
        other, loaded = make_compiled(order_of_other)
        state.load(path, other, loaded)
        assert str(loaded.state_dict()) == str(optimizer.state_dict())
        for got, expected in zip(other.parameters(), model.parameters(), strict=True):
            assert torch.equal(got, expected)
