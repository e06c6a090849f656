"""A model with wrapped modules equals the plain model in everything but its backward.

Random module trees, random subsets of them wrapped, compared with a deepcopy of the plain model
from the root and from every level.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import nn

from wrappers.modules.base import _SHARED, ActivationWrapper, unwrap
from wrappers.modules.checkpoint import CheckpointWrapper
from wrappers.modules.offload import OffloadWrapper

SEEDS = range(40)
DIM = 4


class Block(nn.Module):
    """Extra attributes, extra state, a non-persistent buffer, overridden methods."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        self.scale = 2.0
        self.config = {"hidden": DIM}
        self.steps = nn.ModuleList(children)
        self.gain = nn.Parameter(torch.ones(DIM))
        self.register_buffer("mask", torch.ones(DIM), persistent=False)
        self.register_buffer("count", torch.zeros(()))
        self.register_parameter("absent", None)
        self.num_applied = 0

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x * self.gain * self.mask * self.scale

    def get_extra_state(self):
        return {"scale": self.scale}

    def set_extra_state(self, state):
        self.scale = state["scale"]

    def _apply(self, fn, recurse=True):
        self.num_applied += 1
        return super()._apply(fn, recurse)

    def half(self):
        self.gain.data.mul_(2)
        return super().half()


class Renamed(nn.Module):
    """Writes and reads other state-dict keys than its attributes are called."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM))
        self._register_load_state_dict_pre_hook(self._rename)

    def forward(self, x):
        return x * self.weight

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "renamed"] = self.weight if keep_vars else self.weight.detach()

    def _rename(self, state_dict, prefix, *args):
        if prefix + "renamed" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "renamed")


class Recurrent(nn.LSTM):
    """``_apply`` and ``__setattr__`` keep a second list of the weights."""

    def forward(self, x):
        return super().forward(x.reshape(1, -1, DIM))[0].reshape(x.shape)


class Lookup(nn.Module):
    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        self.by_key = nn.ModuleDict({f"k{i}": m for i, m in enumerate(children)})
        self.scales = nn.ParameterList([torch.ones(DIM) for _ in range(2)])

    def forward(self, x):
        for module in self.by_key.values():
            x = module(x)
        return x * self.scales[0] * self.scales[1]

    def __len__(self):
        return len(self.by_key)

    def __getitem__(self, key):
        return self.by_key[key]

    def __contains__(self, key):
        return key in self.by_key


LEAVES = [
    lambda: nn.Linear(DIM, DIM),
    lambda: nn.LayerNorm(DIM),
    lambda: nn.BatchNorm1d(DIM),
    lambda: nn.Dropout(0.0),
    nn.Identity,
    Renamed,
    lambda: Recurrent(DIM, DIM),
    nn.Sequential,
]
BRANCHES = [
    lambda children: nn.Sequential(*children),
    lambda children: nn.Sequential(OrderedDict((f"m{i}", c) for i, c in enumerate(children))),
    lambda children: Block(*children),
    lambda children: Lookup(*children),
]


def random_tree(
    rng: random.Random, depth: int, pool: list[nn.Module], leaves: list[Callable[[], nn.Module]]
) -> nn.Module:
    if pool and rng.random() < 0.15:
        return rng.choice(pool)
    if depth == 0 or rng.random() < 0.25:
        module = rng.choice(leaves)()
        linears = [m for m in pool if isinstance(m, nn.Linear)]
        if isinstance(module, nn.Linear) and linears and rng.random() < 0.5:
            module.weight = rng.choice(linears).weight
    else:
        children = [random_tree(rng, depth - 1, pool, leaves) for _ in range(rng.randint(1, 3))]
        module = rng.choice(BRANCHES)(children)
    pool.append(module)
    return module


def make_pair(seed: int, leaves=LEAVES) -> tuple[nn.Module, nn.Module]:
    """The plain model, and a copy of it in which random modules are wrapped."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    children = [random_tree(rng, 3, [], leaves) for _ in range(2)]
    plain = Block(*children)
    wrapped = copy.deepcopy(plain)
    wrap_some(wrapped, rng)
    return plain, wrapped


def wrap_some(model: nn.Module, rng: random.Random) -> None:
    wrappers: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child not in wrappers:
                wrappers[child] = child
                can_wrap = not isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.ParameterList))
                if can_wrap and rng.random() < 0.6:
                    wrappers[child] = rng.choice([wrap, offload, both, both_reversed])(child)
            parent._modules[name] = wrappers[child]


def wrap(module):
    return CheckpointWrapper(module)


def offload(module):
    return OffloadWrapper(module)


def both(module):
    return OffloadWrapper(CheckpointWrapper(module))


def both_reversed(module):
    return CheckpointWrapper(OffloadWrapper(module))


