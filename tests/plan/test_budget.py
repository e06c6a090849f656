"""A budget as the user writes it, and what a device has."""

from __future__ import annotations

import re

import pytest
import torch

from wrappers.offload import pool
from wrappers.plan import budget
from wrappers.plan.budget import budget_bytes, capacity_bytes

GIB = 1024**3


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (12 * GIB, 12 * GIB),
        (1, 1),
        (12e9, 12_000_000_000),
        ("12GiB", 12 * GIB),
        (" 12 gib ", 12 * GIB),
        ("12.5 GB", 12_500_000_000),
        ("800MiB", 800 * 1024**2),
        ("1.5kB", 1500),
        (".5KiB", 512),
        ("2TiB", 2048 * GIB),
        ("7 B", 7),
        ("1_000_000", 1_000_000),
        ("90%", 900),
        ("12.5%", 125),
        ("100%", 1000),
        ("0.9", 900),
        ("1.0", 1000),
        (0.25, 250),
        (1.0, 1000),
    ],
)
def test_forms(value, expected):
    assert budget_bytes(value, capacity_bytes=1000) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("12G", "write GiB for powers of 1024, GB for powers of 1000"),
        ("3k", "write KiB for powers of 1024, kB for powers of 1000"),
        ("12 parsecs", "unknown unit"),
        ("12.5", "needs a unit"),
        (12.5, "neither a share nor whole bytes"),
        (float("nan"), "neither a share nor whole bytes"),
        (float("inf"), "neither a share nor whole bytes"),
        (0.0, "neither a share nor whole bytes"),
        (-0.5, "neither a share nor whole bytes"),
        ("", "cannot be read"),
        ("-1GiB", "cannot be read"),
        ("a lot", "cannot be read"),
        (0, "at least one byte"),
        (-5, "at least one byte"),
        ("0GiB", "at least one byte"),
        ("0.0001%", "at least one byte"),
        ("120%", "not between nothing and all"),
        ("0%", "not between nothing and all"),
    ],
)
def test_what_cannot_be_read_is_named(value, text):
    with pytest.raises(ValueError, match=text) as caught:
        budget_bytes(value, capacity_bytes=1000)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [True, None, [1], b"1GiB"])
def test_neither_number_nor_string(value):
    with pytest.raises(TypeError, match=f"got {type(value).__name__}"):
        budget_bytes(value, capacity_bytes=1000)


@pytest.mark.parametrize("value", ["90%", "0.5", 0.5])
def test_a_share_of_nobody_knows_what(value):
    with pytest.raises(ValueError, match=r'give the budget in bytes, such as "12GiB"') as caught:
        budget_bytes(value, capacity_bytes=None)
    assert repr(value) in str(caught.value)


def test_bytes_need_no_capacity():
    assert budget_bytes("1GiB", capacity_bytes=None) == GIB


def test_errors_list_the_forms():
    with pytest.raises(ValueError, match=re.escape('"12GiB"')):
        budget_bytes("much", capacity_bytes=None)


# --- Devices


def test_the_hosts_memory_is_the_machines(monkeypatch):
    monkeypatch.setattr(pool, "cgroups", list)
    total = capacity_bytes(torch.device("cpu"))
    with open("/proc/meminfo") as file:
        kib = next(int(line.split()[1]) for line in file if line.startswith("MemTotal:"))
    assert total == pytest.approx(kib * 1024, rel=0.01)


@pytest.mark.parametrize("name", ["memory.max", "memory.limit_in_bytes"])
def test_a_cgroups_limit_counts(monkeypatch, tmp_path, name):
    (tmp_path / "outer").mkdir()
    (tmp_path / name).write_text("1000000\n")
    (tmp_path / "outer" / name).write_text("max\n")
    monkeypatch.setattr(pool, "cgroups", lambda: [tmp_path / "outer", tmp_path])
    assert capacity_bytes(torch.device("cpu")) == 1_000_000


@pytest.mark.skipif(torch.accelerator.is_available(), reason="asks for the default device")
def test_the_default_device_is_the_host_without_an_accelerator():
    assert capacity_bytes() == capacity_bytes(torch.device("cpu"))


def test_a_device_that_is_not_there_has_no_known_memory():
    kind = "xpu" if not torch.xpu.is_available() else "mps"
    assert capacity_bytes(torch.device(kind)) is None


@pytest.mark.parametrize("needed", [1, 49, 50, 1_449_192, 10**12 + 7])
def test_the_smallest_budget_leaves_what_is_needed_and_one_byte_less_does_not(needed):
    def margin_of(size: int) -> int:
        return int(size * 2 / 100)

    smallest = budget.smallest_budget(needed, margin_of)
    assert smallest - margin_of(smallest) >= needed
    assert smallest == 1 or smallest - 1 - margin_of(smallest - 1) < needed
    assert budget.smallest_budget(needed, lambda size: 7) == needed + 7


def test_a_margin_of_everything_leaves_no_budget():
    with pytest.raises(ValueError, match="the margin leaves nothing"):
        budget.smallest_budget(5, lambda size: size)
