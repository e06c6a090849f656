"""Is a planned step within its budget where FSDP2 shards the model over two processes?

The model of `scripts.bench.handmade`; each block is sharded for itself, what remains with the root.
The ranks measure a profile each and plan together, so that all of them have rank 0's plan. One row
for each budget, which is the smallest that can be planned for and a share of what lies between that
and the plain peak.

    python -m scripts.bench.budget_sharded [--json FILE] [--rounds 10] [--at 20 35 50 65 80]
    torchrun --nproc-per-node 2 -m scripts.bench.budget_sharded ...

    column                what                                                   to reach
    peak_bytes            measured peak, by rank
    peak_to_budget        the largest / budget                                   at most 1
    peak_error            the one farthest from the predicted peak / that - 1    1%
    num_plans             plans that the ranks have, by their SHA-256            1
    time_ratio            time of a step / plain step
    predicted_time_ratio  the same as planned

Peaks are those of the allocator's events, beyond what is there when a step begins. A release by one
of gloo's threads may be missing there (see `scripts.measure`), which can only make a peak larger:
the least of some steps counts, and `most_peak_bytes` is the largest. Times are the sum over ranks
of what their threads take, in turns as the note of `scripts.bench.handmade` says: without waits for
the other rank, and without gloo's own threads.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

import wrappers
from scripts import measure
from scripts.bench import budget, handmade, harness
from scripts.bench.handmade import MIB, ratio
from scripts.model import GPT, GPTConfig
from wrappers import Plan, Profile
from wrappers.plan.ranks import plan_together

#: Ranks that the script starts where torchrun has not.
NUM_RANKS = 2

#: A peak is the least of so many steps.
PEAK_STEPS = 5

#: A budget that every step is within: its plan says what the budgets lie between.
AMPLE_BYTES = 1 << 60


class Planned(contextlib.AbstractContextManager[None]):
    """A model that runs as planned while the context is open, its modules the same.

    FSDP manages them, so the plan replaces their forwards; these are put there and taken away, in
    microseconds and as often as wanted.

    Args:
        model: Changed in place while the context is open.
        plan: For it.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        report = plan.apply(model, inplace=True)
        regions = [model.get_submodule(fqn) for fqn in report.wrapped]
        self._forwards = [(region, region.__dict__["forward"]) for region in regions]
        wrappers.remove_activation_checkpointing(model)

    def __enter__(self) -> None:
        for region, forward in self._forwards:
            region.__dict__["forward"] = forward

    def __exit__(self, *_: object) -> None:
        for region, _forward in self._forwards:
            del region.__dict__["forward"]


@dataclass(frozen=True)
class Seen:
    """What one rank has seen.

    Attributes:
        peaks: By form of the model: the peaks of some steps.
        times: By form: seconds, round by round.
        hashes: By share: the plan's SHA-256.
        profile_s: Seconds that the profile took.
    """

    peaks: dict[str, list[int]]
    times: dict[str, list[float]]
    hashes: dict[int, str]
    profile_s: float


def shard(model: GPT) -> None:
    """Each block for itself, and what remains with the root, over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def plan_within(profile: Profile, budget_bytes: int) -> Plan:
    """The plan that all ranks have for a budget."""
    return plan_together(
        lambda: profile,
        lambda merged: wrappers.make_plan(merged, budget_bytes, count="activations"),
    )


def plans_at(profile: Profile, shares: Sequence[int]) -> dict[int, Plan]:
    """A plan at each share of what lies between the smallest peak and the plain one."""
    ample = plan_within(profile, AMPLE_BYTES)
    low = ample.smallest_bytes
    high = ample.plain_peak.num_bytes - ample.uncounted_bytes
    return {share: plan_within(profile, low + (high - low) * share // 100) for share in shares}


def run_forms(
    model: GPT, tokens: Tensor, plans: Mapping[int, Plan], rounds: int
) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
    """The peaks and the times of the plain step and of each plan's, on this rank."""
    forms: dict[str, contextlib.AbstractContextManager[None]] = {"none": contextlib.nullcontext()}
    forms |= {str(share): Planned(model, plan) for share, plan in plans.items()}
    steps = handmade.steps_of(model, tokens, forms)
    for step in steps.values():
        step()  # What it makes once is not a step's.
    cpu = torch.device("cpu")
    peaks = {
        name: [measure.peak_activation_bytes(step, cpu) for _ in range(PEAK_STEPS)]
        for name, step in steps.items()
    }
    return peaks, handmade.time_in_turns(steps, rounds)


