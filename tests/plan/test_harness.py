"""One region alone, on the real engine: bytes to the byte."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.plan.blocks import COSTS, Mlp, harness
from wrappers import _knobs, _torch
from wrappers.policies import planned, save_matmuls
from wrappers.policy import CheckpointPolicy

ROWS, WIDTH = 1024, 32
X = ROWS * WIDTH * 4
SEED = 4  # What the harness begins with.
GRADIENTS = 4 * sum(p.numel() for p in Mlp(WIDTH).parameters())
NORM = 2 * ROWS * 4  # A mean and a deviation a row.


@pytest.fixture
def mlp():
    return harness(Mlp(WIDTH), torch.ones(ROWS, WIDTH))[0]


def test_a_plain_region_keeps_what_autograd_saves(mlp):
    run = mlp.run(is_plain=True)
    # Input, statistics, normalised, up (four times as wide), its gelu.
    assert run.kept_bytes == X + NORM + X + 4 * X + 4 * X + SEED
    assert run.gradient_bytes == GRADIENTS + SEED
    # Input, output, and what is added to it.
    assert run.forward_bytes == run.kept_bytes + 2 * X


def test_a_region_that_keeps_nothing_keeps_its_input(mlp):
    run = mlp.run()
    assert run.kept_bytes == X + SEED
    assert run.forward_bytes < mlp.run(is_plain=True).forward_bytes
    assert run.backward_bytes > mlp.run(is_plain=True).kept_bytes


def test_a_policy_keeps_what_it_says(mlp):
    named = planned({("aten.addmm.default", 0): CheckpointPolicy.MUST_SAVE})
    assert mlp.run(named).kept_bytes == X + 4 * X + SEED
    # The other product is not needed by backward, and is let go.
    assert mlp.run(save_matmuls()).kept_bytes == X + 4 * X + SEED


def test_an_input_that_others_keep_does_not_count():
    alone, _ = harness(Mlp(WIDTH), torch.ones(ROWS, WIDTH), is_own=False)
    assert alone.run().kept_bytes == 0


def test_offloaded_results_leave_the_device(mlp):
    run = mlp.run(planned({("aten.addmm.default", 0): CheckpointPolicy.MUST_CPU_OFFLOAD}))
    assert run.offload_bytes == 4 * X
    assert run.kept_bytes == X + SEED


def test_gradients_that_are_there_are_added_to():
    block, x = Mlp(WIDTH), torch.ones(ROWS, WIDTH)
    has, module = harness(block, x, has_gradients=True)
    hasnt, _ = harness(block, x)
    assert has.run(is_plain=True).gradient_bytes == SEED
    assert has.run().backward_bytes < hasnt.run().backward_bytes
    assert all(p.grad is None for p in module.parameters())


def test_an_output_that_is_saved_inside_counts_if_nobody_else_keeps_it():
    class Relu(Mlp):
        def forward(self, x):
            return F.relu_(super().forward(x))

    alone, _ = harness(Relu(WIDTH), torch.ones(ROWS, WIDTH))
    kept = alone.run(is_plain=True).kept_bytes
    alone._call = alone._call.with_own_outputs([True])
    assert alone.run(is_plain=True).kept_bytes == kept + X
    assert alone.run().kept_bytes == X + SEED  # It is replayed.


def test_a_small_region_is_as_from_its_second_call_on(monkeypatch):
    """It then comes back at once, which takes more than what comes back piece by piece."""
    small, _ = harness(Mlp(WIDTH), torch.ones(64, WIDTH))
    cut = planned({("aten.addmm.default", 0): CheckpointPolicy.MUST_SAVE})
    at_once = small.run(cut)
    monkeypatch.setattr(_knobs, "REPLAY_AT_ONCE_BYTES", 0)
    in_pieces = small.run(cut)
    assert at_once.kept_bytes == in_pieces.kept_bytes
    assert at_once.backward_bytes > in_pieces.backward_bytes


def test_times_of_operators_are_added_up(mlp):
    plain, again = mlp.run(is_plain=True, costs=COSTS), mlp.run(costs=COSTS)
    assert plain.forward_us == again.forward_us > 0
    assert again.backward_us > plain.backward_us > plain.forward_us


def test_without_a_gradient_there_is_no_backward():
    frozen = Mlp(WIDTH).requires_grad_(False)
    with torch.no_grad():
        alone, _ = harness(frozen, torch.ones(4, WIDTH))
    run = alone.run(is_plain=True)
    assert not run.has_backward


def test_nothing_is_left_behind(mlp):
    first = mlp.run(save_matmuls())
    assert mlp.run(save_matmuls()).backward_bytes == first.backward_bytes
    assert not any(_torch.is_fake(t) for t in nn.Linear(2, 2).parameters())
