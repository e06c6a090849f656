"""A profile leaves the model as it was, and says what it cannot do."""

from __future__ import annotations

import gc
import random
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.plan.blocks import Mlp, Net, is_mlp
from wrappers import _knobs, _torch, profile
from wrappers.errors import WrapperError
from wrappers.plan.profile import _merged_moments, loss_of, samples_of
from wrappers.plan.records import Moment


@pytest.fixture
def few_runs(monkeypatch):
    """Menus and timings of a few runs: what is asked here is not how good they are."""
    monkeypatch.setattr(_knobs, "PLAN_MENU_RUNS", 4)
    monkeypatch.setattr(_knobs, "PLAN_TIMED_STEPS", 1)
    monkeypatch.setattr(_knobs, "PLAN_TIMED_OPERATOR_STEPS", 1)


class Noisy(Mlp):
    """Draws random numbers and changes a buffer."""

    def __init__(self, width, index):
        super().__init__(width)
        self.register_buffer("steps", torch.zeros(()))
        self.batch_norm = nn.BatchNorm1d(width)
        self.seen = []

    def forward(self, x):
        self.steps += 1
        self.seen.append(x.shape)
        return nn.functional.dropout(self.batch_norm(super().forward(x)), 0.5, self.training)


def _state(model):
    return {
        "parameters": [p.clone() for p in model.parameters()],
        "buffers": [b.clone() for b in model.buffers()],
        "random": [torch.get_rng_state()],
    }


