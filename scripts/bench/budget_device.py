"""Is a planned step on an accelerator within its budget, as fast as predicted, and faster?

A GPT of 24 blocks, d_model 2048, bfloat16, without optimizer. Plans may offload where the device
has a link to the host. Budgets lie between the peak with full recompute and the plain one; one more
is the peak of torchtitan's selective policy, so that both have the same memory. Rows:

    form                           what
    none                           no checkpointing
    full_replay                    every block is recomputed
    save_every_other_matmul        torchtitan's selective policy, by REPLAY
    torch_save_every_other_matmul  the same by torch's contexts
    planned_SHARE                  a plan; SHARE percent of the way from full_replay to none
    planned_selective              a plan within the peak of torch_save_every_other_matmul

    python -m scripts.bench.budget_device [--json FILE] [--device cuda] [--at 30 50 70]
        [--rounds 7] [--tiny]

    column of a plan      what                                              to reach
    peak_to_budget        measured peak / budget                            at most 1
    peak_error            measured peak / predicted peak - 1                2%
    time_error            time of a step / plain step / its prediction - 1
    to_full               time of a step / that of full_replay
    to_selective          the same to torch_save_every_other_matmul
    offload_bytes         what the plan moves to the host
    moved_bytes           what a step has moved there

Peaks are what a step allocates beyond what was there before it. Forms are timed in turns, by events
of the device; on a CPU as the note of `scripts.bench.handmade` says. About 90 seconds on one H200;
`--tiny` takes a small float32 model, for a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import wrappers
from scripts import measure
from scripts.bench import budget, handmade, harness
from scripts.bench.handmade import MIB, ratio
from scripts.model import GPT, GPTConfig
from wrappers import Plan, offload_stats

SHARES = (30, 50, 70)

#: What plans are compared with, besides the plain model.
FULL, SELECTIVE = "full_replay", "torch_save_every_other_matmul"
HAND_MADE = ("none", FULL, "save_every_other_matmul", SELECTIVE)

#: Steps between two events, so that the host can run ahead of the device as it does in training.
STEPS_A_TURN = 3


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        config: The model.
        batch: Sequences in a batch.
        dtype: Of its parameters.
    """

    config: GPTConfig
    batch: int
    dtype: torch.dtype


LARGE = Sizes(
    GPTConfig(num_layers=24, d_model=2048, num_heads=16, seq_len=2048, dropout=0.0),
    batch=4,
    dtype=torch.bfloat16,
)
TINY = Sizes(
    GPTConfig(num_layers=3, d_model=64, num_heads=2, seq_len=64, dropout=0.0),
    batch=4,
    dtype=torch.float32,
)


def build(sizes: Sizes, device: torch.device) -> tuple[GPT, Tensor]:
    """The model on its device, and the tokens of a batch with the targets."""
    with device:
        model, tokens = handmade.build(sizes.config, sizes.batch)
    return model.to(sizes.dtype), tokens


