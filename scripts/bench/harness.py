"""Shared by the benchmarks: interleaved timing in one process, and JSON lines.

Cases are timed in turns, a short batch each, so that what the machine does meanwhile hits all
of them alike; the result is each case's median over the rounds. The clock is the thread's CPU
time where everything runs on the host (a busy machine then matters less), else wall time.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Case = Callable[[], object]


def interleave(cases: Mapping[str, Case], *, rounds: int, batch: int) -> dict[str, float]:
    """Time cases in turns.

    Args:
        cases: What to time, by name. Must be synchronous.
        rounds: How often each case gets its turn.
        batch: How often a case runs in one turn.

    Returns:
        Median microseconds of one run of each case.
    """
    for case in cases.values():
        for _ in range(batch):
            case()
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            gc.collect(0)
            start = time.thread_time_ns()
            for _ in range(batch):
                case()
            samples[name].append((time.thread_time_ns() - start) / batch / 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def environment(device: str) -> dict[str, Any]:
    """Where a figure comes from: device, versions, threads."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = _cpu_name() or platform.processor() or platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has; its module docstring is the help text."""
    options = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", type=Path, help="append the results to this file of JSON lines")
    return options


def report(rows: list[dict[str, Any]], path: Path | None, device: str = "cpu") -> None:
    """Print rows of results, one JSON object a line, and append them to a file."""
    where = environment(device)
    lines = [json.dumps({**row, **where}) for row in rows]
    sys.stdout.write("\n".join(lines) + "\n")
    if path is not None:
        with path.open("a") as file:
            file.write("\n".join(lines) + "\n")
