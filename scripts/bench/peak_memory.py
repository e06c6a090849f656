"""How many bytes does a training step hold at its peak, against torch?

A stack of transformer blocks, each a region; the peak of the activations is taken from the
allocator's events (see `scripts.measure`), so it is exact and repeats. At most 1.00 of torch's
for both implementations.

    python -m scripts.bench.peak_memory [--json FILE] [--blocks 6] [--d-model 256] [--device cpu]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint as theirs
from torch import Tensor, nn

import wrappers as ours
from scripts import measure
from scripts.bench import harness
from scripts.model import Block, GPTConfig


def peak_bytes(blocks: nn.ModuleList, x: Tensor, run: Callable[..., Any]) -> int:
    """Peak of one training step whose blocks are called by `run(block, x)`."""

    def step() -> None:
        h = x
        for block in blocks:
            h = run(block, h)
        h.sum().backward()
        blocks.zero_grad(set_to_none=True)

    step()
    return measure.memory_timeline(step, x.device).peak_bytes


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    torch.manual_seed(0)
    config = GPTConfig(d_model=options.d_model, num_heads=8, seq_len=256)
    blocks = nn.ModuleList(Block(config) for _ in range(options.blocks)).to(options.device)
    x = torch.randn(4, 256, options.d_model, device=options.device, requires_grad=True)
    rows: list[dict[str, Any]] = []
    plain = peak_bytes(blocks, x, lambda block, h: block(h))
    for name, use_reentrant in (("reentrant", True), ("no_reentrant", False)):
        their_peak = peak_bytes(blocks, x, partial(theirs.checkpoint, use_reentrant=use_reentrant))
        our_peak = peak_bytes(blocks, x, partial(ours.checkpoint, use_reentrant=use_reentrant))
        rows.append(
            {
                "benchmark": "peak_memory",
                "impl": name,
                "ratio": round(our_peak / their_peak, 4),
                "ours_bytes": our_peak,
                "theirs_bytes": their_peak,
                "plain_bytes": plain,
            }
        )
    harness.report(rows, options.json, options.device)


if __name__ == "__main__":
    main()
