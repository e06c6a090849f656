"""The main job: train a byte-level GPT under FSDP, its blocks recomputed, offloaded or planned.

Start it with torchrun; the same command trains on CPUs over gloo and on GPUs over nccl:

    torchrun --nproc-per-node 2 scripts/train.py --impl no_reentrant --steps 20

Every block is wrapped first and sharded afterwards, so that FSDP's hooks stand outside the region:
a recompute finds the parameters gathered. Two runs that differ in `--impl`, `--inplace`, `--policy`
or `--budget` alone print the same loss to the last digit, dropout included; that is the point.

    torchrun --nproc-per-node 2 scripts/train.py --impl planned --budget 300MiB

So does a run whose workers were killed on the way, if it saves and resumes:

    torchrun --nproc-per-node 2 --max-restarts 2 scripts/train.py --save runs/a --resume

torchrun ends and restarts all workers where one dies, and each goes on from the newest state
checkpoint. A worker that raises leaves its traceback to torchrun, which names it as the cause.

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
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous

from scripts.measure import MemoryTimeline, count_flops, memory_timeline, peak_activation_bytes
from scripts.model import GPTConfig
from scripts.trainer import DTYPES, IMPLS, POLICIES, Trainer
from wrappers import state
from wrappers.plan.budget import budget_bytes

#: glibc maps blocks of this size on their own, once it is told.
MAPPED_BYTES = 64 * 1024


@dataclass(frozen=True)
class Result:
    """What a run prints, and `--json` writes, from rank 0.

    `peak_activation_bytes` and `flops` are those of one training step on one rank; the timeline
    is empty unless `--memory-trace` asked for it.
    """

    impl: str
    inplace: bool
    policy: str
    budget: str | None
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
        "--budget",
        metavar="SIZE",
        help='of --impl planned: memory for the activations of a step, such as "300MiB"',
    )
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
    add_job_options(parser)
    parser.add_argument("--save", type=Path, help="directory for state checkpoints")
    parser.add_argument(
        "--save-every", type=int, help="steps between two of them, default 10; one at the end"
    )
    parser.add_argument("--keep-last", type=int, help="how many of them stay, default 2")
    parser.add_argument("--resume", action="store_true", help="from the newest one in --save")
    parser.add_argument(
        "--memory-trace", action="store_true", help="add one step's memory timeline to --json"
    )
    args = parser.parse_args(argv)
    check_options(parser, args)
    read_job(parser, args)
    return args


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add what is trained, and on what: the model's sizes, the text, the steps."""
    parser.add_argument("--text", type=Path, help="default: the topics of Python's own help")
    parser.add_argument("--steps", type=int, default=20, help="of the optimizer, in all")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="sequences in a batch of each rank")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here")