def _marks(model):
    """What must be the same, and not only equal."""
    return {
        "parameters": [id(p) for p in model.parameters()],
        "gradients": [id(p.grad) for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


@pytest.mark.parametrize("hardware", ["CPU", None])
def test_the_model_stays_as_it_was(hardware):
    model = Net(2, make=Noisy)
    model.blocks[1].eval()
    model.first.weight.grad = torch.ones_like(model.first.weight)
    model.blocks[0].register_forward_hook(lambda *_: None)
    state, marks = _state(model), _marks(model)
    profile(model, torch.ones(8, 32), check_fn=is_mlp, hardware=hardware)
    after = _state(model)
    for key, tensors in state.items():
        assert all(map(torch.equal, tensors, after[key])), key
    assert _marks(model) == marks
    assert [block.seen for block in model.blocks] == [[], []]
    held = [*model.parameters(), *model.buffers(), model.first.weight.grad]
    assert not any(map(_torch.is_fake, held))


def test_persistent_bytes():
    model, x = Net(2), torch.ones(8, 32)
    model.blocks[0].requires_grad_(False)
    found = profile(model, x, check_fn=is_mlp, hardware="CPU", optimizer=torch.optim.AdamW)
    sizes = [(p.numel() * 4, p.requires_grad) for p in model.parameters()]
    kept = found.persistent
    assert kept.parameter_bytes == sum(num for num, _ in sizes)
    assert kept.gradient_bytes == sum(num for num, is_trained in sizes if is_trained)
    assert kept.sample_bytes == 8 * 32 * 4
    assert 0 <= kept.optimizer_bytes - 2 * kept.gradient_bytes <= 4 * len(sizes)
    assert (kept.bucket_bytes, kept.unsharded_bytes) == (0, 0)
    assert found.moments[-1].label == "optimizer"


def test_moments_follow_the_step():
    found = profile(Net(2), torch.ones(8, 32), check_fn=is_mlp, hardware="CPU")
    assert [(m.label, m.num_alive) for m in found.moments] == [
        ("before blocks.0", 0),
        ("between blocks.0 and blocks.1", 1),
        ("after blocks.1", 2),
        ("backward before blocks.1", 1),
        ("backward before blocks.0", 0),
    ]


def test_what_is_alive_at_the_peak_adds_up():
    found = profile(Net(2), torch.ones(512, 32), check_fn=is_mlp, hardware="CPU")
    sizes = [holding.num_bytes for holding in found.holdings]
    assert sizes == sorted(sizes, reverse=True)
    assert {h.operator for h in found.holdings} >= {"parameter", "sample", "aten.gelu.default"}


def test_several_samples_take_the_largest_of_each():
    model = Net(2)
    small, large = torch.ones(8, 32), torch.ones(64, 32)

    def of(sample):
        return profile(model, sample, check_fn=is_mlp, hardware="CPU")

    both = of([small, large])
    for one in (of(small), of(large)):
        for a, b in zip(both.regions, one.regions, strict=True):
            assert both.options(a)[0].kept_bytes >= one.options(b)[0].kept_bytes
            assert a.backward_base_bytes >= b.backward_base_bytes
    largest = of(large)
    assert both.options(both.regions[0])[0].kept_bytes == (
        largest.options(largest.regions[0])[0].kept_bytes
    )


def test_a_model_that_looks_at_values_outside_of_regions():
    class Item(Net):
        def forward(self, x):
            return super().forward(x) * x.sum().item()

    with pytest.raises(WrapperError, match=r"the Item does not run on tensors without memory"):
        profile(Item(), torch.ones(8, 32), check_fn=is_mlp, hardware="CPU")


def test_a_model_without_regions_or_gradients():
    with pytest.raises(WrapperError, match="no region found in the Linear"):
        profile(nn.Linear(2, 2), torch.ones(2, 2), check_fn=is_mlp, hardware="CPU")
    with pytest.raises(WrapperError, match="no tensor with a gradient"):
        profile(Net().requires_grad_(False), torch.ones(2, 32), check_fn=is_mlp, hardware="CPU")


def test_losses():
    x = torch.ones(3, requires_grad=True)
    assert loss_of(SimpleNamespace(loss=x[0])) is not None
    assert loss_of({"loss": x[1], "logits": x}).shape == ()
    assert loss_of([x, 2 * x, "text"]) == 9
    assert loss_of(x) == 3


def test_samples():
    x = torch.ones(2)
    assert samples_of(x) == [((x,), {})]
    assert samples_of((x, 3)) == [((x, 3), {})]
    assert samples_of({"a": x}) == [((), {"a": x})]
    assert len(samples_of([x, (x,)])) == 2
    for wrong in ([], 3, {"a": 1}):
        with pytest.raises(ValueError, match="sample"):
            samples_of(wrong)


class LeavesOut(Net):
    """A second list of blocks, which a sample may leave out."""

    def __init__(self):
        super().__init__(1)
        self.others = nn.ModuleList([Mlp()])

    def forward(self, x, has_others):
        if has_others:
            x = self.others[0](x)
        return super().forward(x)


def test_a_region_that_a_sample_leaves_out_keeps_its_options(few_runs):
    large, small = torch.ones(512, 32), torch.ones(8, 32)
    model = LeavesOut()
    settings = {"check_fn": is_mlp, "hardware": "CPU"}
    both = profile(model, [(large, False), (small, True)], **settings)
    alone = profile(model, (small, True), **settings)
    menus = []
    for found in (both, alone):
        region = next(r for r in found.regions if r.fqn == "others.0")
        structure = found.structures[region.structure]
        menus.append([(o.decisions, o.kept_bytes, o.offload_bytes) for o in structure.options])
    assert menus[0] == menus[1]
    assert len(menus[0]) > 1


def test_of_samples_that_run_other_operators_the_common_ones_are_counted(few_runs):
    class Halves(Mlp):
        def forward(self, x):
            x = super().forward(x)
            return x.sin().sin() if len(x) > 8 else x.sin()

    model, samples = Net(1, make=Halves), [torch.ones(64, 32), torch.ones(8, 32)]
    found = profile(model, samples, check_fn=is_mlp, hardware="CPU")
    (structure,) = found.structures.values()
    assert structure.calls["aten.addmm.default"] == 2
    assert "aten.sin.default" not in structure.calls


def test_moments_of_samples_are_merged_by_the_largest():
    first = [Moment("before a", 0, 5), Moment("after a", 1, 7)]
    other = [Moment("before a", 0, 6), Moment("before b", 0, 9), Moment("before b", 0, 2)]
    assert _merged_moments([first, other]) == [
        Moment("before a", 0, 6),
        Moment("after a", 1, 7),
        Moment("before b", 0, 9),
    ]


class Frozen(Net):
    """Trained are parameters of blocks alone, so that the first block's input has no gradient."""

    def __init__(self):
        super().__init__(2)
        self.first.requires_grad_(False)
        self.last.requires_grad_(False)


def test_blocks_may_be_all_that_is_trained(few_runs):
    found = profile(Frozen(), torch.ones(8, 32), check_fn=is_mlp)
    assert found.is_measured
    assert all(s.backward_us > 0 and not s.reason for s in found.structures.values())


def test_times_are_those_under_the_models_own_autocast(few_runs):
    dtypes = set()

    class Product(nn.Module):
        def __init__(self, width, index):
            super().__init__()
            self.up = nn.Linear(width, width)

        def forward(self, x):
            out = self.up(x)
            if not _torch.is_fake(out):
                dtypes.add(out.dtype)
            return out.sin()

    class Autocast(Net):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    model = Autocast(2, make=Product)
    profile(model, torch.ones(8, 32), check_fn=list(model.blocks).__contains__)
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("hardware", ["CPU", None])
def test_nothing_holds_the_model_afterwards(few_runs, hardware):
    model = Net(2)
    weight = weakref.ref(model.blocks[0].up.weight)
    gc.collect()
    gc.disable()
    try:
        profile(model, torch.ones(8, 32), check_fn=is_mlp, hardware=hardware)
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_grad_mode_and_random_states_are_the_callers(few_runs):
    class Skips(Mlp):
        def forward(self, x):
            return super().forward(x) if random.random() < 2 else x

    model = Net(1, make=Skips)
    state = random.getstate()
    with torch.no_grad():
        found = profile(model, torch.ones(8, 32), check_fn=is_mlp, hardware="CPU")
        assert not torch.is_grad_enabled()
    assert random.getstate() == state
    assert all(len(s.options) > 1 for s in found.structures.values())


@pytest.mark.parametrize("hardware", ["CPU", None])
def test_a_module_may_hold_a_tensor_with_a_graph(few_runs, hardware):
    model = Net(1)
    model.blocks[0]._last = model.blocks[0].up.weight * 2
    found = profile(model, torch.ones(8, 32), check_fn=is_mlp, hardware=hardware)
    assert [region.fqn for region in found.regions] == ["blocks.0"]
    assert model.blocks[0]._last.grad_fn is not None
