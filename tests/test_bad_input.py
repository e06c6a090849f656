"""What users get wrong, and what they are told: the type and the text of every error."""

from __future__ import annotations

import contextlib
import enum
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import wrappers
from wrappers import (
    CheckpointError,
    CheckpointImpl,
    CheckpointPolicy,
    GraphExecGroup,
    InputChangedError,
    RecomputeMismatchError,
    checkpoint,
    checkpoint_sequential,
    checkpoint_wrapper,
    create_selective_checkpoint_contexts,
    detach_variable,
    is_recomputing,
)

pytestmark = pytest.mark.usefixtures("no_leaks")

REENTRANT, NO_REENTRANT = CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT
REPLAY = CheckpointImpl.REPLAY
aten = torch.ops.aten


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).requires_grad_()


def region(x):
    return x.sin().cos()


def raises(kind, text: str):
    """Exactly this class, exactly this text."""

    @contextlib.contextmanager
    def check():
        with pytest.raises(kind) as caught:
            yield caught
        assert type(caught.value) is kind
        assert str(caught.value) == text

    return check()


# --- Arguments of checkpoint


@pytest.mark.parametrize(
    ("function", "kind"), [(None, "NoneType"), (3, "int"), ("relu", "str"), ([region], "list")]
)
@pytest.mark.parametrize("impl", [REENTRANT, NO_REENTRANT])
def test_something_that_is_not_callable(function, kind, impl):
    with raises(TypeError, f"checkpoint needs a callable, got {kind}"):
        checkpoint(function, leaf(2), impl=impl)


@pytest.mark.parametrize("check", ["strict", "", None, "DEFAULT"])
def test_an_unknown_determinism_check(check):
    text = f"determinism_check must be one of ['default', 'none', 'values'], got {check!r}"
    with raises(ValueError, text):
        checkpoint(region, leaf(2), determinism_check=check)


@pytest.mark.parametrize("option", [{"use_reentrant": True}, {"impl": REENTRANT}])
@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"context_fn": partial(create_selective_checkpoint_contexts, [])}, "context_fn"),
        ({"debug": True}, "debug"),
        ({"determinism_check": "values"}, "determinism_check='values'"),
        ({"debug": True, "determinism_check": "values"}, "debug, determinism_check='values'"),
    ],
)
def test_what_reentrant_cannot_do(option, given, named):
    text = (
        f"{named}: not possible with CheckpointImpl.REENTRANT (use_reentrant=True), which saves "
        "nothing in forward that could be compared or kept. Use CheckpointImpl.NO_REENTRANT "
        "(use_reentrant=False)."
    )
    with raises(ValueError, text):
        checkpoint(region, leaf(2), **option, **given)


@pytest.mark.parametrize(
    ("use_reentrant", "impl", "meant"),
    [(True, NO_REENTRANT, "REENTRANT"), (False, REENTRANT, "NO_REENTRANT")],
)
def test_contradictory_impl(use_reentrant, impl, meant):
    text = (
        f"use_reentrant={use_reentrant} means {meant}, but impl={impl.name} was given too. Give "
        "one of the two."
    )
    with raises(ValueError, text):
        checkpoint(region, leaf(2), use_reentrant=use_reentrant, impl=impl)


@pytest.mark.parametrize(("use_reentrant", "impl"), [(True, REENTRANT), (False, NO_REENTRANT)])
def test_options_that_agree_are_fine(use_reentrant, impl):
    checkpoint(region, leaf(2), use_reentrant=use_reentrant, impl=impl).sum().backward()


@pytest.mark.parametrize("impl", ["REENTRANT", 7, object()])
def test_an_impl_that_is_none(impl):
    with pytest.raises(ValueError, match="is not a valid CheckpointImpl"):
        checkpoint(region, leaf(2), impl=impl)


def test_torchs_own_impl_enum_is_taken():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl as Theirs

    assert CheckpointImpl(Theirs.REENTRANT) is REENTRANT
    assert CheckpointImpl(Theirs.NO_REENTRANT) is NO_REENTRANT


