"""One plan for all ranks of a group, or an error on all of them.

Problem: ranks profile for themselves. Their times differ, with uneven shards their bytes too; a
rank may have built another model, or run out of memory while it profiles. A plan that fits one rank
may be too large for another, and ranks with different plans wait for each other's collectives.

Idea: everything goes to rank 0 and one plan comes back, in steps that all ranks leave together (see
:mod:`wrappers.state.faults`). ::

    [1] profile    on every rank       a profile or a failure
    [2] merge      on rank 0           the larger of every number; other regions: a failure
    [3] solve      on rank 0
    [4] broadcast  to every rank       JSON
    [5] compare    on every rank       SHA-256 of what each has read

What travels is the canonical JSON of profiles and plans. In [2] it is said which rank has which
other regions; what [3] raises, ``InfeasibleBudgetError`` for one, every rank raises.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from wrappers.errors import WrapperError
from wrappers.plan import schema
from wrappers.plan.plan import Plan
from wrappers.plan.records import (
    Hardware,
    Moment,
    OperatorRow,
    Option,
    Persistent,
    Profile,
    RegionProfile,
    Structure,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from wrappers.state.faults import Agreement

__all__ = ["RanksError", "merge", "plan_together", "share"]

#: How many names an error lists for a rank.
_MAX_NAMES = 8


class RanksError(WrapperError):
    """Ranks could not come to one plan; every rank of the group raises it.

    Attributes:
        failures: What each rank that failed has raised, by rank.
        differences: How the model of a rank differs from that of rank 0, by rank.
    """

    def __init__(
        self,
        message: str,
        *,
        fqn: str = "",
        failures: dict[int, BaseException] | None = None,
        differences: dict[int, tuple[str, ...]] | None = None,
    ) -> None:
        super().__init__(message, fqn=fqn)
        self.failures = failures or {}
        self.differences = differences or {}


def plan_together(
    profile: Callable[[], Profile],
    solve: Callable[[Profile], Plan],
    group: ProcessGroup | None = None,
) -> Plan:
    """Profile on every rank, solve on rank 0, and give its plan to all.

    A collective: every rank of the group calls it. Without a process group it is
    ``solve(profile())``.

    Args:
        profile: Makes this rank's profile.
        solve: Makes a plan of the merged profile; called on rank 0 of the group.
        group: The ranks; by default those of the default group.

    Raises:
        RanksError: A rank could not profile, or has another model.
    """
    agreement = _agreement(group)
    if agreement is None:
        return solve(profile())
    texts: list[str] = []  # rank 0's alone
    with _named(agreement, "profile"):
        agreement.reduce("profile", lambda: schema.dump(profile()), texts.extend)
    return _solved(agreement, lambda: solve(merge(list(map(_profile_of, texts)))))


def share(plan: Plan | None, group: ProcessGroup | None = None) -> Plan:
    """Give rank 0's plan to all ranks.

    A collective: every rank of the group calls it.

    Args:
        plan: The plan; of the other ranks it is not looked at.
        group: The ranks; by default those of the default group.

    Raises:
        RanksError: A rank has received something else.
        TypeError: Rank 0 has no plan; raised on every rank.
    """

    def own() -> Plan:
        if plan is None:
            raise TypeError("rank 0 has no plan to share")
        return plan

    agreement = _agreement(group)
    return own() if agreement is None else _solved(agreement, own)


def _agreement(group: ProcessGroup | None) -> Agreement | None:
    """The ranks; None where this process is alone."""
    from torch import distributed as dist

    if group is None and not (dist.is_available() and dist.is_initialized()):
        return None
    from wrappers.state.faults import Agreement, collective_group

    return Agreement(collective_group(group, is_private=False))


def _solved(agreement: Agreement, solve: Callable[[], Plan]) -> Plan:
    """Make a plan on rank 0 and have every rank read it."""
    plans: list[Plan] = []

    def read() -> str:
        plans.append(Plan.from_json(text))
        return plans[0].hash

    with _named(agreement, "plan"):
        text = agreement.coordinate("plan", lambda: solve().to_json())
    with _named(agreement, "read the plan"):
        hashes = agreement.gather("read the plan", read)
    others = [rank for rank, each in enumerate(hashes) if each != hashes[0]]
    if others:
        raise RanksError(
            f"the plan of ranks {_numbers(others)} is not that of rank 0 (SHA-256 {hashes[0]}): "
            "all ranks must run the same version of this package"
        )
    return plans[0]


@contextlib.contextmanager
def _named(agreement: Agreement, step: str) -> Iterator[None]:
    """Turn the failure of a step into an error of planning; rank 0's own is raised as it is."""
    from wrappers.state.faults import CheckpointException

    try:
        yield
        return
    except CheckpointException as error:
        failures = {rank: wrapped[0] for rank, wrapped in error.failures.items()}
    if step == "plan" and isinstance(failures[0], Exception):
        raise failures[0]
    texts = [f"rank {rank}: {type(e).__name__}: {e}" for rank, e in sorted(failures.items())]
    raise RanksError(
        f"{len(failures)} of {agreement.size} ranks failed at the step `{step}`, so no rank has a "
        "plan\n  " + "\n  ".join(texts),
        failures=failures,
    ) from failures.get(agreement.rank)


