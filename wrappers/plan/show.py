"""Profiles, plans and comparisons as tables: what a region costs, and what holds the memory.

A report is a list of tables, and a table is text: ``print`` needs nothing else. Where rich is
installed, its ``print`` shows the same with lines and colours, as :class:`Report` knows rich's
protocol; it never imports rich on its own.

:func:`why` answers "why did memory not drop": what is alive at the peak, who holds it, and in
which part of the step the peak lies. Storages come from the profile; those of a plan's peak are
what its decisions keep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from wrappers.plan import records
from wrappers.plan.chain import plain_choice
from wrappers.plan.parts import Measured, Peak, PlanData, RegionPlan
from wrappers.plan.records import (
    Action,
    Holding,
    OperatorRow,
    Persistent,
    Profile,
    Structure,
)
from wrappers.plan.spans import plain_peak_of, spans_of

__all__ = [
    "Report",
    "Table",
    "comparison_report",
    "duration",
    "plan_report",
    "report",
    "size",
    "why",
]

#: Rows of a list of storages; the rest is one line.
_MAX_ROWS = 40


@dataclass(frozen=True)
class Table:
    """Cells under titles.

    Attributes:
        title: The line above.
        columns: Titles; those that end in ``>`` stand to the right.
        rows: Cells, as many in each row as there are columns.
        notes: Lines below.
    """

    title: str
    columns: tuple[str, ...] = ()
    rows: Sequence[tuple[str, ...]] = ()
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        titles = tuple(name.rstrip(">") for name in self.columns)
        lines = [*([titles] if any(titles) else []), *self.rows] if self.rows else []
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        text = [self.title]
        for line in lines:
            cells = [
                cell.rjust(width) if name.endswith(">") else cell.ljust(width)
                for cell, width, name in zip(line, widths, self.columns, strict=True)
            ]
            text.append(("  " + "  ".join(cells)).rstrip())
        return "\n".join([*text, *(f"  {note}" for note in self.notes)])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        has_titles = any(name.rstrip(">") for name in self.columns)
        table = RichTable(title=Text(self.title), title_justify="left", show_header=has_titles)
        for name in self.columns:
            table.add_column(name.rstrip(">"), justify="right" if name[-1:] == ">" else "left")
        for row in self.rows:
            table.add_row(*map(Text, row))
        notes = map(Text, self.notes)
        return Group(*([table] if self.rows else [Text(self.title)]), *notes)


@dataclass(frozen=True)
class Report:
    """Tables, one below the other; ``print`` shows them."""

    tables: tuple[Table, ...]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables))

    def __rich__(self) -> Any:
        from rich.console import Group

        return Group(*(table.__rich__() for table in self.tables))


def size(num_bytes: int) -> str:
    """Bytes for people: ``512 B``, ``12.0 KiB``, ``1.5 GiB``."""
    if abs(num_bytes) < 1024:
        return f"{num_bytes} B"
    value = num_bytes / 1024
    for unit in ("KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def duration(time_us: float) -> str:
    """A time for people: ``12.5 us``, ``3.2 ms``, ``1.4 s``."""
    for limit, unit in ((1e3, "us"), (1e6, "ms")):
        if abs(time_us) < limit:
            return f"{time_us * 1e3 / limit:.1f} {unit}"
    return f"{time_us / 1e6:.2f} s"


def names_of(fqns: Sequence[str]) -> str:
    """The names of neighbouring regions in short: ``blocks.0..blocks.11 x12``."""
    if len(fqns) == 1:
        return fqns[0]
    return f"{fqns[0]}..{fqns[-1]} x{len(fqns)}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


# --- A profile ------------------------------------------------------------------------------


def report(profile: Profile) -> Report:
    """A profile as tables: what stays, regions by structure, their operators, the plain peak."""
    structures = _by_structure(profile)
    tables = [_profile_table(profile), _structures_table(profile, structures)]
    tables += [_operators_table(profile.structures[key], fqns) for key, fqns in structures]
    return Report((*tables, *_plain_tables(profile)))


def _by_structure(profile: Profile) -> list[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for region in profile.regions:
        found.setdefault(region.structure, []).append(region.fqn)
    return list(found.items())


def _profile_table(profile: Profile) -> Table:
    how = "measured on" if profile.is_measured else "derived for"
    if not profile.is_measured and not profile.hardware.is_calibrated:
        how = "derived from a data sheet for"
    rows = [("step", duration(profile.step_us)), ("optimizer", duration(profile.optimizer_us))]
    title = f"{profile.model_class}, one step, times {how} {profile.hardware.name}"
    if profile.world_size > 1:
        title += f", one of {profile.world_size} ranks"
    return Table(title, ("", ">"), rows + _persistent_rows(profile.persistent))


def _persistent_rows(persistent: Persistent) -> list[tuple[str, str]]:
    named = (
        ("parameters and buffers", persistent.parameter_bytes),
        ("gradients", persistent.gradient_bytes),
        ("optimizer state", persistent.optimizer_bytes),
        ("gathered parameters", persistent.unsharded_bytes),
        ("sample", persistent.sample_bytes),
    )
    rows = [(name, size(num_bytes)) for name, num_bytes in named]
    if persistent.bucket_bytes:
        rows.append(("DDP's buckets", size(persistent.bucket_bytes)))
    return rows


def _structures_table(profile: Profile, structures: list[tuple[str, list[str]]]) -> Table:
    columns = (
        "regions",
        "class",
        "forward>",
        "backward>",
        "plain>",
        "options>",
        "least>",
        "remark",
    )
    rows = []
    for key, fqns in structures:
        structure = profile.structures[key]
        kept = [option.kept_bytes for option in structure.options]
        remark = structure.reason or ("" if structure.is_exact else "the menu is not complete")
        rows.append(
            (
                names_of(fqns),
                structure.class_name,
                duration(structure.forward_us),
                duration(structure.backward_us),
                size(_plain_bytes(structure)),
                str(len(kept)),
                size(min(kept, default=0)),
                remark,
            )
        )
    notes = ["plain, least: what one region keeps for backward, left alone and at the least"]
    return Table(f"{len(profile.regions)} regions", columns, rows, notes)


def _plain_bytes(structure: Structure) -> int:
    plain = [option.kept_bytes for option in structure.options if option.decisions is None]
    return plain[0] if plain else 0


def _operators_table(structure: Structure, fqns: list[str]) -> Table:
    title = f"{names_of(fqns)} ({structure.class_name}): operators that make memory"
    columns = ("operator", "#>", "module", "time>", "output>", "saved>", "flags")
    rows = [
        (
            row.operator,
            str(row.ordinal),
            row.module,
            duration(row.time_us),
            size(row.output_bytes),
            size(row.saved_bytes) if row.saved_bytes else "-",
            _flags(row),
        )
        for row in structure.operators
    ]
    others = structure.num_operators - len(rows)
    notes = [f"and {others} operators that make none, such as views"] if others > 0 else []
    return Table(title, columns, rows, notes)


def _flags(row: OperatorRow) -> str:
    flags = (("random", row.is_random), ("never recomputed", row.is_asked_once))
    return ", ".join(name for name, is_set in flags if is_set)


# --- What is alive at the peak --------------------------------------------------------------


def why(profile: Profile, plan: PlanData | None = None) -> Report:
    """Why memory is what it is: where the peak lies, and every storage that is alive in it.

    Args:
        profile: The step.
        plan: Look at the planned step instead of the plain one.
    """
    if plan is None:
        return Report(_plain_tables(profile))
    table = _peaks_table(plan)
    holdings = planned_holdings(profile, plan)
    return Report((table, _holdings_table("alive at the peak of the planned step", holdings)))


def _plain_tables(profile: Profile) -> tuple[Table, ...]:
    peak = plain_peak_of(profile, spans_of(profile, plain_choice(profile)))
    holdings = _holdings_table("alive at the peak of the plain step", profile.holdings)
    return _peak_table(peak), holdings


def planned_holdings(profile: Profile, plan: PlanData) -> tuple[Holding, ...]:
    """What is alive at a plan's peak, largest first; the sizes add up to the peak."""
    peak = plan.peak
    found = [Holding("", "parameters, gradients, inputs, ...", peak.base_bytes, "model")]
    for region in plan.regions[: peak.num_alive]:
        found += _kept_by(profile.structures[region.structure], region)
    fqn, what = "", "copies to and from the host"
    if peak.phase.is_in_region:
        fqn, what = plan.regions[peak.num_alive].fqn, f"({peak.label})"
    found.append(Holding(fqn, what, peak.running_bytes, "region"))
    return tuple(sorted((h for h in found if h.num_bytes), key=lambda h: -h.num_bytes))


