"""The benchmark of the disk tier on small blocks: its rows, and that they are what they say."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scripts.bench import disk_offload
from scripts.model import Block, GPTConfig
from wrappers.offload import store

ROOT = Path(__file__).parents[2]
MODES = ["none", "no_reentrant", "disk", "no_reentrant_disk"]
SIZES = {"blocks": 4, "d_model": 64, "seq_len": 128, "batch": 4}
#: A layer's output, in a block of such sizes.
NBYTES = 4 * 128 * 64 * 4


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, dict[str, Any]]:
    # In a process of its own: it tells the allocator how to allocate.
    folder = tmp_path_factory.mktemp("disk")
    path = folder / "rows.jsonl"
    given = {**SIZES, "heads": 4, "max_inflight_mib": 2 * NBYTES / 2**20, "rounds": 1}
    command = [sys.executable, "-m", "scripts.bench.disk_offload"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    command += [f"--json={path}", f"--directory={folder}"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {row["mode"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_each_mode_has_a_row_with_its_figures(rows):
    assert list(rows) == MODES
    for row in rows.values():
        assert row["benchmark"] == "disk_offload"
        assert {name: row[name] for name in SIZES} == SIZES
        assert row["step_ms"] > 0
        assert row["peak_ratio"] == round(row["peak_bytes"] / rows["none"]["peak_bytes"], 4)
    assert (rows["none"]["time_ratio"], rows["none"]["peak_ratio"]) == (1, 1)


def test_losses_are_equal_to_the_last_digit(rows):
    assert len({repr(row["loss"]) for row in rows.values()}) == 1


def test_a_file_saves_most_of_the_memory(rows):
    peak = {mode: row["peak_bytes"] for mode, row in rows.items()}
    assert peak["disk"] < 0.7 * peak["none"]
    assert peak["no_reentrant_disk"] <= peak["no_reentrant"] + 2 * NBYTES < 0.7 * peak["none"]


def test_what_each_mode_sends_to_the_file(tmp_path):
    """Nothing; nothing; all that is saved in a block; the inputs of all blocks but the first."""
    store.reset_offloading()
    torch.manual_seed(0)
    config = GPTConfig(d_model=64, num_heads=4, seq_len=128)
    blocks = nn.ModuleList(Block(config) for _ in range(4))
    x = torch.randn(4, 128, 64)
    sent_bytes = {}
    for mode, those in disk_offload.modes_of(blocks, tmp_path, 2 * NBYTES).items():
        store.reset_offloading()
        disk_offload.run_step(those, x)
        sent_bytes[mode] = sum(tier.out_bytes for tier in store.offload_stats().tiers)
    store.reset_offloading()
    assert sent_bytes["none"] == sent_bytes["no_reentrant"] == 0
    assert sent_bytes["disk"] > 4 * 10 * NBYTES
    assert sent_bytes["no_reentrant_disk"] == 3 * NBYTES


def test_a_result_that_differs_is_a_failure(monkeypatch, tmp_path):
    def differ(blocks, directory, max_inflight_bytes):
        torch.manual_seed(1)
        config = GPTConfig(d_model=64, num_heads=4, seq_len=128)
        return {"none": blocks, "disk": nn.ModuleList([Block(config)])}

    monkeypatch.setattr(disk_offload, "modes_of", differ)
    sizes = {**SIZES, "blocks": 1}
    options = argparse.Namespace(directory=tmp_path, heads=4, max_inflight_mib=1, rounds=1, **sizes)
    with pytest.raises(SystemExit, match="losses and gradients must be equal, but are"):
        disk_offload.measure_modes(options)


def test_results_are_printed_and_appended(monkeypatch, tmp_path, capsys):
    store.reset_offloading()
    path = tmp_path / "results.jsonl"
    directory = tmp_path / "disk"
    given = "--blocks 2 --d-model 64 --heads 2 --seq-len 128 --batch 2 --rounds 1"
    monkeypatch.setattr(
        sys,
        "argv",
        ["disk_offload", *given.split(), f"--json={path}", f"--directory={directory}"],
    )
    num_threads = torch.get_num_threads()
    try:
        disk_offload.main()
    finally:
        torch.set_num_threads(num_threads)
        store.reset_offloading()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["mode", "peak", "MiB", "step", "ms", "loss"]
    assert [line.split()[0] for line in printed[1:5]] == MODES
    assert any(line.startswith(f"disk {directory.resolve()}") for line in printed)
    assert path.read_text().splitlines() == printed[-4:]
    assert [json.loads(line)["mode"] for line in printed[-4:]] == MODES
    assert os.listdir(directory) == []