def levels(plain: nn.Module, wrapped: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Every level of both models; the names must be equal."""
    ours, theirs = dict(wrapped.named_modules()), dict(plain.named_modules())
    assert list(ours) == list(theirs)
    return [(theirs[name], ours[name]) for name in theirs]


def assert_equal_members(plain: nn.Module, wrapped: nn.Module) -> None:
    for remove_duplicate in (True, False):
        for method in ("named_parameters", "named_buffers"):
            ours = getattr(wrapped, method)(remove_duplicate=remove_duplicate)
            theirs = getattr(plain, method)(remove_duplicate=remove_duplicate)
            assert_equal_tensors(dict(ours), dict(theirs))
        ours = wrapped.named_modules(remove_duplicate=remove_duplicate)
        theirs = plain.named_modules(remove_duplicate=remove_duplicate)
        assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert [n for n, _ in wrapped.named_children()] == [n for n, _ in plain.named_children()]


def assert_equal_tensors(ours: dict, theirs: dict) -> None:
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if not isinstance(value, torch.Tensor):
            assert ours[name] == value, name
            continue
        assert ours[name].dtype == value.dtype, name
        assert ours[name].requires_grad == value.requires_grad, name
        assert torch.equal(ours[name], value), name


def assert_linked(model: nn.Module) -> None:
    """The invariant: wrapper and inner module have the same containers."""
    for module in model.modules():
        while isinstance(module, ActivationWrapper):
            inner = module._checkpoint_wrapped_module
            for name in _SHARED:
                assert module.__dict__[name] is inner.__dict__[name]
            assert "training" not in module.__dict__
            module = inner


def num_wrappers(model: nn.Module) -> int:
    return sum(isinstance(module, ActivationWrapper) for module in model.modules())


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor | None]:
    model.zero_grad()
    model(x).sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.fixture(params=SEEDS)
def pair(request):
    return make_pair(request.param)


def test_the_trees_have_wrappers():
    assert sum(num_wrappers(make_pair(seed)[1]) for seed in SEEDS) > 100


def test_members_are_equal_from_every_level(pair):
    plain, wrapped = pair
    for ours, theirs in levels(plain, wrapped):
        assert_equal_members(ours, theirs)


def test_members_are_the_inner_modules_own(pair):
    _, wrapped = pair
    for module in wrapped.modules():
        inner = unwrap(module)
        for name, parameter in module.named_parameters():
            assert module.get_parameter(name) is parameter
            assert inner.get_parameter(name) is parameter
        for name, buffer in module.named_buffers():
            assert inner.get_buffer(name) is buffer
        for name, child in module.named_modules():
            if name:
                assert module.get_submodule(name) is child
                assert inner.get_submodule(name) is child


def test_state_dict_both_ways(pair):
    plain, wrapped = pair
    for theirs, ours in levels(plain, wrapped):
        assert_equal_tensors(ours.state_dict(), theirs.state_dict())
        assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    changed = copy.deepcopy(plain)
    for parameter in changed.parameters():
        parameter.data.add_(1)
    for module in changed.modules():
        if isinstance(module, Block):
            module.scale = 5.0
    wrapped.load_state_dict(copy.deepcopy(changed.state_dict()), strict=True)
    assert_equal_tensors(wrapped.state_dict(), changed.state_dict())
    plain.load_state_dict(copy.deepcopy(wrapped.state_dict()), strict=True)
    assert_equal_tensors(plain.state_dict(), changed.state_dict())
    assert plain.scale == 5.0


def test_a_level_loads_strictly(pair):
    plain, wrapped = pair
    for theirs, ours in levels(plain, wrapped):
        result = ours.load_state_dict(copy.deepcopy(theirs.state_dict()), strict=True)
        assert not result.missing_keys
        assert not result.unexpected_keys
        if list(theirs.parameters()):
            with pytest.raises(RuntimeError, match="Missing key"):
                ours.load_state_dict({}, strict=True)


def test_attributes(pair):
    plain, wrapped = pair
    for theirs, ours in levels(plain, wrapped):
        for name, value in vars(theirs).items():
            if not name.startswith("_") and not isinstance(value, torch.Tensor):
                assert getattr(ours, name) == value, name
        assert set(dir(theirs)) - set(dir(ours)) == set()
        with pytest.raises(AttributeError, match="no attribute 'nothing_like_that'"):
            ours.nothing_like_that
        ours.note = "written"
        assert unwrap(ours).note == "written"
        del ours.note
        assert not hasattr(unwrap(ours), "note")
        ours.extra = nn.Parameter(torch.zeros(2))
        ours.child = nn.Linear(1, 1)
        ours.register_buffer("table", torch.zeros(3), persistent=False)
        assert unwrap(ours).extra is ours.extra is ours._parameters["extra"]
        assert unwrap(ours).child is ours.child
        assert unwrap(ours).table is ours.table
        assert "table" not in unwrap(ours).state_dict()
        del ours.extra, ours.child, ours.table
        assert not {"extra", "child", "table"} & {
            *unwrap(ours)._parameters,
            *unwrap(ours)._modules,
            *unwrap(ours)._buffers,
        }
        assert_linked(ours)


def test_container_protocol(pair):
    plain, wrapped = pair
    for theirs, ours in levels(plain, wrapped):
        assert bool(ours) == bool(theirs)
        for method in ("__len__", "__iter__", "__getitem__", "__contains__", "__add__"):
            assert hasattr(ours, method) == hasattr(theirs, method), method
        if isinstance(theirs, nn.Sequential):
            assert len(ours) == len(theirs)
            assert list(ours) == list(ours._modules.values())
            assert len(ours[:1]) == len(theirs[:1])
            assert type(ours[:1]) is nn.Sequential
            if len(theirs):
                assert ours[0] is ours[-len(theirs)] is next(iter(ours))
                assert ours[0] in list(ours)
        elif isinstance(theirs, Lookup):
            assert len(ours) == len(theirs)
            assert ("k0" in ours, "k9" in ours) == (True, False)
            assert ours["k0"] is ours.by_key["k0"]
        elif not hasattr(theirs, "__iter__"):
            with pytest.raises(TypeError, match="iterable"):
                iter(ours)


def test_apply_reaches_every_inner_module(pair):
    plain, wrapped = pair
    ours, theirs = [], []
    assert wrapped.apply(lambda m: ours.append(type(m))) is wrapped
    plain.apply(lambda m: theirs.append(type(m)))
    assert ours == theirs


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(torch.float64),
        lambda m: m.half(),
        lambda m: m.train(False),
        lambda m: m.eval(),
        lambda m: m.requires_grad_(False),
        lambda m: m.to("meta").to_empty(device="cpu").apply(zero),
    ],
)
def test_whole_model_methods(pair, change):
    plain, wrapped = pair
    for theirs, ours in [*levels(plain, wrapped)[::3], (plain, wrapped)]:
        assert change(ours) is ours
        change(theirs)
    for theirs, ours in levels(plain, wrapped):
        assert ours.training == theirs.training
        if isinstance(theirs, Block):
            assert ours.num_applied == theirs.num_applied
    assert_equal_members(plain, wrapped)
    assert_linked(wrapped)


def zero(module):
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            tensor.data.zero_()


def via_pickle(model):
    return pickle.loads(pickle.dumps(model))


def via_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, via_pickle, via_torch_save])
def test_clones(pair, clone):
    plain, wrapped = pair
    for original in (wrapped, *wrapped.children()):
        cloned = clone(original)
        assert num_wrappers(cloned) == num_wrappers(original)
        assert_linked(cloned)
        assert_equal_members(original, cloned)
        assert {id(p) for p in cloned.parameters()}.isdisjoint(
            {id(p) for p in original.parameters()}
        )
    cloned = clone(wrapped)
    for grad, expected in zip(step(cloned, X), step(plain, X), strict=True):
        assert (grad is None) == (expected is None)
        if grad is not None:
            assert torch.equal(grad, expected)


X = torch.randn(3, DIM, generator=torch.Generator().manual_seed(0))


def test_training_and_optimizer_state_by_name(pair):
    plain, wrapped = pair
    states = []
    for model in (plain, wrapped):
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
        for _ in range(2):
            step(model, X)
            optimizer.step()
        states.append(optimizer.state_dict())
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for key, theirs in states[0]["state"].items():
        assert_equal_tensors(states[1]["state"][key], theirs)
    assert_equal_members(plain, wrapped)
    assert_equal_tensors(wrapped.state_dict(), plain.state_dict())
    optimizer = torch.optim.AdamW(wrapped.named_parameters(), lr=0.1)
    optimizer.load_state_dict(states[0])
    assert optimizer.state_dict()["param_groups"] == states[0]["param_groups"]


def test_named_tensors_of_functional_call(pair):
    plain, wrapped = pair
    tensors = {name: p.detach() * 2 for name, p in plain.named_parameters()}
    with torch.no_grad():
        ours = torch.func.functional_call(wrapped, tensors, (X,))
        theirs = torch.func.functional_call(plain, tensors, (X,))
        assert torch.equal(ours, theirs)
        assert torch.equal(wrapped(X), plain(X))
    assert_linked(wrapped)


@pytest.mark.parametrize("seed", SEEDS)
def test_state_dict_of_torch_distributed_checkpoint(seed):
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        set_model_state_dict,
    )

    # torch's functions want state-dict keys that are attributes, also of the plain model.
    plain, wrapped = make_pair(seed, [leaf for leaf in LEAVES if leaf is not Renamed])
    assert_equal_tensors(get_model_state_dict(wrapped), get_model_state_dict(plain))
    for parameter in plain.parameters():
        parameter.data.add_(1)
    set_model_state_dict(wrapped, get_model_state_dict(plain))
    assert_equal_tensors(wrapped.state_dict(), plain.state_dict())