def time_in_turns(
    steps: Mapping[str, measure.Step], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of one step of each form, round by round, in an order drawn anew for each."""
    if device.type == "cpu":
        return handmade.time_in_turns(steps, rounds)
    for step in steps.values():
        for _ in range(STEPS_A_TURN):
            step()
    order = list(steps)
    shuffle = random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in order}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            gc.collect(0)
            steps[name]()  # What is fetched ahead follows the order of the step before.
            torch.cuda.synchronize(device)
            start.record()
            for _ in range(STEPS_A_TURN):
                steps[name]()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) / 1e3 / STEPS_A_TURN)
    return samples


def moved_bytes(step: measure.Step) -> int:
    """What one step moves to the host."""

    def so_far() -> int:
        return sum(tier.out_bytes for tier in offload_stats().tiers)

    before = so_far()
    step()
    return so_far() - before


def peak_bytes(step: measure.Step, device: torch.device) -> int:
    """Peak of a step, gradients included, when it has been run often enough to be as all others."""
    for _ in range(2):  # A first replay is compared; a first offloading step learns its order.
        step()
    return measure.peak_activation_bytes(step, device)


def budgets_of(peaks: Mapping[str, int], shares: Sequence[int]) -> dict[str, int]:
    """By name of a plan: its budget."""
    low, high = peaks[FULL], peaks["none"]
    budgets = {f"planned_{share}": low + (high - low) * share // 100 for share in shares}
    return {**budgets, "planned_selective": peaks[SELECTIVE]}


def row_of(
    name: str, peaks: Mapping[str, int], times: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """What one form has come to."""
    to_plain = ratio(times[name], times["none"])
    return {
        "benchmark": "budget_device",
        "form": name,
        "peak_bytes": peaks[name],
        "peak_ratio": round(peaks[name] / peaks["none"], 4),
        "step_ms": round(statistics.median(times[name]) * 1e3, 2),
        "time_ratio": round(to_plain.value, 4),
        "time_ratio_error": round(to_plain.error, 4),
    }


def planned_row(
    name: str,
    plan: Plan,
    moved: int,
    peaks: Mapping[str, int],
    times: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """What a plan has come to, beside its predictions and its rivals."""
    predicted_peak = plan.peak_bytes - plan.uncounted_bytes
    to_plain = ratio(times[name], times["none"])
    to_full, to_selective = (ratio(times[name], times[rival]) for rival in (FULL, SELECTIVE))
    return {
        **row_of(name, peaks, times),
        "budget_bytes": plan.budget_bytes,
        "margin_bytes": plan.margin_bytes,
        "predicted_peak_bytes": predicted_peak,
        "peak_to_budget": round(peaks[name] / plan.budget_bytes, 5),
        "peak_error": round(peaks[name] / predicted_peak - 1, 6),
        "predicted_step_ms": round(plan.step_us / 1e3, 2),
        "predicted_time_ratio": round(plan.ratio, 4),
        "time_error": round(to_plain.value / plan.ratio - 1, 4),
        "to_full": round(to_full.value, 4),
        "to_full_error": round(to_full.error, 4),
        "to_selective": round(to_selective.value, 4),
        "to_selective_error": round(to_selective.error, 4),
        "num_wrapped": plan.num_wrapped,
        "offload_bytes": sum(region.offload_bytes for region in plan.regions),
        "moved_bytes": moved,
        "wait_ms": round(plan.wait_us / 1e3, 2),
    }


def measure_forms(
    sizes: Sizes, device: torch.device, shares: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """A row for each form: the hand-made ones, then the plans."""
    model, tokens = build(sizes, device)
    policies = dict(handmade.policies_for(sizes.config.num_layers))
    forms: dict[str, contextlib.AbstractContextManager[None]]
    forms = {name: policies[name](model) for name in HAND_MADE}
    steps = handmade.steps_of(model, tokens, forms)
    peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
    profile, profile_s = budget.take_profile(model, tokens)
    plans = {
        name: wrappers.make_plan(profile, budget_bytes, count="activations")
        for name, budget_bytes in budgets_of(peaks, shares).items()
    }
    forms = {name: budget.planned(model, plan) for name, plan in plans.items()}
    planned = handmade.steps_of(model, tokens, forms)
    peaks |= {name: peak_bytes(step, device) for name, step in planned.items()}
    moved = {name: moved_bytes(step) for name, step in planned.items()}
    times = time_in_turns({**steps, **planned}, rounds, device)
    rows = [row_of(name, peaks, times) for name in HAND_MADE]
    rows += [planned_row(name, plan, moved[name], peaks, times) for name, plan in plans.items()]
    more = {
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "profile_s": round(profile_s, 1),
        "rounds": rounds,
        **handmade.sizes(model, tokens),
    }
    return [{**row, **more} for row in rows]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people."""
    lines = [
        f"{'form':<30} {'peak MiB':>9} {'budget':>9} {'error':>7} {'x plain':>8} {'+-':>6} "
        f"{'error':>7} {'to full':>8} {'to sel.':>8} {'moved':>7}"
    ]
    for row in rows:
        line = f"{row['form']:<30} {row['peak_bytes'] / MIB:>9.1f} "
        if "budget_bytes" not in row:
            line += f"{'':>17} {row['time_ratio']:>8.3f} {row['time_ratio_error']:>6.4f}"
        else:
            line += (
                f"{row['budget_bytes'] / MIB:>9.1f} {row['peak_error']:>7.2%} "
                f"{row['time_ratio']:>8.3f} {row['time_ratio_error']:>6.4f} "
                f"{row['time_error']:>7.1%} {row['to_full']:>8.3f} {row['to_selective']:>8.3f} "
                f"{row['moved_bytes'] / MIB:>7.1f}"
            )
        lines.append(line)
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="a small float32 model, for a CPU")
    parser.add_argument("--at", type=int, nargs="*", default=list(SHARES), metavar="PERCENT")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args(arguments)


def main() -> None:
    options = _options()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("budget_device: torch finds no GPU here; --tiny --device cpu shows what it does")
        return
    if options.device == "cpu":
        handmade.keep_heap()
        torch.set_num_threads(1)
    sizes = TINY if options.tiny else LARGE
    rows = measure_forms(sizes, torch.device(options.device), options.at, options.rounds)
    print(table(rows))
    harness.report(rows, options.json, options.device)


if __name__ == "__main__":
    main()
