"""What a wrapper keeps for itself, what it passes on, and what others do to it."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from wrappers.apply import apply_activation_checkpointing, remove_activation_checkpointing
from wrappers.errors import WrapperError
from wrappers.modules.base import (
    _CHECKPOINT_PREFIX,
    _CHECKPOINT_WRAPPED_MODULE,
    ActivationWrapper,
    plain_module,
    unwrap,
)
from wrappers.modules.checkpoint import CheckpointWrapper, checkpoint_wrapper
from wrappers.modules.offload import OffloadWrapper, offload_wrapper


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.factor = 1.0

    def forward(self, x, *, shift=0.0):
        """Scale."""
        return self.linear(x).relu() * self.factor + shift


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"version": 7}

    def set_extra_state(self, state):
        self.loaded = state


class Double(nn.Module):
    def forward(self, x):
        return x * 2


def test_abstract():
    with pytest.raises(TypeError, match="abstract"):
        ActivationWrapper(nn.Linear(1, 1))


@pytest.mark.parametrize("make", [CheckpointWrapper, OffloadWrapper])
@pytest.mark.parametrize("value", [None, "x", nn.Linear, torch.ones(1)])
def test_only_modules_can_be_wrapped(make, value):
    with pytest.raises(
        TypeError, match=rf"expected an nn\.Module to wrap, got {type(value).__name__}"
    ):
        make(value)


@pytest.mark.parametrize("make", [checkpoint_wrapper, offload_wrapper])
@pytest.mark.parametrize("inplace", [False, True])
def test_functions_refuse_non_modules(make, inplace):
    with pytest.raises(TypeError, match=r"expected an nn\.Module to wrap, got int"):
        make(3, inplace=inplace)


def test_torch_finds_the_inner_module_by_its_private_name():
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as theirs

    assert _CHECKPOINT_WRAPPED_MODULE == theirs._CHECKPOINT_WRAPPED_MODULE
    assert _CHECKPOINT_PREFIX == theirs._CHECKPOINT_PREFIX
    linear = nn.Linear(1, 1)
    wrapper = CheckpointWrapper(linear)
    assert getattr(wrapper, theirs._CHECKPOINT_WRAPPED_MODULE) is linear
    assert isinstance(wrapper, theirs.ActivationWrapper)


def test_a_new_inner_module_is_linked():
    wrapper = CheckpointWrapper(nn.Linear(1, 1))
    wrapper._checkpoint_wrapped_module = other = nn.Linear(2, 2)
    assert dict(wrapper.named_parameters())["weight"] is other.weight


def test_extra_state_only_where_the_class_has_it():
    assert type(CheckpointWrapper(nn.Linear(1, 1))).get_extra_state is nn.Module.get_extra_state
    inner = WithExtraState(1, 1)
    wrapper = CheckpointWrapper(inner)
    assert type(wrapper).get_extra_state is not nn.Module.get_extra_state
    assert wrapper.state_dict()["_extra_state"] == {"version": 7}
    wrapper.load_state_dict(wrapper.state_dict())
    assert inner.loaded == {"version": 7}
    assert isinstance(pickle.loads(pickle.dumps(wrapper)), CheckpointWrapper)


def test_generated_classes_are_shared_and_look_like_the_wrappers_class():
    first, second = (CheckpointWrapper(nn.Sequential()) for _ in range(2))
    assert type(first) is type(second)
    assert type(first).__name__ == "CheckpointWrapper"
    assert issubclass(type(first), CheckpointWrapper)
    assert type(CheckpointWrapper(nn.Module())) is CheckpointWrapper


class Special(nn.Linear):
    """What a class can define that must stay the inner module's, or the wrapper's."""

    mode = "class"

    def __call__(self, *args):
        self.__dict__["num_calls"] = self.__dict__.get("num_calls", 0) + 1
        return super().__call__(*args)

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 7

    def me(self):
        return self

    @functools.cached_property
    def computed(self):
        return object()

    @property
    def failing(self):
        raise AttributeError("no such thing")


def test_code_that_looks_for_a_class_finds_it():
    wrapper = CheckpointWrapper(OffloadWrapper(Special(2, 2)))
    assert isinstance(wrapper, Special)
    assert isinstance(wrapper, nn.Linear)
    assert isinstance(wrapper, CheckpointWrapper)
    assert not isinstance(wrapper, OffloadWrapper)
    model = nn.Sequential(wrapper, nn.ReLU())
    assert [type(m) for m in model.modules() if isinstance(m, nn.Linear)] == [type(wrapper)]


def test_what_a_class_defines_is_the_inner_modules():
    inner = Special(2, 2)
    wrapper = CheckpointWrapper(inner)
    assert wrapper.mode == "class"
    inner.mode = "instance"
    assert wrapper.mode == "instance"
    wrapper.mode = "written"
    assert inner.mode == "written"
    assert wrapper.me() is inner
    assert wrapper.computed is inner.computed is vars(inner)["computed"]
    inner.me = lambda: 3
    assert wrapper.me() == 3
    with pytest.raises(AttributeError, match="no attribute 'failing'"):
        _ = wrapper.failing
    assert wrapper != CheckpointWrapper(inner)
    assert hash(wrapper) != 7


def test_a_class_that_changes_its_subclasses():
    """As the base class of transformers' layers does."""

    class Layer(nn.Linear):
        def __init_subclass__(cls, **kwargs):
            super().__init_subclass__(**kwargs)
            cls.forward = lambda self, x: x * 0

    wrapper = CheckpointWrapper(Layer(2, 2))
    assert isinstance(wrapper, Layer)
    assert torch.equal(wrapper(torch.ones(1, 2)), unwrap(wrapper)(torch.ones(1, 2)))


