"""Debug mode records the operators of both runs and shows the first that differs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from wrappers import (
    RecomputeMismatchError,
    _knobs,
    checkpoint,
    create_selective_checkpoint_contexts,
    is_recomputing,
    set_checkpoint_debug_enabled,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).requires_grad_()


def line_of(marker: str) -> str:
    """``file:line`` of the only line here that ends in a comment with this text."""
    with open(__file__) as file:
        lines = [i for i, line in enumerate(file, 1) if line.endswith(f"  # {marker}\n")]
    (line,) = lines
    return f"{__file__}:{line}"


def error_text(region, *args, **options) -> str:
    out = checkpoint(region, *args, **options)
    with pytest.raises(RecomputeMismatchError) as caught:
        out.sum().backward()
    return str(caught.value)


def another_operator(x):
    x = x.sin()
    x = (
        x.tanh()  # recompute's operator
        if is_recomputing()
        else x.exp()  # forward's operator
    )
    return (x[:1] if is_recomputing() else x).cos()


def test_the_first_operator_that_differs_is_shown_for_both_runs():
    text = error_text(another_operator, leaf(4, 2), debug=True)
    assert "First operator that differs: number 1\n" in text
    forward = f"  forward:   aten.exp.default -> (4, 2) float32  ({line_of(FORWARD)})\n"
    recompute = f"  recompute: aten.tanh.default -> (4, 2) float32  ({line_of(RECOMPUTE)})\n"
    assert forward + recompute in text


FORWARD, RECOMPUTE = "forward's operator", "recompute's operator"


def test_both_lists_are_printed():
    text = error_text(another_operator, leaf(4, 2), debug=True)
    assert "Operators of the forward (3, from number 0):\n     0  aten.sin.default" in text
    assert "Operators of the recompute (" in text
    assert "detach" not in text


def test_an_operator_with_another_output_differs():
    def region(x):
        x = x.sin()
        x = x.double() if is_recomputing() else x.float().view(-1)
        return x.exp()

    text = error_text(region, leaf(4), debug=True)
    assert "First operator that differs: number 1\n" in text
    assert "aten._to_copy.default -> (4,) float64" in text


def test_a_recompute_that_ends_too_soon():
    def region(x):
        x = x.sin().cos()
        return x if is_recomputing() else x.exp().sin()

    text = error_text(region, leaf(4), debug=True)
    assert "the forward saved 4 tensors, the recompute 2." in text
    assert "The first 2 operators agree; the recompute ended there" in text
    assert "Operators of the forward (4, from number 0)" in text
    assert "Operators of the recompute (2, from number 0)" in text


def test_an_operator_inside_torchs_modules_is_located_at_the_users_line():
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.GELU())

        def forward(self, x):
            x = x[:1] if is_recomputing() else x
            return self.layers(x)  # inside torch.nn

    text = error_text(Mlp(), leaf(3, 4), debug=True)
    assert f"aten.addmm.default -> (3, 4) float32  ({line_of('inside torch.nn')})" in text
    assert "site-packages" not in text


def test_without_debug_the_text_says_how_to_get_it():
    text = error_text(another_operator, leaf(4))
    assert "Pass debug=True to compare the operators of both runs." in text
    assert "Operators of the" not in text


def test_debug_changes_no_values():
    def region(x):
        return nn.functional.dropout(x.sin(), 0.5).cos()

    grads = []
    for debug in (False, True):
        torch.manual_seed(0)
        x = leaf(64)
        checkpoint(region, x, debug=debug).sum().backward()
        grads.append((x.grad, torch.get_rng_state()))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_debug_with_two_backwards():
    x, plain = leaf(4), leaf(4)
    out = checkpoint(torch.sin, x.exp(), debug=True).sum()
    out.backward(retain_graph=True)
    out.backward()
    plain_out = plain.exp().sin().sum()
    plain_out.backward(retain_graph=True)
    plain_out.backward()
    assert torch.equal(x.grad, plain.grad)


def test_debug_in_nested_regions():
    def inner(x):
        return x.sin().exp()

    def outer(x):
        return checkpoint(inner, x.cos(), debug=True).sin()

    x, plain = leaf(4), leaf(4)
    checkpoint(outer, x, debug=True).sum().backward()
    plain.cos().sin().exp().sin().sum().backward()
    assert torch.equal(x.grad, plain.grad)


def test_the_trace_is_of_the_latest_recompute():
    fail = []

    def region(x):
        x = x.sin()
        if is_recomputing() and fail:
            x = x[:2]
        return x.cos()

    out = checkpoint(region, leaf(4), debug=True).sum()
    out.backward(retain_graph=True)
    fail.append(True)
    with pytest.raises(RecomputeMismatchError, match=r"Operators of the recompute \(2") as caught:
        out.backward()
    assert "First operator that differs: number 1" in str(caught.value)


# --- With a policy

save_mm = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])


def test_debug_with_a_policy_keeps_what_the_policy_keeps():
    x, w = leaf(8, 8), leaf(8, 8, seed=1)
    plain_x, plain_w = leaf(8, 8), leaf(8, 8, seed=1)
    out = checkpoint(lambda x, w: (x @ w).sin().exp(), x, w, context_fn=save_mm, debug=True)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 8**3
    (plain_x @ plain_w).sin().exp().sum().backward()
    assert torch.equal(x.grad, plain_x.grad)
    assert torch.equal(w.grad, plain_w.grad)


def test_debug_with_a_policy_shows_the_first_difference():
    def region(x, w):
        x = (x @ w).sin()
        return x[: 1 if is_recomputing() else 7].exp()

    text = error_text(region, leaf(8, 8), leaf(8, 8), context_fn=save_mm, debug=True)
    first = text[text.index("First operator that differs: number") :].splitlines()
    assert first[1].startswith("  forward:   aten.slice.Tensor -> (7, 8) float32")
    assert first[2].startswith("  recompute: aten.slice.Tensor -> (1, 8) float32")


# --- The switch


@pytest.mark.parametrize(
    ("switch", "option", "is_traced"),
    [
        (True, False, True),
        (True, True, True),
        (False, True, False),
        (False, False, False),
        (None, True, True),
        (None, False, False),
    ],
)
def test_the_switch_overrides_the_option(switch, option, is_traced):
    with set_checkpoint_debug_enabled(switch):
        out = checkpoint(another_operator, leaf(4), debug=option)
    with pytest.raises(RecomputeMismatchError) as caught:
        out.sum().backward()
    assert ("Operators of the forward" in str(caught.value)) is is_traced


def test_the_switch_counts_in_forward_alone():
    out = checkpoint(another_operator, leaf(4))
    with set_checkpoint_debug_enabled(True), pytest.raises(RecomputeMismatchError) as caught:
        out.sum().backward()
    assert "Operators of the forward" not in str(caught.value)


def test_switches_nest_and_are_put_back_after_an_exception():
    with set_checkpoint_debug_enabled(True):
        with pytest.raises(ValueError, match="stop"), set_checkpoint_debug_enabled(False):
            raise ValueError("stop")
        assert "Operators of the forward" in error_text(another_operator, leaf(4))
    assert "Operators of the forward" not in error_text(another_operator, leaf(4))


# --- Bounds


def long_region(x):
    for _ in range(50):
        x = x.sin()
    return (x[:1] if is_recomputing() else x).cos()


def test_a_trace_keeps_no_more_operators_than_the_knob_says():
    with _knobs.override(DEBUG_TRACE_OPERATORS=10):
        text = error_text(long_region, leaf(4), debug=True)
    assert "The first 10 operators agree" in text
    assert "Operators of the forward (51," in text


def test_an_error_prints_no_more_operators_than_the_knob_says():
    with _knobs.override(DEBUG_PRINTED_OPERATORS=6):
        text = error_text(long_region, leaf(4), debug=True)
    assert "First operator that differs: number 50" in text
    listed = [line for line in text.splitlines() if "  aten." in line and "put:" not in line]
    listed = [line for line in listed if not line.strip().startswith(("forward:", "recompute:"))]
    assert len(listed) <= 12
    assert f"aten.cos.default -> (4,) float32  ({line_of_return()})" in text


def line_of_return() -> str:
    with open(__file__) as file:
        for number, line in enumerate(file, 1):
            if line == "    return (x[:1] if is_recomputing() else x).cos()\n":
                last = number
    return f"{__file__}:{last}"


def test_a_trace_holds_no_tensors():
    import weakref

    seen = []

    def region(x):
        y = x.sin()
        seen.append(weakref.ref(y.untyped_storage()))
        del x
        z = y + 1
        del y
        return z * 2

    out = checkpoint(region, leaf(4), debug=True)
    assert seen[0]() is None
    del out
