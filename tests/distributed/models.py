"""A tiny model, its data, and one process's part of a step, for all distributed tests.

Each rank trains on its own half of the global batch with its own seed. The single-process
counterpart runs the halves one after the other on copies of the plain model and takes the mean
of their gradients. Dividing by two is exact and a sum of two numbers has one order, so even the
ranks' reduced gradients must be equal to it bit by bit. (One run over the whole batch at once
adds up the samples in another order, inside the matmuls, and agrees to rounding only.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wrappers import CheckpointImpl

WIDTH = 8
BATCH = 4
WORLD_SIZE = 2
NUM_BLOCKS = 3
IMPLS = (CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT)


class Block(nn.Module):
    """Residual MLP with dropout, and with buffers that a second forward must not update twice."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH) if batch_norm else nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.drop = nn.Dropout(0.25)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(self.up(self.norm(x)).relu()))


class Model(nn.Module):
    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(batch_norm) for _ in range(NUM_BLOCKS))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make_model(batch_norm: bool = True) -> Model:
    torch.manual_seed(0)
    return Model(batch_norm)


def data(rank: int, micro_batch: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 + 10 * micro_batch + rank)
    return torch.randn(BATCH, WIDTH, generator=generator)


def forward(model: nn.Module, rank: int, micro_batch: int = 0) -> Tensor:
    """The loss of a rank's share of the batch, with the rank's dropout."""
    torch.manual_seed(1000 + 10 * micro_batch + rank)
    out: Tensor = model(data(rank, micro_batch))
    return out.float().square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients by name, whole also where they are sharded."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    return found


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@dataclass
class Reference:
    """What a step leaves in a single process: mean gradients, and each rank's buffers."""

    gradients: dict[str, Tensor]
    buffers: list[dict[str, Tensor]]


def single_process(model: nn.Module, step: Callable[[nn.Module, int], Any]) -> Reference:
    """Run ``step(copy of model, rank)`` for each rank, here, one after the other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a rank: threads would split sums in other places
    replicas = [copy.deepcopy(model) for _ in range(WORLD_SIZE)]
    for rank, replica in enumerate(replicas):
        step(replica, rank)
    torch.set_num_threads(num_threads)
    first, second = map(gradients, replicas)
    mean = {name: (first[name] + second[name]) / 2 for name in first}
    return Reference(mean, [buffers(replica) for replica in replicas])


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bitwise equality of two dicts of tensors."""
    assert got.keys() == expected.keys()
    differing = {
        name: (got[name] - expected[name]).abs().max().item()
        for name in expected
        if not torch.equal(got[name], expected[name])
    }
    assert not differing, f"largest absolute differences: {differing}"
