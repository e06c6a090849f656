r"""FSDP2 under torchrun; killed workers are restarted and go on from the newest state checkpoint.

TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \
torchrun --standalone --nproc-per-node 2 --max-restarts 3 scripts/recipes/fsdp2.py runs/a

Without the variable restarted workers may find addresses of killed ones in torchrun's store
(torch 2.13).
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from scripts.model import GPT, Block, GPTConfig  # your model
from wrappers import apply_activation_checkpointing, state
from wrappers.select import by_class


@record  # torchrun then shows the traceback of the rank that failed first
def main() -> None:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group()
    torch.manual_seed(0)  # the same weights on every rank
    model = GPT(GPTConfig(num_layers=2, d_model=32, num_heads=2, seq_len=32)).to(device)
    if "--plain" not in sys.argv:
        apply_activation_checkpointing(model, check_fn=by_class(Block))
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(1 + dist.get_rank())  # batches and dropout masks of its own

    folder, start = Path(sys.argv[1]), 0
    if (newest := state.latest(folder)) is not None:
        start = state.load(newest, model, optimizer)["step"]
    for step in range(start + 1, 5):
        tokens = torch.randint(256, (4, 33)).to(device)
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item()!r}")
        if step % 2 == 0:
            path = folder / f"step-{step:08}"
            state.save(path, model, optimizer, {"step": step}, keep_last=2)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
