"""How much memory a plan may use: what the user writes, in bytes.

A budget is written as bytes, with a unit, or as a share of what the device has:

    12_884_901_888    "12GiB"    "12.5 GB"    "800 MiB"    "90%"    "0.9"    0.9

Units with an ``i`` are powers of 1024, those without are powers of 1000. What can be read in two
ways is refused: "12G", or 12.5 without a unit.

Not all of a budget can be planned with: an allocator that takes memory in pieces loses some of it
between them. See ``MARGIN_PERCENT``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import torch

from wrappers import _device
from wrappers.offload import pool

__all__ = ["MARGIN_PERCENT", "budget_bytes", "capacity_bytes", "smallest_budget"]

#: What an allocator that rounds sizes up and keeps freed blocks may lose, as a share of the budget.
MARGIN_PERCENT = 2.0

#: No budget is larger.
_MOST_BYTES = 2**62

_FORMS = (
    "bytes as an int, a string with a unit (B, kB, MB, GB, TB, KiB, MiB, GiB, TiB) such as "
    '"12GiB", or a share of the device\'s memory such as "90%" or 0.9'
)

_UNITS = {"b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[f"{_letter}b"] = 1000**_power
    _UNITS[f"{_letter}ib"] = 1024**_power

_NUMBER = re.compile(r"\s*(?P<number>\d[\d_]*(?:\.\d*)?|\.\d+)\s*(?P<unit>[a-zA-Z]*|%)\s*")


def budget_bytes(value: int | float | str, *, capacity_bytes: int | None) -> int:
    """Read a budget.

    Args:
        value: Bytes, a string with a unit, or a share of ``capacity_bytes``: a string with a
            percent sign, or a fraction up to 1 that has a decimal point.
        capacity_bytes: What the device has; None if nobody knows.

    Returns:
        The budget in bytes, rounded down.

    Raises:
        ValueError: It cannot be read, is not positive, is a share of more than the whole, or a
            share of a capacity that is not known.
        TypeError: It is neither a number nor a string.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"a memory budget is {_FORMS}; got {type(value).__name__}")
    if isinstance(value, int):
        return _positive(value, value)
    if isinstance(value, float):
        if value > 1 and value.is_integer():
            return int(value)
        if 0 < value <= 1:
            return _share(value, value, capacity_bytes)
        raise ValueError(f"memory budget {value!r} is neither a share nor whole bytes: {_FORMS}")
    match = _NUMBER.fullmatch(value)
    if match is None:
        raise ValueError(f"memory budget {value!r} cannot be read: it is {_FORMS}")
    number, unit = float(match["number"]), match["unit"].lower()
    if unit == "%":
        return _share(number / 100, value, capacity_bytes)
    if unit in _UNITS:
        return _positive(int(number * _UNITS[unit]), value)
    if unit in ("k", "m", "g", "t", "ki", "mi", "gi", "ti"):
        letter = unit[0].upper()
        raise ValueError(
            f"memory budget {value!r} can mean two things: write {letter}iB for powers of 1024, "
            f"{'k' if letter == 'K' else letter}B for powers of 1000"
        )
    if unit:
        raise ValueError(
            f"memory budget {value!r} has the unknown unit {match['unit']!r}: {_FORMS}"
        )
    if "." not in match["number"]:
        return _positive(int(match["number"]), value)
    if number <= 1:
        return _share(number, value, capacity_bytes)
    raise ValueError(f"memory budget {value!r} needs a unit: it is {_FORMS}")


def _positive(num_bytes: int, value: object) -> int:
    if num_bytes < 1:
        raise ValueError(f"a memory budget is at least one byte, got {value!r}")
    return num_bytes


def _share(share: float, value: object, capacity_bytes: int | None) -> int:
    if not 0 < share <= 1:
        raise ValueError(f"memory budget {value!r} is not between nothing and all of the device")
    if capacity_bytes is None:
        raise ValueError(
            f"memory budget {value!r} is a share of a device whose memory is not known: give the "
            'budget in bytes, such as "12GiB", or a Hardware with memory_bytes'
        )
    return _positive(int(share * capacity_bytes), value)


def capacity_bytes(device: torch.device | None = None) -> int | None:
    """How much memory a device has, in use or not.

    Args:
        device: The default is the accelerator, or the CPU where there is none.

    Returns:
        Bytes: an accelerator's own memory; for a CPU the machine's, or less where the process's
        cgroup has a limit. None if the device does not say.
    """
    device = _device.default_device() if device is None else device
    if _device.is_host_type(device):
        return _host_bytes()
    return _device.own_memory_bytes(device)


def _host_bytes() -> int:
    total = int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))
    for folder in pool.cgroups():
        for name in ("memory.max", "memory.limit_in_bytes"):  # versions 2 and 1
            limit = pool.read_int(folder / name)
            if limit is not None:
                total = min(total, limit)
    return total


def smallest_budget(num_bytes: int, margin_of: Callable[[int], int]) -> int:
    """The smallest budget of which so many bytes are left without its margin, exactly.

    Args:
        num_bytes: What has to fit.
        margin_of: The margin of a budget; a larger budget leaves no fewer bytes than a smaller one.

    Raises:
        ValueError: Margins are so large that no budget leaves as many.
    """
    low = high = max(1, num_bytes)
    while high - margin_of(high) < num_bytes:
        low, high = high, 2 * high
        if high > _MOST_BYTES:
            raise ValueError("the margin leaves nothing of a budget: give a smaller one")
    while low < high:
        middle = (low + high) // 2
        if middle - margin_of(middle) < num_bytes:
            low = middle + 1
        else:
            high = middle
    return high
