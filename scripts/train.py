"""The main job: train a byte-level GPT under FSDP, its blocks checkpointed or offloaded to a disk.

Start it with torchrun; the same command trains on CPUs over gloo and on GPUs over nccl:

    torchrun --nproc-per-node 2 scripts/train.py --impl no_reentrant --steps 20

Every block is wrapped first and sharded afterwards, so that FSDP's hooks stand outside the region:
a recompute finds the parameters gathered. Two runs that differ in `--impl`, `--inplace` or
`--policy` alone print the same loss to the last digit, dropout included; that is the point.

After training the job repeats the step twice outside the record, once under the allocator's events
for peak memory and once under the FLOP counter, so that neither disturbs loss or step time.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import pydoc_data.topics
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

from scripts.measure import MemoryTimeline, count_flops, memory_timeline, peak_activation_bytes
from scripts.model import GPT, VOCAB_SIZE, Block, GPTConfig
from wrappers import (
    CheckpointImpl,
    apply_activation_checkpointing,
    create_selective_checkpoint_contexts,
    offload_wrapper,
)

#: How the activations of a block wait for backward: not at all, as little as a recompute needs, or
#: in a file.
IMPLS = ("none", "reentrant", "no_reentrant", "offload_disk")

#: glibc maps blocks of this size on their own, once it is told.
MAPPED_BYTES = 64 * 1024

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Operators whose outputs each policy keeps; all others are recomputed.
POLICIES = {
    "recompute_all": None,
    "save_matmuls": [torch.ops.aten.mm.default, torch.ops.aten.addmm.default],
}


@dataclass(frozen=True)
class Result:
    """What a run prints, and `--json` writes, from rank 0.

    `peak_activation_bytes` and `flops` are those of one training step on one rank; the timeline
    is empty unless `--memory-trace` asked for it.
    """

    impl: str
    inplace: bool
    policy: str
    dtype: str
    device: str
    world_size: int
    torch: str
    loss: float
    step_ms: float
    peak_activation_bytes: int
    flops: int
    timeline_us: list[float]
    timeline_bytes: list[int]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a contradiction or an impossible size ends with argparse's error."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a byte-level GPT under FSDP, its blocks checkpointed or offloaded.",
    )
    parser.add_argument("--impl", choices=IMPLS, default="no_reentrant")
    parser.add_argument("--inplace", action="store_true", help="patch the blocks' own forward")
    parser.add_argument("--policy", choices=POLICIES, default="recompute_all")
    parser.add_argument(
        "--directory",
        type=Path,
        help="of the file of --impl offload_disk; default: the one for temporary files",
    )
    parser.add_argument(
        "--max-inflight-mib",
        type=float,
        default=32,
        help="memory of what is on its way to the file, and of what is on its way back",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the computation")
    parser.add_argument("--text", type=Path, help="default: the topics of Python's own help")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step on each rank")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument(
        "--memory-trace", action="store_true", help="add one step's memory timeline to --json"
    )
    args = parser.parse_args(argv)
    if args.impl == "none" and args.inplace:
        parser.error("--inplace needs an --impl to put in place, got --impl none")
    if args.impl != "no_reentrant" and args.policy != "recompute_all":
        parser.error(f"--policy {args.policy} needs --impl no_reentrant, got --impl {args.impl}")
    if args.impl != "offload_disk" and args.directory is not None:
        parser.error(f"--directory needs --impl offload_disk, got --impl {args.impl}")
    if args.max_inflight_mib <= 0:
        parser.error(f"--max-inflight-mib must be positive, got {args.max_inflight_mib:g}")
    if args.memory_trace and args.json is None:
        parser.error("--memory-trace needs --json FILE to write to")
    if args.steps < 2:
        parser.error(f"--steps must be at least 2 (the first one is not timed), got {args.steps}")
    if args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    try:
        args.model = GPTConfig(args.layers, args.d_model, args.heads, args.seq, args.dropout)
        args.tokens = load_tokens(args.text, min_bytes=args.seq + 1)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args


def load_tokens(path: Path | None, min_bytes: int) -> Tensor:
    """Read a file, or the help topics that ship with CPython, as a tensor of byte values.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the text has fewer than `min_bytes` bytes.
    """
    text = "\n".join(pydoc_data.topics.topics.values()).encode() if path is None else b""
    data = text if path is None else path.read_bytes()
    if len(data) < min_bytes:
        raise ValueError(f"{path}: a sequence takes {min_bytes} bytes, the text has {len(data)}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join torchrun's process group, or make one of this process alone; yields the device.

    Raises:
        RuntimeError: if this machine has GPUs, but fewer than processes.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise RuntimeError(
                f"process {local_rank} has no GPU of its own, this machine has "
                f"{torch.cuda.device_count()}: lower --nproc-per-node, or hide the GPUs with "
                "CUDA_VISIBLE_DEVICES= to train on CPUs"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # Losses are compared to the last digit; on a GPU that takes deterministic kernels.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    backend = "nccl" if device.type == "cuda" else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    try:
        yield device
        # Gloo's threads let go of the last collective's tensors after we have its result. One
        # that does so while Python shuts down aborts the process, so give them a round trip.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def wrapping(args: argparse.Namespace) -> dict[str, Any]:
    """What `apply_activation_checkpointing` wraps the blocks with."""
    if args.impl == "offload_disk":
        return {
            "checkpoint_wrapper_fn": offload_wrapper,
            "tier": "disk",
            "directory": args.directory or tempfile.gettempdir(),
            "max_inflight_bytes": int(args.max_inflight_mib * 2**20),
        }
    options: dict[str, Any] = {"impl": CheckpointImpl[args.impl.upper()]}
    saved_operators = POLICIES[args.policy]
    if saved_operators is not None:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, saved_operators)
    return options


def map_large_blocks() -> None:
    """Let large blocks of host memory have mappings of their own from now on, where glibc can.

    The threads that write activations release their memory, and the profiler does not follow them:
    a release shows once the address is used again, which for such a block is soon. It makes
    allocations slower, so nothing is timed afterwards.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(-3, MAPPED_BYTES)  # M_MMAP_THRESHOLD