def test_another_enum_is_not():
    class Other(enum.Enum):
        REENTRANT = 1

    with pytest.raises(ValueError, match="is not a valid CheckpointImpl"):
        CheckpointImpl(Other.REENTRANT)


@pytest.mark.parametrize("context_fn", [None, 3, contextlib.nullcontext()])
def test_a_context_fn_that_is_not_callable(context_fn):
    text = f"context_fn must be a callable, got {type(context_fn).__name__}"
    with raises(TypeError, text):
        checkpoint(region, leaf(2), context_fn=context_fn)


def test_a_context_that_swallows_the_regions_exception():
    def failing(x):
        raise ValueError("lost")

    def context_fn():
        return contextlib.suppress(ValueError), contextlib.nullcontext()

    with pytest.raises(CheckpointError) as caught:
        checkpoint(failing, leaf(2), context_fn=context_fn)
    assert str(caught.value) == (
        "region `test_a_context_that_swallows_the_regions_exception.<locals>.failing`: the forward "
        "context of context_fn suppressed an exception of the region, which so has no output. Let "
        "the context pass exceptions on."
    )


def test_a_recompute_context_that_swallows_the_early_stop_or_an_exception():
    def failing(x):
        x = x.sin()
        if is_recomputing():
            raise ValueError("lost")
        return x.cos()

    def context_fn():
        return contextlib.nullcontext(), contextlib.suppress(BaseException)

    out = checkpoint(failing, leaf(2), context_fn=context_fn)
    with pytest.raises(CheckpointError, match="the forward saved 2 tensors, the recompute 1"):
        out.sum().backward()
    # The stop of a rerun is no exception of the user's; it ends inside the context.
    x, plain = leaf(2), leaf(2)
    checkpoint(region, x, context_fn=context_fn).sum().backward()
    region(plain).sum().backward()
    assert torch.equal(x.grad, plain.grad)


def test_a_context_fn_that_returns_too_little():
    with pytest.raises((TypeError, ValueError)):
        checkpoint(region, leaf(2), context_fn=contextlib.nullcontext)


@pytest.mark.parametrize("entry", ["mm", 3, None, torch.mm, nn.Linear])
def test_a_policy_list_with_something_that_is_not_an_operator(entry):
    text = (
        "a policy list holds operators such as torch.ops.aten.mm.default, got "
        f"{entry!r} of type {type(entry).__name__}"
    )
    with raises(ValueError, text):
        create_selective_checkpoint_contexts([torch.ops.aten.mm.default, entry])


# --- REENTRANT


def test_an_output_without_grad_under_reentrant():
    def detached(x):
        return x.sin().detach(), x.cos()

    out, _ = checkpoint(detached, leaf(2), impl=REENTRANT)
    with raises(
        CheckpointError,
        "region `test_an_output_without_grad_under_reentrant.<locals>.detached`: none of the "
        "outputs that backward came from requires grad, so this region has no gradient to "
        "compute. Do not checkpoint it, do not detach its outputs inside, or use "
        "CheckpointImpl.NO_REENTRANT.",
    ):
        out.sum().backward()


def test_autograd_grad_through_reentrant():
    x = leaf(2)
    out = checkpoint(region, x, impl=REENTRANT).sum()
    text = (
        "region `region`: .grad() and .backward(inputs=...) are not possible through a REENTRANT "
        "region, whose backward runs a backward of its own. Use CheckpointImpl.NO_REENTRANT "
        "(use_reentrant=False)."
    )
    with raises(CheckpointError, text):
        torch.autograd.grad(out, x)
    out = checkpoint(region, x, impl=REENTRANT).sum()
    with raises(CheckpointError, text):
        out.backward(inputs=[x])


def test_create_graph_through_reentrant():
    out = checkpoint(region, leaf(2), impl=REENTRANT).sum()
    with pytest.raises(CheckpointError, match=r"`region`: create_graph=True is not possible"):
        out.backward(create_graph=True)


def test_a_recompute_that_returns_another_number_of_outputs():
    def two(x):
        return (x.sin(),) if is_recomputing() else (x.sin(), x.cos())

    out, _ = checkpoint(two, leaf(2), impl=REENTRANT)
    with pytest.raises(CheckpointError) as caught:
        out.sum().backward()
    assert str(caught.value).endswith(
        "two`: the forward returned 2 tensors, the recompute 1. The forward must repeat exactly."
    )


