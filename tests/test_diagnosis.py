"""What ``doctor`` finds, here and in models that have one thing wrong each."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as theirs

from wrappers import _knobs, _torch, diagnosis
from wrappers.apply import apply_activation_checkpointing
from wrappers.diagnosis import EXTRAS, Diagnosis, Finding, doctor
from wrappers.engine.region import set_checkpoint_debug_enabled, set_checkpoint_early_stop
from wrappers.modules.checkpoint import CheckpointImpl, CheckpointWrapper, checkpoint_wrapper
from wrappers.modules.offload import OffloadWrapper
from wrappers.offload.simulated import Fault, SimulatedTransport
from wrappers.plan import hardware
from wrappers.policies import save_matmuls
from wrappers.select import by_class

ROOT = Path(__file__).parents[1]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return torch.relu(self.fc(x))


class Model(nn.Module):
    def __init__(self, num_blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """One without settings that interfere, on a machine that is idle."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.5, 0.5))
    for name in (
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_NO_CUDA_MEMORY_CACHING",
        "TORCHINDUCTOR_CACHE_DIR",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WRAPPERS_CACHE_DIR", str(tmp_path))


def rows(look, *args) -> list[tuple[str, str]]:
    """Name and status of what one of the doctor's questions yields."""
    return [(row.name, row.status) for row in look(*args)]


def only(found) -> Finding:
    (row,) = list(found)
    return row


# --- All of it


def test_it_looks_at_everything_and_finds_no_problem_here():
    found = doctor(Model())
    assert found.problems == ()
    names = [row.name for row in found.rows]
    for name in ("torch", "host", "pinned memory", "calibration", "allocator", "switches"):
        assert names.count(name) == 1
    assert [n for n in names if n.startswith("extra ")] == [f"extra {extra}" for extra in EXTRAS]
    assert names[-2:] == ["blocks", "regions"]
    assert found["torch"].what == f"torch {torch.__version__}"
    with pytest.raises(KeyError):
        found["nothing of this name"]


def test_what_needs_doing_stands_below_the_table():
    found = Diagnosis((Finding("a", "ok", "fine"), Finding("b", "problem", "bad", "mend it")))
    assert found.problems == (found["b"],)
    assert str(found).splitlines() == [
        "1 problem found",
        "              found",
        "  a  ok       fine",
        "  b  problem  bad",
        "  b: mend it",
    ]
    assert str(Diagnosis(found.rows[:1])).startswith("no problems found")
    assert str(Diagnosis(found.rows * 2)).startswith("2 problems found")


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"expected an nn\.Module to look through, got type"):
        doctor(Model)


# --- Torch


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("2.10.1", "problem"),
        ("2.11.0+cu128", "ok"),
        ("2.13.0a0+git1234", "ok"),
        ("2.14.0.dev20260101", "note"),
        ("3.0.0", "note"),
    ],
)
def test_versions_of_torch(monkeypatch, version, status):
    monkeypatch.setattr(torch, "__version__", version)
    row = only(diagnosis._torch_version())
    assert (row.status, version in row.what) == (status, True)
    assert bool(row.remedy) == (status != "ok")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torch.nn.Linear", True),
        ("torch.nn.Linear.forward", True),
        (
            "torch.nn.parallel.DistributedDataParallel._active_ddp_module",
            True,
        ),  # whose value is None
        ("torch.nn.Nope", False),
        ("torch.nope.Linear", False),
        ("nope.Linear", False),
    ],
)
def test_has_api(name, expected):
    assert _torch.has_api(name) is expected


def test_private_apis_are_here_and_are_those_that_the_one_file_uses():
    source = (ROOT / "wrappers" / "_torch.py").read_text()
    source = source[: source.index("PRIVATE_APIS = ")]
    for api in _torch.PRIVATE_APIS:
        assert api.fallback or _torch.has_api(api.name), api.name
        last = api.name.rpartition(".")[2]
        assert last in source or last == "activation_memory_budget", api.name


