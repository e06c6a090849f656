"""The wrapper's and the in-place forward's settings, and how a call gets to the engine.

What the engine does with a region is tested in tests/engine.
"""

from __future__ import annotations

import copy
import types
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as theirs
from torch.utils.flop_counter import FlopCounterMode

from wrappers.errors import InputChangedError
from wrappers.modules.checkpoint import (
    CheckpointImpl,
    CheckpointWrapper,
    checkpoint_wrapper,
    is_checkpointed,
)
from wrappers.modules.offload import OffloadWrapper, offload_wrapper

IMPLS = list(CheckpointImpl)[:2]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(8, 4)
        self.calls = []  # a number would be put back after a rerun

    @property
    def num_calls(self):
        return len(self.calls)

    def forward(self, x, *, scale=None):
        self.calls.append(self.training)
        x = self.down(self.drop(self.norm(self.up(x)).relu()))
        return x if scale is None else x * scale


def in_place(module, **kwargs):
    return checkpoint_wrapper(module, inplace=True, **kwargs)


FACES = [CheckpointWrapper, in_place]


def step(module: nn.Module, **kwargs) -> list[torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, 4, requires_grad=True)
    out = module(x, **kwargs)
    out.sin().sum().backward()
    return [out, x.grad, *(p.grad for p in module.parameters()), *module.buffers()]


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_kwargs", [False, True])
def test_a_step_is_bitwise_equal(face, impl, with_kwargs):
    plain = Mlp()
    wrapped = face(copy.deepcopy(plain), impl=impl)
    kwargs = {"scale": torch.full((4,), 3.0)} if with_kwargs else {}
    for _ in range(2):
        for ours, expected in zip(step(wrapped, **kwargs), step(plain, **kwargs), strict=True):
            assert torch.equal(ours, expected)
    assert (plain.num_calls, wrapped.num_calls) == (2, 4)


@pytest.mark.parametrize("face", FACES)
def test_without_grad_mode_nothing_is_recorded(face, monkeypatch):
    module = face(Mlp())
    monkeypatch.setattr("wrappers.modules.checkpoint.run_region", None)
    with torch.no_grad():
        module(torch.ones(2, 4))
    with torch.inference_mode():
        module(torch.ones(2, 4))
    assert module.num_calls == 2
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        module(torch.ones(2, 4))


@pytest.mark.parametrize("face", FACES)
def test_in_place_and_wrapped_regions_know_their_module(face):
    module = face(Mlp())
    (module if face is CheckpointWrapper else module.forward).region_fqn = "layers.3"
    out = module(torch.ones(2, 4, requires_grad=True))
    with torch.no_grad():
        module.up.weight.add_(1)
    with pytest.raises(InputChangedError, match=r"up\.weight") as caught:
        out.sum().backward()
    assert caught.value.fqn == "layers.3"


@pytest.mark.parametrize("face", FACES)
def test_settings(face):
    module = face(Mlp(), preserve_rng_state=False, early_stop=False, determinism_check="none")
    owner = module if face is CheckpointWrapper else module.forward
    region = owner._checkpoint_region
    assert (region.preserve_rng_state, region.early_stop) == (False, False)
    assert region.determinism_check == "none"
    assert owner.checkpoint_impl is region.impl is CheckpointImpl.NO_REENTRANT


@pytest.mark.parametrize("face", FACES)
def test_impl_has_two_names(face):
    for kwargs in (
        {"impl": CheckpointImpl.REENTRANT},
        {"checkpoint_impl": CheckpointImpl.REENTRANT},
    ):
        module = face(Mlp(), **kwargs)
        owner = module if face is CheckpointWrapper else module.forward
        assert owner._checkpoint_region.impl is CheckpointImpl.REENTRANT
    with pytest.raises(ValueError, match="checkpoint_impl=NO_REENTRANT, impl=REENTRANT"):
        face(Mlp(), checkpoint_impl=CheckpointImpl.NO_REENTRANT, impl=CheckpointImpl.REENTRANT)


def test_torchs_enum_is_accepted():
    wrapper = checkpoint_wrapper(Mlp(), theirs.CheckpointImpl.REENTRANT)
    assert wrapper.checkpoint_impl is CheckpointImpl.REENTRANT


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"impl": "fast"}, ValueError, "'fast' is not a valid CheckpointImpl"),
        ({"determinism_check": "maybe"}, ValueError, "determinism_check must be one of"),
        ({"impl": CheckpointImpl.REENTRANT, "debug": True}, ValueError, "debug: not possible"),
        ({"preserve_rng": True}, TypeError, "preserve_rng"),
    ],
)
def test_bad_settings_are_refused_at_once(face, kwargs, error, text):
    module = Mlp()
    with pytest.raises(error, match=text):
        face(module, **kwargs)
    assert "forward" not in vars(module)