def _profile_of(text: str) -> Profile:
    return schema.read(Profile, schema.load(text))


# --- Merge ----------------------------------------------------------------------------------


def merge(profiles: Sequence[Profile]) -> Profile:
    """The profile of a rank that is as large and as slow as any of them.

    Bytes and times are the larger ones, rates the smaller ones. Menus are those of the first
    profile: regions of one structure have the same bytes on every rank, and an option's time is
    the longest of those ranks that have the option.

    Raises:
        RanksError: The profiles are not of the same model.
    """
    first = profiles[0]
    if len(profiles) == 1:
        return first
    _refuse_other_models(profiles)
    return dataclasses.replace(
        first,
        regions=tuple(
            _largest_region(each) for each in zip(*(p.regions for p in profiles), strict=True)
        ),
        structures={
            key: _slowest([p.structures[key] for p in profiles]) for key in first.structures
        },
        moments=tuple(
            _largest_moment(each) for each in zip(*(p.moments for p in profiles), strict=True)
        ),
        persistent=Persistent(**_largest([p.persistent for p in profiles])),
        step_us=max(p.step_us for p in profiles),
        optimizer_us=max(p.optimizer_us for p in profiles),
        hardware=_weakest([p.hardware for p in profiles]),
        is_measured=all(p.is_measured for p in profiles),
        has_gradients=any(p.has_gradients for p in profiles),
        holdings=max((p.holdings for p in profiles), key=lambda h: sum(e.num_bytes for e in h)),
    )


def _largest(records: Sequence[Any]) -> dict[str, Any]:
    """The larger one of every field that is a number."""
    names = [field.name for field in dataclasses.fields(records[0])]
    values = {name: [getattr(record, name) for record in records] for name in names}
    numbers = {n: v for n, v in values.items() if all(type(x) in (int, float) for x in v)}
    return {name: max(each) for name, each in numbers.items()}


def _largest_region(regions: Sequence[RegionProfile]) -> RegionProfile:
    return dataclasses.replace(regions[0], **_largest(regions))


def _largest_moment(moments: Sequence[Moment]) -> Moment:
    return dataclasses.replace(moments[0], **_largest(moments))


def _slowest(structures: Sequence[Structure]) -> Structure:
    first = structures[0]
    rows = zip(*(s.operators for s in structures), strict=True)
    return dataclasses.replace(
        first,
        operators=tuple(map(_slowest_row, rows)),
        forward_us=max(s.forward_us for s in structures),
        backward_us=max(s.backward_us for s in structures),
        options=tuple(_slowest_option(option, structures) for option in first.options),
        is_exact=all(s.is_exact for s in structures),
    )


