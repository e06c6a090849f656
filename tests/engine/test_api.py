"""``wrappers`` stands in for ``torch.utils.checkpoint``: names, signatures, behaviour."""

from __future__ import annotations

import inspect
import warnings
from functools import partial

import pytest
import torch
import torch.utils.checkpoint as theirs
from torch import nn

import wrappers
from tests.engine.helpers import (
    IMPLS,
    NO_REENTRANT,
    REENTRANT,
    Calls,
    assert_equal,
    count_backward,
    gradients,
    leaf,
    live_frames,
)
from wrappers import CheckpointImpl, InputChangedError, checkpoint, checkpoint_sequential
from wrappers.engine.rerun import RerunFrame

both = pytest.mark.parametrize("impl", IMPLS)

FUNCTIONS = [name for name in theirs.__all__ if inspect.isfunction(getattr(theirs, name))]
CLASSES = [name for name in theirs.__all__ if inspect.isclass(getattr(theirs, name))]


# --- Names ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", theirs.__all__)
def test_every_public_name_of_torch_is_ours_too(name):
    assert hasattr(wrappers, name)
    assert name in wrappers.__all__


def test_a_star_import_gives_torchs_names():
    namespace = {}
    exec("from wrappers import *", namespace)
    assert set(theirs.__all__) <= namespace.keys()


def test_every_name_of_ours_exists_once():
    assert len(set(wrappers.__all__)) == len(wrappers.__all__)
    assert [name for name in wrappers.__all__ if not hasattr(wrappers, name)] == []


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_every_name_has_a_docstring(name):
    assert inspect.getdoc(getattr(wrappers, name))


# --- Signatures -------------------------------------------------------------------------


def assert_accepts_what(theirs_signature, ours_signature):
    """Every call that fits their parameters fits ours, with the same defaults."""
    ours = ours_signature.parameters
    positional = [
        p.name for p in ours.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    names = [
        p.name
        for p in theirs_signature.parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    assert positional[: len(names)] == names
    for parameter in theirs_signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            assert any(p.kind is p.VAR_KEYWORD for p in ours.values())
        elif parameter.kind is parameter.VAR_POSITIONAL:
            assert any(p.kind is p.VAR_POSITIONAL for p in ours.values())
        else:
            own = ours[parameter.name]
            assert own.kind is parameter.kind
            is_noop = parameter.name == "context_fn"
            default = wrappers.noop_context_fn if is_noop else parameter.default
            assert own.default == default
    known = set(theirs_signature.parameters)
    extra = [p for name, p in ours.items() if name not in known]
    for parameter in extra:
        is_var = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        assert is_var or parameter.default is not parameter.empty


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_accept_what_torchs_accept(name):
    assert_accepts_what(
        inspect.signature(getattr(theirs, name)), inspect.signature(getattr(wrappers, name))
    )


def test_classes_accept_what_torchs_accept():
    for name in ("SelectiveCheckpointContext", "GraphExecGroup", "DefaultDeviceType"):
        assert_accepts_what(
            inspect.signature(getattr(theirs, name)), inspect.signature(getattr(wrappers, name))
        )
    for method in ("forward", "backward"):
        assert_accepts_what(
            inspect.signature(getattr(theirs.CheckpointFunction, method)),
            inspect.signature(getattr(wrappers.CheckpointFunction, method)),
        )


def test_default_device_type_has_torchs_methods():
    before = wrappers.DefaultDeviceType.get_device_type()
    assert before == theirs.DefaultDeviceType.get_device_type()
    try:
        wrappers.DefaultDeviceType.set_device_type("meta")
        assert wrappers.DefaultDeviceType.get_device_type() == "meta"
    finally:
        wrappers.DefaultDeviceType.set_device_type(before)


def test_checkpoint_error_is_a_runtime_error_as_torchs():
    assert issubclass(wrappers.CheckpointError, RuntimeError)
    assert issubclass(theirs.CheckpointError, RuntimeError)


def test_policy_members_are_torchs_own():
    assert wrappers.CheckpointPolicy is theirs.CheckpointPolicy
    assert wrappers.SAC_IGNORED_OPS is theirs.SAC_IGNORED_OPS


def test_checkpoint_function_is_a_function():
    assert issubclass(wrappers.CheckpointFunction, torch.autograd.Function)


def test_device_states_round_trip():
    devices, states = wrappers.get_device_states(torch.ones(2), [torch.ones(1)], 3)
    assert (list(devices), list(states)) == ([], [])
    wrappers.set_device_states(devices, states)


def test_noop_context_fn_does_nothing():
    forward, recompute = wrappers.noop_context_fn()
    with forward, recompute:
        pass


# --- Choice of the implementation -------------------------------------------------------


def implementation(**options):
    out = checkpoint(lambda x: x.sin(), leaf(2), **options)
    return NO_REENTRANT if live_frames(RerunFrame) else REENTRANT if out.requires_grad else None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, NO_REENTRANT),
        ({"use_reentrant": None}, NO_REENTRANT),
        ({"use_reentrant": False}, NO_REENTRANT),
        ({"use_reentrant": True}, REENTRANT),
        ({"impl": NO_REENTRANT}, NO_REENTRANT),
        ({"impl": REENTRANT}, REENTRANT),
        ({"impl": REENTRANT, "use_reentrant": True}, REENTRANT),
        ({"impl": NO_REENTRANT, "use_reentrant": False}, NO_REENTRANT),
    ],
)
def test_the_options_choose_the_implementation_without_a_warning(options, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert implementation(**options) is expected


def test_torchs_private_enum_is_understood():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointImpl as Theirs,
    )

    assert implementation(impl=Theirs.REENTRANT) is REENTRANT
    assert CheckpointImpl(Theirs.NO_REENTRANT) is NO_REENTRANT


