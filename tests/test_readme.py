"""The figures in the README are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = [
    json.loads(line)
    for name in ("cpu", "demo")
    for line in (ROOT / f"scripts/bench/results/{name}.jsonl").read_text().splitlines()
]
README = (ROOT / "README.md").read_text()


def result(benchmark: str, **fields: object) -> dict:
    """The newest result of a benchmark for one case."""
    wanted = {"benchmark": benchmark, **fields}.items()
    return [row for row in RESULTS if wanted <= row.items()][-1]


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("NO_REENTRANT", "no_reentrant"),
        ("NO_REENTRANT, `preserve_rng_state=False`", "no_rng"),
        ("REENTRANT", "reentrant"),
        ("`context_fn` policy", "selective"),
    ],
)
def test_overhead(name, case):
    output, input = (result("engine_overhead", region=region) for region in ("output", "input"))
    torchs, ours = output[f"theirs_{case}_us"], output[f"ours_{case}_us"]
    ratios = f"**{output[f'{case}_ratio']:.2f}**, {input[f'{case}_ratio']:.2f}"
    assert f"| overhead, {name} | {torchs:.0f} us | {ours:.0f} us: {ratios} |" in README


@pytest.mark.parametrize(
    ("name", "case", "against"),
    [("`impl=REPLAY`", "replay", "no_reentrant"), ("`policy=`, on REPLAY", "policy", "selective")],
)
def test_overhead_of_replay(name, case, against):
    output, input = (result("engine_overhead", region=region) for region in ("output", "input"))
    torchs, ours = output[f"theirs_{against}_us"], output[f"ours_{case}_us"]
    ratios = f"**{output[f'{case}_ratio']:.2f}**, {input[f'{case}_ratio']:.2f}"
    assert f"| overhead, {name} | {torchs:.0f} us | {ours:.0f} us: {ratios} |" in README


@pytest.mark.parametrize("d_model", [128, 512])
def test_blocks_that_keep_their_matmuls(d_model):
    row = result("policy_blocks", d_model=d_model)
    torchs, ours = (row[f"{whose}_us"] / 1e3 for whose in ("theirs", "ours"))
    what = f"6 transformer blocks of width {d_model} that keep their matmuls"
    assert (
        f"| step of {what} | {torchs:.0f} ms | {ours:.0f} ms: **{row['time_ratio']:.2f}** |"
        in README
    )
    torchs, ours = (row[f"{whose}_bytes"] / 2**20 for whose in ("theirs", "ours"))
    assert (
        f"| peak of {what} | {torchs:.1f} MiB | {ours:.1f} MiB: **{row['peak_ratio']:.2f}** |"
        in README
    )


@pytest.mark.parametrize("impl", ["reentrant", "no_reentrant"])
def test_peak_memory(impl):
    row = result("peak_memory", impl=impl)
    torchs, ours = (row[f"{whose}_bytes"] / 2**20 for whose in ("theirs", "ours"))
    assert (
        f"| peak of a step, 6 transformer blocks, {impl.upper()} | {torchs:.1f} MiB | "
        f"{ours:.1f} MiB: **{row['ratio']:.2f}** |" in README
    )


@pytest.mark.parametrize(
    "mode",
    [
        "none",
        "REENTRANT",
        "NO_REENTRANT",
        "NO_REENTRANT, in place",
        "disk",
        "planned, budget 322 MiB",
    ],
)
def test_demo(mode):
    row = result("demo", mode=mode)
    recomputed = row["flops"] - result("demo", mode="none")["flops"]
    assert (
        f"| {mode} | {row['loss']} | {row['peak_activation_bytes'] / 2**20:.1f} MiB | "
        f"{row['step_ms']:.0f} ms | {recomputed / 1e9:.2f} GFLOPs |" in README
    )


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("the blocks as they are", "none"),
        ("checkpointed, NO_REENTRANT", "no_reentrant"),
        ('`offload_wrapper(tier="disk")`', "disk"),
        ("both", "no_reentrant_disk"),
    ],
)
def test_disk(name, mode):
    row = result("disk_offload", mode=mode)
    peak = f"{row['peak_bytes'] / 2**20:.0f} MiB ({row['peak_ratio']:.0%})"
    assert f"| {name} | {peak} | {row['time_ratio']:.2f} |" in README
