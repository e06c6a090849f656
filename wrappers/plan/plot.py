"""Pictures of a plan: the memory of every moment of one step, and peak against step time.

    memory   plain as a line, planned as an area: outside of regions, kept by regions (neighbours
             together where there are many), the region that runs; the budget, both peaks
    trade    what step time each peak allows, the plan's own point, policies made by hand

The times of moments between regions are shares of what the step takes outside of regions; see
:mod:`wrappers.plan.spans`. An HTML file holds the picture as SVG and the plan's tables, and needs
neither the network nor scripts. matplotlib is used without its global state.
"""

from __future__ import annotations

import html
import io
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from wrappers.plan.parts import PlanData, Span
from wrappers.plan.schema import replace_file
from wrappers.plan.show import Report, Table, names_of, plan_report, size

__all__ = ["SUFFIXES", "draw", "groups_of"]

SUFFIXES = (".html", ".png", ".svg")

#: More regions than that are drawn in so many groups of neighbours.
MAX_GROUPS = 12

_MIB = 1024 * 1024
_DPI = 120


def draw(plan: PlanData, path: str | os.PathLike[str]) -> None:
    """Draw a plan into a file; see :meth:`wrappers.plan.plan.Plan.plot`."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"a plan is drawn into a file that ends in {', '.join(SUFFIXES)}, got "
            f"{os.fspath(path)!r}"
        )
    if suffix == ".html":
        replace_file(path, _page(plan).encode())
    else:
        replace_file(path, _picture(plan, suffix[1:]))


def _picture(plan: PlanData, kind: str) -> bytes:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing a plan needs matplotlib: pip install 'activation-wrappers[plot]'"
        ) from error
    figure = Figure(figsize=(11, 9), layout="constrained")
    memory, trade = figure.subplots(2, 1, height_ratios=(3, 2))
    _draw_memory(memory, plan)
    _draw_trade(trade, plan)
    data = io.BytesIO()
    # The same plan gives the same file: no date, no random names.
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "plan"}):
        figure.savefig(data, format=kind, dpi=_DPI, metadata=metadata)
    return data.getvalue()


# --- Memory over one step -------------------------------------------------------------------


def groups_of(num_regions: int, max_groups: int = MAX_GROUPS) -> list[range]:
    """Neighbouring regions together, as evenly as possible."""
    num = min(num_regions, max_groups)
    edges = [num_regions * i // num for i in range(num + 1)] if num else [0]
    return [range(*pair) for pair in pairwise(edges)]


def layers_of(plan: PlanData) -> list[tuple[str, list[int]]]:
    """What the planned memory of every span consists of, from the bottom up.

    The layers of a span add up to its ``planned_bytes``.
    """
    base = [span.base_bytes for span in plan.spans]
    layers = [("outside of regions", base)]
    for group in groups_of(len(plan.regions)):
        kept = [_kept_in(plan, group, span) for span in plan.spans]
        layers.append((names_of([plan.regions[i].fqn for i in group]), kept))
    below = [sum(layer[i] for _, layer in layers) for i in range(len(plan.spans))]
    running = [s.planned_bytes - b for s, b in zip(plan.spans, below, strict=True)]
    return [*layers, ("the region that runs, and copies", running)]


def _kept_in(plan: PlanData, group: range, span: Span) -> int:
    return sum(plan.regions[i].kept_bytes for i in group if i < span.num_alive)


def _draw_memory(axes: Any, plan: PlanData) -> None:
    from matplotlib import colormaps

    layers = layers_of(plan)
    edges = _edges([s.start_us for s in plan.spans], [s.duration_us for s in plan.spans])
    colors = ["0.75", *colormaps["viridis"](_shades(len(layers) - 2)), "tab:orange"]
    below = [0.0] * (2 * len(plan.spans))
    for (name, layer), color in zip(layers, colors, strict=True):
        above = [b + v / _MIB for b, v in zip(below, _doubled(layer), strict=True)]
        axes.fill_between(edges, below, above, color=color, label=name, linewidth=0)
        below = above
    plain = _doubled([span.plain_bytes for span in plan.spans])
    plain_edges = _edges([s.plain_start_us for s in plan.spans], [s.plain_us for s in plan.spans])
    axes.plot(plain_edges, [v / _MIB for v in plain], color="black", label="plain step", lw=1.2)
    budget = (plan.budget_bytes + plan.uncounted_bytes) / _MIB
    axes.axhline(budget, color="tab:red", linestyle="--", label="budget")
    _mark(axes, plan, is_planned=True, color="tab:red")
    _mark(axes, plan, is_planned=False, color="black")
    axes.set_title(
        f"{plan.model_class} on {plan.device}: peak {size(plan.peak_bytes)} instead of "
        f"{size(plan.plain_peak.num_bytes)}, step {plan.ratio:.3f} of the plain one"
    )
    axes.set_xlabel("time in the step [ms]")
    axes.set_ylabel("memory [MiB]")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _mark(axes: Any, plan: PlanData, *, is_planned: bool, color: str) -> None:
    peak = plan.peak if is_planned else plan.plain_peak
    for span in plan.spans:
        value = span.planned_bytes if is_planned else span.plain_bytes
        if span.label == peak.label and value == peak.num_bytes:
            start, length = (
                (span.start_us, span.duration_us)
                if is_planned
                else (span.plain_start_us, span.plain_us)
            )
            where = ((start + length / 2) / 1e3, value / _MIB)
            axes.plot(*where, "v", color=color)
            axes.annotate(
                f"{size(value)}: {peak.label}",
                where,
                (0, 6),
                textcoords="offset points",
                fontsize=7,
                ha="center",
            )
            return


def _shades(num: int) -> list[float]:
    return [0.15 + 0.75 * i / max(1, num - 1) for i in range(num)]


def _edges(starts: Sequence[float], durations: Sequence[float]) -> list[float]:
    """Beginning and end of every span, in milliseconds."""
    pairs = zip(starts, durations, strict=True)
    return [each / 1e3 for start, length in pairs for each in (start, start + length)]


def _doubled(values: Sequence[int]) -> list[int]:
    return [value for value in values for _ in range(2)]


# --- Peak against step time -----------------------------------------------------------------


def _draw_trade(axes: Any, plan: PlanData) -> None:
    frontier = sorted((point.peak_bytes, point.step_us) for point in plan.frontier)
    if frontier:
        x = [peak / _MIB for peak, _ in frontier]
        y = [step_us / 1e3 for _, step_us in frontier]
        axes.step(x, y, where="post", marker=".", label="fastest within a budget")
    for point in plan.hand_made:
        where = (point.peak_bytes / _MIB, point.step_us / 1e3)
        axes.plot(*where, "x", color="0.4")
        axes.annotate(point.name, where, (4, 3), textcoords="offset points", fontsize=7)
    plain = (plan.plain_peak.num_bytes / _MIB, plan.plain_step_us / 1e3)
    axes.plot(*plain, "s", color="black", label="plain step")
    chosen = (plan.peak_bytes / _MIB, plan.step_us / 1e3)
    axes.plot(*chosen, "o", color="tab:red", label="this plan")
    budget = (plan.budget_bytes + plan.uncounted_bytes) / _MIB
    axes.axvline(budget, color="tab:red", linestyle="--", label="budget")
    axes.set_xlabel("peak memory [MiB]")
    axes.set_ylabel("step time [ms]")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


# --- A page ---------------------------------------------------------------------------------

_STYLE = """
body { font: 14px sans-serif; margin: 2em auto; max-width: 75em; color: #222 }
table { border-collapse: collapse; margin: .5em 0 }
td, th { padding: .15em .8em; border-bottom: 1px solid #ddd; text-align: left }
.right { text-align: right }
.note { color: #555; margin: .2em 0 }
svg { max-width: 100%; height: auto }
"""


def _page(plan: PlanData) -> str:
    picture = _picture(plan, "svg").decode()
    svg = picture[picture.index("<svg") :]  # what comes before is not allowed inside a page
    title = html.escape(f"Plan for {plan.model_class}")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{svg}\n{_tables(plan_report(plan))}\n"
        "</body>\n</html>\n"
    )


def _tables(report: Report) -> str:
    return "\n".join(map(_table, report.tables))


def _table(table: Table) -> str:
    kinds = [' class="right"' if name.endswith(">") else "" for name in table.columns]
    lines = [f"<h3>{html.escape(table.title)}</h3>", "<table>"]
    titles = [name.rstrip(">") for name in table.columns]
    if any(titles):
        lines.append(_row("th", kinds, titles))
    lines += [_row("td", kinds, row) for row in table.rows]
    notes = [f'<p class="note">{html.escape(note)}</p>' for note in table.notes]
    return "\n".join([*lines, "</table>", *notes])


def _row(tag: str, kinds: Sequence[str], cells: Sequence[str]) -> str:
    pairs = zip(kinds, cells, strict=True)
    return "<tr>" + "".join(f"<{tag}{k}>{html.escape(c)}</{tag}>" for k, c in pairs) + "</tr>"