def test_detach_variable_needs_a_tuple():
    with raises(TypeError, "detach_variable needs a tuple, got list"):
        detach_variable([leaf(2)])


# --- Changes after the forward


@pytest.mark.parametrize("impl", [REENTRANT, NO_REENTRANT])
def test_an_input_changed_in_place_after_the_forward(impl):
    x, mask = leaf(2), torch.ones(2)

    def masked(x, mask):
        return (x * mask).sin()

    out = checkpoint(masked, x, mask, impl=impl)
    mask.zero_()
    with pytest.raises(InputChangedError) as caught:
        out.sum().backward()
    assert type(caught.value) is InputChangedError
    assert str(caught.value).startswith(
        "region `test_an_input_changed_in_place_after_the_forward.<locals>.masked`: argument 1 was "
        "changed in place after the forward had read it, so the recompute would start from other "
        "values. Pass a copy, or make the change out of place."
    )
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("impl", [REENTRANT, NO_REENTRANT])
def test_a_parameter_changed_in_place_after_the_forward(impl):
    module = nn.Linear(2, 2)
    out = checkpoint(module, leaf(3, 2), impl=impl)
    with torch.no_grad():
        module.bias.add_(1)
    with raises(
        InputChangedError,
        "region `Linear`: parameter `bias` was changed in place between forward and backward, so a "
        "recompute would use other values than the forward did. Run backward before the "
        "optimizer step or any other update, or do not checkpoint this region.",
    ):
        out.sum().backward()


# --- Execution groups


def test_a_slot_that_is_needed_twice_under_a_group():
    out = checkpoint(region, leaf(2)).sum()
    with GraphExecGroup():
        out.backward(retain_graph=True)
        with raises(
            CheckpointError,
            "region `region`: two backward calls under one GraphExecGroup need the same saved "
            "tensor. Calls in a group must run over parts of the graph that do not overlap; run "
            "these outside of the group.",
        ):
            out.backward()
    out.backward()


def test_groups_inside_groups():
    with GraphExecGroup() as outer:
        text = f"GraphExecGroup contexts cannot be nested; {outer} is active. Leave it first."
        inner = GraphExecGroup()
        with raises(RuntimeError, text):
            inner.__enter__()
    with GraphExecGroup():
        pass


# --- Recomputes that differ


@pytest.mark.parametrize(
    ("name", "function", "text"),
    [
        (
            "fewer",
            lambda x: x.sin() if is_recomputing() else x.sin().cos(),
            "the forward saved 2 tensors, the recompute 1.",
        ),
        (
            "more",
            lambda x: x.sin().cos() if is_recomputing() else x.sin(),
            "the forward saved 1 tensors, the recompute 2.",
        ),
        (
            "different",
            lambda x: x.sin().double().cos() if is_recomputing() else x.sin().cos(),
            "saved tensor 2 of 2: forward (2,) float32 cpu, recomputed (2,) float64 cpu.",
        ),
    ],
)
def test_a_recompute_that_saves_other_tensors(name, function, text):
    out = checkpoint(function, leaf(2), early_stop=False)
    with pytest.raises(RecomputeMismatchError) as caught:
        out.sum().backward()
    assert text in str(caught.value)
    assert str(caught.value).startswith("region `<lambda>`")


# --- torch.func


def loss(x):
    return checkpoint(region, x).sum()


def loss_reentrant(x):
    return checkpoint(region, x, impl=REENTRANT).sum()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.func.jvp's own
