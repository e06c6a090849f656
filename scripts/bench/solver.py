"""How fast is the choice over regions, how far from the optimum, and does HiGHS agree?

    row          what
    speed        a chain of regions with 40 options each, identical or different, with offloading or
                 without: CPU seconds and certified gap, the worst of budgets at 20, 50 and 80%
                 between the smallest peak and the plain one
    reference    random chains of 1 to 32 regions: on how many the solver's choice adds as little
                 as the optimum that HiGHS proves

    python -m scripts.bench.solver [--json FILE] [--regions 32 96 192] [--options 40]
        [--instances 200] [--limit-s 30]

A realistic menu is a cloud around a convex curve of time over bytes, so that it has points off the
convex hull, with a transient of the recompute beside it. The menus of the random chains have bytes
and times that know nothing of each other, that nearly add up, that are coarse enough to be often
equal, or that are realistic. Instances that HiGHS does not prove within the limit are counted
apart.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from scripts.bench import harness
from wrappers.plan.chain import Chain, Item, evaluate
from wrappers.plan.milp import solve_milp
from wrappers.plan.solve import solve

if TYPE_CHECKING:
    import numpy as np

MIB = 2**20

#: Of a realistic block: what its plain option keeps, what its input takes, and its forward.
FULL_BYTES = 40 * MIB
INPUT_BYTES = 2 * MIB
FORWARD_US = 10_000.0

#: Budgets, between the smallest peak (0) and the plain one (1).
BUDGETS = (0.2, 0.5, 0.8)

#: How the menus of random chains look.
KINDS = ("uncorrelated", "correlated", "coarse", "realistic")


def realistic_menu(
    rng: np.random.Generator, num_options: int, *, scale: float = 1.0, has_offload: bool = False
) -> list[Item]:
    """The menu of a block, its needs without a base: the plain option, cuts, full recompute.

    With offloading, every third option moves a part of what it keeps to the host.
    """
    full, least = int(FULL_BYTES * scale), int(INPUT_BYTES * scale)
    parts = [1.0, *sorted(rng.random(max(num_options - 2, 0)), reverse=True), 0.0]
    items = []
    for number, part in enumerate(parts[:num_options]):
        kept = least + int((full - least) * part)
        time_us = FORWARD_US * scale * (1 - part) ** rng.uniform(1.2, 2.2) * rng.uniform(1.0, 1.1)
        need = kept + int((full - kept) * rng.uniform(0.4, 0.9)) + 2 * least
        moved = 0
        if has_offload and number % 3 == 1:
            moved = int((kept - least // 2) * rng.uniform(0.2, 0.9))
            time_us += 50.0
        items.append(Item(kept - moved, need, float(time_us), moved))
    return items


def realistic_chain(
    seed: int,
    num_regions: int,
    num_options: int,
    *,
    is_identical: bool = False,
    has_offload: bool = False,
) -> Chain:
    """Blocks with gradients that pile up in backward.

    Copies run at a fifth of a plain block's bytes during its forward.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    base, gradient = 500 * MIB, 6 * MIB
    menu = realistic_menu(rng, num_options, has_offload=has_offload)
    regions = []
    for region in range(num_regions):
        if not is_identical:
            scale = rng.uniform(0.5, 1.5)
            menu = realistic_menu(rng, num_options, scale=scale, has_offload=has_offload)
        alive = base + gradient * (num_regions - region)
        regions.append(
            tuple(
                Item(i.kept_bytes, i.need_bytes + alive, i.extra_us, i.offload_bytes) for i in menu
            )
        )
    bandwidth = 0.2 * FULL_BYTES / FORWARD_US if has_offload else 0.0
    return Chain(
        tuple(regions),
        tuple(base + gradient * (num_regions - k) + 10 * MIB for k in range(num_regions + 1)),
        (FORWARD_US,) * num_regions,
        (2 * FORWARD_US,) * num_regions,
        3 * FORWARD_US * num_regions,
        bandwidth,
        bandwidth,
    )


def _random_menu(rng: np.random.Generator, kind: str, num_options: int) -> list[Item]:
    if kind == "realistic":
        return realistic_menu(rng, max(num_options, 2), scale=rng.uniform(0.5, 1.5))
    items = []
    for _ in range(num_options):
        kept = int(rng.integers(0, 1000))
        need, extra_us = int(rng.integers(0, 3000)), rng.uniform(0, 100)
        if kind == "correlated":
            need, extra_us = kept + need // 2, (1000 - kept) / 10 + extra_us / 30
        elif kind == "coarse":
            kept, need, extra_us = kept // 100 * 100, need // 100 * 100, extra_us // 10
        items.append(Item(kept, need, float(extra_us)))
    return items