def _kept_by(structure: Structure, region: RegionPlan) -> list[Holding]:
    """The storages that a region keeps; what no operator of it has made is its input."""
    is_alone = region.decisions is None
    saved = {(d.operator, d.ordinal) for d in region.decisions or () if d.action is Action.SAVE}
    found = []
    rest = region.kept_bytes
    for row in structure.operators:
        kept = row.saved_bytes if is_alone else row.output_bytes
        if not is_alone and (row.operator, row.ordinal) not in saved:
            continue
        kept = min(kept, rest)
        rest -= kept
        name = f"{row.operator} #{row.ordinal}"
        found.append(Holding(region.fqn, name, kept, "autograd" if is_alone else "region"))
    found.append(Holding(region.fqn, "input and others", rest, "region"))
    return found


def _holdings_table(title: str, holdings: Sequence[Holding]) -> Table:
    total = sum(holding.num_bytes for holding in holdings)
    columns = ("region", "operator", "bytes>", "share>", "held by")
    rows = []
    for holding, fqns in _grouped(holdings)[:_MAX_ROWS]:
        num_bytes = holding.num_bytes * len(fqns)
        region = names_of(fqns) if fqns[0] else "(outside)"
        row = (region, holding.operator, size(num_bytes), _percent(num_bytes, total))
        rows.append((*row, holding.holder))
    more = len(_grouped(holdings)) - _MAX_ROWS
    notes = [f"and {more} smaller ones"] if more > 0 else []
    by_holder: Counter[str] = Counter()
    for holding in holdings:
        by_holder[holding.holder] += holding.num_bytes
    shares = ", ".join(f"{name} {size(n)}" for name, n in by_holder.most_common())
    notes.append(f"{size(total)} altogether: {shares}" if holdings else "nothing is known of it")
    return Table(title, columns, rows, notes)


