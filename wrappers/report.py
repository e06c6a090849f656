"""What the regions of a model have come to: one row a region, as objects and as a table.

The figures are those of each region's latest forward and backward. Bytes are measured in the first
call of a region alone, as looking at every tensor costs time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from wrappers.engine.region import Region
from wrappers.modules.base import in_place_layers, require_module, wrapper_layers
from wrappers.policy import CheckpointImpl
from wrappers.select import plain_modules

__all__ = ["RegionReport", "RegionRow", "region_report"]


@dataclass(frozen=True)
class RegionRow:
    """One region. Counts and bytes are None where the implementation records no operators.

    Attributes:
        fqn: Name of the region, as in the unwrapped model.
        impl: How it is recomputed now: REPLAY that has fallen back is NO_REENTRANT.
        num_operators: Operators recorded in the latest forward, views included.
        num_kept: Those of them whose output was kept for backward.
        num_replayed: Operators that the latest forward's backwards have executed so far.
        num_dropped: Operators that nothing in backward depends on.
        num_offloaded: Outputs that were moved to the host.
        kept_bytes: Bytes of what the policy has kept, in the region's first call.
        released_bytes: Bytes that would have been kept too without checkpointing, in the
            region's first call; the region's inputs and parameters do not count.
        reason: Why a region with REPLAY has fallen back to a rerun; else empty.
        note: Why its replay could not be compared with a rerun; else empty.
        plan: What its plan keeps, or how it has differed from it; empty without a plan.
    """

    fqn: str
    impl: CheckpointImpl
    num_operators: int | None = None
    num_kept: int | None = None
    num_replayed: int | None = None
    num_dropped: int | None = None
    num_offloaded: int | None = None
    kept_bytes: int | None = None
    released_bytes: int | None = None
    reason: str = ""
    note: str = ""
    plan: str = ""


_TITLES = ("region", "impl", "ops", "kept", "replayed", "dropped", "kept", "released")


@dataclass(frozen=True)
class RegionReport:
    """The regions of a model; ``print`` shows a table, as does rich's.

    Attributes:
        rows: One for each region, in the order of ``named_modules``.
    """

    rows: tuple[RegionRow, ...] = ()

    def __getitem__(self, fqn: str) -> RegionRow:
        """The row of a region.

        Raises:
            KeyError: There is no region of this name.
        """
        for row in self.rows:
            if row.fqn == fqn:
                return row
        raise KeyError(fqn)

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(*_TITLES[:2], box=None)
        for title in _TITLES[2:]:
            table.add_column(title, justify="right")
        table.add_column("remark")
        for row in self.rows:
            table.add_row(*_cells(row), _remark(row))
        return table

    def __str__(self) -> str:
        lines = [list(_TITLES), *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_TITLES))]
        text = []
        for line, row in zip(lines, (None, *self.rows), strict=True):
            left = [cell.ljust(w) for cell, w in zip(line[:2], widths[:2], strict=True)]
            right = [cell.rjust(w) for cell, w in zip(line[2:], widths[2:], strict=True)]
            remark = "" if row is None else _remark(row)
            text.append("  ".join([*left, *right, remark]).rstrip())
        return "\n".join(text)


def _remark(row: RegionRow) -> str:
    return "; ".join(filter(None, (row.reason or row.note, row.plan)))


def _cells(row: RegionRow) -> list[str]:
    counts = (row.num_operators, row.num_kept, row.num_replayed, row.num_dropped)
    return [
        row.fqn or "(unnamed)",
        row.impl.name,
        *("-" if count is None else str(count) for count in counts),
        _size(row.kept_bytes),
        _size(row.released_bytes),
    ]


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "-"
    if num_bytes < 1024 * 1024:
        return f"{num_bytes / 1024:.1f} KiB"
    return f"{num_bytes / 1024 / 1024:.1f} MiB"


def region_report(model: nn.Module) -> RegionReport:
    """Tell what the checkpointed regions of a model have come to, after a step or more.

    Args:
        model: A model with regions, wrapped or in place.

    Returns:
        A row for each region. A region that has not run has no figures.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> apply_activation_checkpointing(model, check_fn=by_class(Block), policy=save_matmuls())
        >>> model(x).sum().backward()
        >>> print(region_report(model))
    """
    require_module(model)
    rows: dict[int, RegionRow] = {}
    modules = dict(plain_modules(model))
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        outer: Any = modules[parent]._modules[last] if name else model
        for face in (*wrapper_layers(outer), *in_place_layers(module)):
            region = getattr(face, "_checkpoint_region", None)
            has_own_function = getattr(face, "checkpoint_fn", None) is not None
            if isinstance(region, Region) and id(region) not in rows and not has_own_function:
                rows[id(region)] = _row(region, name)
    return RegionReport(tuple(rows.values()))


def _row(region: Region, name: str) -> RegionRow:
    experience = region.experience
    figures: dict[str, Any] = {}
    impl = region.impl
    if experience.fallen_at is not None:
        impl = CheckpointImpl.NO_REENTRANT
    elif experience.stats is not None:
        stats, measured = experience.stats, experience.measured
        figures = {
            "num_operators": stats.num_operators,
            "num_kept": stats.num_kept,
            "num_replayed": stats.num_replayed,
            "num_dropped": stats.num_dropped,
            "num_offloaded": stats.num_offloaded,
            "kept_bytes": measured and measured.kept_bytes,
            "released_bytes": measured and measured.released_bytes,
        }
    return RegionRow(
        region.fqn or name,
        impl,
        **figures,
        reason=experience.reason,
        note=experience.note,
        plan=_plan(region),
    )


def _plan(region: Region) -> str:
    """What a region's plan has come to."""
    if region.policy is None or not region.policy.expected_calls:
        return ""
    if region.experience.difference:
        return f"not as planned: {region.experience.difference}"
    return repr(region.policy)