def random_chain(
    seed: int, *, max_regions: int = 32, max_options: int = 12, has_offload: bool = False
) -> Chain:
    """A chain of any size up to a largest one; its kind goes by the seed."""
    import numpy as np

    rng = np.random.default_rng(seed)
    num_regions = int(rng.integers(1, max_regions + 1))
    kind = KINDS[seed % len(KINDS)]
    unit = MIB // 25 if kind == "realistic" else 1
    regions = []
    for _ in range(num_regions):
        menu = _random_menu(rng, kind, int(rng.integers(1, max_options + 1)))
        for number in range(1, len(menu) if has_offload else 0):
            if rng.random() < 0.4:
                item, moved = menu[number], int(rng.integers(1, 800)) * unit
                menu[number] = Item(item.kept_bytes, item.need_bytes, item.extra_us, moved)
        regions.append(tuple(menu))
    time_us = FORWARD_US if kind == "realistic" else 30.0
    bandwidth = float(40 * 10 ** rng.uniform(-2, 0)) * unit * 30 / time_us if has_offload else 0.0
    return Chain(
        tuple(regions),
        tuple(int(base) * unit for base in rng.integers(0, 3000, num_regions + 1)),
        tuple(rng.uniform(0, time_us, num_regions).tolist()),
        tuple(rng.uniform(0, 2 * time_us, num_regions).tolist()),
        3 * time_us * num_regions,
        bandwidth,
        bandwidth * float(rng.uniform(0.1, 1.5)),
    )


def budget_between(chain: Chain, part: float) -> int:
    """A budget between the smallest peak and that of the options that add least."""
    smallest = chain.smallest()[0]
    fastest = [
        min(range(len(items)), key=[(i.offload_bytes > 0, i.extra_us) for i in items].__getitem__)
        for items in chain.items
    ]
    return smallest + round(part * max(evaluate(chain, fastest).peak_bytes - smallest, 0))


def measure_speed(num_regions: int, num_options: int) -> list[dict[str, Any]]:
    """A row for each kind of chain of this length."""
    rows = []
    for has_offload in (False, True):
        for is_identical in (True, False):
            chain = realistic_chain(
                num_regions,
                num_regions,
                num_options,
                is_identical=is_identical,
                has_offload=has_offload,
            )
            seconds, gaps = [], []
            for part in BUDGETS:
                start_s = time.process_time()
                solution = solve(chain, budget_between(chain, part))
                seconds.append(time.process_time() - start_s)
                gaps.append(solution.gap_us / chain.step_us)
            rows.append(
                {
                    "benchmark": "solver",
                    "row": "speed",
                    "regions": num_regions,
                    "options": num_options,
                    "identical": is_identical,
                    "offload": has_offload,
                    "cpu_s": round(max(seconds), 2),
                    "gap": float(f"{max(gaps):.2g}"),
                }
            )
    return rows


def compare(num_instances: int, limit_s: float, *, has_offload: bool) -> dict[str, Any]:
    """The solver against HiGHS on random chains of up to 32 regions."""
    counts = {"equal": 0, "better": 0, "worse": 0, "unproven": 0}
    solver_s = milp_s = 0.0
    num_certified = 0
    for seed in range(num_instances):
        chain = random_chain(seed, has_offload=has_offload)
        budget_bytes = budget_between(chain, (0.0, *BUDGETS)[seed // len(KINDS) % 4])
        start_s = time.process_time()
        solution = solve(chain, budget_bytes)
        solver_s += time.process_time() - start_s
        start_s = time.process_time()
        reference = solve_milp(chain, budget_bytes, time_limit_s=limit_s)
        milp_s += time.process_time() - start_s
        num_certified += solution.is_optimal
        difference_us = solution.extra_us - reference.extra_us
        if not reference.is_proven:
            counts["unproven"] += 1
        elif abs(difference_us) <= 1e-6 * chain.step_us:
            counts["equal"] += 1
        else:
            counts["worse" if difference_us > 0 else "better"] += 1
    return {
        "benchmark": "solver",
        "row": "reference",
        "offload": has_offload,
        "instances": num_instances,
        **counts,
        "certified": num_certified,
        "cpu_s": round(solver_s, 1),
        "milp_cpu_s": round(milp_s, 1),
    }


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--regions", type=int, nargs="+", default=[32, 96, 192])
    parser.add_argument("--options", type=int, default=40)
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--limit-s", type=float, default=30.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    solve(realistic_chain(0, 2, 4), budget_between(realistic_chain(0, 2, 4), 0.5))  # Imports.
    rows = [row for num in options.regions for row in measure_speed(num, options.options)]
    for has_offload in (False, True):
        rows.append(compare(options.instances, options.limit_s, has_offload=has_offload))
    harness.report(rows, options.json)


if __name__ == "__main__":
    main()