@pytest.mark.parametrize("function", [loss, loss_reentrant])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(f)(leaf(2)),
        lambda f: torch.func.vjp(f, leaf(2)),
        lambda f: torch.func.vmap(f)(leaf(3, 2)),
        lambda f: torch.func.jvp(f, (leaf(2),), (torch.ones(2),)),
        lambda f: torch.func.jacrev(f)(leaf(2)),
        lambda f: torch.func.hessian(f)(leaf(2)),
    ],
    ids=["grad", "vjp", "vmap", "jvp", "jacrev", "hessian"],
)
def test_a_region_inside_a_transform(function, transform):
    with raises(
        RuntimeError,
        "region `region`: activation checkpointing inside a torch.func transform (grad, vjp, vmap, "
        "jvp, ...) is not possible, since the transform has its own saved tensors. Put the region "
        "around the transform, or use torch.autograd.grad in place of it.",
    ):
        transform(function)


def test_a_region_around_a_transform_is_possible_as_the_error_says():
    def function(x, w):
        return torch.func.vmap(lambda row: (row * w).sin())(x)

    x, w, plain_x, plain_w = leaf(3, 2), leaf(2), leaf(3, 2), leaf(2)
    checkpoint(function, x, w).sum().backward()
    function(plain_x, plain_w).sum().backward()
    assert torch.equal(x.grad, plain_x.grad)
    assert torch.equal(w.grad, plain_w.grad)


# --- checkpoint_sequential


@pytest.mark.parametrize("segments", [0, -1, 4])
def test_segments_out_of_range(segments):
    with raises(ValueError, f"segments must be between 1 and 3, got {segments}"):
        checkpoint_sequential(nn.Sequential(*[nn.Tanh()] * 3), segments, leaf(2))


def test_no_functions_at_all():
    with pytest.raises(ValueError, match=r"segments must be between 1 and 0, got 1"):
        checkpoint_sequential([], 1, leaf(2))


def test_unknown_options_of_checkpoint_sequential():
    with raises(ValueError, "unexpected keyword arguments: mask, scale"):
        checkpoint_sequential([torch.sin], 1, leaf(2), scale=1, mask=2)


def test_bad_options_of_checkpoint_sequential_are_those_of_checkpoint():
    with pytest.raises(ValueError, match="determinism_check must be one of"):
        checkpoint_sequential([torch.sin, torch.cos], 2, leaf(2), determinism_check="all")
    with pytest.raises(ValueError, match="Give one of the two"):
        checkpoint_sequential(
            [torch.sin, torch.cos], 2, leaf(2), use_reentrant=True, impl=NO_REENTRANT
        )


# --- Fields and classes


def test_every_error_of_a_region_is_a_runtime_error_with_its_name():
    for kind in (CheckpointError, RecomputeMismatchError, InputChangedError):
        assert issubclass(kind, wrappers.WrapperError)
        assert issubclass(kind, RuntimeError)
        assert kind("text", fqn="layers.0").fqn == "layers.0"
        assert kind("text").fqn == ""


def test_code_that_catches_torchs_error_of_this_name_is_not_lied_to():
    # Ours is not torch's class: an import from torch.utils.checkpoint stays torch's.
    assert CheckpointError is not torch.utils.checkpoint.CheckpointError


# --- Policies; what the wrappers and both implementations make of them is in test_policies.py


@pytest.mark.parametrize("answer", [None, 1, "save", torch.ones(2) > 0])
def test_a_policy_that_returns_something_else(answer):
    with raises(
        TypeError,
        "the policy function must return a CheckpointPolicy or a bool; for aten.sin.default it "
        f"returned {answer!r}",
    ):
        checkpoint(region, leaf(2), policy=lambda ctx, op, *args, **kwargs: answer)


class OwnError(Exception):
    pass


@pytest.mark.parametrize("kind", [OwnError, RuntimeError, TypeError, StopIteration])
def test_the_exception_of_a_policy_is_the_users_own(kind):
    def policy(ctx, op, *args, **kwargs):
        raise kind("mine")

    with raises(kind, "mine"):
        checkpoint(region, leaf(2), policy=policy)


@pytest.mark.parametrize("policy", [3, "mm", object(), {"mm": True}])
def test_something_that_is_no_policy(policy):
    text = (
        "a policy is a function policy(ctx, op, *args, **kwargs), a preset of wrappers.policies, "
        f"or a list of operators, got {type(policy).__name__}"
    )
    with raises(TypeError, text):
        checkpoint(region, leaf(2), policy=policy)


