"""What optimizers keep and take, from their own code on tensors without memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from scripts.measure import memory_timeline
from tests.plan.blocks import Net, is_mlp
from wrappers import profile
from wrappers.errors import WrapperError
from wrappers.plan.fakes import Fakes
from wrappers.plan.optimizers import measure_optimizer

CPU = torch.device("cpu")
SHAPES = (64 * 32, 32)


def _measure(optimizer, model=None, **settings):
    fakes = Fakes(CPU)
    model = model or nn.Linear(64, 32)
    return measure_optimizer(optimizer, model, fakes.module(model), fakes.mode, **settings)


@pytest.mark.parametrize(
    ("make", "num_states"),
    [
        (torch.optim.AdamW, 2),
        (partial(torch.optim.AdamW, amsgrad=True), 3),
        (partial(torch.optim.SGD, lr=0.1), 0),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1),
        (partial(torch.optim.RMSprop, lr=0.1), 1),
    ],
)
def test_state_and_step(make, num_states):
    memory = _measure(make)
    counters = memory.state_bytes - num_states * 4 * sum(SHAPES)
    assert 0 <= counters <= 4 * len(SHAPES)  # A count of steps is a tensor in some.
    model = nn.Linear(64, 32)
    optimizer = make(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    real = memory_timeline(optimizer.step, CPU).peak_bytes
    assert memory.step_bytes == pytest.approx(real, abs=64)


def test_groups_and_settings_of_the_user_count():
    model = nn.Linear(64, 32)
    optimizer = torch.optim.SGD(
        [{"params": [model.weight], "momentum": 0.9}, {"params": [model.bias]}], lr=0.1
    )
    assert _measure(optimizer, model).state_bytes == 4 * 64 * 32
    assert optimizer.state == {}
    assert model.weight.grad is None


def test_none_takes_nothing():
    memory = _measure(None)
    assert (memory.state_bytes, memory.step_bytes) == (0, 0)


def test_frozen_parameters_have_no_state():
    model = nn.Linear(64, 32)
    model.weight.requires_grad_(False)
    assert _measure(torch.optim.AdamW, model).state_bytes <= 2 * 4 * 32 + 4


def test_an_optimizer_that_needs_values():
    class Picky(torch.optim.AdamW):
        def step(self, closure=None):
            raise RuntimeError("needs a closure")

    with pytest.raises(WrapperError, match=r"the optimizer Picky does not run.*needs a closure"):
        _measure(Picky)


def test_on_an_accelerator_the_default_is_a_step_of_all_parameters_at_once():
    model = nn.Sequential(*(nn.Linear(64, 32, bias=False) for _ in range(4)))
    one = 64 * 32 * 4

    def step_bytes(make, **settings):
        return _measure(make, model, **settings).step_bytes

    alone = step_bytes(torch.optim.AdamW)
    together = step_bytes(torch.optim.AdamW, is_elsewhere=True)
    assert together >= 4 * one > alone
    assert together == step_bytes(partial(torch.optim.AdamW, foreach=True))
    for chosen in ({"foreach": False}, {"fused": True}):
        make = partial(torch.optim.AdamW, **chosen)
        assert step_bytes(make, is_elsewhere=True) == step_bytes(make)
    # What the user's own has chosen, or not, counts too.
    own = torch.optim.AdamW(model.parameters())
    assert step_bytes(own, is_elsewhere=True) == together
    assert own.param_groups[0]["foreach"] is None


def test_a_profile_for_a_device_elsewhere_steps_like_that_device():
    model = Net(1)
    settings = {"check_fn": is_mlp, "optimizer": torch.optim.AdamW, "max_options": 8}
    sizes = []
    for hardware in ("H100", "CPU"):
        found = profile(model, torch.ones(8, 32), hardware=hardware, **settings)
        after = found.moments[-1]
        assert after.label == "optimizer"
        sizes.append(after.base_bytes - found.persistent.gradient_bytes - found.start_bytes)
    assert sizes[0] == found.persistent.parameter_bytes > sizes[1] > 0
