"""The tables of `docs/plan.md` from the committed results of the benchmarks that they name.

    python -m scripts.bench.plan_tables

prints them, each under its name; a test holds the page to them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results") / "cpu.jsonl"

MIB = 1 << 20

Row = Mapping[str, Any]


def _newest(benchmark: str, *case: str) -> list[Row]:
    """The newest row of each case of a benchmark, in the order of the cases."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["benchmark"] == benchmark:
            found[tuple(row[field] for field in case)] = row
    return list(found.values())


def _table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.1f}"


def budget_table() -> str:
    """Plans of one process, beside the best policy by hand."""
    titles = ("profile", "budget MiB", "peak", "predicted", "x plain step", "predicted")
    return _table(
        (*titles, "best by hand", "of its time"),
        (
            (
                row["profile"],
                _mib(row["budget_bytes"]),
                _mib(row["peak_bytes"]),
                _mib(row["predicted_peak_bytes"]),
                f"{row['time_ratio']:.3f}",
                f"{row['predicted_time_ratio']:.3f}",
                f"`{row['best']}` ({row['best_time_ratio']:.3f})",
                f"{row['to_best']:.3f}",
            )
            for row in _newest("budget", "profile", "share")
        ),
    )


def sharded_table() -> str:
    """Plans of two ranks under FSDP2."""
    return _table(
        ("budget MiB", "peak", "predicted", "x plain step", "predicted"),
        (
            (
                _mib(row["budget_bytes"]),
                _mib(max(row["peak_bytes"])),
                _mib(row["predicted_peak_bytes"]),
                f"{row['time_ratio']:.3f}",
                f"{row['predicted_time_ratio']:.3f}",
            )
            for row in _newest("budget_sharded", "share")
        ),
    )


def torch_planner_table() -> str:
    """Torch's planner, and ours within the peak that its plan has."""
    return _table(
        ("peak MiB", "ours", "x plain step", "ours", "ours / torch's"),
        (
            (
                _mib(row["peak_bytes"]),
                _mib(row["ours_peak_bytes"]),
                f"{row['time_ratio']:.3f}",
                f"{row['ours_time_ratio']:.3f}",
                f"{row['to_torch_planner']:.3f}",
            )
            for row in _newest("torch_planner", "fraction")
        ),
    )


def compile_table() -> str:
    """torch.compile's budget."""
    return _table(
        ("compiled", "budget", "peak MiB", "x plain peak", "x plain step", "compiling, s"),
        (
            (
                row["scope"],
                str(row["budget"]),
                _mib(row["peak_bytes"]),
                f"{row['peak_ratio']:.2f}",
                f"{row['time_ratio']:.2f}",
                f"{row['compile_s']:.0f}",
            )
            for row in _newest("compile_budget", "scope", "budget")
        ),
    )


TABLES = {
    "budget": budget_table,
    "sharded": sharded_table,
    "torch_planner": torch_planner_table,
    "compile": compile_table,
}


def main() -> None:
    for name, make in TABLES.items():
        print(f"{name}\n\n{make()}\n")


if __name__ == "__main__":
    main()