def read_job(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Put the model's configuration and the text into ``args``, or end with argparse's error."""
    try:
        args.model = GPTConfig(args.layers, args.d_model, args.heads, args.seq, args.dropout)
        args.tokens = load_tokens(args.text, min_bytes=args.seq + 1)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with argparse's error where options contradict each other or cannot be."""
    if args.impl == "none" and args.inplace:
        parser.error("--inplace needs an --impl to put in place, got --impl none")
    if args.impl != "no_reentrant" and args.policy != "recompute_all":
        parser.error(f"--policy {args.policy} needs --impl no_reentrant, got --impl {args.impl}")
    if (args.impl == "planned") is not (args.budget is not None):
        parser.error(f"--impl planned and --budget SIZE need each other, got --impl {args.impl}")
    if args.budget is not None:
        try:
            budget_bytes(args.budget, capacity_bytes=None)
        except ValueError as error:
            parser.error(f"--budget: {error}")
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
    check_saving(parser, args)


def check_saving(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The same for the options of state checkpoints; fills in their defaults."""
    for option, default in (("save_every", 10), ("keep_last", 2)):
        value = getattr(args, option)
        if value is None:
            setattr(args, option, default)
        elif value < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1, got {value}")
        elif args.save is None:
            parser.error(f"--{option.replace('_', '-')} needs --save DIR to save to")
    if args.resume and args.save is None:
        parser.error("--resume needs --save DIR to resume from")
    if args.save is not None and not args.resume:
        found = state.latest(args.save)
        if found is not None:
            parser.error(
                f"{found} is there already: go on from it with --resume, or save elsewhere"
            )


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

    Where the caller raises, the group is left as it is: to end it could mean to wait for the other
    ranks, which may wait in a collective for this one. They end with this process.

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
        store, rank, world_size = next(rendezvous("env://"))
        # torchrun has one store for all attempts. Without a prefix, workers that it has restarted
        # may find the addresses of killed ones there (torch 2.13).
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        store = dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend, init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    yield device
    # Gloo's threads let go of the last collective's tensors after we have its result. One
    # that does so while Python shuts down aborts the process, so give them a round trip.
    dist.barrier()
    dist.destroy_process_group()


def map_large_blocks() -> None:
    """Let large blocks of host memory have mappings of their own from now on, where glibc can.

    The threads that write activations release their memory, and the profiler does not follow them:
    a release shows once the address is used again, which for such a block is soon. It makes
    allocations slower, so nothing is timed afterwards.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(-3, MAPPED_BYTES)  # M_MMAP_THRESHOLD


def train(trainer: Trainer, args: argparse.Namespace) -> float:
    """Take the steps that are left, under a progress bar, and save; returns the median step ms.

    The first step builds the optimizer's state and is left out of the median, which is NaN where
    fewer than two steps were left.
    """
    step_ms: list[float] = []
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[ms]:.0f} ms a step"),
    )
    with Progress(*columns, disable=dist.get_rank() != 0) as progress:
        task = progress.add_task(
            "train",
            total=args.steps,
            completed=trainer.num_steps,
            loss=trainer.loss,
            ms=float("nan"),
        )
        while trainer.num_steps < args.steps:
            start = time.perf_counter()
            trainer.step()
            step_ms.append((time.perf_counter() - start) * 1e3)
            progress.update(task, advance=1, loss=trainer.loss, ms=step_ms[-1])
            is_due = trainer.num_steps % args.save_every == 0 or trainer.num_steps == args.steps
            if args.save is not None and is_due:
                trainer.save(args.save, args.keep_last)
    return statistics.median(step_ms[1:] or [float("nan")])


def run(args: argparse.Namespace, device: torch.device) -> Result:
    """Train, from a state checkpoint if so told, then measure a step's memory and FLOPs."""
    trainer = Trainer(args, device)
    if args.resume:
        resumed = trainer.resume(args.save)
        if dist.get_rank() == 0:
            print(f"resumed from {resumed}" if resumed else f"{args.save}: nothing to resume from")
        if trainer.num_steps > args.steps:
            raise ValueError(f"{resumed} is beyond --steps {args.steps}, there is nothing to do")
    step_ms = train(trainer, args)
    loss = trainer.loss
    map_large_blocks()
    timeline = MemoryTimeline([], [])
    if args.memory_trace:
        timeline = memory_timeline(trainer.step, device)
    return Result(
        impl=args.impl,
        inplace=args.inplace,
        policy=args.policy,
        budget=args.budget,
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


@record
def main() -> None:
    """Run the job; rank 0 prints the result and writes it to `--json`."""
    args = parse_args()
    with process_group() as device:
        result = run(args, device)
        if dist.get_rank() != 0:
            return
        print(
            f"{result.impl}{' in place' if result.inplace else ''}"
            f"{f', budget {result.budget}' if result.budget else ''}: loss {result.loss!r}, "
            f"{result.step_ms:.0f} ms a step, "
            f"peak activations {result.peak_activation_bytes / 2**20:.1f} MiB, "
            f"{result.flops / 1e9:.2f} GFLOPs a step"
        )
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
