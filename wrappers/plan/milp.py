"""The choice over regions as a linear program, with whole numbers or without.

With whole numbers it is the reference that :mod:`wrappers.plan.solve` is held against: HiGHS, as
scipy has it, proves an optimum by branch and bound. It is meant for small chains, as identical
regions make it slow: every permutation of a choice is another node.

Without whole numbers its dual says what a byte is worth at each moment of the step. Those prices
are what the solver's lower bound is made of, at any size.

Per region ``k``, and for the end of the forward, the rows are, in fractions of the budget:

    K(k + 1) >= K(k) + kept x(k)                                   what is kept
    K(k) + need x(k) + b(k) <= 1                                   [out]
    K(k) + need x(k) + p(k) <= 1                                   [back]
    b(k + 1) >= b(k) - D T + d x(k) - D s(k + 1)                   see [Note: Copies] in chain.py
    b(k + 1) >= d x(k) - D s(k + 1)
    p(k + 1) >= p(k) - H (T + extra x(k)) + d x(k) - H z(k + 1)
    p(k + 1) >= d x(k) - H z(k + 1)
    sum x(k) = 1

Without offloading ``b``, ``p`` and their rows are left out. HiGHS keeps rows to about 1e-6, which
of a large budget is more than a byte: what it finds is checked by :func:`chain.evaluate`.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wrappers.plan.chain import Chain, evaluate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

#: By which part of the budget a row may be off, so that the next try leaves as much free.
_TOLERANCE = 2e-6


@dataclass(frozen=True)
class Stage:
    """A region whose options may be chosen, or the end of the forward, as arrays by option.

    Attributes:
        options: Positions in the chain's items.
        kept: What they keep.
        need: What they need at most, moments before the region included.
        extra: What they add to the step.
        offload: What they offload.
        out_bytes: What copies to the host manage during the forward.
        back_bytes: What copies back manage during the backward, without its recompute.
    """

    options: Ints
    kept: Ints
    need: Ints
    extra: Floats
    offload: Floats
    out_bytes: float
    back_bytes: float


def stages_of(chain: Chain, budget_bytes: int) -> list[Stage]:
    """The regions with the options that can be part of an optimum, and the end of the forward.

    Left out is what does not fit whatever the other regions do, and what another option of the
    region is as good as in all respects; the first of equal ones stays.
    """
    import numpy as np

    after = chain.smallest_after()
    stages = []
    before = 0
    for k, items in enumerate(chain.items):
        columns = np.array(
            [(i.kept_bytes, max(i.need_bytes, chain.bases[k]), i.offload_bytes) for i in items],
            dtype=np.int64,
        )
        extra = np.array([i.extra_us for i in items])
        kept, need, offload = columns.T
        is_in = (before + need <= budget_bytes) & (before + kept + after[k + 1] <= budget_bytes)
        if not chain.can_offload:
            is_in &= offload == 0
        values = np.column_stack([columns.astype(float), extra])
        is_in[is_in] = _undominated(values[is_in])
        options = np.flatnonzero(is_in)
        stages.append(
            Stage(
                options,
                kept[options],
                need[options],
                extra[options],
                offload[options].astype(float),
                chain.d2h_bytes_per_us * chain.forward_us[k],
                chain.h2d_bytes_per_us * chain.backward_us[k],
            )
        )
        before += int(kept[options].min())
    zero = np.zeros(1, dtype=np.int64)
    end = np.array([chain.bases[-1]], dtype=np.int64)
    stages.append(Stage(zero, zero, end, zero.astype(float), zero.astype(float), 0.0, 0.0))
    return stages


def _undominated(values: Any) -> Any:
    """Which rows no other row is at most equal to everywhere; the first of equal rows."""
    import numpy as np

    is_le = (values[:, None, :] <= values[None, :, :]).all(-1)
    is_equal = is_le & is_le.T
    is_beaten = is_le & (~is_equal | np.tri(len(values), k=-1, dtype=bool).T)
    return ~is_beaten.any(0)


@dataclass(frozen=True)
class Prices:
    """What the linear program without whole numbers says, by stage; all at least 0.

    Attributes:
        out: Of a byte in the row [out] of a stage, in microseconds.
        back: Of a byte in the row [back].
        out_moved: Of a byte of ``b(k)`` before the wait; less than what it costs from there on
            where the copies are through at ``k`` anyway.
        back_moved: The same of ``p``.
        out_share: Which part of the price of ``b(k + 1)`` comes from ``b(k)``.
        back_share: The same of ``p``.
        path: What is kept, on its way out and back early in its solution: three columns, bytes.
    """

    out: Floats
    back: Floats
    out_moved: Floats
    back_moved: Floats
    out_share: Floats
    back_share: Floats
    path: Floats


class _Rows:
    """A sparse matrix of rows ``a v <= rhs``, written entry by entry."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.columns: list[Any] = []
        self.values: list[Any] = []
        self.rhs: list[float] = []

    def add(self, rhs: float, *entries: tuple[Any, Any]) -> int:
        """Append a row of (columns, values); gives back its number."""
        import numpy as np

        row = len(self.rhs)
        for columns, values in entries:
            columns = np.atleast_1d(columns)
            self.columns.append(columns)
            self.values.append(np.broadcast_to(values, columns.shape))
            self.rows.append(np.full(columns.shape, row))
        self.rhs.append(rhs)
        return row

    def matrix(self, num_columns: int) -> Any:
        import numpy as np
        from scipy.sparse import csr_array

        shape = (len(self.rhs), num_columns)
        if not self.rows:
            return csr_array(shape)
        values = np.concatenate(self.values)
        return csr_array((values, (np.concatenate(self.rows), np.concatenate(self.columns))), shape)