def test_an_api_with_a_fallback_may_be_missing(monkeypatch):
    api = _torch.PRIVATE_APIS[0]
    assert api.name == "torch._C._autograd._make_saved_tensor"
    monkeypatch.delattr(torch._C._autograd, "_make_saved_tensor", raising=False)
    first, *others = diagnosis._private_apis()
    assert first.status == "ok"
    row = next(row for row in others if api.name in row.what)
    assert (row.status, row.remedy) == ("note", "")
    assert api.fallback in row.what


def test_an_api_without_a_fallback_may_not(monkeypatch):
    monkeypatch.setattr(_torch, "PRIVATE_APIS", (_torch.PrivateApi("torch._C._nope", "x"),))
    count, row = diagnosis._private_apis()
    assert count.what.startswith("0 of 1 ")
    assert (row.status, "torch._C._nope, for x" in row.what) == ("problem", True)
    assert "install torch 2.11 to 2.13" in row.remedy


# --- Devices


def test_copies_are_measured(monkeypatch):
    monkeypatch.setattr(diagnosis, "_COPY_BYTES", 1_000_000)
    with SimulatedTransport(
        bandwidth_bytes_per_s=5e9,
        latency_s=0.0,
        fault=lambda direction, _: Fault("delay", 3e-4 if direction == "H2D" else 0.0),
    ) as transport:
        monkeypatch.setattr(diagnosis.time, "perf_counter", transport.now_s)
        row = only(diagnosis._copies())
    assert (row.name, row.status) == ("copies of the simulated device", "ok")
    assert row.what.startswith("D2H 5.0 GB/s, H2D 2.0 GB/s")
    assert transport.num_copies("D2H") == transport.num_copies("H2D") == 9


def test_where_nothing_can_be_pinned_that_is_a_problem():
    with SimulatedTransport(host_bytes=0):
        row = only(diagnosis._copies())
    assert (row.status, "no pinned memory is left" in row.what) == ("problem", True)
    assert "64.0 MiB" in row.remedy


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without one")
def test_without_an_accelerator_there_are_no_copies():
    assert list(diagnosis._copies()) == []
    assert rows(diagnosis._devices) == [("host", "ok"), ("accelerator", "note")]


@pytest.mark.parametrize(("load", "is_busy"), [(5.9, False), (6.1, True)])
def test_a_machine_that_is_busy(monkeypatch, load, is_busy):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    found = [row for row in diagnosis._devices() if row.name == "host"]
    assert [row.status for row in found] == ["ok", "note"][: 1 + is_busy]
    assert found[-1].what.startswith("6.1 processes want to run on 4 cores") is is_busy


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_each_accelerator_is_named_and_measured():
    num = torch.accelerator.device_count()
    names = [name for name, _ in rows(diagnosis._devices)]
    assert len([name for name in names if name.startswith("device ")]) == num
    found = list(diagnosis._copies())
    assert [row.status for row in found] == ["ok"] * num
    for row in found:
        rates = [float(rate) for rate in re.findall(r"([\d.]+) GB/s", row.what)]
        assert len(rates) == 2
        assert all(0.1 < rate < 1000 for rate in rates)


def test_the_limit_of_pinned_memory_is_the_knobs(monkeypatch):
    monkeypatch.setattr(diagnosis, "available_host_bytes", lambda: 100 * 1024**3)
    with _knobs.override(OFFLOAD_PINNED_PERCENT=10):
        assert "at most 10.0 GiB of the 100.0 GiB" in only(diagnosis._pinned_memory()).what
    with _knobs.override(OFFLOAD_PINNED_BYTES=1024**3):
        assert "at most 1.0 GiB of the 100.0 GiB" in only(diagnosis._pinned_memory()).what


def test_calibration_stored_missing_and_damaged():
    row = only(diagnosis._calibration())
    assert (row.status, row.remedy) == ("note", "run wrappers.calibrate() once")
    path = hardware.save(hardware.PRESETS["CPU"])
    row = only(diagnosis._calibration())
    assert (row.status, row.what) == ("ok", f"stored in {path}")
    path.write_text("{")
    row = only(diagnosis._calibration())
    assert (row.status, row.remedy) == ("problem", "run wrappers.calibrate() once")
    assert str(path) in row.what


