"""The benchmarks of planned steps on a tiny model: their rows, and that they are what they say."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import pytest
import torch

from scripts.bench import budget, budget_device, budget_sharded, handmade, torch_planner
from scripts.model import GPTConfig
from tests.distributed.conftest import ranks  # noqa: F401
from wrappers import _knobs, make_plan
from wrappers.plan.hardware import PRESETS

CONFIG = GPTConfig(num_layers=3, d_model=64, num_heads=2, seq_len=64, dropout=0.0)
BATCH = 4
SHARES = (30, 70)

#: What a prediction of the CPU's allocator may be off by.
PEAK_ERROR = 1e-3

#: What waits in gloo's own threads may add to a peak here, where a buffer is a large part of it.
SHARDED_PEAK_ERROR = 0.1


@pytest.fixture(autouse=True, scope="module")
def _tiny():
    """A tiny model, a menu from few of the ways to treat a block, one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_knobs, "PLAN_MENU_RUNS", 8)
        patch.setattr(handmade, "build", lambda *_, build=handmade.build: build(CONFIG, BATCH))
        patch.setattr(handmade, "POLICIES", dict(handmade.policies_for(CONFIG.num_layers)))
        yield
    torch.set_num_threads(num_threads)


def assert_planned(row: dict[str, Any]) -> None:
    """What holds of the row of each plan on a CPU."""
    assert row["peak_to_budget"] == round(row["peak_bytes"] / row["budget_bytes"], 5)
    assert row["peak_bytes"] <= row["budget_bytes"]
    assert abs(row["peak_error"]) < PEAK_ERROR
    assert row["time_ratio"] > 0
    assert row["predicted_time_ratio"] > 1
    error = row["time_ratio"] / row["predicted_time_ratio"] - 1
    assert row["time_error"] == pytest.approx(error, abs=1e-3)
    assert 0 < row["num_wrapped"] <= CONFIG.num_layers


# --- On a CPU -----------------------------------------------------------------------------


def test_each_budget_has_a_row_for_a_measured_and_for_a_derived_profile(monkeypatch):
    monkeypatch.setattr(budget.wrappers, "calibrate", lambda save: PRESETS["CPU"])
    rows = budget.measure(1, SHARES)
    named = [(row["profile"], row["share"]) for row in rows]
    assert named == [(name, share) for name in ("measured", "derived") for share in SHARES]
    for row in rows:
        assert_planned(row)
        assert row["best"] in handmade.POLICIES
        assert row["to_best"] > 0
    assert [row["budget_bytes"] for row in rows[:2]] == sorted({r["budget_bytes"] for r in rows})
    assert len(budget.table(rows).splitlines()) == 1 + len(rows)


# --- Torch's planner ----------------------------------------------------------------------


def test_our_plan_has_the_peak_of_torchs_as_its_budget(monkeypatch):
    """Torch's has recomputed one block here, and two; a budget for which it finds none is left."""
    whole = torch_planner.ModulePlan(1.0, [], [])
    found = {20: {"blocks.0": whole, "blocks.1": whole}, 60: {"blocks.0": whole}, 80: None}
    plans = iter(
        [modules and torch_planner.TorchPlan(modules, 7, 1.0) for modules in found.values()]
    )
    estimates = torch_planner.Estimates(None, {}, 0, 2.0)
    monkeypatch.setattr(torch_planner, "estimate", lambda *_: estimates)
    monkeypatch.setattr(torch_planner, "make_plan", lambda *_: next(plans))
    rows = torch_planner.measure_plans([0.2, 0.6, 0.8], 1)
    assert [row["fraction"] for row in rows] == [0.2, 0.6, 0.8]
    assert rows[0]["peak_bytes"] < rows[1]["peak_bytes"]
    for row in rows[:2]:
        assert row["ours_budget_bytes"] == row["peak_bytes"]
        assert row["ours_peak_bytes"] <= row["peak_bytes"]
        assert row["ours_peak_bytes"] == pytest.approx(row["ours_predicted_bytes"], rel=PEAK_ERROR)
        # One round: the ratio of the ratios is that of the times.
        ratio = row["ours_time_ratio"] / row["time_ratio"]
        assert row["to_torch_planner"] == pytest.approx(ratio, abs=1e-3)
    assert rows[0]["ours_profile_s"] == rows[1]["ours_profile_s"] > 0
    assert rows[2]["predicted_bytes"] is None
    assert "to_torch_planner" not in rows[2]
    assert torch_planner.table(rows).splitlines()[3].endswith("no plan")


# --- FSDP2 --------------------------------------------------------------------------------


def sharded_rows() -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_knobs, "PLAN_MENU_RUNS", 8)
        patch.setattr(budget_sharded, "PEAK_STEPS", 2)
        return budget_sharded.measure_plans(1, (50,), CONFIG, BATCH)


