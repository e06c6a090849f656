"""What do the plans of torch's own planner come to, in memory and in time, and beside ours?

`torch.distributed._tools` estimates, on fake tensors, what each module keeps and what its operators
take, chooses by integer programming which modules are checkpointed and which fraction of their
activations is discarded (`sac_milp`), and which operators of a module are recomputed for that
(`get_optimal_checkpointing_policy_per_module`). It cannot apply the result; here it is applied as
its estimates assume, by torch's checkpoint_wrapper and selective contexts. One row for each budget
of activations, on the model of `scripts.bench.handmade`:

    column            what
    budget_bytes      full recompute + the fraction of what lies between that and no recompute
    predicted_bytes   the peak that the planner promises; null where it finds no plan
    peak_bytes        the peak of a step by its plan
    time_ratio        time of a step by its plan / that of the model as it is
    plan              the fraction of its activations that a module discards
    estimate_s        CPU seconds of the estimates, the same for all budgets
    solve_s           CPU seconds of the integer programmes, the solver's process included
    to_torch_planner  time of a step by our plan / by torch's; to reach: at most 0.97
    ours_...          the same of our plan, whose budget is the peak that torch's has come to

    python -m scripts.bench.torch_planner [--json FILE] [--fractions 0.2 0.35 0.5 0.65 0.8]
        [--rounds 30]

It needs `pip install pulp pwlf`. On a CPU two things stand in its way, which are stepped around in
`estimate`: operators are timed by events of CUDA, and a module that is called twice in a forward,
as a block's dropout is, stops it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint as theirs
from torch._subclasses.fake_tensor import FakeTensorMode

import wrappers
from scripts.bench import budget, handmade, harness
from scripts.model import GPT, GPTConfig
from wrappers import Plan

#: What the planner imports besides torch.
NEEDED = ("pulp", "pwlf")

#: Its unit of budgets.
GIB = 1 << 30

#: How it times operators: it runs them.
_MODE = "operator-level-benchmark"


@dataclass(frozen=True)
class Estimates:
    """What the planner knows about a model.

    Attributes:
        graph: What `sac_milp` takes.
        operators: By the name of a module that is no leaf: the operators of its forward.
        parameter_bytes: What its budgets and peaks count besides activations and gradients.
        cpu_s: Seconds that the estimates took.
    """

    graph: Any
    operators: dict[str, Any]
    parameter_bytes: int
    cpu_s: float


@dataclass(frozen=True)
class ModulePlan:
    """A module that is checkpointed.

    Attributes:
        discarded: The fraction of its activations that is recomputed.
        operators: Names of the operators of its forward.
        is_saved: Which of their outputs are kept.
    """

    discarded: float
    operators: list[str]
    is_saved: list[bool]


@dataclass(frozen=True)
class TorchPlan:
    """What the planner has chosen.

    Attributes:
        modules: By name.
        predicted_bytes: The peak that it promises, without parameters.
        cpu_s: Seconds that its programmes took.
    """

    modules: dict[str, ModulePlan]
    predicted_bytes: int
    cpu_s: float


# --- Estimate -----------------------------------------------------------------------------


class _HostEvent:
    """Takes the place of a CUDA event: what it measures is the thread's time."""

    def __init__(self, **_: Any) -> None:
        self.time_s = 0.0

    def record(self, *_: Any) -> None:
        self.time_s = time.thread_time()

    def elapsed_time(self, end: _HostEvent) -> float:
        return (end.time_s - self.time_s) * 1e3


@contextlib.contextmanager
def _timing_on_host() -> Iterator[None]:
    """Let the estimator time operators without CUDA, and print to stderr."""
    nothing = mock.Mock(return_value=None)
    stubs = mock.patch.multiple(
        "torch.cuda", Event=_HostEvent, current_stream=nothing, synchronize=nothing
    )
    with stubs, contextlib.redirect_stdout(sys.stderr):
        yield


def estimate(config: GPTConfig, batch: int) -> Estimates:
    """Let the planner look at a fake model."""
    import numpy
    from torch.distributed._tools.ilp_utils import aggregate_stats, parse_module_info
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.distributed._tools.runtime_estimator import RuntimeEstimator
    from torch.distributed._tools.sac_estimator import SACEstimator

    numpy.random.seed(0)  # The fit of trade-offs draws from it.
    start_s = handmade.cpu_seconds()
    memory, runtime, operators = MemTracker(), RuntimeEstimator(), SACEstimator()
    with FakeTensorMode(), _timing_on_host():
        model, tokens = handmade.build(config, batch)
        memory.track_external(model)
        with memory:
            handmade.run_step(model, tokens)
            memory.reset_mod_stats()  # What the first step leaves behind is not the second one's.
            handmade.run_step(model, tokens)
        with runtime(_MODE):
            handmade.run_step(model, tokens)
        with operators(_MODE):
            model(tokens[:, :-1])
        info = aggregate_stats(model, memory, runtime, operators, torch.device("cpu"))
    order = info["mod_order"]
    for when, names in order.items():
        order[when] = list(dict.fromkeys(names))  # type: ignore[literal-required, call-overload]
    graph = parse_module_info(info)
    stats = dict(operators.sac_mod_stats)
    parameter_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return Estimates(graph, stats, parameter_bytes, handmade.cpu_seconds() - start_s)


