"""accelerate with FSDP2; without GPUs accelerate trains with DDP instead.

accelerate launch --config_file scripts/accelerate_fsdp2.yaml scripts/recipes/with_accelerate.py
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scripts.model import GPT, Block, GPTConfig  # your model
from wrappers.integrations import accelerate as checkpointing
from wrappers.select import by_class


def main() -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(0)  # the same weights on every rank
    model = GPT(GPTConfig(num_layers=2, d_model=32, num_heads=2, seq_len=32))
    if "--plain" not in sys.argv:
        checkpointing.enable(accelerator, model, check_fn=by_class(Block))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(torch.randint(256, (32, 33))), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    set_seed(1, device_specific=True)  # dropout masks of its own
    for step, (tokens,) in enumerate(loader, 1):
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step}: loss {loss.item()!r}")
    accelerator.wait_for_everyone()
    # Before the process group goes: with gloo, DDP may hang if it is the last to hold it.
    model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
    accelerator.end_training()


if __name__ == "__main__":
    main()