def test_ranks_have_one_plan_and_its_peak(ranks):  # noqa: F811
    rows, others = ranks(sharded_rows)
    assert rows == others
    assert [row["share"] for row in rows] == [50]
    for row in rows:
        assert row["num_ranks"] == len(row["peak_bytes"]) == 2
        assert row["num_plans"] == 1
        assert row["profile"] == "measured"
        for peak in row["peak_bytes"]:
            assert peak == pytest.approx(row["predicted_peak_bytes"], rel=SHARDED_PEAK_ERROR)
        assert row["most_peak_bytes"] >= max(row["peak_bytes"])
        assert row["predicted_peak_bytes"] <= row["budget_bytes"]
        assert row["predicted_peak_bytes"] < row["predicted_plain_peak_bytes"]
        assert row["num_wrapped"] > 0
    table = budget_sharded.table(rows).splitlines()
    assert [line.split()[0] for line in table] == ["at", "50%"]


@pytest.fixture(scope="module")
def profile():
    return budget.take_profile(*handmade.build(), PRESETS["CPU"])[0]


def test_a_model_is_planned_in_place_and_as_it_was(profile):
    model, tokens = handmade.build()
    modules = list(model.modules())
    ample = make_plan(profile, budget_sharded.AMPLE_BYTES, count="activations")
    plan = make_plan(profile, ample.smallest_bytes, count="activations")
    peaks = []
    form = budget_sharded.Planned(model, plan)
    for _ in range(2):
        peaks.append(handmade.peak_bytes(partial(handmade.run_step, model, tokens)))
        with form:
            assert list(model.modules()) == modules
            peaks.append(handmade.peak_bytes(partial(handmade.run_step, model, tokens)))
    plain, planned = (each.peak_bytes - each.uncounted_bytes for each in (ample, plan))
    assert peaks == pytest.approx([plain, planned] * 2, rel=PEAK_ERROR)


def test_ranks_with_different_plans_show(profile):
    plan = make_plan(profile, budget_sharded.AMPLE_BYTES, count="activations")
    peak = plan.peak_bytes - plan.uncounted_bytes
    times = {"none": [1.0, 1.0], "50": [1.5, 1.5]}
    one = budget_sharded.Seen({"none": [9, 8], "50": [peak, peak + 100]}, times, {50: "a"}, 1.0)
    two = budget_sharded.Seen({"none": [8, 9], "50": [peak * 3, peak * 2]}, times, {50: "b"}, 2.0)
    (row,) = budget_sharded.rows_of({50: plan}, [one, two])
    assert row["num_plans"] == 2
    assert row["peak_bytes"] == [peak, peak * 2]
    assert row["most_peak_bytes"] == peak * 3
    assert row["peak_error"] == 1
    assert row["peak_to_budget"] == round(peak * 2 / plan.budget_bytes, 5)
    assert row["time_ratio"] == 1.5
    assert row["time_error"] == 0.5
    assert row["profile_s"] == 2.0


# --- On a device --------------------------------------------------------------------------


def test_the_benchmark_of_devices_on_a_cpu(monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    given = ["--tiny", "--device=cpu", "--rounds=1", "--at", *map(str, SHARES), f"--json={path}"]
    monkeypatch.setattr(handmade, "keep_heap", lambda: None)
    monkeypatch.setattr(sys, "argv", ["budget_device", *given])
    budget_device.main()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.read_text() in capsys.readouterr().out
    plans = ["planned_30", "planned_70", "planned_selective"]
    assert [row["form"] for row in rows] == [*budget_device.HAND_MADE, *plans]
    peaks = {row["form"]: row["peak_bytes"] for row in rows}
    assert peaks["full_replay"] < peaks["planned_30"] < peaks["planned_70"] < peaks["none"]
    assert rows[-1]["budget_bytes"] == peaks["torch_save_every_other_matmul"]
    for row in rows[-3:]:
        assert_planned(row)
        assert (row["offload_bytes"], row["moved_bytes"]) == (0, 0)
        to_full = row["step_ms"] / rows[1]["step_ms"]
        assert row["to_full"] == pytest.approx(to_full, rel=0.01)


def test_a_step_on_a_device_is_timed_by_events_of_some_in_a_row(monkeypatch):
    now_ms, calls = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = now_ms[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def step(name: str, ms: float) -> None:
        # The first after another form is slower, which no sample shows.
        now_ms[0] += ms if calls[-1:] == [name] else 10 * ms
        calls.append(name)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    steps = {"a": partial(step, "a", 1000.0), "b": partial(step, "b", 3000.0)}
    samples = budget_device.time_in_turns(steps, 3, torch.device("cuda"))
    assert samples == {"a": [1.0] * 3, "b": [3.0] * 3}


def test_without_a_device_it_says_so_and_ends(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["budget_device"])
    budget_device.main()
    assert "torch finds no GPU here" in capsys.readouterr().out