# --- Plan ---------------------------------------------------------------------------------


def make_plan(estimates: Estimates, budget_bytes: int) -> TorchPlan | None:
    """Let the planner choose, for a budget of activations and gradients; None if it cannot."""
    from torch.distributed._tools import sac_ilp

    start_s = handmade.cpu_seconds()
    root = estimates.graph.nodes[0]["fqn"]
    chosen, _, peak = sac_ilp.sac_milp(
        estimates.graph,
        (budget_bytes + estimates.parameter_bytes) / GIB,
        # The root is none: it would be recomputed as a whole at the beginning of backward.
        ac_units=[name for name in estimates.operators if name != root],
    )
    if peak < 0:
        return None
    modules = {}
    for name, discarded in chosen.items():
        operators = estimates.operators[name]
        saved = sac_ilp.get_optimal_checkpointing_policy_per_module(operators, 1 - discarded)
        modules[name.removeprefix(f"{root}.")] = ModulePlan(
            discarded, operators.func_names, [bool(each) for each in saved]
        )
    return TorchPlan(modules, peak - estimates.parameter_bytes, handmade.cpu_seconds() - start_s)


# --- Apply --------------------------------------------------------------------------------


def _policy(plan: ModulePlan) -> Callable[..., theirs.CheckpointPolicy]:
    """The policy of one forward: answers by the number of the operator, as it was estimated.

    Raises:
        RuntimeError: An operator that was not there in the estimate.
    """
    from torch.distributed._tools.sac_estimator import OPS_TO_ALWAYS_SKIP

    num_calls = {False: 0, True: 0}

    def answer(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> theirs.CheckpointPolicy:
        if op in OPS_TO_ALWAYS_SKIP:
            return theirs.CheckpointPolicy.PREFER_RECOMPUTE
        index = num_calls[ctx.is_recompute]
        num_calls[ctx.is_recompute] += 1
        name = op.overloadpacket.__name__
        expected = plan.operators[index] if index < len(plan.operators) else "none"
        if name != expected:
            raise RuntimeError(f"operator {index}: the estimate has {expected}, the step {name}")
        if plan.is_saved[index]:
            return theirs.CheckpointPolicy.MUST_SAVE
        return theirs.CheckpointPolicy.PREFER_RECOMPUTE

    return answer


def apply_plan(model: GPT, plan: TorchPlan) -> handmade.Replaced:
    """The context in which the model is run by a plan."""

    def contexts(module: ModulePlan) -> Any:
        return theirs.create_selective_checkpoint_contexts(_policy(module))

    def wrap(name: str, module: ModulePlan) -> torch.nn.Module:
        options = {"context_fn": partial(contexts, module)} if any(module.is_saved) else {}
        return handmade.torch_checkpoint(**options)(model.get_submodule(name))

    return handmade.Replaced(model, {name: wrap(name, each) for name, each in plan.modules.items()})


# --- Measure ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """Our plans.

    Attributes:
        plans: By fraction.
        profile_s: CPU seconds of the profile that all of them are made from.
        solve_s: By fraction: CPU seconds of the plan.
    """

    plans: dict[float, Plan]
    profile_s: float
    solve_s: dict[float, float]


def make_ours(model: GPT, tokens: torch.Tensor, budgets: Mapping[float, int]) -> Ours:
    """Plans of ours within some peaks."""
    start_s = handmade.cpu_seconds()
    profile, _ = budget.take_profile(model, tokens)
    profile_s = handmade.cpu_seconds() - start_s
    plans, seconds = {}, {}
    for fraction, budget_bytes in budgets.items():
        start_s = handmade.cpu_seconds()
        plans[fraction] = wrappers.make_plan(profile, budget_bytes, count="activations")
        seconds[fraction] = handmade.cpu_seconds() - start_s
    return Ours(plans, profile_s, seconds)


def row_of(
    name: str, peaks: Mapping[str, int], times: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """What one form of the model has come to."""
    time_ratio = handmade.ratio(times[name], times["none"])
    return {
        "peak_bytes": peaks[name],
        "peak_ratio": round(peaks[name] / peaks["none"], 4),
        "time_ratio": round(time_ratio.value, 4),
        "time_ratio_error": round(time_ratio.error, 4),
    }


def measure_plans(
    fractions: list[float],
    rounds: int,
    config: GPTConfig = handmade.CONFIG,
    batch: int = handmade.BATCH,
) -> list[dict[str, Any]]:
    """A row for each budget."""
    estimates = estimate(config, batch)
    model, tokens = handmade.build(config, batch)
    ends = {name: handmade.POLICIES[name](model) for name in ("none", "full_torch")}
    high, low = map(handmade.peak_bytes, handmade.steps_of(model, tokens, ends).values())
    budgets = {fraction: int(low + fraction * (high - low)) for fraction in fractions}
    plans = {fraction: make_plan(estimates, each) for fraction, each in budgets.items()}
    found = {fraction: plan for fraction, plan in plans.items() if plan}
    forms: dict[str, contextlib.AbstractContextManager[None]] = {"none": ends["none"]}
    forms |= {str(fraction): apply_plan(model, plan) for fraction, plan in found.items()}
    steps = handmade.steps_of(model, tokens, forms)
    peaks = {name: handmade.peak_bytes(step) for name, step in steps.items()}
    ours = make_ours(model, tokens, {fraction: peaks[str(fraction)] for fraction in found})
    forms = {f"ours_{key}": budget.planned(model, plan) for key, plan in ours.plans.items()}
    our_steps = handmade.steps_of(model, tokens, forms)
    peaks |= {name: handmade.peak_bytes(step) for name, step in our_steps.items()}
    times = handmade.time_in_turns({**steps, **our_steps}, rounds)
    rows = []
    for fraction, plan in plans.items():
        row: dict[str, Any] = {
            "benchmark": "torch_planner",
            "fraction": fraction,
            "budget_bytes": budgets[fraction],
            "estimate_s": round(estimates.cpu_s, 1),
            "predicted_bytes": plan.predicted_bytes if plan else None,
        }
        if plan:
            row |= row_of(str(fraction), peaks, times)
            row |= {
                "plan": {name: module.discarded for name, module in plan.modules.items()},
                "solve_s": round(plan.cpu_s, 2),
                **_beside(fraction, ours, peaks, times),
                "rounds": rounds,
            }
        rows.append({**row, **handmade.sizes(model, tokens)})
    return rows


def _beside(
    fraction: float,
    ours: Ours,
    peaks: Mapping[str, int],
    times: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """What our plan has come to, beside torch's."""
    plan, name = ours.plans[fraction], f"ours_{fraction}"
    to_theirs = handmade.ratio(times[name], times[str(fraction)])
    own = {
        "budget_bytes": plan.budget_bytes,
        "predicted_bytes": plan.peak_bytes - plan.uncounted_bytes,
        **row_of(name, peaks, times),
        "predicted_time_ratio": round(plan.ratio, 4),
        "profile_s": round(ours.profile_s, 1),
        "solve_s": round(ours.solve_s[fraction], 2),
    }
    return {
        "to_torch_planner": round(to_theirs.value, 4),
        "to_torch_planner_error": round(to_theirs.error, 4),
        **{f"ours_{key}": value for key, value in own.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [
        f"{'budget MiB':>10} {'predicted':>10} {'peak':>8} {'x plain time':>13} {'solve s':>8} "
        f"{'our peak':>9} {'x plain time':>13} {'to torch':>9} {'+-':>7}"
    ]
    for row in rows:
        budget_mib = f"{row['budget_bytes'] / handmade.MIB:>10.1f}"
        if row["predicted_bytes"] is None:
            lines.append(f"{budget_mib}   no plan")
            continue
        lines.append(
            f"{budget_mib} {row['predicted_bytes'] / handmade.MIB:>10.1f} "
            f"{row['peak_bytes'] / handmade.MIB:>8.1f} {row['time_ratio']:>13.3f} "
            f"{row['solve_s']:>8.2f} {row['ours_peak_bytes'] / handmade.MIB:>9.1f} "
            f"{row['ours_time_ratio']:>13.3f} {row['to_torch_planner']:>9.3f} "
            f"{row['to_torch_planner_error']:>7.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.2, 0.35, 0.5, 0.65, 0.8])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        parser.error(f"torch's planner needs {' and '.join(missing)}: pip install pulp pwlf")
    handmade.keep_heap()
    torch.set_num_threads(1)
    rows = measure_plans(options.fractions, options.rounds)
    print(table(rows))
    harness.report(rows, options.json)


if __name__ == "__main__":
    main()
