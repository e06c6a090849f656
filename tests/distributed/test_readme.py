"""The README's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

from torch.distributed.fsdp import FSDPModule

README = Path(__file__).parents[2] / "README.md"


def run_example():
    from scripts.model import GPT, Block, GPTConfig

    config = GPTConfig(num_layers=4, d_model=16, num_heads=2, seq_len=8)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {"GPT": GPT, "Block": Block, "config": config, "print": lambda *_: None}
    exec(example, names)
    model = names["model"]
    assert all(isinstance(block, FSDPModule) for block in model.blocks)
    return names["report"].wrapped


def test_the_example_runs(ranks):
    assert ranks(run_example) == [("blocks.0", "blocks.1")] * 2