def _grouped(holdings: Sequence[Holding]) -> list[tuple[Holding, list[str]]]:
    """Equal storages of several regions as one, largest together first."""
    found: dict[tuple[str, int, str, bool], list[Holding]] = {}
    for holding in holdings:
        key = (holding.operator, holding.num_bytes, holding.holder, bool(holding.fqn))
        found.setdefault(key, []).append(holding)
    groups = [(group[0], [holding.fqn for holding in group]) for group in found.values()]
    return sorted(groups, key=lambda each: -each[0].num_bytes * len(each[1]))


# --- A plan ---------------------------------------------------------------------------------


def plan_report(plan: PlanData) -> Report:
    """A plan as tables: what it comes to, what it consists of, what is done with each region."""
    tables = [_summary_table(plan), _peaks_table(plan), _regions_table(plan)]
    if plan.hand_made:
        tables.append(_hand_made_table(plan))
    return Report(tuple(tables))


def _summary_table(plan: PlanData) -> Table:
    title = (
        f"plan for {plan.model_class}: {plan.num_wrapped} of {len(plan.regions)} regions wrapped"
    )
    counted = plan.peak_bytes - plan.uncounted_bytes
    counts = "everything on the device" if plan.counts == "all" else "activations"
    margin = f", {size(plan.margin_bytes)} of it margin" if plan.margin_bytes else ""
    share = _percent(counted, plan.budget_bytes)
    gap = f"at most {100 * plan.gap_us / plan.step_us:.2g}% above " if plan.gap_us else ""
    rows = [
        ("budget", size(plan.budget_bytes), f"counts {counts}{margin}"),
        ("predicted peak", size(counted), f"{share} of the budget, in: {plan.peak.label}"),
        ("plain peak", size(plan.plain_peak.num_bytes - plan.uncounted_bytes), ""),
        ("smallest budget", size(plan.smallest_bytes), ""),
        (
            "predicted step",
            duration(plan.step_us),
            f"{plan.ratio:.3f} of the plain step; {gap}the fastest within the budget",
        ),
        ("  plain step", duration(plan.plain_step_us), _times_from(plan)),
        ("  recompute", duration(plan.recompute_us), ""),
        ("  waits for copies", duration(plan.wait_us), ""),
    ]
    return Table(title, ("", ">", ""), rows)


def _times_from(plan: PlanData) -> str:
    if plan.is_measured:
        return f"measured on {plan.device}"
    source = "calibrated" if plan.is_calibrated else "from a data sheet"
    return f"derived for {plan.device}, {source}"


_PARTS_OF_A_PEAK = {
    "outside of regions": "base_bytes",
    "kept by regions": "kept_bytes",
    "the region that runs": "running_bytes",
    "altogether": "num_bytes",
}


def _peak_table(peak: Peak) -> Table:
    """The plain peak alone."""
    rows = [(name, size(getattr(peak, part))) for name, part in _PARTS_OF_A_PEAK.items()]
    notes = [f"the peak lies {peak.phase.text} ({peak.label})", *_advice_about(peak)]
    return Table("memory at the peak of the plain step", ("", ">"), rows, notes)