@pytest.mark.parametrize(("use_reentrant", "impl"), [(True, NO_REENTRANT), (False, REENTRANT)])
def test_contradictory_options_raise(use_reentrant, impl):
    run = Calls(torch.sin)
    with pytest.raises(ValueError, match=f"use_reentrant={use_reentrant}.*impl={impl.name}"):
        checkpoint(run, leaf(2), use_reentrant=use_reentrant, impl=impl)
    assert run.num == 0


@both
def test_bad_options_raise_also_for_a_function_called_before(impl):
    run = Calls(torch.sin)
    for _ in range(2):
        with pytest.raises(ValueError, match="determinism_check must be one of"):
            checkpoint(run, leaf(2), impl=impl, determinism_check="never")
    assert run.num == 0


def test_options_of_one_call_do_not_reach_the_next_of_the_same_function():
    def tail(x):
        return (x * 2).sin() * 3

    for early_stop in (True, False, True, False):
        out = checkpoint(tail, leaf(3), early_stop=early_stop)
        assert count_backward(out)["sin"] == (0 if early_stop else 1)
    for impl in (REENTRANT, NO_REENTRANT, REENTRANT):
        name = type(checkpoint(tail, leaf(3), impl=impl).grad_fn).__name__
        assert ("MulBackward0" in name) is (impl is NO_REENTRANT)


@both
def test_what_can_be_called_can_be_a_region(impl):
    class Callable:
        def __call__(self, x):
            return x.sin()

        def method(self, x):
            return x.sin()

        @staticmethod
        def static(x):
            return x.sin()

    functions = [
        torch.sin,
        lambda x: x.sin(),
        Callable(),
        Callable().method,
        Callable.static,
        partial(torch.sin),
        partial(Callable().method),
        nn.Sequential(nn.Identity(), nn.Identity()),
        nn.Identity().forward,
    ]
    for function in functions:
        got = gradients(partial(checkpoint, function, impl=impl), leaf(3))
        assert_equal(got, gradients(function, leaf(3)))


# --- checkpoint_sequential --------------------------------------------------------------


def sequence():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(5)])


