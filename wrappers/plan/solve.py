"""The choice over regions: a dynamic programme over labels that proves how good its answer is.

A *label* is what matters of a choice for the first ``k`` regions: the bytes they keep, the time
they add, and with offloading the copies under way, ``b`` and ``p`` of [Note: Copies] in chain.py.
Less of each is never worse, so of two labels one of which is at most the other everywhere, the
larger is dropped; what remains is extended by every option of the next region.

There would still be too many. With prices ``m(k) >= 0`` for a byte at each moment, as the linear
program of :mod:`wrappers.plan.milp` gives them, the rest of the chain adds at least

    f(k, K) = min over the remaining choices of  sum of (extra + m(j) (K(j) + need(j) - budget))

as whatever fits makes the added terms at most 0. That is affine in ``K`` and separable by region,
so one pass from the end gives it for all labels. A label whose time plus ``f`` reaches that of the
best known choice is dropped, and an option whose own share of that sum is too large for a label is
not even tried on it (reduced cost). With copies, ``f`` is affine in ``b`` and ``p`` too; a wait
takes bytes at ``1 / D``, so no price of a byte on its way is larger than that.

The certificate: at most ``width`` labels a region are kept, those with the lowest ``f``. The lowest
``f`` that was ever dropped for its width is a lower bound of all that was not looked at; where
nothing was dropped, the answer is an optimum. A first narrow pass finds a good choice, wider ones
improve it or prove it, until the gap is closed or the work is done that the caller allows. The work
is counted in labels and not in seconds, so that the same chain has the same answer everywhere.

The bound does not trust the linear program: other prices make it lower, not wrong. Labels are
Pareto sets of up to (number of options) ** k in the worst case; what makes them few is that ``f``
is tight, as the linear program has few fractional regions. Instances in which many moments bind at
once have the largest gaps.

References: Pisinger, A minimal algorithm for the multiple-choice knapsack problem (1995); Beaumont
et al., Rotor and POFO, for chains.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wrappers.plan.chain import Chain, Cost, evaluate
from wrappers.plan.milp import Prices, Stage, no_prices, relax, solve_milp, stages_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

#: Labels a region that are kept, from the first pass to the last.
WIDTHS = (50, 500, 5_000, 50_000, 500_000)

#: With so many regions or fewer the answer is proven to be an optimum, if the work allows.
MAX_EXACT_REGIONS = 32

#: A larger chain is done when the gap is at most this part of the step; with copies, this part.
ENOUGH_GAP = 1e-5
ENOUGH_GAP_COPIES = 5e-4

#: Extensions of labels that may be looked at; a pass that is expected to need more is not begun.
MAX_WORK = 200_000_000

#: What a label with copies counts, as it takes so much longer.
_COPIES_WORK = 50

#: Nodes of the tree of HiGHS, for a small chain with copies that the passes leave open.
_MAX_NODES = 1_000

#: What a byte away from the linear program's solution counts, as a part of a kept byte's price.
_PATH_WEIGHT = 0.1

#: Part of the times by which sums in another order may differ.
_ROUNDING = 1e-10

#: Part of the terms of a bound that its sums are too large by at most, for each of its stages.
_FLOAT_ROUNDING = 4e-16


class DoesNotFitError(Exception):
    """No choice fits into the budget.

    Attributes:
        budget_bytes: What was asked for.
        smallest_bytes: The smallest budget that a choice fits into, exactly.
        choice: A choice for that budget.
        index: The region that needs all of it then, from 0; the number of regions where it is the
            end of the forward.
    """

    def __init__(self, budget_bytes: int, smallest_bytes: int, choice: list[int], index: int):
        super().__init__(f"{budget_bytes} bytes: the smallest feasible budget is {smallest_bytes}")
        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes
        self.choice = choice
        self.index = index


@dataclass(frozen=True)
class Solution:
    """A choice over regions, and how good it is.

    Attributes:
        choice: An option for each region.
        extra_us: What it adds to the step, waits for copies included.
        peak_bytes: The most that is alive at once, copies included.
        bound_us: What every choice within the budget adds at least.
        stall_us: The waits for copies.
        num_labels: How many extensions of labels were looked at.
        elapsed_s: How long it took; not compared.
    """

    choice: tuple[int, ...]
    extra_us: float
    peak_bytes: int
    bound_us: float
    stall_us: float = 0.0
    num_labels: int = 0
    elapsed_s: float = field(default=0.0, compare=False)

    @property
    def gap_us(self) -> float:
        """How much better than this a choice within the budget could be at most."""
        return max(self.extra_us - self.bound_us, 0.0)

    @property
    def is_optimal(self) -> bool:
        """Whether it is proven that there is nothing better, up to rounding of times."""
        return self.gap_us == 0


def solve(
    chain: Chain,
    budget_bytes: int,
    *,
    progress: Callable[[float], object] | None = None,
    time_limit_s: float = 120.0,
    max_work: int = MAX_WORK,
) -> Solution:
    """The choice that adds least to the step within a budget.

    Args:
        chain: The choice over regions.
        budget_bytes: The most that may be alive at any moment.
        progress: Called now and then with the part that is done, from 0 to 1.
        time_limit_s: When to stop and give what was found, with its gap. A safety net: what it
            cuts off depends on the machine.
        max_work: How many extensions of labels may be looked at, about.

    Raises:
        DoesNotFitError: Nothing fits into the budget.
        ImportError: numpy or scipy is missing.
    """
    start_s = time.monotonic()
    report = progress or (lambda fraction: None)
    fastest = _fastest(chain)
    cost = evaluate(chain, fastest, budget_bytes)
    if cost.peak_bytes <= budget_bytes and not cost.stall_us:
        report(1.0)
        return Solution(tuple(fastest), cost.extra_us, cost.peak_bytes, cost.extra_us)
    _check_fits(chain, budget_bytes)
    _check_imports()
    search = _Search(chain, budget_bytes, start_s + time_limit_s, report)
    solution = search.run(max_work, start_s)
    report(1.0)
    return solution


def frontier(
    chain: Chain, num_points: int = 20, *, progress: Callable[[float], object] | None = None
) -> list[Solution]:
    """How much time the step takes for how much memory, from the smallest peak to the plain one.

    A narrow pass for each of some budgets that are equally far from each other. Choices on which
    another is better in memory and time are left out.

    Args:
        chain: The choice over regions.
        num_points: How many budgets, the smallest and the plain peak included; at least 2.
        progress: Called with the part that is done, from 0 to 1.

    Returns:
        By rising peak and falling time, each with its bound for the budget that it was found for.

    Raises:
        ImportError: numpy or scipy is missing.
    """
    if num_points < 2:
        raise ValueError(f"num_points must be at least 2, got {num_points}")
    smallest_bytes = chain.smallest()[0]
    plain_bytes = max(evaluate(chain, _fastest(chain)).peak_bytes, smallest_bytes)
    found = []
    for point in range(num_points):
        part = point / (num_points - 1)
        budget_bytes = smallest_bytes + round((plain_bytes - smallest_bytes) * part)
        found.append(solve(chain, budget_bytes, max_work=0))
        if progress is not None:
            progress((point + 1) / num_points)
    found.sort(key=lambda s: (s.peak_bytes, s.extra_us))
    points: list[Solution] = []
    for solution in found:
        if not points or solution.extra_us < points[-1].extra_us:
            points.append(solution)
    return points


def _fastest(chain: Chain) -> list[int]:
    """By region the option that adds least, of equal ones the first that offloads least."""
    choice = []
    for items in chain.items:
        ranks = [
            (item.extra_us, item.offload_bytes, option)
            for option, item in enumerate(items)
            if chain.can_offload or not item.offload_bytes
        ]
        choice.append(min(ranks)[2])
    return choice


def _check_fits(chain: Chain, budget_bytes: int) -> None:
    smallest_bytes, choice = chain.smallest()
    if budget_bytes < smallest_bytes:
        index = chain.needs(choice).index(smallest_bytes)
        raise DoesNotFitError(budget_bytes, smallest_bytes, choice, index)


def _check_imports() -> None:
    try:
        import scipy.optimize  # noqa: F401 (brings numpy)
    except ImportError as error:
        raise ImportError(
            "plans need numpy and scipy: pip install 'activation-wrappers[plan]'"
        ) from error


@dataclass(frozen=True)
class _Labels:
    """Choices for the first regions, one a row.

    Attributes:
        kept: Bytes that they keep.
        time: Microseconds that they add, waits included.
        out: ``b`` of [Note: Copies], before a wait.
        back: ``p``.
        bound: What the step is longer by at least, whatever follows.
        parent: Row of the label that this one extends, among those of the region before.
        option: Position of the option that the last region has.
    """

    kept: Ints
    time: Floats
    out: Floats
    back: Floats
    bound: Floats
    parent: Ints
    option: Ints

    def __len__(self) -> int:
        return len(self.kept)

    def take(self, rows: Any) -> _Labels:
        return _Labels(
            self.kept[rows],
            self.time[rows],
            self.out[rows],
            self.back[rows],
            self.bound[rows],
            self.parent[rows],
            self.option[rows],
        )


@dataclass(frozen=True)
class _Bound:
    """The affine lower bound of what stages from ``k`` on add, by stage.

    Attributes:
        constant: What they add if nothing is kept before them, by ``k``.
        kept: What a byte that is kept before them adds.
        out: What a byte on its way to the host adds.
        back: What a byte that is back early adds.
        reduced: By stage and option: by how much the option raises the bound.
    """

    constant: list[float]
    kept: list[float]
    out: list[float]
    back: list[float]
    reduced: list[Floats]

    def of(self, k: int, kept: Any, out: Any, back: Any) -> Any:
        value = self.constant[k] + self.kept[k] * kept
        if self.out[k] or self.back[k]:
            value = value + self.out[k] * out + self.back[k] * back
        return value


def _bound_of(stages: list[Stage], chain: Chain, budget_bytes: int, prices: Prices) -> _Bound:
    """The bound that prices give, from the last stage to the first.

    With ``q`` the price of a byte on its way that later stages and the row [out] make together, a
    wait of ``s`` saves ``q D s``; so the price that counts is ``min(q, 1 / D)``, and a lower one is
    valid too, as there are no fewer than 0 bytes on their way.
    """
    out_cap = 1 / chain.d2h_bytes_per_us if chain.can_offload else 0.0
    back_cap = 1 / chain.h2d_bytes_per_us if chain.can_offload else 0.0
    constants, kepts, outs, backs = [0.0], [0.0], [0.0], [0.0]
    reduced: list[Floats] = []
    for k in reversed(range(len(stages))):
        stage = stages[k]
        is_last = k + 1 == len(stages)
        out = 0.0 if is_last else outs[-1] * float(prices.out_share[k])
        back = 0.0 if is_last else backs[-1] * float(prices.back_share[k])
        row_out, row_back = float(prices.out[k]), float(prices.back[k])
        values = stage.extra + kepts[-1] * stage.kept
        values = values + (row_out + row_back) * (stage.need - budget_bytes)
        values = values + (outs[-1] + backs[-1]) * stage.offload
        values = values - back * chain.h2d_bytes_per_us * stage.extra.clip(0)
        least = float(values.min())
        reduced.append(values - least)
        constants.append(constants[-1] + least - out * stage.out_bytes - back * stage.back_bytes)
        kepts.append(kepts[-1] + row_out + row_back)
        outs.append(min(out + row_out, out_cap, float(prices.out_moved[k])))
        backs.append(min(back + row_back, back_cap, float(prices.back_moved[k])))
    largest = max(abs(c) + p * budget_bytes for c, p in zip(constants, kepts, strict=True))
    rounding = _FLOAT_ROUNDING * len(stages) * largest
    constants = [constants[0], *(constant - rounding for constant in constants[1:])]
    return _Bound(constants[::-1], kepts[::-1], outs[::-1], backs[::-1], reduced[::-1])


class _Search:
    """Passes over the chain, each wider than the one before."""

    def __init__(
        self,
        chain: Chain,
        budget_bytes: int,
        deadline_s: float,
        report: Callable[[float], object],
    ) -> None:
        self.chain = chain
        self.budget = budget_bytes
        self.deadline_s = deadline_s
        self.report = report
        self.done = 0.0
        self.stages = stages_of(chain, budget_bytes)
        self.has_copies = any(stage.offload.any() for stage in self.stages)
        self.limits = [budget_bytes - need for need in chain.smallest_after()]
        self.prices = relax(self.stages, chain, budget_bytes) or no_prices(len(self.stages))
        self.bound = _bound_of(self.stages, chain, budget_bytes, self.prices)
        self.num_labels = 0
        self.best: tuple[Cost, tuple[int, ...]] | None = None
        self.proven_us = self.bound.constant[0]
        scale = [chain.step_us, *(float(abs(s.extra).max()) for s in self.stages)]
        self.slack_us = _ROUNDING * max(scale)

    def run(self, max_work: int, start_s: float) -> Solution:
        enough = ENOUGH_GAP_COPIES if self.has_copies else ENOUGH_GAP
        if len(self.chain.items) <= MAX_EXACT_REGIONS:
            enough = 0.0
        for number, width in enumerate(WIDTHS):
            self.done = number / len(WIDTHS)
            before = self.num_labels
            if self._pass(width) or time.monotonic() > self.deadline_s:
                break
            if self.gap_us <= enough * self.chain.step_us:
                break
            factor = WIDTHS[min(number + 1, len(WIDTHS) - 1)] // width
            expected = self.num_labels + (self.num_labels - before) * factor
            if expected * (_COPIES_WORK if self.has_copies else 1) > max_work:
                break
        if enough == 0 and self.has_copies and self.gap_us > 0 and max_work:
            self._branch()
        if self.best is None:
            self._improve(self.chain.smallest()[1])
        assert self.best is not None
        cost, choice = self.best
        return Solution(
            choice,
            float(cost.extra_us),
            cost.peak_bytes,
            float(min(self.proven_us, cost.extra_us)),
            float(cost.stall_us),
            self.num_labels,
            time.monotonic() - start_s,
        )

    @property
    def gap_us(self) -> float:
        return math.inf if self.best is None else self.best[0].extra_us - self.proven_us

    def _branch(self) -> None:
        """Let HiGHS prove or improve what was found."""
        left_s = self.deadline_s - time.monotonic()
        if left_s <= 0:
            return
        found = solve_milp(self.chain, self.budget, time_limit_s=left_s, max_nodes=_MAX_NODES)
        if found.choice is not None:
            self._improve(found.choice)
        assert self.best is not None
        is_proven = found.is_proven and found.extra_us - self.best[0].extra_us <= self.slack_us
        bound_us = self.best[0].extra_us if is_proven else found.bound_us
        self.proven_us = max(self.proven_us, bound_us)

    def _improve(self, choice: Any) -> None:
        cost = evaluate(self.chain, choice, self.budget)
        assert cost.peak_bytes <= self.budget, "a label's choice is over the budget"
        if self.best is None or cost.extra_us < self.best[0].extra_us:
            self.best = cost, tuple(choice)

    def _pass(self, width: int) -> bool:
        """One pass; gives back whether the best choice is proven to be an optimum."""
        import numpy as np

        threshold = math.inf if self.best is None else self.best[0].extra_us - self.slack_us
        lowest_dropped = math.inf
        history = [self._start()]
        for k, stage in enumerate(self.stages):
            self.report(self.done + k / len(self.stages) / len(WIDTHS))
            labels = self._extend(k, stage, history[-1], threshold)
            if k + 1 < len(self.stages):
                labels = self._undominated(labels, width)
                if len(labels) > width:
                    rows = self._chosen(k + 1, labels, width)
                    dropped = np.delete(labels.bound, rows)
                    lowest_dropped = min(lowest_dropped, float(dropped.min()))
                    labels = labels.take(rows)
            history.append(labels)
            if time.monotonic() > self.deadline_s:
                return False
            if not len(labels):
                break
        if len(history) == len(self.stages) + 1 and len(history[-1]):
            self._improve(self._trace(history))
        if lowest_dropped == math.inf:
            if self.best is not None:
                self.proven_us = self.best[0].extra_us
                return True
            return False
        self.proven_us = max(self.proven_us, min(lowest_dropped, threshold))
        return False

    def _start(self) -> _Labels:
        import numpy as np

        zero, none = np.zeros(1), np.zeros(1, dtype=np.int64)
        bound = zero + self.bound.constant[0]
        return _Labels(none, zero, zero, zero, bound, none, none)

    def _extend(self, k: int, stage: Stage, labels: _Labels, threshold: float) -> _Labels:
        """All labels one region further that fit and whose bound is below the threshold."""
        import numpy as np

        reduced = self.bound.reduced[k]
        by_cost = reduced.argsort(kind="stable")
        counts = np.searchsorted(reduced[by_cost], threshold - labels.bound, side="right")
        parent = np.repeat(np.arange(len(labels)), counts)
        first = np.cumsum(counts) - counts
        option = by_cost[np.arange(len(parent)) - first[parent]]
        self.num_labels += len(parent)
        kept = labels.kept[parent]
        room = self.budget - kept - stage.need[option]
        after = kept + stage.kept[option]
        is_in = room >= 0
        if k + 1 < len(self.stages):
            is_in &= after <= self.limits[k + 1]
        parent, option, room, after = parent[is_in], option[is_in], room[is_in], after[is_in]
        spent = labels.time[parent] + stage.extra[option]
        out = back = np.zeros(0)
        if self.has_copies:
            out, back = labels.out[parent], labels.back[parent]
            spent += (out - room).clip(0) / self.chain.d2h_bytes_per_us
            spent += (back - room).clip(0) / self.chain.h2d_bytes_per_us
            copied = stage.back_bytes + self.chain.h2d_bytes_per_us * stage.extra[option].clip(0)
            out = (np.minimum(out, room) - stage.out_bytes).clip(0) + stage.offload[option]
            back = (np.minimum(back, room) - copied).clip(0) + stage.offload[option]
        else:
            out = back = np.zeros(len(after))
        bound = spent + self.bound.of(k + 1, after, out, back)
        extended = _Labels(after, spent, out, back, bound, parent, option)
        return extended.take(bound < threshold)

    def _undominated(self, labels: _Labels, width: int) -> _Labels:
        import numpy as np

        if not self.has_copies:
            labels = labels.take(np.lexsort((labels.time, labels.kept)))
            least = np.minimum.accumulate(labels.time)
            is_in = np.ones(len(labels), dtype=bool)
            is_in[1:] = labels.time[1:] < least[:-1]
            return labels.take(is_in)
        return _pareto(labels)

    def _chosen(self, k: int, labels: _Labels, width: int) -> Ints:
        """Which labels to keep: those of the lowest bounds, with copies only half of them.

        The other half are near what the linear program keeps and copies. Where regions are
        identical many labels have the same bound, as it does not see that copies which have piled
        up cannot be through in time; the linear program's solution is never in that position.
        """
        import numpy as np

        if not self.has_copies:
            return labels.bound.argsort(kind="stable")[:width]
        path = self.prices.path[k]
        distance = np.abs(labels.kept - path[0])
        distance += np.abs(labels.out - path[1]) + np.abs(labels.back - path[2])
        is_in = np.zeros(len(labels), dtype=bool)
        near = labels.bound + _PATH_WEIGHT * self.bound.kept[k] * distance
        is_in[near.argsort(kind="stable")[: width // 2]] = True
        order = np.lexsort((distance, labels.bound))
        order = order[~is_in[order]]
        is_in[order[: width - width // 2]] = True
        return np.flatnonzero(is_in)

    def _trace(self, history: list[_Labels]) -> list[int]:
        row = int(history[-1].time.argmin())
        choice = []
        for stage, labels in zip(reversed(self.stages), reversed(history[1:]), strict=True):
            choice.append(int(stage.options[labels.option[row]]))
            row = int(labels.parent[row])
        return choice[:0:-1]


#: Labels that all others are compared with.
_MAX_JUDGES = 128


def _pareto(labels: _Labels) -> _Labels:
    """The labels without those that one of the lowest bounds is at most equal to everywhere."""
    import numpy as np

    labels = labels.take(np.lexsort((labels.time, labels.kept, labels.bound)))
    for position in range(_MAX_JUDGES):
        if position >= len(labels):
            break
        is_in = labels.kept < labels.kept[position]
        is_in |= labels.time < labels.time[position]
        is_in |= labels.out < labels.out[position]
        is_in |= labels.back < labels.back[position]
        is_in[: position + 1] = True
        if not is_in.all():
            labels = labels.take(is_in)
    return labels
