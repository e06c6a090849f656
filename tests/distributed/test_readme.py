"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

from torch.distributed.fsdp import FSDPModule

README = Path(__file__).parents[2] / "README.md"


def run_examples():
    import torch

    from scripts.model import GPT, Block, GPTConfig
    from wrappers import _knobs

    # Few of the ways to treat a block, and times that mean nothing: two ranks plan here.
    _knobs.PLAN_MENU_RUNS, _knobs.PLAN_TIMED_STEPS, _knobs.PLAN_TIMED_OPERATOR_STEPS = 8, 1, 1
    config = GPTConfig(num_layers=4, d_model=16, num_heads=2, seq_len=8)
    batch = torch.zeros(16, config.seq_len, dtype=torch.long)
    planned, chosen = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {"GPT": GPT, "Block": Block, "config": config, "batch": batch}
    assert planned.count('"12GiB"') == 1
    reports = []
    for example in (planned.replace("12GiB", "600KiB"), chosen):  # 12 GiB are enough for anything
        exec(example, {**names, "print": lambda *_: None}, found := {})
        assert all(isinstance(block, FSDPModule) for block in found["model"].blocks)
        reports.append(found["report"])
    by_plan, by_hand = reports
    return by_plan.wrapped, by_plan.plan.hash, by_hand.wrapped


def test_the_examples_run(ranks):
    first, second = ranks(run_examples)
    assert first == second
    by_plan, _, by_hand = first
    assert by_plan
    assert by_hand == ("blocks.0", "blocks.1")
