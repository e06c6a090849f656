"""What does an op-level policy cost on transformer blocks, against torch's selective path?

A stack of six blocks that keep their matrix products, each a region; ours with `policy=`, on
REPLAY, torch's with `context_fn`. Timed in turns in one process, on one thread; the peak of the
activations is taken from the allocator's events, so it is exact.

    python -m scripts.bench.policy_blocks [--json FILE] [--d-model 128 512] [--rounds 20]

    column        what                                                     at most
    peak_ratio    peak bytes of a step, ours / torch's                     1.00
    time_ratio    time of a step, ours / torch's                           0.90 (128), 1.00 (512)
    ideal_ratio   time of a step / (plain step + the replayed operators)   1.05 (512)

The replayed operators alone are timed inside our own steps, around the bare call of each.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint as theirs
from torch import Tensor, nn

import wrappers as ours
from scripts.bench import harness
from scripts.bench.peak_memory import peak_bytes
from scripts.model import Block, GPTConfig
from wrappers.engine import operators
from wrappers.policies import save_matmuls

POLICY = save_matmuls()


def run_step(blocks: nn.ModuleList, x: Tensor, run: Callable[..., Any]) -> None:
    """One training step whose blocks are called by `run(block, x)`."""
    h = x
    for block in blocks:
        h = run(block, h)
    h.sum().backward()
    blocks.zero_grad(set_to_none=True)


@contextlib.contextmanager
def timed_replay() -> Iterator[list[int]]:
    """Add up the nanoseconds that recorded operators take in recomputes; one number."""
    total = [0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not ours.is_recomputing():
                return call(*args, **kwargs)
            start = time.thread_time_ns()
            try:
                return call(*args, **kwargs)
            finally:
                total[0] += time.thread_time_ns() - start

        return run

    facts = list(operators._known.values())
    calls = [operator.call for operator in facts]
    for operator in facts:
        operator.call = timed(operator.call)
    try:
        yield total
    finally:
        for operator, call in zip(facts, calls, strict=True):
            operator.call = call


def measure(num_blocks: int, d_model: int, rounds: int) -> dict[str, Any]:
    """Times in microseconds, peaks in bytes, and the ratios of the table."""
    torch.manual_seed(0)
    config = GPTConfig(d_model=d_model, num_heads=8, seq_len=128, dropout=0.0)
    blocks = nn.ModuleList(Block(config) for _ in range(num_blocks))
    x = torch.randn(2, 128, d_model, requires_grad=True)
    saved = list(POLICY.operators)  # type: ignore[attr-defined]
    context_fn = partial(theirs.create_selective_checkpoint_contexts, saved)
    run_theirs = partial(theirs.checkpoint, use_reentrant=False, context_fn=context_fn)
    run_ours = partial(ours.checkpoint, policy=POLICY)
    runs: dict[str, Callable[..., Any]] = {
        "plain": lambda block, h: block(h),
        "theirs": run_theirs,
        "ours": run_ours,
    }
    times = harness.interleave(
        {name: partial(run_step, blocks, x, run) for name, run in runs.items()},
        rounds=rounds,
        batch=max(1, 512 // d_model),
    )
    replays = []
    with timed_replay() as total:
        for _ in range(rounds):
            total[0] = 0
            run_step(blocks, x, run_ours)
            replays.append(total[0] / 1e3)
    replay = statistics.median(replays)
    peaks = {name: peak_bytes(blocks, x, run) for name, run in runs.items()}
    return {
        "benchmark": "policy_blocks",
        "d_model": d_model,
        "peak_ratio": round(peaks["ours"] / peaks["theirs"], 4),
        "time_ratio": round(times["ours"] / times["theirs"], 3),
        "ideal_ratio": round(times["ours"] / (times["plain"] + replay), 3),
        **{f"{name}_us": round(us) for name, us in times.items()},
        "replayed_operators_us": round(replay),
        **{f"{name}_bytes": peak for name, peak in peaks.items()},
    }


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--blocks", type=int, default=6)
    options.add_argument("--d-model", type=int, nargs="*", default=[128, 512])
    options.add_argument("--rounds", type=int, default=20)
    given = options.parse_args()
    torch.set_num_threads(1)
    rows = [measure(given.blocks, d_model, given.rounds) for d_model in given.d_model]
    harness.report(rows, given.json)


if __name__ == "__main__":
    main()
