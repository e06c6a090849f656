"""Where does the time of a step go when its blocks are offloaded, and when does that pay?

Eight blocks of `scripts.model` of width 12288 and 4096 tokens in bfloat16 run on the simulated
transport, whose clock is virtual, so the figures are exact and the same on every machine. Nothing
here was measured on a GPU. The numbers are meant to be those of an H100 with PCIe:

    compute    400 TFLOP/s, sustained in matrix products and attention, the rest included
    link       50 GB/s in each direction; 10 us for every copy; the slower link has 25 GB/s

The products that really run are those of a model whose width and sequence are `SCALE` times
smaller. Their FLOPs count `SCALE ** 3` times and their bytes `SCALE ** 2` times, which is what both
are in the large one. So what is copied when, and what waits for it, is what the offload room does
in a run, and only the durations are computed.

    python -m scripts.bench.offload_timeline [--out docs/offload.svg]

draws compute, waiting, D2H and H2D copies of the third step over time, and prints the step's
figures and the widths from which offloading costs no time.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from scripts.model import Block, GPTConfig
from wrappers import apply_activation_checkpointing, offload_stats, offload_wrapper
from wrappers.offload.simulated import SimulatedTransport, Span
from wrappers.select import by_class

FLOPS_PER_S = 400e12
BANDWIDTH_BYTES_PER_S = 50e9
SLOWER_BYTES_PER_S = 25e9
LATENCY_S = 10e-6

NUM_BLOCKS = 8
D_MODEL = 12288
SEQ_LEN = 4096
NUM_HEADS = 96
SCALE = 64

#: In the picture, as the largest tensor of a block alone takes 384 MiB.
INFLIGHT_BYTES = 1024 * 2**20

#: What a block saves for backward: 16 tensors of (batch, sequence, width) of two bytes.
#: `tests/test_docs.py` measures it.
SAVED_BYTES = 16 * 2

#: Of a block's forward with `w` the width and `s` the tokens of a sequence, by token and width:
#: `24 * w` in four products, `4 * s` in attention, of which a causal kernel may skip half.
PRODUCT_FLOPS = 24
ATTENTION_FLOPS = 4

WIDTHS = (1024, 2048, 4096, 8192, 12288, 16384)

ROWS = {"compute": "tab:blue", "wait": "tab:red", "D2H": "tab:orange", "H2D": "tab:green"}


@dataclass(frozen=True)
class Timeline:
    """One step, on a clock that starts with it.

    Attributes:
        bandwidth_bytes_per_s: Of each direction of the link.
        spans: What happened when, in the order of their beginning.
        step_s: How long the step took.
        compute_s: How long the compute was busy; without offloading a step takes as long.
        out_bytes: Bytes copied away.
        back_bytes: Bytes copied back.
        inflight_bytes: The most device memory that copies had in use at once in one direction.
    """

    bandwidth_bytes_per_s: float
    spans: list[Span]
    step_s: float
    compute_s: float
    out_bytes: int
    back_bytes: int
    inflight_bytes: int

    @property
    def waited_s(self) -> float:
        return sum(s.end_s - s.start_s for s in self.spans if s.row == "wait")

    @property
    def title(self) -> str:
        return (
            f"{self.bandwidth_bytes_per_s / 1e9:g} GB/s: {self.step_s * 1e3:.1f} ms a step, "
            f"{self.waited_s * 1e3:.1f} ms of them waiting"
        )


def _attention_flops(func: Any, query: Tensor) -> int:
    """Of the CPU's fused attention, which torch's counter has no formula for."""
    name = func.overloadpacket.__name__
    if not name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
        return 0
    batch, heads, seq, width = query.shape
    num_products = 5 if name.endswith("backward") else 2  # The backward repeats the scores.
    return num_products * 2 * batch * heads * seq * seq * width


class TakesTime(TorchDispatchMode):
    """Operators take the time of their FLOPs on a simulated device."""

    def __init__(self, device: SimulatedTransport) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.name = "forward"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            num_flops = count(*args, **(kwargs or {}), out_val=out)
        else:
            index = 1 if func.overloadpacket.__name__.endswith("backward") else 0
            tensors = [a for a in args if isinstance(a, Tensor) and a.dim() == 4]
            num_flops = _attention_flops(func, tensors[index]) if len(tensors) > index else 0
        if num_flops:
            self.device.compute(num_flops * SCALE**3 / FLOPS_PER_S, self.name)
        return out


def run(bandwidth_bytes_per_s: float, *, num_steps: int = 3, **options: Any) -> Timeline:
    """Run steps of offloaded blocks and give the last one, in figures of the large model.

    Args:
        bandwidth_bytes_per_s: Of each direction of the link.
        num_steps: How many steps; the first one shows the order of backward.
        **options: Those of `offload_wrapper`, byte sizes in the large model's bytes.
    """
    options.setdefault("max_inflight_bytes", INFLIGHT_BYTES)
    options["max_inflight_bytes"] //= SCALE**2
    config = GPTConfig(d_model=D_MODEL // SCALE, num_heads=4, seq_len=SEQ_LEN // SCALE, dropout=0.0)
    model = nn.Sequential(*(Block(config) for _ in range(NUM_BLOCKS))).to(torch.bfloat16)
    wrap = partial(offload_wrapper, min_bytes=4096, **options)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=by_class(Block))
    x = torch.ones(1, config.seq_len, config.d_model, dtype=torch.bfloat16, requires_grad=True)
    with SimulatedTransport(
        bandwidth_bytes_per_s=bandwidth_bytes_per_s / SCALE**2, latency_s=LATENCY_S
    ) as device:
        for _ in range(num_steps):
            first, start_s = len(device.spans), device.now_s()
            with TakesTime(device) as mode:
                loss = model(x.sin()).sum()
                mode.name = "backward"
                loss.backward()
            step_s = device.now_s() - start_s
        spans = [
            Span(s.row, s.start_s - start_s, s.end_s - start_s, s.nbytes * SCALE**2, s.name)
            for s in sorted(device.spans[first:], key=lambda s: s.start_s)
        ]
        inflight_bytes = offload_stats().tiers[-1].inflight_bytes

    def total(row: str) -> int:
        return sum(s.nbytes for s in spans if s.row == row)

    return Timeline(
        bandwidth_bytes_per_s,
        spans,
        step_s,
        sum(s.end_s - s.start_s for s in spans if s.row == "compute"),
        total("D2H"),
        total("H2D"),
        inflight_bytes * SCALE**2,
    )


# --- When it pays


def forward_s(width: int, seq_len: int = SEQ_LEN) -> float:
    """Seconds of compute in a block's forward for one token."""
    num_flops = width * (PRODUCT_FLOPS * width + ATTENTION_FLOPS * seq_len)
    return num_flops / FLOPS_PER_S


