"""A recompute that differs from the forward is an error that says where and how."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from tests.engine.helpers import shown
from wrappers import (
    CheckpointError,
    InputChangedError,
    RecomputeMismatchError,
    _knobs,
    checkpoint,
    is_recomputing,
)
from wrappers.engine import verify

pytestmark = pytest.mark.usefixtures("no_leaks")

NAN = float("nan")


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).requires_grad_()


def line_of(marker: str) -> str:
    """``file:line`` of the only line here that ends in a comment with this text."""
    with open(__file__) as file:
        lines = [i for i, line in enumerate(file, 1) if line.endswith(f"  # {marker}\n")]
    (line,) = lines
    return f"{__file__}:{line}"


def mismatch(region, *args, **options) -> RecomputeMismatchError:
    out = checkpoint(region, *args, **options)
    with pytest.raises(RecomputeMismatchError) as caught:
        out.sum().backward()
    return caught.value


def other_shape(x):
    x = x.sin()
    if is_recomputing():
        x = x[:3]
    return x.cos().exp()  # other shape


def other_dtype(x):
    x = x.sin()
    if is_recomputing():
        x = x.double()
    return x.cos().exp()  # other dtype


def other_device(x):
    x = x.sin()
    if is_recomputing():
        x = x.to("meta")
    return x.cos().exp()  # other device


@pytest.mark.parametrize(
    ("region", "marker", "got"),
    [
        (other_shape, "other shape", "(3, 2) float32 cpu"),
        (other_dtype, "other dtype", "(4, 2) float64 cpu"),
        (other_device, "other device", "(4, 2) float32 meta"),
    ],
)
def test_a_tensor_that_differs(region, marker, got):
    error = mismatch(region, leaf(4, 2))
    assert isinstance(error, CheckpointError)
    assert error.fqn == region.__name__
    assert error.slot == 1
    assert error.num_slots == 3
    assert error.expected == "(4, 2) float32 cpu"
    assert error.got == got
    expression = shown("x.cos()", f"return x.cos().exp()  # {marker}")
    assert error.operator == expression
    assert error.location == line_of(marker)
    assert str(error).startswith(
        f"region `{region.__name__}`, saved tensor 2 of 3: forward (4, 2) float32 cpu, recomputed "
        f"{got}. First operator that differs: {expression} ({line_of(marker)}). The forward must "
        "repeat exactly: check autocast"
    )
    assert str(error).endswith("Pass debug=True to compare the operators of both runs.")


class Changing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        if is_recomputing():
            x = x[:1]
        return self.mlp(self.norm(x))  # inside torch.nn


def test_an_operator_inside_torchs_modules_is_located_at_the_users_line():
    module = Changing()
    error = mismatch(module, leaf(3, 4))
    assert f"saved tensor {error.slot + 1} of {error.num_slots}: forward (3, 4)" in str(error)
    assert error.fqn == "Changing"
    assert error.expected == "(3, 4) float32 cpu"
    assert error.got == "(1, 4) float32 cpu"
    assert error.location == line_of("inside torch.nn")
    assert "layer_norm" in error.operator
    assert "site-packages" not in str(error)


def test_a_method_of_torch_called_through_a_helper_of_the_user():
    def helper(x):
        return torch.nn.functional.gelu(x)  # user's helper

    def region(x):
        return helper(x[:1] if is_recomputing() else x)

    error = mismatch(region, leaf(3, 4))
    assert error.location == line_of("user's helper")


def fewer(x):
    x = x.sin().cos()
    return x if is_recomputing() else x.exp()


def more(x):
    x = x.sin().cos()
    return x.exp() if is_recomputing() else x


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_recompute_that_saves_fewer_tensors(early_stop):
    error = mismatch(fewer, leaf(4), early_stop=early_stop)
    assert error.fqn == "fewer"
    assert error.slot is None
    assert error.num_slots == 3
    assert error.num_recomputed == 2
    assert error.expected == "3 saved tensors"
    assert error.got == "2 saved tensors"
    assert "region `fewer`: the forward saved 3 tensors, the recompute 2." in str(error)
    assert "another way through its code" in str(error)


def test_a_recompute_that_saves_more_tensors():
    error = mismatch(more, leaf(4), early_stop=False)
    assert error.fqn == "more"
    assert error.slot is None
    assert error.num_slots == 2
    assert error.num_recomputed == 3
    assert error.expected == "2 saved tensors"
    assert error.got == "3 saved tensors"
    assert "region `more`: the forward saved 2 tensors, the recompute 3." in str(error)


def test_what_comes_after_the_early_stop_does_not_matter():
    x, plain = leaf(4), leaf(4)
    checkpoint(more, x).sum().backward()
    plain.sin().cos().sum().backward()
    assert torch.equal(x.grad, plain.grad)


def test_the_first_of_several_differences_is_reported():
    def region(x):
        x = x.sin()
        if is_recomputing():
            x = x[:2]
        return x.cos().exp().sin()

    assert mismatch(region, leaf(4)).slot == 1


def test_a_slot_that_died_is_not_compared():
    def region(x):
        unused = (x[:1] if is_recomputing() else x).sin()
        del unused
        return x.cos()

    x, plain = leaf(4), leaf(4)
    checkpoint(region, x).sum().backward()
    plain.cos().sum().backward()
    assert torch.equal(x.grad, plain.grad)


def test_a_nested_region_that_differs_is_the_one_that_is_named():
    calls = []

    def inner(x):
        calls.append(is_recomputing())
        x = x.sin()
        if len(calls) == 3:  # forward, rerun of outer, rerun of inner
            x = x[:1]
        return x.cos()

    def outer(x):
        return checkpoint(inner, x.exp()).exp()

    error = mismatch(outer, leaf(4))
    assert calls == [False, True, True]
    assert error.fqn.endswith("inner")


def test_the_regions_own_exception_carries_the_difference_as_a_note():
    def region(x, w):
        x = x.sin()
        if is_recomputing():
            x = x[:, :2]
        return x.exp() @ w

    out = checkpoint(region, leaf(3, 4), leaf(4, 4), early_stop=False)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied") as caught:
        out.sum().backward()
    if hasattr(caught.value, "add_note"):
        (note,) = caught.value.__notes__
        assert "saved tensor 2 of" in note
        assert "forward (3, 4) float32 cpu, recomputed (3, 2) float32 cpu" in note


def test_the_step_after_a_mismatch_is_right():
    state = {"differ": True}

    def region(x):
        x = x.sin()
        if is_recomputing() and state["differ"]:
            x = x[:2]
        return x.cos()

    mismatch(region, leaf(4))
    state["differ"] = False
    x, plain = leaf(4), leaf(4)
    checkpoint(region, x).sum().backward()
    plain.sin().cos().sum().backward()
    assert torch.equal(x.grad, plain.grad)


# --- determinism_check


def test_none_checks_nothing():
    def region(x):
        return (x.sin().double() if is_recomputing() else x.sin()).cos()

    checkpoint(region, leaf(4), determinism_check="none").sum().backward()
    assert isinstance(mismatch(region, leaf(4)), RecomputeMismatchError)


class Factor:
    """A Python number that changes values, but no shape."""

    def __init__(self, forward, recompute):
        self.numbers = [forward, recompute]

    def __call__(self, x):
        factor = self.numbers[is_recomputing()]
        x = x * 1.0
        return (x + factor).sin()  # values


def test_values_finds_what_the_default_check_misses():
    checkpoint(Factor(1.0, 2.0), leaf(4)).sum().backward()
    error = mismatch(Factor(1.0, 2.0), leaf(4), determinism_check="values")
    assert error.fqn == "Factor"
    assert error.slot == error.num_slots - 1
    assert error.expected == "(4,) float32 cpu"
    assert error.got == "other values"
    assert error.location == line_of("values")


@pytest.mark.parametrize("number", [1.0, NAN, float("inf"), -0.0])
def test_equal_values_pass(number):
    x, plain = leaf(4), leaf(4)
    checkpoint(Factor(number, number), x, determinism_check="values").sum().backward()
    Factor(number, number)(plain).sum().backward()
    torch.testing.assert_close(x.grad, plain.grad, rtol=0, atol=0, equal_nan=True)


def test_nan_against_a_number_differs():
    assert mismatch(Factor(NAN, 1.0), leaf(4), determinism_check="values").got == "other values"
    assert mismatch(Factor(1.0, NAN), leaf(4), determinism_check="values").got == "other values"


def test_one_element_of_a_small_tensor_that_differs_is_found():
    def region(x):
        odd = 2.0 if is_recomputing() else 1.0
        return x.sin() * torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, odd, 1.0, 1.0])

    assert mismatch(region, leaf(8), determinism_check="values").got == "other values"


def test_values_compares_shapes_too():
    error = mismatch(other_shape, leaf(4, 2), determinism_check="values")
    assert error.got == "(3, 2) float32 cpu"


def test_values_with_dropout_passes_and_without_random_states_fails():
    def region(x):
        return nn.functional.dropout(x.sin(), 0.5).cos()

    checkpoint(region, leaf(64), determinism_check="values").sum().backward()
    with pytest.warns(UserWarning, match="draws random numbers"):
        out = checkpoint(
            region, leaf(64), determinism_check="values", preserve_rng_state=False
        ).sum()
    with pytest.raises(RecomputeMismatchError, match="recomputed other values"):
        out.backward()


def test_values_with_batch_norm_passes():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    for _ in range(2):
        checkpoint(module, leaf(5, 4), determinism_check="values").square().sum().backward()


class Save(torch.autograd.Function):
    """Saves any tensor, of whatever kind."""

    @staticmethod
    def forward(ctx, x, saved):
        ctx.save_for_backward(saved)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.saved_tensors
        return grad, None


def sparse():
    return torch.eye(4).to_sparse()


def sparse_csr():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.eye(4).to_sparse_csr()


def nested_jagged():
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)


@pytest.mark.parametrize("check", ["default", "values", "none"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(8, 8)[::2, 1::3],
        lambda: torch.ones(4, 6).t(),
        lambda: torch.ones(1, 3).expand(5, 3),
        lambda: torch.empty(0, 3),
        lambda: torch.tensor(1.5),
        lambda: torch.ones(3, 4, device="meta"),
        lambda: torch.tensor([True, False]),
        lambda: torch.arange(300),
        lambda: torch.ones(3, dtype=torch.complex64) * 1j,
        lambda: torch.ones(200, 200, dtype=torch.bfloat16),
        lambda: torch.ones(300, dtype=torch.float8_e4m3fn),
        lambda: torch.ones(2, 3, 4, 5, 6, 7),
        sparse,
        sparse_csr,
        nested_jagged,
    ],
    ids=lambda make: make.__name__,
)
def test_every_kind_of_saved_tensor_can_be_checked(check, make):
    tensor = make()

    def region(x):
        return Save.apply(x.sin(), tensor)

    x, plain = leaf(4), leaf(4)
    checkpoint(region, x, determinism_check=check, early_stop=False).sum().backward()
    plain.sin().sum().backward()
    assert torch.equal(x.grad, plain.grad)


@pytest.mark.parametrize("check", ["default", "values", "none"])
def test_a_nested_tensor_without_a_shape(check):
    def make():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
            parts = [torch.ones(2, 3), torch.full((1, 3), 2.0)]
            return torch.nested.nested_tensor(parts, requires_grad=True)

    def region(nested):
        return torch.nested.to_padded_tensor(nested * nested, 0.0).sin()

    nested, plain = make(), make()
    checkpoint(region, nested, determinism_check=check).sum().backward()
    region(plain).sum().backward()
    for a, b in zip(nested.grad.unbind(), plain.grad.unbind(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(1,), (64,), (65,), (10_000,), (3, 1000), (1000, 3), (7, 9, 11)])
def test_a_sample_is_bounded_and_covers_small_tensors(shape):
    (*_, sample) = verify.describe_with_values(torch.rand(shape))
    budget = _knobs.VALUE_SAMPLE_ELEMENTS
    numel = torch.Size(shape).numel()
    assert sample.elements.numel() <= budget
    assert sample.elements.numel() == numel or sample.elements.numel() > budget // 4


def test_a_sample_of_another_size_can_be_set():
    with _knobs.override(VALUE_SAMPLE_ELEMENTS=1000):
        (*_, sample) = verify.describe_with_values(torch.rand(1000))
    assert sample.elements.numel() == 1000


def test_a_sample_is_a_copy():
    tensor = torch.ones(4)
    (*_, sample) = verify.describe_with_values(tensor)
    tensor.zero_()
    assert sample.elements.tolist() == [1.0] * 4


def test_a_value_check_does_not_hold_whole_tensors():
    (*_, sample) = verify.describe_with_values(torch.rand(10_000))
    assert sample.elements.untyped_storage().nbytes() <= 4 * _knobs.VALUE_SAMPLE_ELEMENTS


# --- Changed in place


@pytest.mark.parametrize("check", ["default", "values"])
def test_a_closures_tensor_changed_in_place_is_no_mismatch_but_a_change(check):
    weight = leaf(4, 4)

    def region(x):
        return (x @ weight).sin()  # closure

    out = checkpoint(region, leaf(2, 4), determinism_check=check)
    with torch.no_grad():
        weight.mul_(1)
    with pytest.raises(InputChangedError) as caught:
        out.sum().backward()
    assert caught.value.fqn.endswith("region")
    expression = shown("x @ weight", "return (x @ weight).sin()  # closure")
    assert f"{expression} reads ({line_of('closure')})" in caught.value.tensor
    assert "saved tensor 1 of 3" in str(caught.value)


def test_a_tensor_changed_in_place_inside_the_region_before_it_is_saved():
    def region(x):
        x = x * 3
        x.mul_(2)
        return x.sin().add_(1)

    x, plain = leaf(4), leaf(4)
    checkpoint(region, x).sum().backward()
    region(plain).sum().backward()
    assert torch.equal(x.grad, plain.grad)


def test_a_saved_tensor_changed_in_place_inside_the_region_raises_as_in_the_plain_model():
    def region(x):
        x = x.exp()
        x.mul_(2)  # Damages what exp has saved.
        return x.sin().cos()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        region(leaf(4)).sum().backward()
    out = checkpoint(region, leaf(4))
    with pytest.raises(RuntimeError, match=r"in ?place"):
        out.sum().backward()