def test_an_overridden_call_runs_once():
    wrapper = CheckpointWrapper(Special(2, 2))
    with torch.no_grad():
        wrapper(torch.ones(1, 2))
    assert unwrap(wrapper).num_calls == 1


@pytest.mark.parametrize(
    "define", [{"__slots__": ("x",)}, {"__deepcopy__": lambda self, memo: self}]
)
def test_a_class_that_cannot_be_a_base_is_wrapped_all_the_same(define):
    cls = type("Odd", (nn.Linear,), define)
    wrapper = CheckpointWrapper(cls(2, 2))
    assert wrapper(torch.ones(1, 2)).shape == (1, 2)
    assert isinstance(copy.deepcopy(wrapper), CheckpointWrapper)


def test_subclasses_choose_their_own_signature():
    class Scaling(ActivationWrapper):
        def __init__(self, scale, *, module):
            super().__init__(module)
            object.__setattr__(self, "scale", scale)

        def forward(self, x):
            return self.scale * self._checkpoint_wrapped_module(x)

    wrapper = Scaling(3, module=nn.Linear(2, 2))
    x = torch.ones(1, 2)
    assert torch.equal(wrapper(x), 3 * unwrap(wrapper)(x))
    twin = copy.deepcopy(wrapper)
    assert torch.equal(twin(x), wrapper(x))
    assert isinstance(twin, Scaling)


def test_a_container_that_replaces_its_dict_of_children():
    wrapper = CheckpointWrapper(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3)))
    del wrapper[0]
    wrapper.add_module("z", nn.Linear(3, 3))
    assert [name for name, _ in wrapper.named_children()] == ["0", "1", "z"]
    assert len(wrapper) == 3
    assert "z.weight" in wrapper.state_dict()


def test_in_place_operators_return_the_wrapper():
    inner = nn.Sequential(nn.Linear(1, 1))
    wrapper = CheckpointWrapper(inner)
    before = wrapper
    wrapper += nn.Sequential(nn.ReLU())
    assert wrapper is before
    assert len(inner) == 2
    wrapper[1] = nn.Tanh()
    del wrapper[0]
    assert [type(m) for m in inner] == [nn.Tanh]


def test_a_method_of_the_inner_class_wins():
    class Loud(nn.Linear):
        def float(self):
            self.called = True
            return super().float()

        def parameters(self, recurse=True):
            return iter(())

    inner = Loud(1, 1)
    wrapper = CheckpointWrapper(inner)
    assert wrapper.float() is wrapper
    assert inner.called
    assert list(wrapper.parameters()) == []