class _Program:
    """The rows of the module's docstring; bytes in budgets, times in ``unit_us``."""

    def __init__(self, stages: list[Stage], chain: Chain, budget_bytes: int) -> None:
        import numpy as np

        self.stages = stages
        self.has_copies = any(stage.offload.any() for stage in stages)
        self.budget = float(max(budget_bytes, 1))
        self.unit_us = max([chain.step_us, *(float(np.abs(s.extra).max()) for s in stages)]) or 1.0
        self._to_host = chain.d2h_bytes_per_us * self.unit_us / self.budget
        self._to_device = chain.h2d_bytes_per_us * self.unit_us / self.budget
        counts = [len(stage.options) for stage in stages]
        ends = np.cumsum([0, *counts])
        self.x = [np.arange(a, b) for a, b in itertools.pairwise(ends.tolist())]
        num, first = len(stages), int(ends[-1])
        blocks = 5 if self.has_copies else 1
        self.kept, *copies = np.arange(first, first + blocks * num).reshape(blocks, num)
        self.num_columns, self.num_choices = first + blocks * num, first
        self.le, self.eq = _Rows(), _Rows()
        self.out_rows: list[int] = []
        self.back_rows: list[int] = []
        self.out_pairs: list[tuple[int, int]] = []
        self.back_pairs: list[tuple[int, int]] = []
        self.cost = np.zeros(self.num_columns)
        if self.has_copies:
            self.out, self.back, self.wait_out, self.wait_back = copies
            self.cost[self.wait_out] = self.cost[self.wait_back] = 1.0
        for k in range(num):
            self._add(k)

    def _add(self, k: int) -> None:
        stage, x, le = self.stages[k], self.x[k], self.le
        self.cost[x] = stage.extra / self.unit_us
        self.eq.add(1.0, (x, 1.0))
        resident = [(self.kept[k], 1.0), (x, stage.need / self.budget)]
        if self.has_copies:
            self.out_rows.append(le.add(1.0, *resident, (self.out[k], 1.0)))
            self.back_rows.append(le.add(1.0, *resident, (self.back[k], 1.0)))
        else:
            self.out_rows.append(le.add(1.0, *resident))
        if k + 1 == len(self.stages):
            return
        kept = stage.kept / self.budget
        le.add(0.0, (self.kept[k], 1.0), (x, kept), (self.kept[k + 1], -1.0))
        if not self.has_copies:
            return
        moved = stage.offload / self.budget
        recompute = self._to_device * stage.extra.clip(0) / self.unit_us
        out_end = [(self.out[k + 1], -1.0), (self.wait_out[k + 1], -self._to_host)]
        back_end = [(self.back[k + 1], -1.0), (self.wait_back[k + 1], -self._to_device)]
        out_rest, back_rest = stage.out_bytes / self.budget, stage.back_bytes / self.budget
        self.out_pairs.append(
            (
                le.add(out_rest, (self.out[k], 1.0), (x, moved), *out_end),
                le.add(0.0, (x, moved), *out_end),
            )
        )
        self.back_pairs.append(
            (
                le.add(back_rest, (self.back[k], 1.0), (x, moved - recompute), *back_end),
                le.add(0.0, (x, moved), *back_end),
            )
        )

    def prices(self, solution: Floats, marginals: Floats) -> Prices:
        import numpy as np

        duals = np.maximum(-marginals, 0.0)
        scale = self.unit_us / self.budget

        out = duals[self.out_rows] * scale
        if not self.has_copies:
            return no_prices(len(self.stages), out)
        back = duals[self.back_rows] * scale
        out_moved, out_share = self._moved(duals * scale, self.out_pairs)
        back_moved, back_share = self._moved(duals * scale, self.back_pairs)
        path = solution[np.column_stack([self.kept, self.out, self.back])] * self.budget
        return Prices(out, back, out_moved, back_moved, out_share, back_share, path)

    def _moved(self, duals: Floats, pairs: list[tuple[int, int]]) -> tuple[Floats, Floats]:
        import numpy as np

        first, second = duals[np.array(pairs, dtype=int).reshape(-1, 2)].T
        total = first + second
        share = np.divide(first, total, out=np.zeros_like(first), where=total > 0)
        return np.append(0.0, total), share