def _peaks_table(plan: PlanData) -> Table:
    peaks = {"plain": plan.plain_peak, "planned": plan.peak}
    rows = [
        (name, *(size(getattr(peak, part)) for peak in peaks.values()))
        for name, part in _PARTS_OF_A_PEAK.items()
    ]
    notes = [f"the {n} peak lies {p.phase.text} ({p.label})" for n, p in peaks.items()]
    notes += _advice_about(plan.peak)
    persistent = ", ".join(f"{name} {text}" for name, text in _persistent_rows(plan.persistent))
    notes.append(f"between steps: {persistent}")
    return Table("memory at the peak", ("at the peak", "plain>", "planned>"), rows, notes)


def _advice_about(peak: Peak) -> list[str]:
    """What could lower a peak, where regions cannot."""
    if 2 * peak.base_bytes <= peak.num_bytes:
        return []
    return [
        "more than half of it lies outside of regions, where no plan can help: shard or offload "
        "parameters and optimizer state, or choose more modules as regions"
    ]


def _regions_table(plan: PlanData) -> Table:
    columns = ("regions", "class", "what", "plain>", "kept>", "offloaded>", "extra>", "saved")
    rows = []
    for _, group in groupby(plan.regions, key=_treatment):
        regions = list(group)
        first = regions[0]
        rows.append(
            (
                names_of([region.fqn for region in regions]),
                first.class_name,
                "planned" if first.is_wrapped else "left alone",
                size(first.plain_bytes),
                size(first.kept_bytes),
                size(first.offload_bytes) if first.offload_bytes else "-",
                duration(first.extra_us),
                _decisions(first),
            )
        )
    notes = ["plain, kept, offloaded, extra: of one region"] if rows else []
    return Table("regions", columns, rows, notes)


def _treatment(region: RegionPlan) -> Any:
    decisions = region.decisions and [(d.operator, d.ordinal, d.action) for d in region.decisions]
    return region.structure, decisions, region.kept_bytes, region.extra_us


def _decisions(region: RegionPlan) -> str:
    """Which outputs are kept: ``mm 0 2, gelu 0; offloaded: mm 1``; the input alone is a dash."""
    if region.decisions is None:
        return "everything"
    texts = []
    for action, prefix in ((Action.SAVE, ""), (Action.OFFLOAD, "offloaded: ")):
        numbers: dict[str, list[int]] = {}
        for decision in sorted(region.decisions):
            if decision.action is action:
                numbers.setdefault(_short(decision.operator), []).append(decision.ordinal)
        named = ", ".join(f"{name} {' '.join(map(str, n))}" for name, n in numbers.items())
        texts += [prefix + named] if named else []
    return "; ".join(texts) or "-"


def _short(operator: str) -> str:
    return operator.removeprefix("aten.").removesuffix(".default")


def _hand_made_table(plan: PlanData) -> Table:
    columns = ("policy", "peak>", "step>", "of the plain step>", "within the budget")
    points = [("this plan", plan.peak_bytes, plan.step_us)]
    points += [(point.name, point.peak_bytes, point.step_us) for point in plan.hand_made]
    rows = [
        (
            name,
            size(peak - plan.uncounted_bytes),
            duration(step_us),
            f"{step_us / plan.plain_step_us:.3f}" if plan.plain_step_us else "-",
            "yes" if peak - plan.uncounted_bytes <= plan.budget_bytes else "no",
        )
        for name, peak, step_us in points
    ]
    return Table("beside policies made by hand", columns, rows)


# --- A comparison ---------------------------------------------------------------------------


def comparison_report(plan: PlanData, measured: Measured, advice: Iterable[str]) -> Report:
    """A plan's predictions beside a measured step."""
    rows = [
        _compared("peak", plan.peak_bytes, measured.peak_bytes, size),
        _compared("step", plan.step_us, measured.step_us, duration),
    ]
    if measured.plain_step_us:
        rows.append(_compared("plain step", plan.plain_step_us, measured.plain_step_us, duration))
        ratio = measured.step_us / measured.plain_step_us
        rows.append(_compared("of the plain step", plan.ratio, ratio, "{:.3f}".format))
    notes = list(advice) or ["the plan holds"]
    columns = ("", "predicted>", "measured>", "error>")
    return Report((Table("predicted and measured", columns, rows, notes),))


def _compared(name: str, expected: Any, got: Any, text: Any) -> tuple[str, ...]:
    error = f"{100 * (got / expected - 1):+.2f}%" if expected else "-"
    return name, text(expected), text(got), error


records.connect_report(report)