@pytest.mark.parametrize("entry", ["mm", 3, None, torch.mm, nn.Linear])
@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
def test_a_policy_with_an_entry_that_is_not_an_operator(kind, entry):
    text = (
        "a policy list holds operators such as torch.ops.aten.mm.default, got "
        f"{entry!r} of type {type(entry).__name__}"
    )
    with raises(ValueError, text):
        checkpoint(region, leaf(2), policy=kind([entry]))


@pytest.mark.parametrize("option", [{"use_reentrant": True}, {"impl": REENTRANT}])
@pytest.mark.parametrize("policy", [[aten.sin], lambda ctx, op, *args, **kwargs: True])
def test_a_policy_under_reentrant(option, policy):
    with raises(
        ValueError,
        "policy: not possible with CheckpointImpl.REENTRANT (use_reentrant=True), which saves "
        "nothing in forward that could be compared or kept. Use CheckpointImpl.NO_REENTRANT "
        "(use_reentrant=False).",
    ):
        checkpoint(region, leaf(2), policy=policy, **option)


@pytest.mark.parametrize(
    "option",
    [
        {"policy": [aten.sin]},
        {"policy": [aten.sin], "use_reentrant": False},
        {"policy": [aten.sin], "impl": REPLAY},
        {"impl": REPLAY},
    ],
)
def test_a_context_fn_beside_a_policy_or_for_replay(option):
    context_fn = partial(create_selective_checkpoint_contexts, [aten.sin.default])
    with raises(
        ValueError,
        "context_fn cannot be combined with policy or CheckpointImpl.REPLAY: give the policy of "
        "create_selective_checkpoint_contexts as policy=..., or use CheckpointImpl.NO_REENTRANT "
        "without policy.",
    ):
        checkpoint(region, leaf(2), context_fn=context_fn, **option)


@pytest.mark.parametrize("impl", list(CheckpointImpl))
@pytest.mark.parametrize("verify", ["sometimes", "", None, True, "FIRST"])
def test_an_unknown_verify(verify, impl):
    text = f"verify must be one of ['first', 'always', 'never'], got {verify!r}"
    with raises(ValueError, text):
        checkpoint(region, leaf(2), verify=verify, impl=impl)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_use_reentrant_says_that_it_is_not_replay(use_reentrant):
    meant = REENTRANT if use_reentrant else NO_REENTRANT
    text = (
        f"use_reentrant={use_reentrant} means {meant.name}, but impl=REPLAY was given too. Give "
        "one of the two."
    )
    with raises(ValueError, text):
        checkpoint(region, leaf(2), use_reentrant=use_reentrant, impl=REPLAY)


