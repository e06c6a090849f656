"""What does a region cost beyond its recompute, against torch?

A region of 20 pointwise operators on 4 elements, where kernels cost next to nothing, on one
thread. The overhead is: checkpointed step - plain step - plain forward (the recompute that
nobody can avoid). Ours and torch's are timed in turns in one process.

    python -m scripts.bench.engine_overhead [--json FILE]

Two regions, as they stop early in different ways: `output` ends with an operator that saves its
output (sigmoid), so nothing is left to stop; `input` ends with one that saves its input (sin),
so the recompute ends in an exception before the last kernel. The figures to reach are stated
for the first.

    case              what                                              at most
    no_reentrant      NO_REENTRANT against use_reentrant=False          0.35
    no_rng            the same with preserve_rng_state=False            0.35
    reentrant         REENTRANT against use_reentrant=True              0.50
    selective         context_fn pair that saves sin, against torch's   0.60
    policy            REPLAY with policy=[sin], against the same of torch  0.22
    replay            REPLAY against use_reentrant=False                0.60
    debug             debug=True against our own no_reentrant           4.00
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint as theirs
from torch import Tensor

import wrappers as ours
from scripts.bench import harness

SAVED = [torch.ops.aten.sin.default]
ROUNDS = 60
BATCH = 20


def ends_with_output(x: Tensor) -> Tensor:
    for _ in range(5):
        x = torch.sigmoid(torch.tanh(torch.cos(torch.sin(x))))
    return x


def ends_with_input(x: Tensor) -> Tensor:
    for _ in range(5):
        x = torch.sin(torch.sigmoid(torch.tanh(torch.cos(x))))
    return x


def measure(function: Any) -> dict[str, float]:
    """Overheads in microseconds, and the ratios of the table."""
    x = torch.randn(4, requires_grad=True)

    def step(checkpoint: Any, **options: Any) -> Any:
        def run() -> None:
            checkpoint(function, x, **options).sum().backward()

        return run

    def selective(module: Any) -> Any:
        return partial(module.create_selective_checkpoint_contexts, SAVED)

    # The policy's contexts are used up by one step, so each step makes its own, as users do.
    cases = {
        "forward": partial(function, x),
        "plain": step(lambda f, x: f(x)),
        "theirs_no_reentrant": step(theirs.checkpoint, use_reentrant=False),
        "ours_no_reentrant": step(ours.checkpoint, use_reentrant=False),
        "theirs_no_rng": step(theirs.checkpoint, use_reentrant=False, preserve_rng_state=False),
        "ours_no_rng": step(ours.checkpoint, use_reentrant=False, preserve_rng_state=False),
        "theirs_reentrant": step(theirs.checkpoint, use_reentrant=True),
        "ours_reentrant": step(ours.checkpoint, use_reentrant=True),
        "theirs_selective": step(
            theirs.checkpoint, use_reentrant=False, context_fn=selective(theirs)
        ),
        "ours_selective": step(ours.checkpoint, use_reentrant=False, context_fn=selective(ours)),
        "ours_policy": step(ours.checkpoint, policy=SAVED),
        "ours_replay": step(ours.checkpoint, impl=ours.CheckpointImpl.REPLAY),
        "ours_debug": step(ours.checkpoint, use_reentrant=False, debug=True),
    }
    medians = harness.interleave(cases, rounds=ROUNDS, batch=BATCH)
    unavoidable = medians["plain"] + medians["forward"]
    overhead = {name: us - unavoidable for name, us in medians.items() if "_" in name}
    ratios = {
        f"{case}_ratio": overhead[f"ours_{case}"] / overhead[f"theirs_{case}"]
        for case in ("no_reentrant", "no_rng", "reentrant", "selective")
    }
    ratios["policy_ratio"] = overhead["ours_policy"] / overhead["theirs_selective"]
    ratios["replay_ratio"] = overhead["ours_replay"] / overhead["theirs_no_reentrant"]
    ratios["debug_ratio"] = overhead["ours_debug"] / overhead["ours_no_reentrant"]
    microseconds = {f"{name}_us": us for name, us in overhead.items()}
    return {key: round(value, 3) for key, value in {**ratios, **microseconds}.items()}


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    rows = [
        {"benchmark": "engine_overhead", "region": name, **measure(function)}
        for name, function in (("output", ends_with_output), ("input", ends_with_input))
    ]
    harness.report(rows, options.json)


if __name__ == "__main__":
    main()
