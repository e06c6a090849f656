"""Tensor parallel blocks: each rank has a part of the heads and of the MLP's width.

torchrun --standalone --nproc-per-node 2 scripts/recipes/tensor_parallel.py
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from wrappers import apply_activation_checkpointing
from wrappers.select import by_class

WIDTH, HEAD_WIDTH = 32, 8


class Block(nn.Module):  # yours
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        heads = (proj(y).unflatten(-1, (-1, HEAD_WIDTH)) for proj in (self.q, self.k, self.v))
        q, k, v = (part.transpose(1, 2) for part in heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.out(y.transpose(1, 2).flatten(2)), 0.1, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norms[1](x)))), 0.1, self.training)


def main() -> None:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group()
    torch.manual_seed(0)  # of all ranks: they have the same batches and dropout masks
    model = nn.Sequential(Block(), Block()).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model:
        for name in ("q", "k", "v", "up"):
            parallelize_module(block.get_submodule(name), mesh, ColwiseParallel())
        for name in ("out", "down"):
            parallelize_module(block.get_submodule(name), mesh, RowwiseParallel())
    if "--plain" not in sys.argv:
        apply_activation_checkpointing(model, check_fn=by_class(Block))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, 5):
        loss = model(torch.randn(4, 16, WIDTH).to(device)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item()!r}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