def hidden_share(
    width: int, bandwidth_bytes_per_s: float, saved_bytes: float = SAVED_BYTES
) -> float:
    """The part of what a block saves that leaves while the block computes; more than 1 is slack.

    Args:
        width: Of the model.
        bandwidth_bytes_per_s: Of the link, in one direction.
        saved_bytes: What a block saves, by token and width.
    """
    return forward_s(width) * bandwidth_bytes_per_s / (saved_bytes * width)


def least_width(bandwidth_bytes_per_s: float, saved_bytes: float = SAVED_BYTES) -> float:
    """The width from which all of it leaves in that time; negative if any width will do."""
    flops_per_byte = FLOPS_PER_S / bandwidth_bytes_per_s
    return (saved_bytes * flops_per_byte - ATTENTION_FLOPS * SEQ_LEN) / PRODUCT_FLOPS


def width_table() -> str:
    """By width: one block's compute and copy for 4096 tokens, and how much can be hidden."""
    slower, faster = SLOWER_BYTES_PER_S, BANDWIDTH_BYTES_PER_S
    lines = [
        f"| width | forward | saved | copy, {faster / 1e9:g} GB/s | hidden | "
        f"hidden, {slower / 1e9:g} GB/s | hidden, input only |",
        "|---|---|---|---|---|---|---|",
    ]
    for width in WIDTHS:
        saved = SEQ_LEN * width * SAVED_BYTES
        shares = (
            hidden_share(width, faster),
            hidden_share(width, slower),
            hidden_share(width, faster, 2),
        )
        cells = [
            str(width),
            f"{SEQ_LEN * forward_s(width) * 1e3:.1f} ms",
            f"{saved / 2**20:.0f} MiB",
            f"{saved / faster * 1e3:.1f} ms",
            *("all" if share >= 1 else f"{share:.0%}" for share in shares),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- What is shown

#: The runs of the table.
CASES: dict[str, dict[str, Any]] = {
    "50 GB/s": {},
    "50 GB/s, `max_inflight_bytes=256 * 2**20`": {"max_inflight_bytes": 256 * 2**20},
    "50 GB/s, `max_inflight_bytes=768 * 2**20`, the default": {"max_inflight_bytes": 768 * 2**20},
    "50 GB/s, `prefetch=0`": {"prefetch": 0},
    "50 GB/s, `keep_last=0`": {"keep_last": 0},
    "25 GB/s": {"bandwidth_bytes_per_s": SLOWER_BYTES_PER_S},
    "25 GB/s, `max_inflight_bytes=4 * 2**30`": {
        "bandwidth_bytes_per_s": SLOWER_BYTES_PER_S,
        "max_inflight_bytes": 4 * 2**30,
    },
}
#: Those in the picture.
DRAWN = ("50 GB/s", "25 GB/s")


def run_cases() -> dict[str, Timeline]:
    """All runs of the table."""
    return {
        name: run(**{"bandwidth_bytes_per_s": BANDWIDTH_BYTES_PER_S, **options})
        for name, options in CASES.items()
    }


def step_table(timelines: dict[str, Timeline]) -> str:
    """What each run's step took, and what it copied."""
    lines = ["| run | step | waiting | out | back | in flight |", "|---|---|---|---|---|---|"]
    for name, timeline in timelines.items():
        cells = [name, f"{timeline.step_s * 1e3:.1f} ms", f"{timeline.waited_s * 1e3:.1f} ms"]
        for num_bytes in (timeline.out_bytes, timeline.back_bytes, timeline.inflight_bytes):
            cells.append(f"{num_bytes / 2**30:.2f} GiB")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _bars(timeline: Timeline, row: str, name: str) -> list[tuple[float, float]]:
    """Beginning and length in milliseconds; compute that goes on without a break is one bar."""
    bars: list[tuple[float, float]] = []
    for span in timeline.spans:
        if (span.row, span.name) != (row, name):
            continue
        start_ms, end_ms = span.start_s * 1e3, span.end_s * 1e3
        if name and bars and abs(sum(bars[-1]) - start_ms) < 1e-6:
            start_ms = bars.pop()[0]
        bars.append((start_ms, end_ms - start_ms))
    return bars


def draw(timelines: list[Timeline], path: Path) -> None:
    """Draw one panel for each step, its rows over the same time axis."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The same bytes in each run.
    with mpl.rc_context({"svg.hashsalt": "wrappers", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(9, 1.9 * len(timelines)), layout="constrained")
        panels = figure.subplots(len(timelines), sharex=True, squeeze=False)[:, 0]
        for axes, timeline in zip(panels, timelines, strict=True):
            for y, (row, color) in enumerate(ROWS.items()):
                for name, opacity in (("", 1), ("forward", 1), ("backward", 0.5)):
                    axes.broken_barh(
                        _bars(timeline, row, name),
                        (y - 0.4, 0.8),
                        facecolors=mpl.colors.to_rgba(color, opacity),
                        edgecolor="white",
                        linewidth=0.2,
                    )
            axes.set_yticks(range(len(ROWS)), ROWS)
            axes.invert_yaxis()
            axes.set_title(timeline.title, loc="left", fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        panels[-1].set_xlabel("ms; compute: forward, then backward in a lighter colour")
        panels[-1].set_xlim(0)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("docs/offload.svg"))
    path = options.parse_args().out
    timelines = run_cases()
    draw([timelines[name] for name in DRAWN], path)
    print(step_table(timelines), width_table(), sep="\n\n")


if __name__ == "__main__":
    main()