# --- What is installed and set


def test_extras_are_those_of_the_package():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = parser["options.extras_require"]
    declared = {
        extra: tuple(re.split(r"[<>=!~]", line)[0] for line in extras[extra].split())
        for extra in extras
        if extra != "dev"
    }
    assert {extra: packages for extra, (packages, _) in EXTRAS.items()} == declared


def test_an_extra_that_is_missing_says_how_to_get_it(monkeypatch):
    real = importlib.metadata.version

    def version(package):
        if package == "scipy":
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {row.name: row for row in diagnosis._extras()}
    assert found["extra plan"].status == "note"
    assert "pip install 'activation-wrappers[plan]'" in found["extra plan"].remedy
    assert found["extra cli"].status == "ok"
    assert f"rich {real('rich')}" in found["extra cli"].what


@pytest.mark.parametrize(
    ("settings", "statuses"),
    [
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, ["ok"]),
        ({"PYTORCH_ALLOC_CONF": "a:1", "PYTORCH_CUDA_ALLOC_CONF": "a:1"}, ["ok", "ok"]),
        ({"PYTORCH_ALLOC_CONF": "a:1", "PYTORCH_CUDA_ALLOC_CONF": "a:2"}, ["problem", "ok", "ok"]),
        ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTORCH_ALLOC_CONF": "a:1"}, ["problem", "ok"]),
    ],
)
def test_settings_of_the_allocator(monkeypatch, settings, statuses):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert rows(diagnosis._allocator) == [("allocator", status) for status in statuses]