def rows_of(plans: Mapping[int, Plan], seen: Sequence[Seen]) -> list[dict[str, Any]]:
    """A row for each plan, of what all ranks have seen."""
    names = seen[0].times
    times = {
        name: [sum(r) for r in zip(*(s.times[name] for s in seen), strict=True)] for name in names
    }
    rows = []
    for share, plan in plans.items():
        peaks = [min(each.peaks[str(share)]) for each in seen]
        predicted_peak = plan.peak_bytes - plan.uncounted_bytes
        farthest = max(peaks, key=lambda peak: abs(peak - predicted_peak))
        hashes = [each.hashes[share] for each in seen]
        time_ratio = ratio(times[str(share)], times["none"])
        rows.append(
            {
                "benchmark": "budget_sharded",
                "profile": "measured" if plan.is_measured else "derived",
                "num_ranks": len(seen),
                "share": share,
                "budget_bytes": plan.budget_bytes,
                "peak_bytes": peaks,
                "most_peak_bytes": max(max(each.peaks[str(share)]) for each in seen),
                "predicted_peak_bytes": predicted_peak,
                "plain_peak_bytes": [min(each.peaks["none"]) for each in seen],
                "predicted_plain_peak_bytes": plan.plain_peak.num_bytes - plan.uncounted_bytes,
                "peak_to_budget": round(max(peaks) / plan.budget_bytes, 5),
                "peak_error": round(farthest / predicted_peak - 1, 6),
                "plan_hash": hashes[0],
                "num_plans": len(set(hashes)),
                "time_ratio": round(time_ratio.value, 4),
                "time_ratio_error": round(time_ratio.error, 4),
                "predicted_time_ratio": round(plan.ratio, 4),
                "time_error": round(time_ratio.value / plan.ratio - 1, 4),
                "num_wrapped": plan.num_wrapped,
                "profile_s": round(max(each.profile_s for each in seen), 1),
            }
        )
    return rows


def measure_plans(
    rounds: int,
    shares: Sequence[int],
    config: GPTConfig = handmade.CONFIG,
    batch: int = handmade.BATCH,
) -> list[dict[str, Any]]:
    """All rows, on every rank of the default group."""
    model, tokens = handmade.build(config, batch)
    shard(model)
    profile, profile_s = budget.take_profile(model, tokens)
    plans = plans_at(profile, shares)
    peaks, times = run_forms(model, tokens, plans, rounds)
    own = Seen(peaks, times, {share: plan.hash for share, plan in plans.items()}, profile_s)
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, own)
    more = {"rounds": rounds, **handmade.sizes(model, tokens)}
    return [{**row, **more} for row in rows_of(plans, seen)]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people."""
    lines = [
        f"{'at':>4} {'budget':>7} {'predicted':>9} {'peak by rank':>15} {'error':>8} {'plans':>5} "
        f"{'x plain':>8} {'+-':>6} {'error':>7}"
    ]
    for row in rows:
        peaks = " ".join(f"{peak / MIB:.1f}" for peak in row["peak_bytes"])
        lines.append(
            f"{row['share']:>3}% {row['budget_bytes'] / MIB:>7.1f} "
            f"{row['predicted_peak_bytes'] / MIB:>9.1f} {peaks:>15} {row['peak_error']:>8.3%} "
            f"{row['num_plans']:>5} {row['time_ratio']:>8.3f} {row['time_ratio_error']:>6.4f} "
            f"{row['time_error']:>7.1%}"
        )
    return "\n".join(lines)


def _run_rank(rank: int, num_ranks: int, init_method: str, options: argparse.Namespace) -> None:
    """What one process does."""
    handmade.keep_heap()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=num_ranks)
    try:
        rows = measure_plans(options.rounds, options.at)
        if rank == 0:
            print(table(rows))
            harness.report(rows, options.json)
        dist.barrier()  # A rank that leaves early takes its store with it.
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--at", type=int, nargs="*", default=list(budget.SHARES), metavar="PERCENT")
    options = parser.parse_args()
    if "RANK" in os.environ:  # torchrun has started this process.
        rank, num_ranks = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
        _run_rank(rank, num_ranks, "env://", options)
        return
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # Host names need not resolve.
    with tempfile.TemporaryDirectory() as folder:
        init_method = Path(folder, "ranks").as_uri()
        spawn(_run_rank, (NUM_RANKS, init_method, options), NUM_RANKS)


if __name__ == "__main__":
    main()