@pytest.mark.parametrize(
    "name",
    [
        "_apply",
        "_load_from_state_dict",
        "_save_to_state_dict",
        "apply",
        "extra_repr",
        "load_state_dict",
        "requires_grad_",
        "state_dict",
        "to",
        "train",
        "zero_grad",
    ],
)
def test_a_method_set_on_the_instance_wins(name):
    wrapper = CheckpointWrapper(nn.Linear(1, 1))
    setattr(wrapper, name, lambda *args: ("replaced", args))
    assert name in vars(unwrap(wrapper))
    assert name not in vars(wrapper)
    assert getattr(wrapper, name)(7) == ("replaced", (7,))


def test_missing_attributes_are_reported_for_the_inner_class():
    with pytest.raises(AttributeError, match="'Scaled' object has no attribute 'nope'"):
        CheckpointWrapper(Scaled()).nope


def test_own_attributes_do_not_reach_the_inner_module():
    wrapper = CheckpointWrapper(Scaled())
    wrapper.forward = lambda x: x + 1
    assert torch.equal(wrapper(torch.zeros(3)), torch.ones(3))
    assert "forward" not in vars(unwrap(wrapper))
    del wrapper.forward
    assert wrapper(torch.zeros(3)).shape == (3,)


def test_hooks_of_the_wrapper_run_outside_and_once():
    calls = []
    inner = Scaled()
    inner.register_forward_hook(lambda *_: calls.append("inner"))
    wrapper = CheckpointWrapper(inner)
    wrapper.register_forward_hook(lambda *_: calls.append("outer"))
    wrapper.register_full_backward_hook(lambda *_: calls.append("backward"))
    wrapper(torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert calls.count("outer") == 1
    assert calls.count("backward") == 1
    assert calls.index("inner") < calls.index("outer")


def test_accelerate_hook_on_a_wrapper():
    hooks = pytest.importorskip("accelerate.hooks")
    calls = []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    inner = Scaled()
    hooks.add_hook_to_module(inner, Counting())
    wrapper = CheckpointWrapper(inner)
    hooks.add_hook_to_module(wrapper, Counting())
    with torch.no_grad():
        wrapper(torch.ones(2, 3))
    assert calls == [wrapper, inner]
    hooks.remove_hook_from_module(wrapper)
    calls.clear()
    with torch.no_grad():
        wrapper(torch.ones(2, 3))
    assert calls == [inner]


def test_a_dynamic_class_can_be_set():
    class Mixin:
        def reshard(self):
            return "resharded"

    wrapper = CheckpointWrapper(nn.Sequential(nn.Linear(2, 2)))
    cls = type(wrapper)
    wrapper.__class__ = type("FSDPCheckpointWrapper", (Mixin, cls), {})
    assert wrapper.reshard() == "resharded"
    assert len(wrapper) == 1
    assert type(unwrap(wrapper)) is nn.Sequential


def test_parametrize_inside_a_wrapper():
    model = nn.Sequential(CheckpointWrapper(Scaled()))
    linear = model.get_submodule("0.linear")
    before = linear.weight.detach().clone()
    parametrize.register_parametrization(linear, "weight", Double())
    assert "0.linear.parametrizations.weight.original" in dict(model.named_parameters())
    assert torch.equal(model[0].linear.weight, before * 2)
    model(torch.ones(2, 3)).sum().backward()
    grad = linear.parametrizations.weight.original.grad
    plain = copy.deepcopy(model)
    plain[0] = unwrap(plain[0])
    plain.zero_grad()
    plain(torch.ones(2, 3)).sum().backward()
    assert torch.equal(plain[0].linear.parametrizations.weight.original.grad, grad)


def test_a_parametrized_module_can_be_wrapped_and_copied():
    linear = nn.Linear(2, 2)
    parametrize.register_parametrization(linear, "weight", Double())
    wrapper = copy.deepcopy(CheckpointWrapper(linear))
    assert isinstance(wrapper, CheckpointWrapper)
    assert torch.equal(wrapper.weight, linear.weight)
    assert wrapper._parameters is unwrap(wrapper)._parameters


def test_parametrize_through_a_wrapper():
    linear = nn.Linear(2, 2)
    plain = copy.deepcopy(linear)
    wrapper = CheckpointWrapper(linear)
    for module in (wrapper, plain):
        parametrize.register_parametrization(module, "weight", Double())
        module(torch.ones(2)).sum().backward()
    assert list(wrapper.state_dict()) == list(plain.state_dict())
    assert torch.equal(wrapper.weight, plain.weight)
    ours, theirs = (m.parametrizations.weight.original.grad for m in (wrapper, plain))
    assert torch.equal(ours, theirs)
    parametrize.remove_parametrizations(wrapper, "weight")
    assert torch.equal(wrapper(torch.ones(2)), plain(torch.ones(2)))
    assert type(wrapper).__name__ == "CheckpointWrapper"


def test_functional_call_with_clean_names():
    model = nn.Sequential(CheckpointWrapper(Scaled()))
    plain = nn.Sequential(unwrap(model[0]))
    weight = torch.zeros(3, 3)
    ours = torch.func.functional_call(model, {"0.linear.weight": weight}, (torch.ones(2, 3),))
    theirs = torch.func.functional_call(plain, {"0.linear.weight": weight}, (torch.ones(2, 3),))
    assert torch.equal(ours, theirs)


def test_data_parallel_replica():
    wrapper = CheckpointWrapper(Scaled())
    replica = wrapper._replicate_for_data_parallel()
    assert type(replica) is type(wrapper)
    assert replica._checkpoint_wrapped_module is not unwrap(wrapper)
    assert replica._modules is unwrap(replica)._modules
    assert replica._modules is not wrapper._modules
    replica.factor = 3.0
    assert wrapper.factor == 1.0


class CopiesItsState(nn.Linear):
    def __getstate__(self):
        state = super().__getstate__()
        return {k: dict(v) if isinstance(v, dict) else v for k, v in state.items()}


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_clones_are_linked_also_if_the_inner_class_copies_its_containers(clone):
    wrapper = clone(CheckpointWrapper(CopiesItsState(1, 1)))
    assert wrapper._parameters is unwrap(wrapper)._parameters
    assert wrapper.weight is dict(wrapper.named_parameters())["weight"]


def test_a_cycle_through_the_wrapper_survives_pickle():
    wrapper = CheckpointWrapper(Scaled())
    unwrap(wrapper).linear.owner = [wrapper]
    for start in (lambda w: w, unwrap, lambda w: w.linear):
        found = start(pickle.loads(pickle.dumps(wrapper)))
        linear = found if isinstance(found, nn.Linear) else found.linear
        copied = pickle.loads(pickle.dumps(linear)).owner[0]
        assert copied._modules is unwrap(copied)._modules
        assert copied.linear.owner[0] is copied


def test_repr():
    model = nn.Sequential(CheckpointWrapper(nn.ReLU()), OffloadWrapper(Scaled(), min_bytes=8))
    assert repr(model[0]) == "CheckpointWrapper[impl=NO_REENTRANT](ReLU())"
    assert repr(model[1]) == (
        "OffloadWrapper[min_bytes=8](\n"
        "  Scaled(\n"
        "    (linear): Linear(in_features=3, out_features=3, bias=True)\n"
        "  )\n"
        ")"
    )
    assert "(0): CheckpointWrapper[impl=NO_REENTRANT](ReLU())" in repr(model)


def test_unwrap():
    inner = Scaled()
    assert unwrap(inner) is inner
    assert unwrap(OffloadWrapper(CheckpointWrapper(inner))) is inner


def test_compiled_modules_have_the_plain_names():
    inner = Scaled()
    compiled = torch.compile(inner, backend="eager")
    wrapper = CheckpointWrapper(compiled)
    assert list(wrapper.state_dict()) == list(Scaled().state_dict())
    assert [name for name, _ in wrapper.named_modules()] == ["", "linear"]
    assert plain_module(wrapper) is inner
    x = torch.ones(2, 3, requires_grad=True)
    wrapper(x, shift=1.0).sum().backward()
    (expected,) = torch.autograd.grad(inner(x, shift=1.0).sum(), x)
    assert torch.equal(x.grad, expected)
    wrapper.train(False)
    assert inner.training is False


# --- In place -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [checkpoint_wrapper, offload_wrapper])
def test_in_place_keeps_class_names_and_signature(make):
    module = Scaled()
    assert make(module, inplace=True) is module
    assert type(module) is Scaled
    assert list(module.state_dict()) == list(Scaled().state_dict())
    assert inspect.signature(module.forward) == inspect.signature(Scaled().forward)
    assert module.forward.__name__ == "forward"
    assert module.forward.__self__ is module


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("start", [lambda m: m, lambda m: m.forward])
def test_in_place_copies_belong_to_their_own_module(clone, start):
    module = checkpoint_wrapper(Scaled(), inplace=True)
    copied = clone(start(module))
    forward = copied.forward if isinstance(copied, Scaled) else copied
    assert forward.__self__ is not module
    x = torch.ones(2, 3)
    expected = module(x)
    forward.__self__.factor = 2.0
    assert torch.equal(forward(x), expected * 2)
    assert torch.equal(module(x), expected)


def test_in_place_calls_the_instance_level_forward_that_was_there():
    module = Scaled()
    module.forward = lambda x: module.linear(x) + 10
    expected = module(torch.ones(2, 3))
    checkpoint_wrapper(module, inplace=True)
    assert torch.equal(module(torch.ones(2, 3)), expected)
    assert list(inspect.signature(module.forward).parameters) == ["x"]


@pytest.mark.parametrize("wrap", [CheckpointWrapper, OffloadWrapper])
def test_fx_sees_the_inner_modules(wrap):
    model = nn.Sequential(wrap(nn.Sequential(nn.Linear(2, 2), nn.ReLU())), wrap(Scaled()))
    model[1] = wrap(nn.Sequential(nn.Linear(2, 3)))
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == [
        "0.0",
        "0.1",
        "1.0",
    ]
    x = torch.ones(1, 2)
    assert torch.equal(traced(x), model(x))


def test_a_parametrized_wrapper_is_copied_and_not_removed():
    model = nn.Sequential(CheckpointWrapper(nn.Linear(2, 2)))
    parametrize.register_parametrization(model[0], "weight", Double())
    twin = copy.deepcopy(model)
    assert torch.equal(twin[0].weight, model[0].weight)
    with pytest.raises(WrapperError, match=r"region `0`: .*remove_parametrizations"):
        remove_activation_checkpointing(model)
    parametrize.remove_parametrizations(model[0], "weight")
    assert pickle.loads(pickle.dumps(model))[0].weight.shape == (2, 2)
    assert remove_activation_checkpointing(model) == 1


def test_a_compiled_wrapper_is_known_to_be_wrapped():
    model = nn.Sequential(torch.compile(CheckpointWrapper(nn.Linear(2, 2)), backend="eager"))
    with pytest.warns(UserWarning, match="wrapped already"):
        report = apply_activation_checkpointing(model, check_fn=lambda m: type(m) is nn.Linear)
    assert report.wrapped == ()


def test_a_class_that_closes_or_restores_itself_is_not_made_a_base_in_that():
    class Closing(nn.Linear):
        is_open = True

        def __del__(self):
            self.is_open = False

    inner = Closing(2, 2)
    wrapper = CheckpointWrapper(inner)
    del wrapper
    gc.collect()
    assert inner.is_open
    attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=3)  # its __setstate__ sets a default
    twin = copy.deepcopy(CheckpointWrapper(attention))
    assert twin._qkv_same_embed_dim is attention._qkv_same_embed_dim is False


def test_class_attributes_are_read_from_the_inner_class():
    wrapper = CheckpointWrapper(Special(2, 2))
    assert type(wrapper).mode == "class"
    assert type(wrapper).me is Special.me
