"""Training jobs for the state-checkpoint tests: sharded or plain, wrapped or not."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch import distributed as dist

from tests.distributed.models import WIDTH, make_model
from tests.distributed.test_fsdp2 import shard
from wrappers import CheckpointImpl

#: As in :mod:`tests.distributed.test_fsdp2`, and no FSDP at all.
PLAIN = "plain"
LAYOUTS = ("dcp", "safetensors")


def rank_of() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@dataclass
class Job:
    """A model in training, with dropout drawn from the global generator.

    Attributes:
        batches: A generator of this rank's own, for its data.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    batches: torch.Generator
    losses: list[float] = field(default_factory=list)

    @property
    def extra(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler, "losses": self.losses}

    @property
    def rank_extra(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            x = torch.randn(4, WIDTH, generator=self.batches)
            loss = self.model(x).float().square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.losses.append(loss.item())


def make_job(order: str = PLAIN, seed: int = 0) -> Job:
    model: Any = make_model(batch_norm=False)
    if order != PLAIN:
        model = shard(model, order, CheckpointImpl.NO_REENTRANT)
    torch.manual_seed(1000 * seed + rank_of())
    random.seed(seed)
    numpy.random.seed(seed)
    if seed:  # another start
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    return Job(model, optimizer, scheduler, torch.Generator().manual_seed(seed + rank_of()))


def whole(value: Any) -> Any:
    """Every tensor as a plain one; a collective where it is sharded."""
    if hasattr(value, "full_tensor"):
        return value.full_tensor()
    return value.detach().clone() if isinstance(value, Tensor) else value


def contents(job: Job) -> dict[str, Any]:
    """Parameters and optimizer state by name, and the settings of the optimizer."""
    found = {name: whole(p) for name, p in job.model.named_parameters()}
    for name, parameter in job.model.named_parameters():
        for key, value in job.optimizer.state.get(parameter, {}).items():
            found[f"{name}: {key}"] = whole(value)
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in job.optimizer.param_groups
    ]
    return {"tensors": found, "settings": settings, "scheduler": job.scheduler.state_dict()}


def draws() -> list[float]:
    """The next number of every generator."""
    return [torch.rand(()).item(), random.random(), float(numpy.random.rand())]


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bitwise equality of what :func:`contents` returns."""
    assert got["settings"] == expected["settings"]
    assert got["scheduler"] == expected["scheduler"]
    assert got["tensors"].keys() == expected["tensors"].keys()
    differing = [
        name
        for name, value in expected["tensors"].items()
        if not torch.equal(got["tensors"][name], value)
    ]
    assert not differing