def _slowest_row(rows: Sequence[OperatorRow]) -> OperatorRow:
    return dataclasses.replace(rows[0], time_us=max(row.time_us for row in rows))


def _slowest_option(option: Option, structures: Sequence[Structure]) -> Option:
    key = _key_of(option)
    same = [o for s in structures for o in s.options if _key_of(o) == key]
    return dataclasses.replace(option, **_largest(same))


def _key_of(option: Option) -> Any:
    if option.decisions is None:
        return None
    return frozenset((d.operator, d.ordinal, d.action) for d in option.decisions)


def _weakest(devices: Sequence[Hardware]) -> Hardware:
    """A device that is as slow as any of them."""
    first = devices[0]
    if all(each == first for each in devices):
        return first
    rates = {
        name: min(getattr(each, name) for each in devices)
        for name in ("memory_bytes_per_s", "h2d_bytes_per_s", "d2h_bytes_per_s", "memory_bytes")
    }
    times = {
        name: max(getattr(each, name) for each in devices)
        for name in ("launch_us", "region_us", "record_us", "replay_us")
    }
    kinds = set(first.matmul_flops).intersection(*(each.matmul_flops for each in devices))
    return dataclasses.replace(
        first,
        name=", ".join(dict.fromkeys(each.name for each in devices)),
        matmul_flops={k: min(each.matmul_flops[k] for each in devices) for k in sorted(kinds)},
        is_calibrated=all(each.is_calibrated for each in devices),
        **rates,
        **times,
    )


# --- The same model? ------------------------------------------------------------------------


def _refuse_other_models(profiles: Sequence[Profile]) -> None:
    first = profiles[0]
    found = {rank: _differences(first, other) for rank, other in enumerate(profiles)}
    different = {rank: tuple(each) for rank, each in found.items() if each}
    if not different:
        return
    texts = [f"rank {rank}: {_listed(each)}" for rank, each in different.items()]
    names = [name.partition(":")[0] for each in different.values() for name in each]
    raise RanksError(
        f"ranks {_numbers(list(different))} have another model than rank 0, so no rank has a plan. "
        "Build the same model on all ranks of the group; pipeline stages plan in a group each\n  "
        + "\n  ".join(texts),
        fqn=names[0],
        differences=different,
    )


def _differences(first: Profile, other: Profile) -> list[str]:
    """How another rank's model differs, region by region."""
    here, there = ({r.fqn: r for r in p.regions} for p in (first, other))
    found = [f"{fqn}: missing" for fqn in here if fqn not in there]
    found += [f"{fqn}: unknown to rank 0" for fqn in there if fqn not in here]
    for fqn in [fqn for fqn in here if fqn in there]:
        text = _other_structure(first.structures[here[fqn].structure], other, there[fqn])
        found += [f"{fqn}: {text}"] if text else []
    if not found and list(here) != list(there):
        fqn = next(b for a, b in zip(here, there, strict=True) if a != b)
        found = [f"{fqn}: called in another order"]
    mine, others = ([(m.label, m.num_alive) for m in p.moments] for p in (first, other))
    if not found and mine != others:
        found = ["outside of regions: other moments between them"]
    return found


def _other_structure(expected: Structure, other: Profile, region: RegionProfile) -> str:
    structure = other.structures[region.structure]
    if structure.class_name != expected.class_name:
        return f"a {structure.class_name} instead of a {expected.class_name}"
    calls, expected_calls = (
        [(row.operator, row.ordinal) for row in each.operators] for each in (structure, expected)
    )
    if structure.key != expected.key or calls != expected_calls:
        return "other operators, shapes or data types"
    return ""


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - _MAX_NAMES
    shown = "; ".join(texts[:_MAX_NAMES])
    return f"{shown}; and {more} more" if more > 0 else shown


def _numbers(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
