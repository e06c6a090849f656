"""Presets, the file of what was measured, and the measuring."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import warnings

import pytest
import torch

from wrappers import _device
from wrappers.plan import calibration, hardware
from wrappers.plan.calibration import Effort, calibrate
from wrappers.plan.hardware import PRESETS, cache_file, find_hardware
from wrappers.plan.records import Hardware


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WRAPPERS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(hardware, "_warned", set())
    return tmp_path / "cache" / "hardware.json"


def figures_of(described: Hardware) -> list[float]:
    found: list[float] = []
    for value in dataclasses.asdict(described).values():
        found += value.values() if isinstance(value, dict) else [value]
    return [v for v in found if not isinstance(v, str)]


# --- Presets


def test_which_presets_there_are():
    assert list(PRESETS) == ["A100", "H100", "H200", "L4", "RTX4090", "CPU"]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_presets_are_sane(preset):
    assert all(math.isfinite(value) and value >= 0 for value in figures_of(preset))
    assert not preset.is_calibrated
    rates = preset.matmul_flops
    assert rates["bfloat16"] >= rates["float32"] >= rates["float64"] > 0
    assert preset.memory_bytes_per_s > 0
    assert min(preset.launch_us, preset.region_us, preset.record_us, preset.replay_us) > 0
    assert all(0 < share <= 1 for share in preset.efficiency.values())
    if preset.name != "CPU":
        assert rates["bfloat16"] > rates["tf32"] >= rates["float32"]
        assert preset.memory_bytes_per_s > preset.h2d_bytes_per_s == preset.d2h_bytes_per_s > 0
        assert preset.memory_bytes >= 24 * 1024**3


def test_faster_devices_are_faster():
    l4, ada, a100, h100, h200 = map(PRESETS.get, ("L4", "RTX4090", "A100", "H100", "H200"))
    for slow, fast in ((l4, ada), (l4, a100), (a100, h100), (h100, h200)):
        assert slow.matmul_flops["bfloat16"] <= fast.matmul_flops["bfloat16"]
        assert slow.memory_bytes_per_s < fast.memory_bytes_per_s


@pytest.mark.parametrize("name", ["H100", "h100", "RTX 4090", "rtx-4090", "cpu"])
def test_names_in_any_case(name):
    assert hardware._squeeze(find_hardware(name).name) == hardware._squeeze(name)


def test_a_description_is_itself():
    mine = Hardware("mine", {"float32": 1.0}, 1.0)
    assert find_hardware(mine) is mine


@pytest.mark.parametrize(
    ("name", "close"), [("H10", "H100"), ("rtx409", "RTX4090"), ("A-1000", "A100")]
)
def test_an_unknown_name_meets_close_ones(name, close):
    with pytest.raises(ValueError, match=f"Did you mean .*{close}") as caught:
        find_hardware(name)
    assert repr(name) in str(caught.value)
    assert all(preset in str(caught.value) for preset in PRESETS)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GH200 480GB", "H200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA L40S", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_makers_names(name, preset):
    assert [key for key in PRESETS if hardware._is_called(name, key)] == [preset] * bool(preset)


@pytest.mark.parametrize("mine", [Hardware("x", {}, 1e9), Hardware("x", {"float32": 1e9}, 0.0)])
def test_a_description_without_rates_is_refused(mine):
    with pytest.raises(ValueError, match="'x' needs matmul_flops"):
        find_hardware(mine)


def test_a_processor_without_a_model_name_has_a_key(monkeypatch):
    monkeypatch.setattr(hardware.Path, "read_text", lambda self: "CPU implementer : 0x41\n")
    assert hardware._processor_name() == (platform.processor() or platform.machine())


def test_the_device_at_hand_can_be_the_host_beside_an_accelerator(monkeypatch):
    monkeypatch.setattr(_device, "default_device", lambda: torch.device("cuda", 0))
    assert find_hardware(None, torch.device("cpu")).name == "CPU"


def test_a_name_like_no_other():
    with pytest.raises(ValueError, match=r"'abacus'\. Known are A100, H100"):
        find_hardware("abacus")


# --- The file

MINE = Hardware(
    "mine", {"float32": 1e11}, 2e10, launch_us=1.5, is_calibrated=True, element_ns={"norm": 0.5}
)


def test_what_is_stored_is_found(cache):
    assert hardware.save(MINE) == cache == cache_file()
    assert find_hardware() == find_hardware("this") == find_hardware("THIS") == MINE
    assert [path.name for path in cache.parent.iterdir()] == ["hardware.json"]


def test_without_a_file_a_preset_with_this_memory():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # An accelerator without a preset says so.
        found = find_hardware()
    assert not found.is_calibrated
    assert found.memory_bytes > 0


def test_entries_of_others_stay(cache, monkeypatch):
    hardware.save(MINE)
    monkeypatch.setattr(hardware, "device_key", lambda device=None: "another")
    other = dataclasses.replace(MINE, name="other")
    hardware.save(other)
    assert hardware.load() == other
    monkeypatch.undo()
    monkeypatch.setenv("WRAPPERS_CACHE_DIR", str(cache.parent))
    assert hardware.load() == MINE


def test_the_key_tells_threads_and_versions_apart(monkeypatch):
    cpu = torch.device("cpu")
    key = hardware.device_key(cpu)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert hardware.device_key(cpu) != key
    assert "77 threads" in hardware.device_key(cpu)
    assert torch.__version__ in key


def test_the_folder_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("WRAPPERS_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file() == tmp_path / ".cache" / "wrappers" / "hardware.json"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '"text"',
        '{"devices": {}}',
        '{"version": 0, "devices": {}}',
        '{"version": 1, "devices": 3}',
        "\x00\xff",
    ],
)
def test_a_damaged_or_old_file_warns_once(cache, content):
    cache.parent.mkdir()
    cache.write_text(content)
    with pytest.warns(UserWarning, match=r"is not used: .*Run wrappers\.calibrate\(\)"):
        assert hardware.load() is None
    assert hardware.load() is None  # A second warning would be an error.
    hardware.save(MINE)
    assert hardware.load() == MINE


@pytest.mark.parametrize("entry", [{"name": "x"}, {"unknown": 1}, 3])
def test_an_entry_that_does_not_fit_warns(cache, entry):
    cache.parent.mkdir()
    content = {"version": hardware.FILE_VERSION, "devices": {hardware.device_key(): entry}}
    cache.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="is not used"):
        assert hardware.load() is None


def test_a_write_that_fails_leaves_the_old_file(cache, monkeypatch):
    hardware.save(MINE)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        hardware.save(dataclasses.replace(MINE, name="new"))
    assert [path.name for path in cache.parent.iterdir()] == ["hardware.json"]
    assert hardware.load() == MINE


# --- Measuring

TINY = Effort(
    rounds=1,
    round_us=0.0,
    side=64,
    rows=64,
    row=32,
    pool_bytes=64 * 1024,
    copy_bytes=64 * 1024,
    short=1,
    long=2,
    engine_rounds=2,
)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_calibrate_measures_all_and_stores_it(cache, one_thread):
    state = torch.get_rng_state()
    found = calibrate("cpu", effort=TINY)
    assert found.is_calibrated
    assert all(math.isfinite(value) and value >= 0 for value in figures_of(found))
    assert {"float32", "float64"} <= found.matmul_flops.keys()
    assert min(*found.matmul_flops.values(), found.memory_bytes_per_s, found.launch_us) > 0
    assert found.element_ns.keys() >= PRESETS["CPU"].element_ns.keys()
    assert found.efficiency.keys() == found.half_sides.keys()
    assert found.h2d_bytes_per_s == found.d2h_bytes_per_s == 0
    assert hardware.load(torch.device("cpu")) == found
    assert torch.equal(torch.get_rng_state(), state)


def test_calibrate_need_not_store(cache, one_thread):
    with torch.no_grad():  # The engine's cost needs a graph, whoever calls.
        calibrate("cpu", effort=TINY, save=False)
    assert not cache.exists()


def test_a_rate_that_falls_with_the_side_is_found_again():
    share, half = 0.8, 12.0
    points = [(side, share * side / (side + half)) for side in (32, 128)]
    assert calibration._line(points) == pytest.approx((share, half))


def test_a_rate_that_rises_with_a_shorter_side_is_taken_as_constant():
    share, half = calibration._line([(32, 0.9), (128, 0.8)])
    assert (share, half) == pytest.approx((0.8, 0.0))


def test_the_engines_costs_from_its_times(monkeypatch):
    region, record, replay, operator = 40.0, 10.0, 5.0, 2.0

    def times(watch, num_blocks):
        recorded, replayed = 11 * num_blocks, 11 * num_blocks - 3
        return calibration._EngineTimes(
            0.6 * region + recorded * record,
            0.4 * region + replayed * (replay + operator),
            operator,
            recorded,
            replayed,
        )

    monkeypatch.setattr(calibration, "_engine_times", times)
    watch = calibration._Stopwatch(torch.device("cpu"), TINY)
    assert calibration._engine_costs(watch) == pytest.approx((region, record, replay))


def test_the_stopwatch_takes_the_median_of_means():
    watch = calibration._Stopwatch(torch.device("cpu"), Effort(rounds=3, round_us=4.0))
    now = iter([0, 1000, 0, 2000, 0, 9000, 0, 4000, 0, 6000])  # two trials, three rounds of two
    watch._clock = lambda: next(now)
    calls = []
    assert watch.us(lambda: calls.append(1)) == 3.0
    assert len(calls) == 1 + 1 + 3 * 2
