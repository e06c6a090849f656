"""What only a GPU can show: its random state, its autocast, its memory. Skipped without one."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout, scaled_dot_product_attention

from wrappers import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint,
    checkpoint_wrapper,
    is_recomputing,
    offload_stats,
    offload_wrapper,
    state,
)
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
