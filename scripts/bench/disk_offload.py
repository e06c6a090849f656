"""Does a model train in a fraction of its activations' memory if they wait in a file?

A stack of transformer blocks on the CPU, whose activations take many times the memory of its
parameters. One row a mode:

    mode                 what
    none                 the blocks as they are
    no_reentrant         activation checkpointing, NO_REENTRANT
    disk                 offload_wrapper(tier="disk"): all that backward needs waits in a file
    no_reentrant_disk    both: only the blocks' inputs are kept, and wait in the file

    python -m scripts.bench.disk_offload [--json FILE] [--directory DIR] [--blocks 16]
        [--d-model 256] [--seq-len 256] [--batch 8] [--max-inflight-mib 16] [--rounds 5]

The modes start from the same parameters and random state, so their losses and gradients must be
equal to the last bit; the benchmark fails if they are not. They are timed in turns by the wall
clock, as the threads that write and read take time of their own: on a machine that does other
things as well, only the ratios say something. The peak is what a step allocates beyond what was
there before, the parameters' gradients included, as the C library counts it: the profiler does not
see what the threads that write release.

With many blocks, the peak of both checkpointed modes comes at the end of backward, where no input
is left: the file takes off what the inputs add at its beginning.

The file is written through the page cache, which the kernel empties when memory is short.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scripts import measure
from scripts.bench import harness
from scripts.model import Block, GPTConfig
from wrappers import CheckpointImpl, checkpoint_wrapper, offload_stats, offload_wrapper

#: A step from the same random state: loss, and a digest of the gradients if it is wanted.
Step = Callable[..., tuple[float, str]]


def modes_of(
    blocks: nn.ModuleList, directory: Path, max_inflight_bytes: int
) -> dict[str, nn.ModuleList]:
    """By mode: blocks with parameters of their own, all equal."""
    checkpointed = partial(checkpoint_wrapper, impl=CheckpointImpl.NO_REENTRANT)
    on_disk = partial(
        offload_wrapper, tier="disk", directory=directory, max_inflight_bytes=max_inflight_bytes
    )

    def wrapped(*layers: Callable[[nn.Module], nn.Module]) -> nn.ModuleList:
        own = copy.deepcopy(blocks)
        for wrap in layers:
            own = nn.ModuleList(wrap(block) for block in own)
        return own

    return {
        "none": wrapped(),
        "no_reentrant": wrapped(checkpointed),
        "disk": wrapped(on_disk),
        "no_reentrant_disk": wrapped(checkpointed, on_disk),
    }


def run_step(blocks: nn.ModuleList, x: Tensor, *, is_compared: bool = False) -> tuple[float, str]:
    """Forward and backward of one batch.

    Args:
        blocks: The model.
        x: The batch.
        is_compared: Whether a digest of the gradients is wanted.
    """
    torch.manual_seed(0)  # The masks of dropout.
    h = x
    for block in blocks:
        h = block(h)
    loss = h.square().mean()
    del h
    loss.backward()
    value = loss.item()
    digest = hashlib.sha256()
    if is_compared:
        for parameter in blocks.parameters():
            assert parameter.grad is not None
            digest.update(parameter.grad.numpy().data)
    blocks.zero_grad(set_to_none=True)
    return value, digest.hexdigest()


def time_in_turns(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of a step of each mode, by the wall clock."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            gc.collect(0)
            start_s = time.perf_counter()
            step()
            samples[name].append((time.perf_counter() - start_s) * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def measure_modes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each mode.

    Raises:
        SystemExit: Losses or gradients differ.
    """
    torch.manual_seed(0)
    config = GPTConfig(
        d_model=options.d_model, num_heads=options.heads, seq_len=options.seq_len, dropout=0.1
    )
    blocks = nn.ModuleList(Block(config) for _ in range(options.blocks))
    x = torch.randn(options.batch, options.seq_len, options.d_model)
    directory = options.directory or Path(tempfile.gettempdir())
    modes = modes_of(blocks, directory, int(options.max_inflight_mib * 2**20))
    results = {
        name: [run_step(those, x, is_compared=True) for _ in range(2)]
        for name, those in modes.items()
    }
    if len({pair for pairs in results.values() for pair in pairs}) > 1:
        raise SystemExit(f"disk_offload: losses and gradients must be equal, but are {results}")

    steps = {name: partial(run_step, those, x) for name, those in modes.items()}
    times_ms = time_in_turns(steps, options.rounds)
    peaks = {name: measure.peak_heap_bytes(step) for name, step in steps.items()}
    return [
        {
            "benchmark": "disk_offload",
            "mode": name,
            "loss": results[name][0][0],
            "peak_bytes": peaks[name],
            "peak_ratio": round(peaks[name] / peaks["none"], 4),
            "step_ms": round(times_ms[name], 1),
            "time_ratio": round(times_ms[name] / times_ms["none"], 3),
            "max_inflight_mib": options.max_inflight_mib,
            "blocks": options.blocks,
            "d_model": options.d_model,
            "seq_len": options.seq_len,
            "batch": options.batch,
        }
        for name in modes
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [f"{'mode':<18} {'peak MiB':>16} {'step ms':>16} {'loss':>20}"]
    for row in rows:
        peak = f"{row['peak_bytes'] / 2**20:.1f} ({row['peak_ratio']:.0%})"
        step = f"{row['step_ms']:.0f} (x {row['time_ratio']:.2f})"
        lines.append(f"{row['mode']:<18} {peak:>16} {step:>16} {row['loss']!r:>20}")
    return "\n".join(lines)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--directory", type=Path, help="default: the one for temporary files")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-inflight-mib", type=float, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure_modes(options)
    print(table(rows))
    print(offload_stats())
    harness.report(rows, options.json)


if __name__ == "__main__":
    main()
