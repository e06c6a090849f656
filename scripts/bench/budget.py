"""Is a planned step within its budget, as fast as predicted, and faster than hand-made policies?

The model of `scripts.bench.handmade`, a GPT of 12 blocks, at budgets between its peak with full
recompute and without any. For each budget there is a plan from a profile that was measured here,
and one from tensors without memory and `wrappers.calibrate()` alone.

    python -m scripts.bench.budget [--json FILE] [--rounds 20] [--at 20 35 50 65 80]

    column             what                                                      to reach
    peak_to_budget     measured peak / budget                                    at most 1
    peak_error         measured peak / predicted peak - 1                        0.1%
    time_ratio         time of a step / plain step
    time_error         that / its prediction - 1                                 5%, derived 15%
    best               the fastest hand-made policy that fits the same budget
    to_best            time of a step / its                                      1.01; once 0.95

Peaks are those of the allocator's events, beyond what is there when a step begins; times are taken
as the note of `scripts.bench.handmade` says.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import wrappers
from scripts.bench import handmade, harness
from scripts.bench.handmade import MIB, Replaced, ratio
from scripts.model import GPT, Block
from wrappers import Plan, Profile
from wrappers.select import by_class

#: Budgets in percent of the way from the peak with full recompute to the plain peak.
SHARES = (20, 35, 50, 65, 80)


def take_profile(model: GPT, tokens: Tensor, hardware: Any = None) -> tuple[Profile, float]:
    """The profile of a step of `handmade.run_step`, and how many seconds it took."""
    targets = tokens[:, 1:].flatten()

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets)

    start_s = time.monotonic()
    profile = wrappers.profile(
        model, tokens[:, :-1], check_fn=by_class(Block), loss_fn=loss, hardware=hardware
    )
    return profile, time.monotonic() - start_s


def planned(model: GPT, plan: Plan) -> Replaced:
    """The context in which a model runs as planned."""
    report = plan.apply(model)
    regions = {fqn: model.get_submodule(fqn) for fqn in report.wrapped}
    wrappers.remove_activation_checkpointing(model)
    return Replaced(model, regions)


def start_bytes(profile: Profile) -> int:
    """What is there when a step begins, which the measured peaks leave out."""
    return profile.persistent.parameter_bytes + profile.persistent.sample_bytes


def row_of(
    name: str,
    share: int,
    budget: int,
    plan: Plan,
    profile: Profile,
    peak: int,
    times: Mapping[str, Sequence[float]],
    rivals: Sequence[str],
) -> dict[str, Any]:
    """What one plan has come to, beside the best of its rivals."""
    key = f"{name}_{share}"
    predicted_peak = plan.peak.num_bytes - start_bytes(profile)
    predicted = plan.step_us / plan.plain_step_us
    measured = ratio(times[key], times["none"])
    best = min(rivals, key=lambda rival: ratio(times[rival], times["none"]).value)
    to_best = ratio(times[key], times[best])
    return {
        "benchmark": "budget",
        "profile": name,
        "share": share,
        "budget_bytes": budget,
        "peak_bytes": peak,
        "predicted_peak_bytes": predicted_peak,
        "peak_to_budget": round(peak / budget, 5),
        "peak_error": round(peak / predicted_peak - 1, 6),
        "time_ratio": round(measured.value, 4),
        "time_ratio_error": round(measured.error, 4),
        "predicted_time_ratio": round(predicted, 4),
        "time_error": round(measured.value / predicted - 1, 4),
        "best": best,
        "best_time_ratio": round(ratio(times[best], times["none"]).value, 4),
        "to_best": round(to_best.value, 4),
        "to_best_error": round(to_best.error, 4),
        "num_wrapped": sum(region.decisions is not None for region in plan.regions),
    }


def measure(rounds: int, shares: Sequence[int]) -> list[dict[str, Any]]:
    """All rows of the table."""
    model, tokens = handmade.build()
    profiles = {}
    seconds = {}
    profiles["measured"], seconds["measured"] = take_profile(model, tokens)
    calibrated = wrappers.calibrate(save=False)
    profiles["derived"], seconds["derived"] = take_profile(model, tokens, calibrated)
    forms: dict[str, Any] = {name: make(model) for name, make in handmade.POLICIES.items()}
    steps = handmade.steps_of(model, tokens, forms)
    peaks = {name: handmade.peak_bytes(step) for name, step in steps.items()}
    low, high = peaks["full_replay"], peaks["none"]
    budgets = {share: low + (high - low) * share // 100 for share in shares}
    plans: dict[str, Plan] = {}
    for name, profile in profiles.items():
        for share, budget in budgets.items():
            plan = wrappers.make_plan(profile, budget, count="activations")
            plans[f"{name}_{share}"] = plan
            forms[f"{name}_{share}"] = planned(model, plan)
    rivals = {s: handmade.contenders(model, peaks, budget) for s, budget in budgets.items()}
    timed = {"none", *plans, *(name for names in rivals.values() for name in names)}
    steps = handmade.steps_of(model, tokens, {k: f for k, f in forms.items() if k in timed})
    peaks |= {name: handmade.peak_bytes(steps[name]) for name in plans}
    times = handmade.time_in_turns(steps, rounds)
    rows = [
        row_of(
            name,
            share,
            budgets[share],
            plans[f"{name}_{share}"],
            profiles[name],
            peaks[f"{name}_{share}"],
            times,
            rivals[share],
        )
        for name in profiles
        for share in shares
    ]
    for row in rows:
        row["profile_s"] = round(seconds[row["profile"]], 1)
        row["rounds"] = rounds
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people."""
    lines = [
        f"{'profile':<9} {'at':>4} {'budget':>7} {'peak':>7} {'error':>8} {'x plain':>8} "
        f"{'+-':>6} {'error':>7} {'to best':>8} {'+-':>6}  best"
    ]
    for row in rows:
        lines.append(
            f"{row['profile']:<9} {row['share']:>3}% {row['budget_bytes'] / MIB:>7.1f} "
            f"{row['peak_bytes'] / MIB:>7.1f} {row['peak_error']:>8.3%} {row['time_ratio']:>8.3f} "
            f"{row['time_ratio_error']:>6.4f} {row['time_error']:>7.1%} {row['to_best']:>8.3f} "
            f"{row['to_best_error']:>6.4f}  {row['best']} ({row['best_time_ratio']:.3f})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--at", type=int, nargs="*", default=list(SHARES), metavar="PERCENT")
    options = parser.parse_args()
    handmade.keep_heap()
    torch.set_num_threads(1)
    rows = measure(options.rounds, options.at)
    print(table(rows))
    harness.report(rows, options.json)


if __name__ == "__main__":
    main()