def test_a_policy_that_offloads_where_there_is_no_accelerator():
    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_CPU_OFFLOAD

    model = nn.Sequential(nn.Tanh(), nn.Sigmoid())
    wrappers.apply_activation_checkpointing(
        model, check_fn=lambda module: module is not model, policy=policy
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            model(leaf(2)).sum().backward()
    assert [(warning.category, str(warning.message)) for warning in said] == [
        (
            UserWarning,
            f"region `{fqn}`: the policy moves outputs to the host that are there already; they "
            "are kept as they are",
        )
        for fqn in ("0", "1")
    ]


# --- Changes after the forward of a region that is replayed


class Scale(nn.Module):
    """Product, buffer and constant: everything that a replay reads again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("scale", torch.full((3,), 2.0))
        self.products: list[torch.Tensor] = []

    def forward(self, x, mask=1):
        product = self.linear(x)
        self.products.append(product.detach())  # The memory and version of what a policy keeps.
        return ((product * mask).sin() * self.scale).cos()


def replayed(**options) -> nn.Module:
    model = nn.Sequential(nn.Identity(), Scale())
    wrappers.apply_activation_checkpointing(
        model, check_fn=lambda module: type(module) is Scale, impl=REPLAY, **options
    )
    return model


def gradients(module, *inputs):
    module.zero_grad()
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    module(*inputs).sum().backward()
    return [t.grad for t in [*inputs, *module.parameters()]]


def assert_the_next_step_is_right(model, *inputs) -> None:
    """On REPLAY, and with the gradients of the same module without a region."""
    plain = wrappers.modules.base.unwrap(model[1])
    for _ in range(2):
        for got, expected in zip(
            gradients(model[1], *inputs), gradients(plain, *inputs), strict=True
        ):
            assert torch.equal(got, expected)
    assert wrappers.region_report(model)["1"].impl is REPLAY


@pytest.mark.parametrize("verify", ["first", "always", "never"])
@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("linear.weight", "parameter `linear.weight`"),
        ("scale", "buffer `scale`"),
    ],
)
def test_a_parameter_or_buffer_changed_before_a_replay(name, named, has_run, verify):
    model = replayed(verify=verify)
    if has_run:
        gradients(model, leaf(2, 3))
    out = model(leaf(2, 3)).sum()
    with torch.no_grad():
        model[1].state_dict(keep_vars=True)[name].add_(1)
    with pytest.raises(InputChangedError) as caught:
        out.backward()
    assert type(caught.value) is InputChangedError
    assert str(caught.value).startswith(
        f"region `1`: {named} was changed in place between forward and backward, so a recompute "
        "would use other values than the forward did."
    )
    assert (caught.value.fqn, caught.value.tensor) == ("1", named)
    assert_the_next_step_is_right(model, leaf(2, 3))


@pytest.mark.parametrize("verify", ["first", "always", "never"])
@pytest.mark.parametrize("has_run", [False, True])
def test_an_input_changed_before_a_replay(has_run, verify):
    model = replayed(verify=verify)
    if has_run:
        gradients(model[1], leaf(2, 3), leaf(2, 3, seed=1))
    mask = torch.ones(2, 3)
    out = model[1](leaf(2, 3), mask).sum()
    mask.zero_()
    with pytest.raises(InputChangedError) as caught:
        out.backward()
    assert type(caught.value) is InputChangedError
    assert str(caught.value).startswith(
        "region `1`: argument 1 was changed in place between "
        "forward and backward, so a recompute would use other values than the forward did."
    )
    assert caught.value.fqn == "1"
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert_the_next_step_is_right(model, leaf(2, 3), leaf(2, 3, seed=1))


def test_what_a_replay_does_not_read_may_change():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module = checkpoint_wrapper(model, impl=REPLAY)
    x = leaf(2, 3)
    out = module(x).sum()
    with torch.no_grad():
        model[1].bias.add_(1)  # Nothing that backward needs depends on it.
    out.backward()
    expected = model[1].weight.detach().sum(0).expand(2, 3) @ model[0].weight.detach()
    assert torch.allclose(x.grad, expected)


@pytest.mark.parametrize("verify", ["first", "never"])
def test_a_kept_output_changed_before_a_replay(verify):
    model = replayed(policy=[aten.addmm], verify=verify)
    gradients(model, leaf(2, 3))
    out = model(leaf(2, 3)).sum()
    model[1].products[-1].add_(1)
    with pytest.raises(CheckpointError) as caught:
        out.backward()
    assert type(caught.value) is CheckpointError
    assert str(caught.value).startswith(
        "region `1`: the output of aten.addmm.default that the policy keeps was changed in place "
        "before backward. Let the policy recompute this operator, change a copy, or pass "
        "allow_cache_entry_mutation=True if the change is meant to be seen."
    )
    assert caught.value.fqn == "1"
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert_the_next_step_is_right(model, leaf(2, 3))


def test_a_kept_output_may_be_changed_if_this_is_said():
    model = replayed(policy=[aten.addmm], allow_cache_entry_mutation=True)
    assert_the_next_step_is_right(model, leaf(2, 3))
    x = leaf(2, 3)
    out = model(x).sum()
    model[1].products[-1].add_(1)
    out.backward()
    module = wrappers.modules.base.unwrap(model[1])
    changed = (module.linear(x) + 1).detach()
    gradient = -(changed.sin() * 2).sin() * 2 * changed.cos()
    assert torch.equal(x.grad, gradient @ module.linear.weight.detach())
    assert_the_next_step_is_right(model, leaf(2, 3))