@pytest.mark.parametrize("face", FACES)
def test_checkpoint_fn_is_called_as_torch_does(face):
    calls = []

    def checkpoint_fn(function, *args, tag, **kwargs):
        calls.append((tag, len(args), sorted(kwargs)))
        return function(*args, **kwargs)

    x, scale = torch.ones(2, 4), torch.ones(4)
    for impl, expected in [
        (CheckpointImpl.NO_REENTRANT, ("t", 1, ["scale"])),
        (CheckpointImpl.REENTRANT, ("t", 2, [])),
    ]:
        module = face(Mlp().eval(), impl=impl, checkpoint_fn=checkpoint_fn, tag="t")
        out = module(x, scale=scale * 2)
        assert calls.pop() == expected
        assert torch.equal(out, module(x) * 2)
        calls.clear()


@pytest.mark.parametrize("first", FACES)
@pytest.mark.parametrize("inplace", [False, True])
def test_wrapping_twice_warns_and_changes_nothing(first, inplace):
    for module in (first(Mlp()), offload_wrapper(first(Mlp()))):
        with pytest.warns(UserWarning, match="checkpointed already"):
            assert checkpoint_wrapper(module, inplace=inplace) is module
        step(module)
        assert module.num_calls == 2


def test_wrapping_what_torch_has_wrapped_warns():
    module = theirs.checkpoint_wrapper(Mlp())
    assert is_checkpointed(module)
    with pytest.warns(UserWarning, match="checkpointed already"):
        assert checkpoint_wrapper(module) is module
    assert not is_checkpointed(theirs.offload_wrapper(Mlp()))


@pytest.mark.parametrize(
    "compose",
    [
        lambda m: OffloadWrapper(CheckpointWrapper(m), min_bytes=0),
        lambda m: CheckpointWrapper(OffloadWrapper(m, min_bytes=0)),
        lambda m: offload_wrapper(checkpoint_wrapper(m, inplace=True), inplace=True, min_bytes=0),
        lambda m: checkpoint_wrapper(offload_wrapper(m, inplace=True, min_bytes=0), inplace=True),
        lambda m: offload_wrapper(checkpoint_wrapper(m), inplace=True, min_bytes=0),
    ],
)
def test_composed_with_offload(compose):
    """There is no device here, so nothing is offloaded."""
    plain = Mlp()
    wrapped = compose(copy.deepcopy(plain))
    for _ in range(2):
        for ours, expected in zip(step(wrapped), step(plain), strict=True):
            assert torch.equal(ours, expected)
    assert wrapped.num_calls == 4
    assert list(wrapped.state_dict()) == list(plain.state_dict())


# --- torch.compile ----------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x, *, scale=1.0):
        return self.second(torch.sin(self.first(x))) * scale


class Stack(nn.Module):
    def __init__(self, face) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(face(Block()) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=2.0).cos()
        return x


def backward_matmuls(model: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], float]:
    model.zero_grad()
    loss = model(x).sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return [p.grad.clone() for p in model.parameters()], counter.get_total_flops() / (2 * 3 * 4 * 4)


def compiled_matmuls(model: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], float]:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # functorch's and dynamo's own
        return backward_matmuls(compiled, x)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("impl", IMPLS)
def test_compile_fullgraph(face, impl):
    model = Stack(lambda block: face(block, impl=impl))
    x = torch.randn(3, 4, requires_grad=True)
    expected, num_eager = backward_matmuls(model, x)
    grads, num_compiled = compiled_matmuls(model, x)
    for ours, theirs_ in zip(grads, expected, strict=True):
        assert torch.equal(ours, theirs_)
    # Two linears, two blocks, two matmuls each; early stop leaves the last linear of a block out.
    assert num_eager == (8 + 2 if impl is CheckpointImpl.NO_REENTRANT else 8 + 4)
    # The compiler decides by itself whether to keep a region's output.
    assert compiled_matmuls(Stack(lambda block: block), x)[1] == 8
    assert num_compiled == compiled_matmuls(Stack(theirs.checkpoint_wrapper), x)[1] > 8


@pytest.mark.parametrize("face", FACES)
def test_compiled_wrapper(face):
    torch._dynamo.reset()
    block = Block()
    x = torch.randn(3, 4, requires_grad=True)
    expected, _ = backward_matmuls(copy.deepcopy(block), x)
    module = face(block)
    module.compile(backend="aot_eager", fullgraph=True)
    grads, num = backward_matmuls(module, x)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert num == 4 + 1
    assert list(module.state_dict()) == list(Block().state_dict())


@pytest.mark.parametrize("face", FACES)
def test_an_unknown_setting_is_named_with_what_there_is(face):
    with pytest.raises(TypeError, match=r"unknown settings.*: use_reentrant\. There are impl .*"):
        face(Mlp(), use_reentrant=True)


def test_an_in_place_forward_that_is_bound_once_more():
    """accelerate's unwrap_model does so with a forward that it finds on the instance."""
    module = in_place(Mlp().eval())
    expected = step(module)
    module.forward = types.MethodType(module.forward, module)
    for parameter in module.parameters():
        parameter.grad = None
    assert all(map(torch.equal, step(module), expected))
    assert module.num_calls == 4
