"""What do a training step's time and memory come to on transformer blocks, by implementation?

A stack of blocks as large as those of a real model, each a region; no optimizer. One row a mode:

    mode                 what
    none                 no checkpointing
    torch_full           torch's checkpoint, use_reentrant=False
    torch_save_matmuls   the same with a context_fn that keeps matrix products
    no_reentrant         ours, NO_REENTRANT
    replay               ours, REPLAY
    replay_save_matmuls  ours, REPLAY with policy=save_matmuls()

    python -m scripts.bench.blocks_table [--json FILE] [--device cuda] [--dtype bfloat16]
        [--blocks 12] [--d-model 2048] [--seq-len 2048] [--batch 8] [--rounds 10]

The modes are timed in turns in one process: by CUDA events on a GPU, else by the clock of one
thread. The peak is what a step allocates beyond what was there before, the parameters' gradients
included. Ratios are to `none`; `fallbacks` counts regions that are rerun though asked to replay.
With the defaults a step is 60 to 80 TFLOP and keeps some 16 GiB without checkpointing. On a CPU:

    python -m scripts.bench.blocks_table --device cpu --dtype float32 --d-model 128 --seq-len 128
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint as theirs
from torch import Tensor, nn

import wrappers as ours
from scripts import measure
from scripts.bench import harness
from scripts.bench.policy_blocks import POLICY, run_step
from scripts.model import Block, GPTConfig

#: Steps between two events, so that the host can run ahead of the device as it does in training.
STEPS_A_TURN = 3


def _call(block: nn.Module, h: Tensor) -> Any:
    return block(h)


def modes_of(blocks: nn.ModuleList) -> dict[str, tuple[nn.ModuleList, Callable[..., Any]]]:
    """By mode: the blocks, wrapped where the mode is ours, and what calls one of them."""
    saved = list(POLICY.operators)  # type: ignore[attr-defined]
    torch_full = partial(theirs.checkpoint, use_reentrant=False)
    contexts = partial(theirs.create_selective_checkpoint_contexts, saved)

    def wrapped(**options: Any) -> tuple[nn.ModuleList, Callable[..., Any]]:
        return nn.ModuleList(ours.checkpoint_wrapper(b, **options) for b in blocks), _call

    return {
        "none": (blocks, _call),
        "torch_full": (blocks, torch_full),
        "torch_save_matmuls": (blocks, partial(torch_full, context_fn=contexts)),
        "no_reentrant": wrapped(impl=ours.CheckpointImpl.NO_REENTRANT),
        "replay": wrapped(impl=ours.CheckpointImpl.REPLAY),
        "replay_save_matmuls": wrapped(policy=POLICY),
    }


def time_on_gpu(cases: Mapping[str, harness.Case], rounds: int) -> dict[str, float]:
    """Median milliseconds of one run of each case, timed in turns by events of the GPU."""
    for case in cases.values():
        for _ in range(STEPS_A_TURN):
            case()
    samples: dict[str, list[float]] = {name: [] for name in cases}
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(rounds):
        for name, case in cases.items():
            gc.collect(0)
            torch.cuda.synchronize()
            start.record()
            for _ in range(STEPS_A_TURN):
                case()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) / STEPS_A_TURN)
    return {name: statistics.median(values) for name, values in samples.items()}


def time_on_host(cases: Mapping[str, harness.Case], rounds: int) -> dict[str, float]:
    """Median milliseconds of one run of each case on the thread's clock."""
    times = harness.interleave(cases, rounds=rounds, batch=1)
    return {name: us / 1e3 for name, us in times.items()}


def num_fallbacks(blocks: nn.ModuleList) -> int:
    """How many regions were asked to replay and are rerun."""
    return sum(bool(row.reason) for row in ours.region_report(blocks).rows)


def measure_modes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each mode."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    config = GPTConfig(
        d_model=options.d_model, num_heads=options.heads, seq_len=options.seq_len, dropout=0.0
    )
    with device:
        blocks = nn.ModuleList(Block(config).to(dtype) for _ in range(options.blocks))
        x = torch.randn(options.batch, options.seq_len, options.d_model, dtype=dtype)
    x.requires_grad_()
    modes = modes_of(blocks)
    steps = {name: partial(run_step, those, x, run) for name, (those, run) in modes.items()}

    measure_times = time_on_gpu if device.type == "cuda" else time_on_host
    times = measure_times(steps, options.rounds)
    # The first replays have been compared with a rerun by now, which takes memory of its own.
    peaks = {name: measure.peak_activation_bytes(step, device) for name, step in steps.items()}
    return [
        {
            "benchmark": "blocks_table",
            "mode": name,
            "step_ms": round(times[name], 3),
            "peak_bytes": peaks[name],
            "time_ratio": round(times[name] / times["none"], 3),
            "peak_ratio": round(peaks[name] / peaks["none"], 4),
            "fallbacks": num_fallbacks(those),
            "dtype": options.dtype,
            "blocks": options.blocks,
            "d_model": options.d_model,
            "seq_len": options.seq_len,
            "batch": options.batch,
        }
        for name, (those, _) in modes.items()
    ]


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        parser.error("torch finds no GPU here: pass --device cpu")
    harness.report(measure_modes(options), options.json, options.device)


if __name__ == "__main__":
    main()
