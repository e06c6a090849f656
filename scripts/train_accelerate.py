"""The main job with accelerate: the same GPT on the same text, under FSDP2 or DDP.

    accelerate launch --config_file scripts/accelerate_fsdp2.yaml scripts/train_accelerate.py
    accelerate launch --config_file scripts/accelerate_ddp.yaml scripts/train_accelerate.py

This is what any accelerate script looks like, with one line more: `enable(accelerator, model, ...)`
before `accelerator.prepare`. Two runs that differ in `--impl` or `--policy` alone have the same
losses to the last digit, dropout included, and `--resume` goes on bit for bit from `--save`, also
with another `--impl` than the one that saved.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, set_seed
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from scripts.model import GPT, VOCAB_SIZE, Block
from scripts.train import add_job_options, read_job
from wrappers import ApplyReport, CheckpointImpl
from wrappers.integrations.accelerate import enable
from wrappers.policies import save_matmuls
from wrappers.select import by_class

IMPLS = ("none", "reentrant", "no_reentrant", "replay")
POLICIES = {"recompute_all": None, "save_matmuls": save_matmuls}


@dataclass(frozen=True)
class Result:
    """What a run prints, and `--json` writes, from the main process.

    `losses` has one mean over all processes for each batch; `wrapped` the names of the regions.
    """

    impl: str
    policy: str
    distributed_type: str
    world_size: int
    losses: list[float]
    wrapped: list[str]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a contradiction or an impossible size ends with argparse's error."""
    parser = argparse.ArgumentParser(
        prog="train_accelerate.py",
        description="Train a byte-level GPT with accelerate, its blocks checkpointed.",
    )
    parser.add_argument("--impl", choices=IMPLS, default="no_reentrant")
    parser.add_argument("--policy", choices=POLICIES, default="recompute_all")
    add_job_options(parser)
    parser.add_argument("--accumulate", type=int, default=1, help="batches a step")
    parser.add_argument("--save", type=Path, help="write accelerate's state here at the end")
    parser.add_argument("--resume", type=Path, help="go on from the state in this folder")
    args = parser.parse_args(argv)
    if args.impl != "replay" and args.policy != "recompute_all":
        parser.error(f"--policy {args.policy} needs --impl replay, got --impl {args.impl}")
    for name in ("steps", "accumulate", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.resume is not None and not args.resume.is_dir():
        parser.error(f"--resume {args.resume}: no such folder")
    read_job(parser, args)
    return args


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Sequences at random places of a text, and the same bytes one later; given by index alone."""

    def __init__(self, tokens: Tensor, seq_len: int, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = tokens
        self.seq_len = seq_len
        self.starts = torch.randint(len(tokens) - seq_len, (length,), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = int(self.starts[index])
        window = self.tokens[start : start + self.seq_len + 1].long()
        return window[:-1], window[1:]


class Progress:
    """How many batches a process has trained on; saved and loaded with accelerate's state."""

    def __init__(self) -> None:
        self.num_batches = 0

    def state_dict(self) -> dict[str, int]:
        """What `save_state` writes."""
        return {"num_batches": self.num_batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """What `load_state` has read."""
        self.num_batches = state["num_batches"]


def make_accelerator(**options: Any) -> Accelerator:
    """The Accelerator that the launcher asks for; on a machine without GPUs in CPU processes.

    accelerate 1.15 shards on accelerator devices only: on CPUs it makes its FSDP plugin from the
    launcher's settings and then forgets it in favour of DDP. Its FSDP code runs there all the same,
    once it is told to. This can go when accelerate looks at the plugin on CPUs too.
    """
    if torch.cuda.is_available():
        return Accelerator(**options)
    accelerator = Accelerator(cpu=True, **options)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.use_distributed:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.FSDP
            state.device = torch.device("cpu")  # not cpu:0, which FSDP1 takes for another device
    return accelerator


def regions(args: argparse.Namespace) -> dict[str, Any]:
    """How `enable` shall recompute the blocks."""
    options: dict[str, Any] = {"impl": CheckpointImpl[args.impl.upper()]}
    policy = POLICIES[args.policy]
    if policy is not None:
        options["policy"] = policy()
    return options


def train(accelerator: Accelerator, args: argparse.Namespace) -> Result:
    """Train from the start or from `--resume` to the last step."""
    set_seed(args.seed)
    model = GPT(args.model)
    report = ApplyReport()
    if args.impl != "none":
        report = enable(accelerator, model, check_fn=by_class(Block), **regions(args))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    num_sequences = args.steps * args.accumulate * args.batch * accelerator.num_processes
    windows = Windows(args.tokens, args.seq, num_sequences, args.seed)
    # A loader without a generator of its own draws from the one of the dropout masks.
    loader = DataLoader(windows, batch_size=args.batch, generator=torch.Generator())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    set_seed(args.seed + 1, device_specific=True)  # each process draws masks of its own
    if args.resume is not None:
        accelerator.load_state(str(args.resume))
        loader = accelerator.skip_first_batches(loader, progress.num_batches)

    losses = []
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            logits = model(inputs)
            loss = F.cross_entropy(logits.float().view(-1, VOCAB_SIZE), targets.reshape(-1))
            mean_loss = loss.detach().clone()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        progress.num_batches += 1
        losses.append(accelerator.reduce(mean_loss, "mean").item())
    if args.save is not None:
        accelerator.save_state(str(args.save))
    return Result(
        impl=args.impl,
        policy=args.policy,
        distributed_type=accelerator.distributed_type.value,
        world_size=accelerator.num_processes,
        losses=losses,
        wrapped=list(report.wrapped),
    )


def main() -> None:
    """Run the job; the main process prints the result and writes it to `--json`."""
    args = parse_args()
    accelerator = make_accelerator(gradient_accumulation_steps=args.accumulate)
    result = train(accelerator, args)
    if accelerator.is_main_process:
        print(
            f"{result.impl} under {result.distributed_type} in {result.world_size} processes: "
            f"loss {result.losses[-1]!r}, {len(result.wrapped)} regions"
        )
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(asdict(result)))
    # A round trip, so that gloo's threads let go of the last tensors before Python shuts down; and
    # DDP goes before the process group, or gloo may hang.
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main()
