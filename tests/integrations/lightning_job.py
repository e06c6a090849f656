"""Trains one small GPT under Fabric and Trainer, with several strategies, in two processes.

    torchrun --nproc-per-node 2 tests/integrations/lightning_job.py FOLDER

What each run gave goes to `FOLDER/results.json`, from the first process.

Lightning's `FSDPStrategy` asks for a GPU, by its exact type, and gives FSDP1 a device index. A
subclass and blocks that are put into FSDP1 by hand, which the strategy then leaves alone, run on
CPUs; its own activation checkpointing works as on GPUs.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch import strategies as trainer_strategies
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper as TorchWrapper,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F

from scripts.model import GPT, VOCAB_SIZE, Attention, Block, GPTConfig
from wrappers import CheckpointImpl
from wrappers.integrations.lightning import ActivationCheckpointing, enable
from wrappers.policies import save_matmuls
from wrappers.select import by_class

CONFIG = GPTConfig(num_layers=3, d_model=32, num_heads=2, seq_len=32)
NUM_STEPS = 3
MESH = {"data_parallel_size": 2, "tensor_parallel_size": 1}
STRATEGIES = ("ddp", "fsdp2", "fsdp1")
#: How the blocks are recomputed.
IMPLS = {
    "none": None,
    "reentrant": {"impl": CheckpointImpl.REENTRANT},
    "no_reentrant": {"impl": CheckpointImpl.NO_REENTRANT},
    "replay": {"policy": save_matmuls()},
}


def make_model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG)


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    tokens = torch.randint(VOCAB_SIZE, (2, CONFIG.seq_len + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model, step: int, rank: int) -> torch.Tensor:
    inputs, targets = batch(step, rank)
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def mean(losses: list[float]) -> list[float]:
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


class CountedAttention:
    """Counts the calls of a model's attention modules, those of a recompute too."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.count = 0
        for module in model.modules():
            if isinstance(module, Attention):
                module.register_forward_hook(self._add)

    def _add(self, module, args, output) -> None:
        self.count += 1


def num_torch_wrappers(model: torch.nn.Module) -> int:
    return sum(isinstance(module, TorchWrapper) for module in model.modules())


# --- Sharding


def shard2(model, mesh):
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def shard1(model):
    cpu = {"device_id": torch.device("cpu"), "use_orig_params": True}
    for i, block in enumerate(model.blocks):
        model.blocks[i] = FullyShardedDataParallel(block, **cpu)
    return FullyShardedDataParallel(model, **cpu)


class FabricFSDPOnCPU(FSDPStrategy):
    pass


class TrainerFSDPOnCPU(trainer_strategies.FSDPStrategy):
    pass


# --- Fabric


def run_fabric(strategy: str, settings: dict | None, own: bool = False) -> dict[str, object]:
    policy = {"activation_checkpointing_policy": {Block}} if own else {}
    made = {
        "ddp": lambda: "ddp",
        "fsdp2": lambda: ModelParallelStrategy(shard2, **MESH),
        "fsdp1": lambda: FabricFSDPOnCPU(**policy),
    }[strategy]()
    fabric = Fabric(accelerator="cpu", devices=2, strategy=made)
    fabric.launch()
    model = make_model()
    calls = CountedAttention(model)
    wrapped = ()
    if settings is not None:
        wrapped = enable(fabric, model, check_fn=by_class(Block), **settings).wrapped
    model = fabric.setup(shard1(model) if strategy == "fsdp1" else model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2))
    torch.manual_seed(1 + fabric.global_rank)
    losses = []
    for step in range(NUM_STEPS):
        loss = loss_of(model, step, fabric.global_rank)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "losses": mean(losses),
        "num_attention_calls": calls.count,
        "num_torch_wrappers": num_torch_wrappers(model),
        "wrapped": wrapped,
    }


# --- Trainer


class Module(LightningModule):
    """The GPT, sharded in ``configure_model``, and checkpointed there if ``settings`` say how."""

    def __init__(self, strategy: str, settings: dict | None = None) -> None:
        super().__init__()
        self.strategy = strategy
        self.settings = settings
        self.losses: list[float] = []
        self.model = make_model()
        self.calls = CountedAttention(self.model)

    def configure_model(self) -> None:
        if self.settings is not None:
            enable(self.trainer, self, check_fn=by_class(Block), **self.settings)
        if self.strategy == "fsdp2":
            shard2(self.model, self.device_mesh)
        if self.strategy == "fsdp1":
            self.model = shard1(self.model)

    def on_train_start(self) -> None:
        torch.manual_seed(1 + self.global_rank)

    def training_step(self, step: torch.Tensor) -> torch.Tensor:
        loss = loss_of(self.model, int(step), self.global_rank)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def train_dataloader(self):
        return torch.arange(NUM_STEPS)


def run_trainer(
    strategy: str, settings: dict | None, own: bool = False, is_in_configure_model: bool = False
) -> dict[str, object]:
    policy = {"activation_checkpointing_policy": {Block}} if own else {}
    made = {
        "ddp": lambda: "ddp",
        "fsdp2": lambda: trainer_strategies.ModelParallelStrategy(**MESH),
        "fsdp1": lambda: TrainerFSDPOnCPU(**policy),
    }[strategy]()
    callbacks = []
    if settings is not None and not is_in_configure_model:
        callbacks.append(ActivationCheckpointing(by_class(Block), **settings))
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=made,
        callbacks=callbacks,
        max_epochs=1,
        barebones=True,
    )
    module = Module(strategy, settings if is_in_configure_model else None)
    trainer.fit(module)
    return {
        "losses": mean(module.losses),
        "num_attention_calls": module.calls.count,
        "num_torch_wrappers": num_torch_wrappers(module),
        "wrapped": callbacks[0].report.wrapped if callbacks else (),
    }


def record(function, *args, **kwargs) -> dict[str, object]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args, **kwargs)
    messages = [str(warning.message) for warning in caught]
    return {**result, "warnings": [m for m in messages if "activation_checkpointing_policy" in m]}


def main(folder: Path) -> None:
    results = {}
    for strategy in STRATEGIES:
        for name, settings in IMPLS.items():
            results[f"Fabric {strategy} {name}"] = record(run_fabric, strategy, settings)
        for name in ("none", "no_reentrant"):
            results[f"Trainer {strategy} {name}"] = record(run_trainer, strategy, IMPLS[name])
    settings = IMPLS["no_reentrant"]
    results["Trainer fsdp2 in configure_model"] = record(
        run_trainer, "fsdp2", settings, is_in_configure_model=True
    )
    for runner, run in (("Fabric", run_fabric), ("Trainer", run_trainer)):
        results[f"{runner} fsdp1 own"] = record(run, "fsdp1", None, own=True)
        results[f"{runner} fsdp1 both"] = record(run, "fsdp1", settings, own=True)
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
