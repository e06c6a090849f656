"""Blocks and harnesses for the tests of the profiler."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from wrappers.plan.calls import call_of, with_output
from wrappers.plan.costs import Roofline
from wrappers.plan.fakes import Fakes
from wrappers.plan.hardware import find_hardware
from wrappers.plan.harness import Harness
from wrappers.select import by_class

CPU = torch.device("cpu")
HARDWARE = find_hardware("CPU")
COSTS = Roofline(HARDWARE)


class Mlp(nn.Module):
    """Four operators that make memory; ``index`` says nothing about what it computes."""

    def __init__(self, width=32, index=0):
        super().__init__()
        self.index = index
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


is_mlp = by_class(Mlp)


class Net(nn.Module):
    def __init__(self, num=3, width=32, make=Mlp):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(make(width, index) for index in range(num))
        self.last = nn.Linear(width, 8)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def harness(block, x, *, is_own=True, **settings):
    """A block on its own, called with a tensor like ``x``, and its copy."""
    fakes = Fakes(CPU)
    module = fakes.module(block)
    with fakes.mode:
        fake = fakes.tensor(x.requires_grad_())
        call = call_of((fake,), {}).with_own([is_own])
        call = with_output(call, [fake], module(fake))
    return Harness(fakes.mode, module, call, CPU, **settings), module