@both
@pytest.mark.parametrize("segments", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("as_list", [True, False])
def test_sequential_equals_plain(impl, segments, as_list):
    model = sequence()
    functions = list(model) if as_list else model

    def run(x):
        return checkpoint_sequential(functions, segments, x, impl=impl)

    x = leaf(2, 4)
    got = gradients(run, x)
    got += [p.grad for p in model.parameters()]
    model.zero_grad()
    assert_equal(got, gradients(model, x) + [p.grad for p in model.parameters()])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("segments", [1, 2, 3, 4, 5])
def test_sequential_makes_torchs_segments(use_reentrant, segments):
    nums = []
    for run in (checkpoint_sequential, theirs.checkpoint_sequential):
        functions = [Calls(torch.sin) for _ in range(5)]
        run(functions, segments, leaf(3), use_reentrant=use_reentrant).sum().backward()
        nums.append([function.num for function in functions])
    # Early stop ends a segment's recompute before its last sin in both.
    assert nums[0] == nums[1]


@both
def test_sequential_passes_options_on(impl):
    torch.manual_seed(0)
    functions = [nn.Dropout(0.5), nn.Dropout(0.5), nn.Tanh()]
    results = []
    for is_region in (True, False):
        torch.manual_seed(1)
        x = leaf(64)
        if is_region:
            y = checkpoint_sequential(functions, 2, x, impl=impl, preserve_rng_state=True)
        else:
            y = nn.Sequential(*functions)(x)
        y.sum().backward()
        results.append([x.grad])
    assert_equal(*results)


@pytest.mark.parametrize("segments", [0, -1, 6])
def test_sequential_refuses_impossible_segments(segments):
    with pytest.raises(ValueError, match=rf"segments must be between 1 and 5, got {segments}"):
        checkpoint_sequential(sequence(), segments, leaf(2, 4))


def test_sequential_refuses_unknown_options():
    with pytest.raises(ValueError, match="unexpected keyword arguments: bogus"):
        checkpoint_sequential(sequence(), 2, leaf(2, 4), bogus=1)


@both
def test_sequential_hands_tuples_from_one_function_to_the_next(impl):
    functions = [
        lambda x: (x.sin(), x.cos()),
        lambda pair: (pair[0] * pair[1], pair[1]),
        lambda pair: pair[0] + pair[1],
    ]

    def plain(x):
        for function in functions:
            x = function(x)
        return x

    got = gradients(lambda x: checkpoint_sequential(functions, 3, x, impl=impl), leaf(4))
    assert_equal(got, gradients(plain, leaf(4)))


# --- Cases of torch's own tests, as behaviours ------------------------------------------


@both
def test_trigger_non_checkpointed_part_after(impl):
    """A model whose first half is a region trains like the plain one for three steps."""
    results = []
    for is_region in (True, False):
        model = sequence()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            x = leaf(2, 4, seed=step)
            half = checkpoint(model[:3], x, impl=impl) if is_region else model[:3](x)
            model[3:](half).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(list(model.parameters()))
    assert_equal(*results)


@both
def test_a_module_with_a_branch_on_its_input(impl):
    class Branch(nn.Module):
        def forward(self, x, flag=None):
            return x.sin() if flag else x.exp()

    for flag in (True, False, None):
        got = gradients(lambda x: checkpoint(Branch(), x, flag, impl=impl), leaf(3))  # noqa: B023
        assert_equal(got, gradients(lambda x: Branch()(x, flag), leaf(3)))  # noqa: B023


@both
def test_a_region_under_autocast_computes_as_plain(impl):
    w = leaf(4, 4, seed=1).detach()

    def region(x):
        return (x @ w).sin().float()

    def under_autocast(run):
        def forward(x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return run(x)

        return forward

    got = gradients(under_autocast(partial(checkpoint, region, impl=impl)), leaf(4, 4))
    assert_equal(got, gradients(under_autocast(region), leaf(4, 4)))


def test_only_some_outputs_of_many_regions_are_used():
    blocks = [nn.Linear(3, 3) for _ in range(3)]
    x = leaf(2, 3)
    outs = [checkpoint(block, x) for block in blocks]
    outs[1].sum().backward()
    assert [block.weight.grad is None for block in blocks] == [True, False, True]


@both
def test_a_region_whose_result_is_changed_in_place_afterwards(impl):
    def net(run):
        def forward(x):
            y = run(x)
            y = y * 1
            y.add_(2).mul_(3)
            return y

        return forward

    got = gradients(net(partial(checkpoint, torch.sin, impl=impl)), leaf(4))
    assert_equal(got, gradients(net(torch.sin), leaf(4)))


def test_result_changed_in_place_directly():
    def net(run):
        def forward(x):
            y = run(x)
            y.add_(2)
            return y * x

        return forward

    got = gradients(net(lambda x: checkpoint(lambda x: x.sin() + x, x)), leaf(4))
    assert_equal(got, gradients(net(lambda x: x.sin() + x), leaf(4)))


def test_detect_anomaly_works_through_a_region():
    with torch.autograd.set_detect_anomaly(True, check_nan=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = gradients(lambda x: checkpoint(lambda x: x.sin().exp(), x), leaf(4))
    assert_equal(got, gradients(lambda x: x.sin().exp(), leaf(4)))


def test_nan_is_reported_by_anomaly_mode_as_plain():
    def bad(x):
        return (x * 0).sqrt().sqrt() * 0

    for run in (bad, partial(checkpoint, bad)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with (
                torch.autograd.set_detect_anomaly(True),
                pytest.raises(RuntimeError, match="returned nan values"),
            ):
                run(leaf(4)).sum().backward()


# --- Names of regions that nobody has named ---------------------------------------------


def name_in_error(function, impl):
    """How the error about a changed input names the region."""
    y = leaf(3) * 1
    out = checkpoint(function, y, impl=impl)
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(InputChangedError) as caught:
        out.sum().backward()
    return caught.value.fqn


@both
def test_a_region_of_a_builtin_is_named_after_it_and_not_after_an_earlier_one(impl):
    names = [name_in_error(function, impl) for function in (torch.sin, torch.exp, torch.tanh)]
    assert [name.split(".")[-1] for name in names] == ["sin", "exp", "tanh"]


@both
def test_a_region_of_a_partial_is_named_after_what_it_calls(impl):
    class Named(nn.Module):
        def forward(self, x):
            return x.sin()

    module = Named()
    for function in (partial(module), partial(partial(module)), partial(module.forward)):
        assert name_in_error(function, impl) == "Named"
    assert name_in_error(partial(torch.clamp, max=0.0), impl).endswith("clamp")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_region_of_a_modules_call_is_named_after_its_own_class(impl):
    checkpoint(nn.Tanh().__call__, leaf(4), impl=impl)
    x = leaf(4) * 1
    out = checkpoint(nn.GELU().__call__, x, impl=impl)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(InputChangedError, match="region `GELU`"):
        out.sum().backward()