def no_prices(num_stages: int, out: Floats | None = None) -> Prices:
    """Prices without copies: of a byte that is kept, or of nothing at all."""
    import numpy as np

    nothing = np.zeros(num_stages)
    out = nothing if out is None else out
    path = np.zeros((num_stages, 3))
    return Prices(out, nothing, nothing, nothing, nothing[1:], nothing[1:], path)


def relax(stages: list[Stage], chain: Chain, budget_bytes: int) -> Prices | None:
    """The prices of memory by the linear program without whole numbers.

    Any prices give a valid bound; these give the best of their kind.

    Returns:
        None where HiGHS gives none.
    """
    import numpy as np
    from scipy.optimize import linprog

    program = _Program(stages, chain, budget_bytes)
    result = linprog(
        program.cost,
        program.le.matrix(program.num_columns),
        program.le.rhs,
        program.eq.matrix(program.num_columns),
        program.eq.rhs,
        bounds=(0, None),
        method="highs",
    )
    if result.status != 0:
        return None
    return program.prices(np.asarray(result.x), np.asarray(result.ineqlin.marginals))


@contextlib.contextmanager
def _standard_output_shut() -> Iterator[None]:
    """Keep the process's standard output clean.

    HiGHS 1.8 to 1.12 writes a line for its own developers there, whatever it is told. Can go when
    scipy comes with a version that does not.
    """
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):  # There is none.
        yield
        return
    library = ctypes.CDLL(None) if os.name == "posix" else None
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            yield
            if library is not None:
                library.fflush(None)  # It may be buffered still.
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@dataclass(frozen=True)
class Reference:
    """What HiGHS found.

    Attributes:
        choice: The best choice that fits; None if there is none, or none was found.
        extra_us: What it adds to the step, waits included; infinite without one.
        bound_us: What every choice that fits adds at least, as HiGHS has proven it.
        is_proven: Whether nothing better exists, up to HiGHS's tolerance of 1e-6 of the budget.
            A choice that was found when time was over is not.
        elapsed_s: How long it took.
    """

    choice: tuple[int, ...] | None
    extra_us: float
    bound_us: float
    is_proven: bool
    elapsed_s: float


def solve_milp(
    chain: Chain, budget_bytes: int, *, time_limit_s: float = 60.0, max_nodes: int | None = None
) -> Reference:
    """The choice over regions by branch and bound.

    Args:
        chain: The choice.
        budget_bytes: The most that may be alive at any moment.
        time_limit_s: When HiGHS stops; what it has found is then not proven.
        max_nodes: After how many nodes of the tree it stops, on any machine; None: no limit.
    """
    start_s = time.monotonic()
    if chain.smallest()[0] > budget_bytes:
        return Reference(None, float("inf"), float("inf"), True, 0.0)
    stages = stages_of(chain, budget_bytes)
    bound_us = float("-inf")
    for tightening in (0.0, _TOLERANCE, 8 * _TOLERANCE):
        left_s = time_limit_s - (time.monotonic() - start_s)
        tight_bytes = int(budget_bytes * (1 - tightening))
        if left_s <= 0 or chain.smallest()[0] > tight_bytes:
            break
        choice, found_us = _branch(_Program(stages, chain, tight_bytes), left_s, max_nodes)
        if not tightening:
            bound_us = found_us
        if choice is None:
            break
        cost = evaluate(chain, choice, budget_bytes)
        if cost.peak_bytes <= budget_bytes:
            is_proven = cost.extra_us - bound_us <= 1e-6 * max(abs(cost.extra_us), chain.step_us)
            elapsed_s = time.monotonic() - start_s
            return Reference(choice, cost.extra_us, bound_us, is_proven, elapsed_s)
    elapsed_s = time.monotonic() - start_s
    return Reference(None, float("inf"), bound_us, False, elapsed_s)


def _branch(
    program: _Program, time_limit_s: float, max_nodes: int | None
) -> tuple[tuple[int, ...] | None, float]:
    """A choice, if one was found, and a lower bound of all."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    num = program.num_columns
    is_whole = np.zeros(num)
    is_whole[: program.num_choices] = 1
    upper = np.full(num, np.inf)
    upper[: program.num_choices] = 1
    options: dict[str, Any] = {"time_limit": time_limit_s, "mip_rel_gap": 1e-9}
    if max_nodes is not None:
        options["node_limit"] = max_nodes
    with _standard_output_shut():
        result = milp(
            program.cost,
            integrality=is_whole,
            bounds=Bounds(np.zeros(num), upper),
            constraints=[
                LinearConstraint(program.le.matrix(num), -np.inf, program.le.rhs),
                LinearConstraint(program.eq.matrix(num), program.eq.rhs, program.eq.rhs),
            ],
            options=options,
        )
    dual = getattr(result, "mip_dual_bound", None)
    bound_us = float("-inf") if dual is None else float(dual) * program.unit_us
    if result.x is None:
        return None, bound_us
    choice = tuple(
        int(stage.options[np.argmax(result.x[x])])
        for stage, x in zip(program.stages[:-1], program.x[:-1], strict=True)
    )
    return choice, bound_us
