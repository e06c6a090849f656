"""Lightning's Trainer with FSDP2; the callback is the same for DDP and for one process.

torchrun --standalone --nproc-per-node 2 scripts/recipes/with_lightning.py
"""

import os
import sys

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scripts.model import GPT, Block, GPTConfig  # your model
from wrappers.integrations.lightning import ActivationCheckpointing
from wrappers.select import by_class


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = GPT(GPTConfig(num_layers=2, d_model=32, num_heads=2, seq_len=32))

    def configure_model(self) -> None:
        for block in self.model.blocks:
            fully_shard(block)
        fully_shard(self.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        (tokens,) = batch
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.print(f"step {self.global_step + 1}: loss {loss.item()!r}")
        return loss


def main() -> None:
    seed_everything(0)
    callbacks: list[Callback] = []
    if "--plain" not in sys.argv:
        callbacks.append(ActivationCheckpointing(by_class(Block)))
    num_processes = int(os.environ["WORLD_SIZE"])  # on one machine
    trainer = Trainer(
        devices=num_processes,
        strategy=ModelParallelStrategy(data_parallel_size=num_processes, tensor_parallel_size=1),
        callbacks=callbacks,
        max_steps=4,
        barebones=True,  # no logs, no progress bar
    )
    data = TensorDataset(torch.randint(256, (32, 33)))
    trainer.fit(Module(), DataLoader(data, batch_size=4))
    dist.barrier()
    dist.destroy_process_group()  # gloo may abort a process that exits with a group


if __name__ == "__main__":
    main()
