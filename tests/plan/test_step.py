"""A step with stubs shows what lives outside of regions, and when."""

from __future__ import annotations

import pytest
import torch

from tests.plan.blocks import CPU, Mlp, Net
from wrappers import _torch
from wrappers.plan.calls import with_output
from wrappers.plan.fakes import Fakes
from wrappers.plan.step import Step, replaced_forwards

ROWS, WIDTH = 64, 32
X = ROWS * WIDTH * 4
PARAMETERS = 4 * sum(p.numel() for p in Mlp(WIDTH).parameters())


def _step(model, *, saved=()):
    """A step of a model whose blocks return something like what they get."""
    fakes = Fakes(CPU)
    fake = fakes.module(model)
    regions = {f"blocks.{i}": block for i, block in enumerate(fake.blocks)}

    def describe(fqn, call):
        with fakes.mode:
            out = torch.empty(ROWS, WIDTH).requires_grad_()
            key = _torch.storage_key(out)
            return with_output(call, [], out, {key} if saved else ())

    with fakes.mode:
        x = torch.empty(ROWS, WIDTH)

    def run(module):
        out = module(x)
        return out, out.sum()

    step = Step(fake, regions, describe, run, CPU)
    with fakes.mode:
        step.run()
    return step, fake


class Skips(Net):
    def forward(self, x):
        x = first = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x + first.sin())


def test_regions_are_visited_in_order_and_back():
    step, _ = _step(Net(3))
    assert [visit.fqn for visit in step.visits] == ["blocks.0", "blocks.1", "blocks.2"]
    entries = [visit.backward_entry for visit in step.visits]
    assert entries == sorted(entries, reverse=True)
    assert all(v.entry < v.exit < step.loss_at < v.backward_entry for v in step.visits)


def test_inputs_that_nobody_else_keeps_are_the_regions_own():
    step, _ = _step(Net(3))
    assert step.num_runs == 1
    assert [visit.call.inputs[0].is_own for visit in step.visits] == [True] * 3
    assert [step.base_of_forward(i) for i in range(3)] == [0, 0, 0]


def test_inputs_that_others_keep_are_not():
    step, _ = _step(Skips(3))
    assert step.num_runs == 2
    assert [visit.call.inputs[0].is_own for visit in step.visits] == [False, True, True]
    assert [step.base_of_forward(i) for i in range(3)] == [X, X, X]


def test_gradients_of_later_regions_are_there_in_backward():
    for model in (Net(3), Skips(3)):  # The second one's step runs twice.
        step, fake = _step(model)
        bases = [step.base_of_backward(i) for i in range(3)]
        assert bases[0] - bases[1] == bases[1] - bases[2] == PARAMETERS
        total = sum(p.numel() * 4 for p in fake.parameters())
        assert sum(c for c, _ in step.memory.changes[: step.end_at]) >= total


def test_outputs_count_only_for_the_region_that_alone_keeps_them():
    class Between(Net):
        def forward(self, x):
            x = self.first(x)
            for block in self.blocks[:2]:
                x = block(x)
            return self.last(self.blocks[2](x + 1) + 1)

    step, _ = _step(Between(3), saved=True)
    # The first one's is the second one's input; nobody has the others.
    assert [visit.call.outputs[0].is_own for visit in step.visits] == [False, True, True]
    step, _ = _step(Between(3))
    assert not any(visit.call.outputs[0].is_own for visit in step.visits)


def test_peaks_between_regions():
    step, _ = _step(Net(2))
    first, second = step.visits
    assert step.peak_between(0, first.entry) == X
    assert step.peak_between(first.exit, second.entry) <= X
    assert step.peak_between(second.exit, step.loss_at) == X + ROWS * 8 * 4 + 4


@pytest.mark.parametrize("fails", [False, True])
def test_forwards_are_put_back(fails):
    model = Net(2)
    own = model.blocks[1].forward = lambda x: x
    regions = {"a": model.blocks[0], "b": model.blocks[1]}
    called = []

    def enter(fqn, module, args, kwargs):
        called.append(fqn)
        if fails:
            raise RuntimeError("stop")
        return args[0]

    x = torch.ones(2, WIDTH)
    try:
        with replaced_forwards(regions, enter):
            model(x)
    except RuntimeError:
        assert fails
    assert called == ["a"] if fails else ["a", "b"]
    assert "forward" not in vars(model.blocks[0])
    assert model.blocks[1].forward is own
    assert isinstance(model.blocks[0](x), torch.Tensor)
