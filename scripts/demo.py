"""What wrapping the blocks of a model buys and what it costs: six trainings, alike in all else.

Runs the main job once as it is, once with each implementation of activation checkpointing, once
with activations that wait in a file, and once with a plan for a memory budget, which is half-way
between the peaks of `none` and NO_REENTRANT. Each trains in two FSDP processes (in one where the
machine has a single GPU). Prints a table and draws one step's memory for all of them. The losses
must agree to the last digit: a wrapper that changes a result is a bug, and the demonstration then
fails.

Arguments go to `scripts/train.py`, for example `--layers 4 --steps 20`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from scripts.train import Result

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out"
MIB = 2**20
# With train.py's own sizes, about two and a half minutes for all modes on two cores.
OPTIONS = ["--steps", "6"]

# Title of each mode and the options that select it.
MODES = {
    "none": ["--impl", "none"],
    "REENTRANT": ["--impl", "reentrant"],
    "NO_REENTRANT": ["--impl", "no_reentrant"],
    "in place": ["--impl", "no_reentrant", "--inplace"],
    "disk": ["--impl", "offload_disk"],
}
PLANNED = ["--impl", "planned", "--budget"]


def run_training(
    mode: str, mode_options: Sequence[str], options: Sequence[str], num_processes: int
) -> Result:
    """Train in one mode, its output going to the terminal.

    Raises:
        SystemExit: if the training fails; its output then stands above the message.
    """
    print(f"\n{mode}", flush=True)
    path = OUT / f"{mode.replace(' ', '_').replace(',', '').lower()}.json"
    # A free port on the loopback address: works without a network and without a host name.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(num_processes)]
    command += ["-m", "scripts.train", *options, *mode_options]
    command += ["--memory-trace", "--json", str(path)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if status != 0:
        raise SystemExit(f"demo: the training with {mode} failed (status {status}), see above")
    return Result(**json.loads(path.read_text()))


def budget_between(most: Result, least: Result) -> str:
    """The memory half-way between two trainings, in whole MiB."""
    return f"{round((most.peak_activation_bytes + least.peak_activation_bytes) / 2 / MIB)} MiB"


def make_table(results: dict[str, Result]) -> Table:
    """Compare the modes, one row each."""
    plain = results["none"]
    table = Table(
        title=f"Activations: {plain.world_size} processes, {plain.device}, torch {plain.torch}",
        caption="in place: NO_REENTRANT without wrapper modules; disk: activations wait in a file; "
        "planned: as fast as the budget allows",
    )
    table.add_column("mode", no_wrap=True)
    table.add_column("last loss", justify="right", no_wrap=True)
    table.add_column("peak MiB", justify="right", no_wrap=True)
    table.add_column("step ms", justify="right")
    table.add_column("extra GFLOPs", justify="right")
    for mode, result in results.items():
        share = result.peak_activation_bytes / plain.peak_activation_bytes
        table.add_row(
            mode,
            repr(result.loss),
            f"{result.peak_activation_bytes / MIB:.1f} ({share:.0%})",
            f"{result.step_ms:.0f}",
            f"{(result.flops - plain.flops) / 1e9:.2f}",
        )
    return table


def draw_memory(results: dict[str, Result], path: Path) -> None:
    """Draw the memory of one step on rank 0, a panel for each mode over the shadow of `none`."""
    mpl.use("agg")
    figure, panels = plt.subplots(
        3, 2, figsize=(11, 9.5), sharex=True, sharey=True, layout="constrained"
    )
    plain = _curve(results["none"])
    for axes, (mode, result) in zip(panels.flat, results.items(), strict=True):
        peak_mib = result.peak_activation_bytes / MIB
        if mode != "none":
            axes.fill_between(*plain, step="post", color="#e4e4e4", label="none, to compare")
            axes.legend(frameon=False, loc="upper right")
        axes.fill_between(*_curve(result), step="post", color="#56b4e9", alpha=0.5)
        axes.step(*_curve(result), where="post", color="#1b5e8a", linewidth=1)
        axes.axhline(peak_mib, color="#d55e00", linewidth=1, linestyle="--")
        axes.annotate(
            f"peak {peak_mib:.0f} MiB",
            (1, peak_mib),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            color="#d55e00",
        )
        axes.set_title(mode, loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0)
    axes.set_ylim(0, 1.15 * max(result.peak_activation_bytes for result in results.values()) / MIB)
    figure.suptitle("Memory over one training step of a GPT under FSDP, rank 0")
    figure.supxlabel("ms since the start of the step")
    figure.supylabel("MiB beyond those at the start")
    figure.savefig(path, dpi=150)


def _curve(result: Result) -> tuple[list[float], list[float]]:
    # The profiler slows the step that it watches; show it at the pace of the others.
    ms_per_us = result.step_ms / result.timeline_us[-1]
    times_ms = [us * ms_per_us for us in result.timeline_us]
    return times_ms, [alive / MIB for alive in result.timeline_bytes]


def main() -> None:
    """Train in each mode, compare, draw; a loss that differs ends in a failure."""
    OUT.mkdir(exist_ok=True)
    num_processes = min(2, torch.cuda.device_count() or 2)
    results = {}
    options = [*OPTIONS, *sys.argv[1:]]
    for mode, mode_options in MODES.items():
        results[mode] = run_training(mode, mode_options, options, num_processes)
    budget = budget_between(results["none"], results["NO_REENTRANT"])
    mode = f"planned, budget {budget}"
    results[mode] = run_training(mode, [*PLANNED, budget], options, num_processes)
    picture = OUT / "memory.png"
    draw_memory(results, picture)
    print()
    Console().print(make_table(results))
    print(f"Memory over one step: {picture}")
    losses = {mode: result.loss for mode, result in results.items()}
    if len(set(losses.values())) > 1:
        raise SystemExit(f"demo: the losses must agree to the last digit, but are {losses}")


if __name__ == "__main__":
    main()
