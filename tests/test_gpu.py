"""What only a GPU can show: its random state, its autocast, its memory, its operators.

Skipped without one.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, dropout, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from scripts import measure
from scripts import model as gpt
from wrappers import (
    CheckpointImpl,
    _knobs,
    apply_activation_checkpointing,
    checkpoint,
    checkpoint_wrapper,
    is_recomputing,
    make_plan,
    offload_stats,
    offload_wrapper,
    plan_for,
    profile,
    region_report,
    remove_activation_checkpointing,
    state,
)
from wrappers.plan.hardware import find_hardware
from wrappers.select import by_class

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("no_leaks", "seeded"),
]

both_impls = pytest.mark.parametrize("impl", list(CheckpointImpl), ids=lambda impl: impl.name)


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v, dropout_p=0.1)
        return x + dropout(self.out(attended.transpose(1, 2).flatten(2)), 0.1)


def train(model: nn.Module, **autocast) -> list[torch.Tensor]:
    """One step; the random state moves on between forward and backward."""
    torch.cuda.manual_seed(1)
    x = torch.randn(2, 32, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", **autocast):
        out = model(x)
    torch.randn(7, device="cuda")
    out.float().square().mean().backward()
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.fixture
def model():
    return nn.Sequential(*(Block() for _ in range(3))).cuda()


@both_impls
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dropout_and_autocast_repeat(model, impl, dtype):
    wrapped = copy.deepcopy(model)
    apply_activation_checkpointing(wrapped, check_fn=lambda m: isinstance(m, Block), impl=impl)
    expected = train(model, dtype=dtype)
    for ours, plain in zip(train(wrapped, dtype=dtype), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)


@both_impls
def test_the_random_stream_goes_on_as_in_the_plain_model(model, impl):
    wrapped = copy.deepcopy(model)
    apply_activation_checkpointing(wrapped, check_fn=lambda m: isinstance(m, Block), impl=impl)
    after = []
    for each in (model, wrapped):
        train(each, enabled=False)
        after.append(torch.cuda.get_rng_state())
    assert torch.equal(*after)


@both_impls
def test_a_device_reached_through_a_keyword_argument_keeps_its_random_state(impl):
    drawn = []

    def region(x, *, scale):
        drawn.append(torch.rand(4, device=scale.device))
        return x.sin().cos() * scale.to(x.device)

    x = torch.randn(4, requires_grad=True)
    out = checkpoint(region, x, scale=torch.ones(4, device="cuda"), impl=impl)
    torch.rand(4, device="cuda")
    out.sum().backward()
    assert torch.equal(*drawn)


@both_impls
def test_activations_are_freed_on_the_device(model, impl):
    wrapped = copy.deepcopy(model)
    apply_activation_checkpointing(wrapped, check_fn=lambda m: isinstance(m, Block), impl=impl)
    used = []
    for each in (model, wrapped):
        x = torch.randn(8, 256, 64, device="cuda", requires_grad=True)
        each(x).sum().backward()  # libraries allocate their workspaces
        before = torch.cuda.memory_allocated()
        out = each(x)
        used.append(torch.cuda.memory_allocated() - before)
        out.sum().backward()
        del out
    assert used[1] < 0.4 * used[0]


@both_impls
def test_a_side_stream(impl):
    streams = []

    def region(x):
        if is_recomputing():
            streams.append(torch.cuda.current_stream())
        return (x @ x).sin().exp()

    x = torch.randn(256, 256, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = checkpoint(region, x, impl=impl)
    torch.cuda.current_stream().wait_stream(stream)
    out.sum().backward()
    (plain,) = torch.autograd.grad(region(x).sum(), x)
    torch.testing.assert_close(x.grad, plain)
    assert streams == [stream]  # autograd runs a node where its forward ran


def offloaded(model, *, on_checkpoint):
    blocks = [checkpoint_wrapper(block) if on_checkpoint else block for block in model]
    return nn.Sequential(*(offload_wrapper(block, min_bytes=0) for block in blocks))


@pytest.mark.parametrize("on_checkpoint", [False, True], ids=["alone", "on_checkpoint"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_offload_repeats_dropout_and_autocast(model, dtype, on_checkpoint):
    wrapped = offloaded(copy.deepcopy(model), on_checkpoint=on_checkpoint)
    expected = train(model, dtype=dtype)
    for _ in range(3):  # From the second step on tensors are fetched ahead, and the last stay.
        wrapped.zero_grad(set_to_none=True)
        for ours, plain in zip(train(wrapped, dtype=dtype), expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("on_checkpoint", [False, True], ids=["alone", "on_checkpoint"])
def test_offloaded_activations_leave_the_device(model, on_checkpoint):
    wrapped = offloaded(copy.deepcopy(model), on_checkpoint=on_checkpoint)
    used = []
    for each in (model, wrapped):
        x = torch.randn(8, 256, 64, device="cuda", requires_grad=True)
        each(x).sum().backward()  # libraries allocate their workspaces
        before = torch.cuda.memory_allocated()
        out = each(x)
        torch.cuda.synchronize()
        offload_stats()  # lets go of what has been copied
        used.append(torch.cuda.memory_allocated() - before)
        out.sum().backward()
        del out
    # The last of the three blocks stays, as backward wants it at once.
    assert used[1] < 0.5 * used[0]


def stepped(model, optimizer):
    """One step with the random state as it is; what it leaves of the parameters."""
    out = model(torch.randn(2, 32, 64, device="cuda"))
    out.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("layout", ["dcp", "safetensors"])
@pytest.mark.parametrize("save", [state.save, state.async_save])
def test_a_state_checkpoint_goes_on_where_it_was(model, tmp_path, save, layout):
    other = copy.deepcopy(model)
    apply_activation_checkpointing(model, check_fn=by_class(Block))
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer)
    saved = save(tmp_path / "state", model, optimizer, layout=layout)
    expected = stepped(model, optimizer)
    if isinstance(saved, state.AsyncSave):
        saved.result()
    other_optimizer = torch.optim.AdamW(other.parameters())
    state.load(tmp_path / "state", other, other_optimizer)
    for got, wanted in zip(stepped(other, other_optimizer), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_main_job_over_nccl(tmp_path):
    losses = {}
    for impl in ("none", "reentrant", "no_reentrant"):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
        command += ["scripts/train.py", f"--impl={impl}", "--steps=3", "--layers=2"]
        command += [f"--json={tmp_path / impl}"]
        root = Path(__file__).parents[1]
        subprocess.run([sys.executable, *command], cwd=root, check=True, timeout=300)
        losses[impl] = json.loads((tmp_path / impl).read_text())["loss"]
    assert losses["reentrant"] == losses["no_reentrant"] == losses["none"]


# --- Plans ----------------------------------------------------------------------------------

GPT_CONFIG = gpt.GPTConfig(num_layers=6, d_model=256, num_heads=4, seq_len=256, dropout=0.1)
BATCH = 8


@pytest.fixture(autouse=True)
def _few_options(monkeypatch):
    """A menu from few of the ways to treat a block takes a tenth of the work."""
    monkeypatch.setattr(_knobs, "PLAN_MENU_RUNS", 16)


both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def make_gpt(dtype=torch.float32):
    return gpt.GPT(GPT_CONFIG).to(dtype)


def make_tokens():
    return torch.randint(gpt.VOCAB_SIZE, (BATCH, GPT_CONFIG.seq_len))


def loss_of(tokens, logits):
    return cross_entropy(logits.flatten(0, 1), tokens.flatten())


def gpt_step(model, tokens):
    """One step from the same random state each time; its gradients by name in the plain model."""
    torch.cuda.manual_seed(1)
    logits = model(tokens)  # Alive in backward, as in most training loops and as in a profile.
    loss_of(tokens, logits).backward()
    remainder = "._checkpoint_wrapped_module"
    found = {name.replace(remainder, ""): p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def peak_of(model, tokens):
    """What a step takes at most beyond what is there before it, when others have been run."""
    for _ in range(2):
        gpt_step(model, tokens)
    device = torch.device("cuda")
    return measure.peak_activation_bytes(lambda: gpt_step(model, tokens), device)


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        # What is summed in another order differs by some of the last digits.
        scale = float(expected[name].abs().max())
        eps = torch.finfo(grad.dtype).eps
        torch.testing.assert_close(grad, expected[name], rtol=16 * eps, atol=16 * eps * scale)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def gpt_and_tokens(request):
    return make_gpt(request.param).cuda(), make_tokens().cuda()


def with_link(hardware, bytes_per_s):
    """A device with another link to the host; where nothing comes back nothing is offloaded."""
    return dataclasses.replace(hardware, d2h_bytes_per_s=1e13, h2d_bytes_per_s=bytes_per_s)


def profile_of(model, tokens, **options):
    loss_fn = partial(loss_of, tokens)
    return profile(model, tokens, check_fn=by_class(gpt.Block), loss_fn=loss_fn, **options)


def test_a_planned_step_is_within_its_budget_and_as_predicted(gpt_and_tokens):
    model, tokens = gpt_and_tokens
    expected = gpt_step(model, tokens)
    plain_peak = peak_of(model, tokens)
    found = profile_of(model, tokens)
    found = dataclasses.replace(found, hardware=with_link(found.hardware, 0.0))
    ample = make_plan(found, 1 << 40, count="activations", margin=0)
    assert ample.num_wrapped == 0
    low, high = ample.smallest_bytes, ample.peak_bytes - ample.uncounted_bytes
    assert plain_peak == pytest.approx(high, rel=0.02)
    for share in (0.0, 0.3, 0.7):
        budget = int(low + share * (high - low))
        plan = make_plan(found, budget + budget // 49, count="activations")  # 2% are its margin.
        plan.apply(model)
        assert_same_gradients(gpt_step(model, tokens), expected)
        peak = peak_of(model, tokens)
        assert peak <= plan.budget_bytes
        assert peak == pytest.approx(plan.peak_bytes - plan.uncounted_bytes, rel=0.02)
        assert not any(row.reason for row in region_report(model).rows)
        remove_activation_checkpointing(model)


def test_a_plan_that_offloads_moves_what_it_says_and_repeats_the_step(gpt_and_tokens):
    model, tokens = gpt_and_tokens
    expected = gpt_step(model, tokens)
    # With a link this fast nothing is recomputed that can be moved.
    found = profile_of(model, tokens, hardware=with_link(find_hardware("H100"), 1e13))
    ample = make_plan(found, 1 << 40, count="activations", margin=0)
    low, high = ample.smallest_bytes, ample.peak_bytes - ample.uncounted_bytes
    plan = make_plan(found, low + (high - low) // 3, count="activations", margin=0)
    planned_bytes = sum(region.offload_bytes for region in plan.regions)
    assert planned_bytes > 0
    plan.apply(model, strict=True)
    for _ in range(3):  # From the second step on tensors are fetched ahead.
        before = moved_bytes()
        assert_same_gradients(gpt_step(model, tokens), expected)
        torch.cuda.synchronize()
        assert 0 < moved_bytes() - before <= planned_bytes


def moved_bytes():
    return sum(tier.out_bytes for tier in offload_stats().tiers)


def test_a_profile_measures_and_leaves_the_device_as_it_was(gpt_and_tokens):
    model, tokens = gpt_and_tokens
    gpt_step(model, tokens)  # Libraries allocate their workspaces.
    gc.collect()
    random_state, before = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    found = profile_of(model, tokens)
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.is_measured
    (structure,) = found.structures.values()
    assert not structure.reason
    assert min(structure.forward_us, structure.backward_us) > 0
    assert found.step_us > GPT_CONFIG.num_layers * (structure.forward_us + structure.backward_us)
    assert all(row.time_us > 0 for row in structure.operators)
    extra_us = [option.extra_us for option in structure.options]
    assert extra_us[0] == 0
    assert all(us > 0 for us in extra_us[1:])


class Calls(TorchDispatchMode):
    """Counts the operators of a run."""

    def __init__(self):
        super().__init__()
        self.num = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num[str(func)] += 1
        return func(*args, **(kwargs or {}))


@both_dtypes
def test_a_plan_made_elsewhere_names_the_operators_that_run_here(dtype):
    with torch.device("meta"):
        model, tokens = make_gpt(dtype), make_tokens()
    elsewhere = profile(model, tokens, check_fn=by_class(gpt.Block), hardware="H100")
    (structure,) = elsewhere.structures.values()
    model = make_gpt(dtype).cuda()
    shape = (BATCH, GPT_CONFIG.seq_len, GPT_CONFIG.d_model)
    x = torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True)
    with Calls() as calls:
        model.blocks[0](x)
    calls.num.pop("aten.detach.default", None)  # Autograd's own.
    assert dict(calls.num) == dict(structure.calls)


@both_dtypes
def test_a_plan_made_elsewhere_holds_here(dtype):
    plan = partial(
        plan_for,
        partial(make_gpt, dtype),
        make_tokens,
        device=with_link(find_hardware("H100"), 0.0),
        check_fn=by_class(gpt.Block),
        count="activations",
        margin=0,
    )
    ample = plan(budget=1 << 40)
    low, high = ample.smallest_bytes, ample.peak_bytes - ample.uncounted_bytes
    made = plan(budget=(low + high) // 2)
    assert made.num_wrapped > 0
    model, tokens = make_gpt(dtype).cuda(), make_tokens().cuda()

    def step():
        logits = model(tokens)
        logits.sum().backward()
        model.zero_grad(set_to_none=True)

    made.apply(model, strict=True)
    for _ in range(2):
        step()
    peak = measure.peak_activation_bytes(step, torch.device("cuda"))
    assert peak == pytest.approx(made.peak_bytes - made.uncounted_bytes, rel=0.02)
    assert not any(row.reason for row in region_report(model).rows)