def test_settings_of_the_compiler(monkeypatch):
    assert rows(diagnosis._compiler) == []
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        row = only(diagnosis._compiler())
        assert (row.status, "activation_memory_budget is 0.5" in row.what) == ("problem", True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/cache")
    assert rows(diagnosis._compiler) == [("compile cache", "note")]
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    assert rows(diagnosis._compiler) == []


SWITCHES = {
    "early_stop": lambda: set_checkpoint_early_stop(False),
    "debug": lambda: set_checkpoint_debug_enabled(True),
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=False),
    "saved-tensor hooks": torch.autograd.graph.save_on_cpu,
    "gradients are off": torch.no_grad,
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_what_reaches_into_every_region(no_leaks, switch):
    assert rows(diagnosis._switches) == [("switches", "ok")]
    with SWITCHES[switch]():
        row = only(diagnosis._switches())
    assert (row.status, switch in row.what, bool(row.remedy)) == ("note", True, True)


# --- Models


def of_model(model: nn.Module) -> dict[str, Finding]:
    """What is found in a model, the rows that are fine left out."""
    found = [row for look in diagnosis._MODEL for row in look(model)]
    return {row.name: row for row in found if row.status != "ok"}


def test_a_plain_and_a_wrapped_model_are_fine():
    model = Model()
    assert of_model(model) == {}
    assert doctor(model)["blocks"].what == (
        "what repeats: 3 modules of class Block, the first is `blocks.0`"
    )
    assert doctor(model)["regions"].what == "nothing is checkpointed by wrappers"
    apply_activation_checkpointing(model, check_fn=by_class(Block), policy=save_matmuls())
    assert of_model(model) == {}
    assert doctor(model)["regions"].what == "checkpointed: 3 REPLAY"


def test_a_model_without_blocks():
    row = of_model(nn.Linear(2, 2))["blocks"]
    assert (row.status, "nothing repeats in this Linear" in row.what) == ("note", True)
    assert row.remedy == (
        "say which modules are its blocks, such as wrappers.select.by_class(Block)"
    )


def with_block(make) -> nn.Module:
    model = Model()
    model.blocks[1] = make(model.blocks[1])
    return model


def in_place_and_wrapped(block: nn.Module) -> nn.Module:
    return CheckpointWrapper(checkpoint_wrapper(block, inplace=True))


TWICE = {
    "ours": lambda block: CheckpointWrapper(CheckpointWrapper(block)),
    "in place": in_place_and_wrapped,
    "torch's inside": lambda block: CheckpointWrapper(theirs.checkpoint_wrapper(block)),
    "offloading": lambda block: OffloadWrapper(OffloadWrapper(block)),
}


@pytest.mark.parametrize("case", TWICE)
def test_a_module_that_is_wrapped_twice(case):
    row = of_model(with_block(TWICE[case]))["wrapped twice"]
    assert (row.status, row.what.split(":")[0]) == ("problem", "`blocks.1`")
    assert "remove_activation_checkpointing" in row.remedy


def test_checkpointing_and_offloading_are_not_the_same_thing_twice():
    assert of_model(with_block(lambda b: OffloadWrapper(CheckpointWrapper(b)))) == {}


def test_a_region_in_a_region():
    model = with_block(CheckpointWrapper)
    model.blocks[1].fc = CheckpointWrapper(model.blocks[1].fc)
    row = of_model(model)["region in a region"]
    assert (row.status, row.what.split(":")[0]) == ("note", "`blocks.1.fc`")


@pytest.mark.parametrize("wrap", [theirs.checkpoint_wrapper, theirs.offload_wrapper])
def test_torchs_own_wrappers(wrap):
    model = Model()
    model.blocks = nn.ModuleList(map(wrap, model.blocks))
    row = of_model(model)["torch's wrappers"]
    assert (row.status, row.what.split(":")[0]) == ("problem", "`blocks.0` and 2 more")


def test_transformers_own_checkpointing():
    model = Model()
    model.gradient_checkpointing = True
    row = of_model(model)["transformers"]
    assert (row.status, row.what.split(":")[0]) == ("problem", "the root")
    assert "gradient_checkpointing_disable()" in row.remedy


@pytest.mark.parametrize(("is_wrapped", "use_cache"), [(1, 1), (0, 1), (1, 0)])
def test_a_cache_of_keys_and_values_in_a_wrapped_model(is_wrapped, use_cache):
    model = with_block(CheckpointWrapper) if is_wrapped else Model()
    model.gradient_checkpointing_enable = lambda: None
    model.config = type("Config", (), {"use_cache": bool(use_cache)})()
    found = of_model(model)
    assert list(found) == (["transformers"] if is_wrapped and use_cache else [])
    if found:
        assert found["transformers"].remedy == "model.config.use_cache = False"


def test_compiled_modules():
    model = Model()
    model.blocks[0].compile(backend="eager")
    model.blocks[2] = torch.compile(model.blocks[2], backend="eager")
    row = of_model(model)["torch.compile"]
    assert (row.status, row.what.split(":")[0]) == ("note", "`blocks.0` and 1 more")


def test_regions_that_are_not_replayed_and_reentrant_ones():
    model = Model()
    model.blocks[0] = CheckpointWrapper(model.blocks[0], policy=save_matmuls())
    model.blocks[1] = CheckpointWrapper(model.blocks[1], impl=CheckpointImpl.REENTRANT)
    experience = model.blocks[0]._checkpoint_region.experience
    experience.fallen_at, experience.reason = 0, "a raw kernel"
    found = list(diagnosis._regions(model))
    assert [row.status for row in found] == ["ok", "note", "note"]
    assert found[0].what == "checkpointed: 1 NO_REENTRANT, 1 REENTRANT"
    assert found[1].what == "`blocks.0`: not replayed but rerun: a raw kernel"
    assert found[2].what.startswith("`blocks.1`: REENTRANT")


def test_modules_that_are_sharded_inside_of_a_region(monkeypatch):
    class Sharded(Block):
        pass

    model = with_block(CheckpointWrapper)
    model.blocks[0] = Sharded()
    monkeypatch.setattr(_torch, "fsdp_types", lambda: (Sharded,))
    assert of_model(model) == {}
    model.blocks[1].fc = Sharded()
    row = of_model(model)["FSDP"]
    assert (row.status, row.what.split(":")[0]) == ("note", "`blocks.1.fc`")


def test_the_model_stays_as_it_is():
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    random_state = torch.get_rng_state()
    doctor(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
