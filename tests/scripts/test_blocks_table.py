"""The benchmark of all modes on tiny blocks: its rows, and that each mode is what it says."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import measure
from scripts.bench import blocks_table, policy_blocks
from scripts.model import Block, GPTConfig

MODES = [
    "none",
    "torch_full",
    "torch_save_matmuls",
    "no_reentrant",
    "replay",
    "replay_save_matmuls",
]
NUM_BLOCKS, WIDTH, SEQ_LEN, BATCH = 4, 128, 128, 2
SIZES = {"blocks": NUM_BLOCKS, "d_model": WIDTH, "seq_len": SEQ_LEN, "batch": BATCH}


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    options = argparse.Namespace(device="cpu", dtype="float32", heads=4, rounds=1, **SIZES)
    return {row["mode"]: row for row in blocks_table.measure_modes(options)}


def test_each_mode_has_a_row_with_its_figures(rows):
    assert list(rows) == MODES
    for row in rows.values():
        assert row["benchmark"] == "blocks_table"
        assert {name: row[name] for name in SIZES} == SIZES
        assert row["dtype"] == "float32"
        assert row["step_ms"] > 0
        assert row["time_ratio"] == pytest.approx(
            row["step_ms"] / rows["none"]["step_ms"], abs=0.01
        )
        assert row["peak_ratio"] == round(row["peak_bytes"] / rows["none"]["peak_bytes"], 4)
    assert (rows["none"]["time_ratio"], rows["none"]["peak_ratio"]) == (1, 1)


def test_no_region_has_fallen_back(rows):
    assert {row["fallbacks"] for row in rows.values()} == {0}


def test_full_recompute_takes_the_least_memory_and_kept_products_less_than_none(rows):
    peak = {mode: row["peak_bytes"] for mode, row in rows.items()}
    assert peak["no_reentrant"] == peak["torch_full"]
    assert peak["replay"] <= peak["torch_full"]
    assert peak["torch_full"] < peak["replay_save_matmuls"] < peak["none"]
    assert peak["replay_save_matmuls"] <= peak["torch_save_matmuls"]


def test_each_mode_recomputes_the_products_that_it_says():
    """All four products of a block but the last, which nothing depends on; or none of them."""
    config = GPTConfig(d_model=WIDTH, num_heads=4, seq_len=SEQ_LEN, dropout=0.0)
    blocks = torch.nn.ModuleList(Block(config) for _ in range(NUM_BLOCKS))
    x = torch.randn(BATCH, SEQ_LEN, WIDTH, requires_grad=True)
    flops = {}
    for mode, (those, run) in blocks_table.modes_of(blocks).items():
        for _ in range(2):  # The first replay is compared with a rerun.
            flops[mode] = measure.count_flops(
                lambda those=those, run=run: policy_blocks.run_step(those, x, run)
            )
    extra = {mode: count - flops["none"] for mode, count in flops.items()}
    products = NUM_BLOCKS * 2 * BATCH * SEQ_LEN * WIDTH * WIDTH * (3 + 1 + 4)
    kept = {"none", "torch_save_matmuls", "replay_save_matmuls"}
    assert extra == {mode: 0 if mode in kept else products for mode in MODES}


def test_results_are_printed_and_appended(monkeypatch, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    given = "--device cpu --dtype bfloat16 --blocks 1 --d-model 32 --heads 2 --seq-len 8 --batch 1"
    monkeypatch.setattr(
        sys, "argv", ["blocks_table", *given.split(), "--rounds=1", f"--json={path}"]
    )
    num_threads = torch.get_num_threads()
    try:
        for _ in range(2):
            blocks_table.main()
    finally:
        torch.set_num_threads(num_threads)
    printed = capsys.readouterr().out
    assert path.read_text() == printed
    rows = [json.loads(line) for line in printed.splitlines()]
    assert [row["mode"] for row in rows] == 2 * MODES
    assert {row["dtype"] for row in rows} == {"bfloat16"}


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["blocks_table"])
    with pytest.raises(SystemExit):
        blocks_table.main()
    assert capsys.readouterr().err.endswith("torch finds no GPU here: pass --device cpu\n")


def test_gpu_check_runs_it():
    script = Path(blocks_table.__file__).parents[1] / "gpu_check"
    assert "-m scripts.bench.blocks_table --device cuda" in script.read_text()