def build_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """Build the model, wrap its blocks, then shard blocks and root over all ranks."""
    torch.manual_seed(args.seed)
    model = GPT(args.model).to(device)
    if args.impl != "none":
        apply_activation_checkpointing(
            model,
            check_fn=lambda module: isinstance(module, Block),
            inplace=args.inplace,
            **wrapping(args),
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    mixed = MixedPrecisionPolicy(param_dtype=DTYPES[args.dtype], reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=mixed)
    fully_shard(model, mesh=mesh, mp_policy=mixed)
    return model


class Trainer:
    """One rank's share of the training: its model, its optimizer and its stream of batches."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.model = build_model(args, device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr)
        self.tokens: Tensor = args.tokens
        self.batch_size: int = args.batch
        self.seq_len: int = args.seq
        self.device = device
        # Each rank draws batches of its own, and masks of its own for dropout.
        self.generator = torch.Generator().manual_seed(args.seed + 1 + dist.get_rank())
        torch.manual_seed(args.seed + 1 + dist.get_rank())

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Draw sequences at random places; the targets are the same bytes, one later."""
        starts = torch.randint(
            len(self.tokens) - self.seq_len, (self.batch_size, 1), generator=self.generator
        )
        window = self.tokens[starts + torch.arange(self.seq_len + 1)].long().to(self.device)
        return window[:, :-1], window[:, 1:]

    def step(self) -> Tensor:
        """Train on one batch; returns the loss before the update, averaged over all ranks."""
        inputs, targets = self.next_batch()
        logits = self.model(inputs)
        loss = F.cross_entropy(logits.float().view(-1, VOCAB_SIZE), targets.reshape(-1))
        # The record goes on to use its graph-free copy, so that no activation outlives backward.
        mean_loss = loss.detach().clone()
        loss.backward()
        del logits, loss
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        dist.all_reduce(mean_loss)
        return mean_loss / dist.get_world_size()


def train(trainer: Trainer, num_steps: int) -> tuple[float, float]:
    """Take `num_steps` steps under a progress bar; returns the last loss and median step ms.

    The first step builds the optimizer's state and is left out of the median.
    """
    step_ms: list[float] = []
    loss = float("nan")
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[ms]:.0f} ms a step"),
    )
    with Progress(*columns, disable=dist.get_rank() != 0) as progress:
        task = progress.add_task("train", total=num_steps, loss=loss, ms=float("nan"))
        for _ in range(num_steps):
            start = time.perf_counter()
            loss = trainer.step().item()  # waits for the device
            step_ms.append((time.perf_counter() - start) * 1e3)
            progress.update(task, advance=1, loss=loss, ms=step_ms[-1])
    return loss, statistics.median(step_ms[1:])


def run(args: argparse.Namespace, device: torch.device) -> Result:
    """Train, then measure one more step for its memory and one for its FLOPs."""
    trainer = Trainer(args, device)
    loss, step_ms = train(trainer, args.steps)
    map_large_blocks()
    timeline = MemoryTimeline([], [])
    if args.memory_trace:
        timeline = memory_timeline(trainer.step, device)
    return Result(
        impl=args.impl,
        inplace=args.inplace,
        policy=args.policy,
        dtype=args.dtype,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        world_size=dist.get_world_size(),
        torch=torch.__version__,
        loss=loss,
        step_ms=step_ms,
        peak_activation_bytes=timeline.peak_bytes or peak_activation_bytes(trainer.step, device),
        flops=count_flops(trainer.step),
        timeline_us=timeline.time_us,
        timeline_bytes=timeline.alive_bytes,
    )


def main() -> None:
    """Run the job; rank 0 prints the result and writes it to `--json`."""
    args = parse_args()
    with process_group() as device:
        result = run(args, device)
        if dist.get_rank() != 0:
            return
        print(
            f"{result.impl}{' in place' if result.inplace else ''}: loss {result.loss!r}, "
            f"{result.step_ms:.0f} ms a step, "
            f"peak activations {result.peak_activation_bytes / 2**20:.1f} MiB, "
            f"{result.flops / 1e9:.2f} GFLOPs a step"
        )
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
